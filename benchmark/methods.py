"""What a user would pick instead: ours, its rloo and grpo patches, TRL 1.12.0's trainers and best-of-n.

    python benchmark/make_world.py --output_dir runs/rotation1 --rotation 1
    python benchmark/methods.py --tune --world runs/rotation1 --trl_python trl_env/bin/python
    python benchmark/methods.py --trl_python trl_env/bin/python --seeds 1 2 3 4 5
    python benchmark/methods.py --world runs/second_world --trl_python trl_env/bin/python

All start from the same SFT and reward models, and are judged by the same code with the same random numbers.
--tune runs a method's GRID (three learning rates, then half the KL coefficient; one seed), in a world whose
held-out prompts are not those of the shipped task. CHOSEN is set by hand: each method's gold score there is
the best, or within the noise of it. So TRL's PPO, RLOO and GRPO have the settings of ours: a check of both,
as they should end alike.

Made equal: 3,072 sampled responses (DPO: one pass over the reward model's pairs, in whole updates), 128
an update, 2 passes of 8 minibatches (DPO: one of 8), temperature 0.7, at most 64 tokens, the penalty
without EOS, warm-up and linear decay, Adam with eps 1e-5, clip range 0.2, gradient norm 1, no dropout, fp32,
4 (RLOO) or 8 (GRPO) responses to a prompt; KL by k1 in the reward (PPO, RLOO), by k3 in the loss (GRPO).
Scores are normalized by the first rollout, which samples the SFT model. For TRL's PPO the scale is put into
the reward model's head (trl_ppo.py), from SFT responses to the held-out prompts.

Left as TRL does it: PPO's critic starts as the reward model with its head (ours: its backbone, the head at
zero); the score falls one slot after the last token, where a value is learned too, unless the response
fills the last slot; old log-probs are the sampler's; its gradients are not clipped; each pass leaves out
the prompts that fill no batch. RLOO's ratio, and its clip, are those of a whole response (ours: of each
token), and its gradient is larger by a response's length, so that the limit on its norm cuts it: the two
point the same way until the policy has moved, and need not lie on one curve. Both passes have the same
minibatches; generate stops at the tokenizer's EOS alone; DPO's log-probs are at temperature 1. TRL's RLOO
and GRPO number the left padding too: harmless with rotary positions, as here, wrong with learned ones
(GPT-2).

Best-of-n trains nothing: its "sampled responses" and seconds are what the held-out prompts cost each time
that they are answered, and its KL is the bound log n - (n - 1) / n. Other seconds are a run's, start-up
included (TRL's imports, DPO's tokenization: some 10 to 20 s), spread evenly over its updates.

Runs are kept in --work_dir; another budget, or changed code, wants another.
"""

import json
import math
import shutil
import subprocess
import time
from dataclasses import asdict
from pathlib import Path

import common
import matplotlib
import torch
from tqdm import tqdm

matplotlib.use("Agg")  # files only, no window
import matplotlib.pyplot as plt  # noqa: E402

import ppo_rlhf  # noqa: E402

OURS = {"PPO": (), "RLOO": ("forks/rloo",), "GRPO": ("forks/grpo",)}  # name: patches
TRL = {  # name: flags of trl_method.py; TRL's PPO has trl_ppo.py
    "TRL RLOO": ("--method", "rloo"),
    "TRL GRPO": ("--method", "grpo"),
    "TRL DPO": ("--method", "dpo"),
}
# name: (learning rate, KL coefficient); DPO's coefficient is of another kind than the others'
CHOSEN = {**dict.fromkeys([*OURS, "TRL PPO", *TRL], (1.5e-4, 0.1)), "TRL DPO": (1.5e-4, 0.2)}
METHODS = [*CHOSEN, "best-of-n"]
GRID = {  # what --tune runs
    name: [(7.5e-5, beta), (1.5e-4, beta), (4e-4, beta), (1.5e-4, beta / 2)]
    for name, (_, beta) in CHOSEN.items()
}
BEST_OF = [4, 16]
LEVELS = [1, 2, 3, 4]  # nats a response, where gold scores are compared
BECOME = "import os, sys; os.execv(sys.argv[1], sys.argv[1:])"  # turns run_once's Python into TRL's


def twin(name):
    """Ours of a TRL trainer's name: "TRL RLOO" -> "RLOO"."""
    return name.removeprefix("TRL ")


def job(args, setting):
    """(folder, command) of one run; setting: (name, learning rate, KL coefficient, seed)."""
    name, learning_rate, beta, seed = setting
    slug = name.lower().replace(", ", "_").replace(" ", "_")
    folder = args.work_dir / f"{slug}_lr_{learning_rate:g}_beta_{beta:g}_seed{seed}"
    base = args.base_dir / f"seed{seed}"
    flags = {"learning_rate": learning_rate, "beta": beta, "save_steps": args.save_steps}
    flags["total_episodes"] = args.total_episodes
    if name == "TRL PPO":
        paths = {"sft_model_path": str(base / "sft"), "reward_model_path": str(base / "reward_model")}
        settings = asdict(ppo_rlhf.Args(**paths, output_dir=str(folder), seed=seed, **flags))
        if not (folder / "args.json").exists():
            models = common.load(base)
            settings |= {"score_mean": models.mean, "score_std": models.std}
            settings |= {"device": "cpu", "contender": "trl"}
            folder.mkdir(parents=True)
            (folder / "args.json").write_text(json.dumps(settings, indent=2))
        return folder, ["-c", BECOME, args.trl_python, common.ROOT / "benchmark/trl_ppo.py", folder]
    if name in OURS:
        script = args.work_dir / f"{slug}_script/ppo_rlhf.py"
        if not script.exists():
            common.make_copy(script.parent, OURS[name])
        return common.ppo_job(folder, base, seed, script=script, **flags)
    flags |= {"base_dir": base, "output_dir": folder, "seed": seed}
    words = [word for key, value in flags.items() for word in (f"--{key}", value)]
    script = common.ROOT / "benchmark/trl_method.py"
    return folder, ["-c", BECOME, args.trl_python, script, *TRL[name], *words]


def best_of_n(models, texts):
    """Rows of means, one for each n of BEST_OF: of all sets of n responses to a prompt, from the largest n's
    responses, the one that the reward model likes best."""
    sft = common.respond(models.reference, models, texts, seed=0)
    found = []
    start = time.time()
    sets = [common.respond(models.reference, models, texts, seed) for seed in range(1, max(BEST_OF) + 1)]
    seconds = (time.time() - start) / len(sets)
    for n in BEST_OF:
        groups = [sets[i : i + n] for i in range(0, len(sets) - n + 1, n)]
        best = [[max(rows, key=lambda row: row["score"]) for rows in zip(*group)] for group in groups]
        row = {"n": n, "episodes": n * len(texts), "seconds": n * seconds}
        row |= common.average(sum(best, [])) | {"kl": math.log(n) - (n - 1) / n}
        row["win_rate"] = common.mean(common.win_rate(rows, sft) for rows in best)
        found.append(row)
    return found


def along(args, folder, models, texts, seed):
    """Rows of means for the SFT model and each checkpoint of a run, with its seconds until then."""
    rows = common.along(folder, models, texts, args.samples, seed)
    seconds = float((folder / "wall_seconds").read_text())
    return [{**row, "seconds": seconds * row["update"] / rows[-1]["update"]} for row in rows]


def run_and_judge(args, name, settings):
    """{setting: rows} of all `settings`, run where they have not been."""
    jobs = [job(args, setting) for setting in settings]
    common.run_all(jobs, args.parallel, name, keep=True)
    texts = common.held_out(args.limit)
    models = {}
    found = {}
    for setting, (folder, _) in zip(tqdm(settings, desc=f"{name}, judged"), jobs):
        seed = setting[-1]
        path = folder / f"judged_{len(texts)}x{args.samples}.jsonl"
        if seed not in models and not path.exists():
            models[seed] = common.load(args.base_dir / f"seed{seed}")
        found[setting] = common.cached(path, along, args, folder, models.get(seed), texts, seed)
    return found


def first_at(rows, x, level, y):
    """y where x first comes to `level`, between two checkpoints; None if it never does."""
    for before, after in zip(rows, rows[1:]):
        if before[x] < level <= after[x]:
            share = (level - before[x]) / (after[x] - before[x])
            return before[y] + share * (after[y] - before[y])


def print_tables(args, runs):
    """runs: {name: {seed: rows}}. Differences are to the first method."""
    table, paths = [], []
    target = 0.825 * common.gold_judge.BEST  # 3.3 on the shipped task
    first = next(iter(runs.values()))
    for name, seeds in runs.items():
        last = {seed: rows[-1] for seed, rows in seeds.items()}
        cells = [name, len(last), common.spread(row["gold"] for row in last.values())]
        for key in ("gold", "kl"):
            differences = [row[key] - first[seed][-1][key] for seed, row in last.items()]
            cells.append("" if seeds is first else common.interval(differences))
        columns = {"kl": ".1f", "score": ".2f", "length": ".1f", "garbled": ".2f", "seconds": ".0f"}
        cells += [f"{common.mean(row[key] for row in last.values()):{form}}" for key, form in columns.items()]
        cells.append(common.interval([100 * row["win_rate"] for row in last.values()], ".0f"))
        table.append([*cells, f"{common.mean(row['episodes'] for row in last.values()):,.0f}"])
        asked = [("episodes", share * args.total_episodes, "gold") for share in (0.25, 0.5, 0.75)]
        asked += [("kl", level, "gold") for level in LEVELS] + [("gold", target, "seconds")]
        cells = [name]
        for x, level, y in asked:
            values = [value for rows in seeds.values() if (value := first_at(rows, x, level, y)) is not None]
            form = ".2f" if y == "gold" else ".0f"
            cells.append(f"{common.mean(values):{form}} ({len(values)})" if values else "")
        paths += [cells] if any(cells[1:]) else []
    titles = [
        "",
        "seeds",
        "gold score",
        "difference, 95% interval",
        "difference in KL",
        "KL, nats",
        "RM score",
    ]
    titles += ["tokens", "garbled a response", "s", "gold win rate, %", "responses or pairs"]
    common.print_table(titles, table)
    print("\nOn the way, interpolated between checkpoints (seeds that come there):\n")
    titles = [f"gold at {share * args.total_episodes:,.0f}" for share in (0.25, 0.5, 0.75)]
    titles += [f"at {level} nats" for level in LEVELS]
    common.print_table(["", *titles, f"s to gold {target:g}"], paths)


def draw(runs, path):
    """Gold score against KL and against sampled responses: a line a method, the mean of its seeds."""
    plt.rcParams.update({"font.size": 9.5, "axes.spines.top": False, "axes.spines.right": False})
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.4), sharey=True, layout="constrained")
    trained = [name for name in runs if not name.startswith("best of")]
    families = list(dict.fromkeys(map(twin, trained)))
    labels = {"kl": "KL (nats a response)", "episodes": "sampled responses (DPO: pairs)"}
    for axis, (key, label) in zip(axes, labels.items()):
        for name in trained:
            points = list(zip(*runs[name].values()))  # checkpoints, each with the rows of all seeds
            line = [[common.mean(row[y] for row in rows) for rows in points] for y in (key, "gold")]
            colour = f"C{families.index(twin(name))}"
            style = {"linestyle": "--", "marker": "s"} if name.startswith("TRL") else {"marker": "o"}
            axis.plot(*line, color=colour, markersize=4, linewidth=1.6, label=name, **style)
        axis.set_xlabel(label)
        axis.grid(alpha=0.25, linewidth=0.6)
    best = [list(seeds.values()) for name, seeds in runs.items() if name not in trained]
    if best:
        line = [[common.mean(row[y] for (row,) in seeds) for seeds in best] for y in ("kl", "gold")]
        label = f"best-of-n: {', '.join(map(str, BEST_OF))}"
        axes[0].plot(*line, color="black", marker="|", markersize=9, label=label)
    axes[0].set_ylabel("gold score")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper left", ncols=4, frameon=False)
    figure.savefig(path, dpi=105)
    plt.close(figure)


def tune(args, names):
    """Run the grid of each method -> rows of all; prints the best setting of each by the gold score."""
    seed = args.seeds[0]
    grid = [(name, rate, beta, seed) for name in names for rate, beta in GRID[name]]
    runs = run_and_judge(args, "grid", grid)
    table = []
    for name in names:
        own = {setting: rows[-1] for setting, rows in runs.items() if setting[0] == name}
        best = max(own, key=lambda setting: own[setting]["gold"])
        for setting, row in own.items():
            mark = "best" if setting == best else ""
            cells = [f"{row[key]:{form}}" for key, form in (("gold", ".2f"), ("kl", ".1f"), ("score", ".2f"))]
            table.append([name, f"{setting[1]:g}", f"{setting[2]:g}", *cells, mark])
    common.print_table(["", "learning rate", "beta", "gold score", "KL, nats", "RM score", ""], table)
    return runs


def main():
    parser = common.parser(__doc__)
    add = parser.add_argument
    add("--trl_python", required=True, help="Python of an environment with TRL (benchmark/requirements.txt)")
    add("--methods", nargs="+", choices=METHODS, default=METHODS)
    add("--tune", action="store_true", help="run the grids, at the first seed; not on the shipped task")
    add("--total_episodes", type=int, default=ppo_rlhf.Args.total_episodes)
    add("--save_steps", type=int, default=4, help="updates between two checkpoints, all of which are judged")
    add("--samples", type=int, default=4, help="responses judged to each held-out prompt")
    add("--work_dir", type=lambda x: Path(x).resolve(), default=common.WORLD / "runs/methods")
    args = parser.parse_args()
    if args.tune and common.SHIPPED:
        parser.error("--tune: on the shipped task it would choose on the judged prompts; see --world")
    found = shutil.which(args.trl_python)
    if (
        not found
        or subprocess.run([found, "-c", "import trl.experimental.ppo"], capture_output=True).returncode
    ):
        parser.error(f"--trl_python {args.trl_python}: cannot import trl.experimental.ppo")
    args.trl_python = Path(found).absolute()  # the runs start in the world's folder
    torch.set_num_threads(1)  # and one for each run, as run_all shares out these
    seeds = args.seeds[:1] if args.tune else args.seeds
    common.baselines(args.base_dir, seeds, args.parallel)
    names = [name for name in args.methods if name in CHOSEN]
    output = args.output_dir / f"methods{'_tune' if args.tune else ''}.jsonl"
    if args.tune:
        runs = tune(args, names)
    else:  # by seed, so that a stopped run has complete ones
        settings = [(name, *CHOSEN[name], seed) for seed in seeds for name in names]
        runs = run_and_judge(args, "runs", settings)
    rows = []
    for (name, rate, beta, seed), path in runs.items():
        what = {"method": name, "learning_rate": rate, "beta": beta, "seed": seed}
        rows += [{**what, **row} for row in path]
    if "best-of-n" in args.methods and not args.tune:
        texts = common.held_out(args.limit)
        for seed in seeds:
            path = args.work_dir / f"best_of_{max(BEST_OF)}_seed{seed}_judged_{len(texts)}.jsonl"
            models = None if path.exists() else common.load(args.base_dir / f"seed{seed}")
            found = common.cached(path, best_of_n, models, texts)
            rows += [{"method": f"best of {row['n']}", "seed": seed, **row} for row in found]
    common.write_jsonl(output, rows)
    if not args.tune:
        grouped = {}
        for row in rows:
            grouped.setdefault(row["method"], {}).setdefault(row["seed"], []).append(row)
        print_tables(args, grouped)
        draw(grouped, output.with_suffix(".png"))


if __name__ == "__main__":
    main()
