"""Learning curves of PPO runs, one small panel for each quantity, over the episodes.

    python benchmark/curves.py runs/ppo                                    # -> benchmark/results/curves.png
    python benchmark/curves.py runs/beta_0.1 runs/beta_1.0 --output betas.png

Each RUN is a folder that ppo_rlhf.py wrote, finished or still running; metrics.jsonl is all that is read. A quantity that a
run did not log is left out. Exit status 2 and one line if a folder has nothing to draw. Needs benchmark/requirements.txt.
"""

import argparse
import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # files only, no window
import matplotlib.pyplot as plt

PANELS = {  # key in metrics.jsonl: title with unit
    "objective/scores": "score (score units)",
    "objective/kl": "KL (nats an answer)",
    "policy/entropy_avg": "entropy (nats a token)",
    "response_length": "response length (tokens)",
    "policy/clipfrac_avg": "clip fraction (of tokens)",
    "policy/approxkl_avg": "approxkl (nats a token)",
    "val/explained_variance": "explained variance",
    "loss/value_avg": "value loss (score units²)",
}
COLOURS = ["#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#CC79A7", "#000000"]  # Okabe and Ito's, without yellow
STYLES = ["-", "--", ":"]  # for more runs than colours


def fail(message):
    print(f"curves.py: error: {message}", file=sys.stderr)
    raise SystemExit(2)


def read(run):
    """Lines of metrics.jsonl -> {key: (episodes, values)} of the panels that the run can fill."""
    path = Path(run) / "metrics.jsonl"
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        fail(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error}); name a folder that ppo_rlhf.py wrote")
    curves = {key: [(row["episode"], row[key]) for row in rows if {"episode", key} <= row.keys()] for key in PANELS}
    curves = {key: tuple(zip(*points)) for key, points in curves.items() if points}
    if not curves:
        fail(f"{path}: {'no metrics of PPO in it' if rows else 'is empty'}; name a run of ppo_rlhf.py that has made an update")
    return curves


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run folder with metrics.jsonl")
    parser.add_argument("--output", type=Path, default=Path(__file__).resolve().parent / "results/curves.png")
    args = parser.parse_args()
    curves = [read(run) for run in args.runs]
    folders = [Path(run).resolve() for run in args.runs]
    unique = len({folder.name for folder in folders}) == len(folders)  # seed1/ppo and seed2/ppo need their parents' names
    labels = [folder.name if unique else f"{folder.parent.name}/{folder.name}" for folder in folders]

    panels = [key for key in PANELS if any(key in run for run in curves)]
    columns = min(4, len(panels))
    height = -(-len(panels) // columns)  # rows of panels, rounded up
    lines_of_legend = -(-len(labels) // 4)
    legend, across = 0.22 * lines_of_legend, -(-len(labels) // lines_of_legend)  # height in inches, labels in a line
    plt.rcParams.update({"font.size": 9, "axes.titlesize": 9.5, "axes.spines.top": False, "axes.spines.right": False})
    size = 2.35 * columns, 2.0 * height + legend + 0.1
    figure, axes = plt.subplots(height, columns, figsize=size, sharex=True, squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    for i, (axis, key) in enumerate(zip(axes.flat, panels)):
        for j, run in enumerate(curves):
            if key in run:
                axis.plot(*run[key], color=COLOURS[j % len(COLOURS)], linestyle=STYLES[j // len(COLOURS) % 3], linewidth=1.2,
                          marker="." if len(run[key][0]) == 1 else "")  # fmt: skip
        axis.set_title(PANELS[key], loc="left")
        axis.locator_params(nbins=4)
        axis.grid(alpha=0.25, linewidth=0.6)
        if i + columns >= len(panels):  # the lowest panel of its column
            axis.set_xlabel("episodes")
            axis.tick_params(labelbottom=True)
    lines = {label: plt.Line2D([], [], color=COLOURS[j % len(COLOURS)], linestyle=STYLES[j // len(COLOURS) % 3])
             for j, label in enumerate(labels)}  # fmt: skip
    order = [label for column in range(across) for label in labels[column::across]]  # a legend is filled column by column
    figure.legend([lines[label] for label in order], order, loc="upper left", ncols=across, frameon=False, borderaxespad=0.2)
    figure.tight_layout(rect=(0, 0, 1, 1 - (legend + 0.05) / figure.get_figheight()), w_pad=0.8)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.output, dpi=105, bbox_inches="tight", pad_inches=0.08)
    print(f"{args.output}: {len(panels)} panels of {len(labels)} run{'s' * (len(labels) > 1)}")


if __name__ == "__main__":
    main()
