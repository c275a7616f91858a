"""The curves of runs, from their metrics.jsonl: for whoever does not use Weights & Biases.

    python benchmark/curves.py runs/ppo [RUN ...]             # folders of any of the three stages
    python benchmark/curves.py runs/ppo --output curves.png   # default: curves.png in the first folder

One colour a run, and a panel for each metric that the runs have: README.md says what they mean.
"""

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # files only, no window
import matplotlib.pyplot as plt

PANELS = [  # the metrics of each; the second is dotted
    ["objective/scores"],
    ["objective/kl"],
    ["policy/clipfrac_avg", "policy/approxkl_avg"],
    ["policy/grad_norm"],
    ["val/explained_variance"],
    ["loss/value_avg"],
    ["val/eos_rate"],
    ["val/sampler_logprob_gap"],
    ["train/loss", "eval/loss"],
    ["train/accuracy", "eval/accuracy"],
    ["grad_norm"],
]
LOG_SCALE = ["policy/clipfrac_avg", "val/sampler_logprob_gap"]


def main():
    as_it_is = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_it_is)
    parser.add_argument("runs", metavar="RUN", type=Path, nargs="+", help="a folder with a metrics.jsonl")
    parser.add_argument("--output", type=Path, help="the picture")
    args = parser.parse_args()
    runs = {}  # folder: rows
    for folder in args.runs:
        text = (folder / "metrics.jsonl").read_text()
        runs[folder] = [json.loads(line) for line in text.splitlines()]
    logged = {name for rows in runs.values() for row in rows for name in row}
    panels = [panel for panel in PANELS if panel[0] in logged]
    columns = min(4, len(panels))
    lines = -(-len(panels) // columns)
    plt.rcParams.update({"font.size": 8.5, "axes.spines.top": False, "axes.spines.right": False})
    size = (3 * columns, 2.3 * lines)
    figure, axes = plt.subplots(lines, columns, figsize=size, squeeze=False, layout="constrained")
    for axis, panel in zip(axes.flat, panels):
        for i, (folder, rows) in enumerate(runs.items()):
            for name, style in zip(panel, ("-", "o:")):
                points = [(row.get("update", row.get("step")), row[name]) for row in rows if name in row]
                if points:
                    label = folder if style == "-" else None
                    width = 1.5 if len(points) < 200 else 0.4  # many steps: thin, or noise fills the panel
                    shape = {"color": f"C{i}", "linewidth": width, "markersize": 4}
                    axis.plot(*zip(*points), style, label=label, **shape)
        axis.set_title("; dots: ".join(panel), loc="left", fontsize=8.5)
        axis.set_xlabel("update" if "objective/kl" in logged else "step")
        if panel[0] in LOG_SCALE:
            axis.set_yscale("log", nonpositive="mask")
            axis.yaxis.set_minor_formatter("")
        else:
            axis.set_ylim(bottom=min(0, axis.get_ylim()[0]))
        axis.grid(alpha=0.25, linewidth=0.6)
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    if len(runs) > 1:
        figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper left", frameon=False)
    output = args.output or args.runs[0] / "curves.png"
    figure.savefig(output, dpi=105)
    print(output)


if __name__ == "__main__":
    main()
