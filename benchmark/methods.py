"""What a user would pick instead: PPO, RLOO, GRPO, DPO, SFT on the chosen sides, best-of-n; ours and TRL's.

    W2="--constants data/second_world.py"
    python data/make_world.py $W2 --output_dir runs/tuning --rotation 1
    python benchmark/methods.py --tune --world runs/tuning --trl_python trl_env/bin/python
    python data/make_world.py $W2 --output_dir runs/second_world --held_out_topics 6
    python benchmark/methods.py --world runs/second_world --trl_python trl_env/bin/python --seeds 1 2 3 4 5 \\
        --betas 0.05 0.1 0.2 0.4

All start from the same SFT and reward models of a seed, and are judged by the same code with the same random
numbers. --betas runs each method at several KL coefficients, which makes its frontier, gold score against KL;
DPO's, which is of another kind, is twice as large. --tune runs each at the same learning rates (one seed) in
a world whose held-out prompts are others; METHODS has the one that was best there, or within the noise of it.
--pairs N trains on N pairs of the SFT model's own responses, labelled for each seed (data/label.py).

Made equal: 3,072 sampled responses (DPO: the reward model's pairs, in whole updates), 128 an update, 2 passes
of 8 minibatches (DPO: 1), temperature 0.7, at most 64 tokens, the penalty without EOS, warm-up and linear
decay, Adam with eps 1e-5, clip range 0.2, gradient norm 1, no dropout, weights in fp32, 4 (RLOO) or 8 (GRPO)
responses to a prompt; KL by k1 in the reward (PPO, RLOO), by k3 in the loss (GRPO, unless its name says
otherwise). Scores are normalized by the SFT model's on the first rollout; for TRL's PPO that scale is put
into the reward model's head. "TRL GRPO" has the loss of forks/grpo.patch, so that it checks ours; "TRL GRPO,
its own loss" TRL's defaults: dapo, no KL penalty.

Left as TRL does it: PPO's critic starts as the reward model with its head (ours: its backbone, the head at
zero and with a learning rate of its own); the score falls one slot after the last token, where a value is
learned too, unless the response fills the last slot; old log-probs are the sampler's; its gradients are not
clipped; each pass leaves out the prompts that fill no batch. RLOO's ratio, and its clip, are those of a whole
response (ours: of each token), and its gradient is larger by a response's length, so that the limit on its
norm cuts it: the two point the same way until the policy has moved, and need not lie on one curve. Both
passes have the same minibatches; generate stops at the tokenizer's EOS alone; DPO's log-probs are at
temperature 1. TRL's RLOO and GRPO number the left padding too: harmless with rotary positions, as here, wrong
with learned ones (GPT-2).

Seconds are a run's, start-up included (TRL's imports, DPO's tokenization: some 10 to 20 s), spread evenly
over its updates; "with the reward model" adds its training, where a method needs one. Best-of-n trains
nothing: its responses and seconds are what the held-out prompts cost each time that they are answered, and
its KL is the bound log n - (n - 1) / n.

Runs are kept in --work_dir; another budget, or changed code, wants another.
"""

import math
import shutil
import subprocess
import time
from pathlib import Path
from typing import NamedTuple

import common
import matplotlib
import torch
from common import mean
from tqdm import tqdm

matplotlib.use("Agg")  # files only, no window
import matplotlib.pyplot as plt  # noqa: E402

import ppo_rlhf  # noqa: E402
import sft  # noqa: E402


class Method(NamedTuple):
    script: str = "ppo_rlhf.py"
    flags: str = ""
    patches: tuple = ()
    edit: tuple = ()  # what in the patched script is replaced, and by what
    learning_rate: float = 1.5e-4
    beta: float | None = 0.1  # None: it has no KL coefficient
    budget: float = 1.0  # as a multiple of --total_episodes
    reward_model: bool = True  # it needs one


GROUPS = "--no-separate_critic --vf_coef 0 --num_generations"
DPO = {"script": "trl_run.py", "beta": 0.2, "reward_model": False}
METHODS = {
    "PPO": Method(),
    "PPO, shared values": Method(flags="--no-separate_critic"),
    "PPO, shared values, longer": Method(flags="--no-separate_critic", budget=1.5),  # as many seconds as PPO
    "RLOO": Method(flags=f"{GROUPS} 4", patches=("forks/rloo",)),
    "GRPO": Method(flags=f"{GROUPS} 8", patches=("forks/grpo",)),
    "GRPO, KL in the reward": Method(
        flags=f"{GROUPS} 8",
        patches=("forks/rloo",),
        edit=(
            "(totals - baselines)",
            "((totals - totals.mean(1, keepdim=True)) / (totals.std(1, keepdim=True) + 1e-4))",
        ),
    ),
    "TRL PPO": Method("trl_run.py", "--method ppo"),
    "TRL RLOO": Method("trl_run.py", "--method rloo --num_generations 4"),
    "TRL GRPO": Method("trl_run.py", "--method grpo --num_generations 8"),
    "TRL GRPO, its own loss": Method("trl_run.py", "--method grpo --num_generations 8 --trl_loss", beta=0.0),
    "TRL DPO": Method(flags="--method dpo --preference_dir {preferences}", **DPO),
    "TRL DPO, 2 passes": Method(
        flags="--method dpo --preference_dir {preferences} --num_train_epochs 2", **DPO
    ),
    "SFT on chosen": Method(
        "sft.py", "--num_train_epochs 1", learning_rate=1e-3, beta=None, reward_model=False
    ),
}
RATES = [4e-5, 1e-4, 2.5e-4, 6e-4, 1.5e-3]  # of --tune
BEST_OF = [4, 16]
LEVELS = [1, 2, 3, 4, 5]  # nats a response, where frontiers are compared
BECOME = "import os, sys; os.execv(sys.argv[1], sys.argv[1:])"  # turns run_once's Python into TRL's


class Setting(NamedTuple):
    name: str
    learning_rate: float
    beta: float | None
    seed: int


def models_of(args, seed):
    """(SFT model, reward model, pairs) of a seed."""
    base = args.base_dir / f"seed{seed}"
    if args.pairs:
        return base / "sft", base / f"reward_model_{args.pairs}", base / f"pairs_{args.pairs}"
    return base / "sft", base / "reward_model", common.DATA / "preferences"


def label(args, seeds):
    """The pairs of --pairs and their reward models."""
    stages = {"pairs": [], "reward models": []}
    for seed in seeds:
        sft_model, reward_model, pairs = models_of(args, seed)
        flags = {"policy": sft_model, "pairs": args.pairs, "seed": seed}
        stages["pairs"].append(common.job(pairs, common.DATA / "label.py", **flags))
        flags = {"model_name_or_path": sft_model, "dataset_name": pairs, "seed": seed}
        stages["reward models"].append(common.job(reward_model, "reward_model.py", **flags))
    for title, jobs in stages.items():
        common.run_all(jobs, args.parallel, title)


def chosen_sides(args, seed):
    """The pairs' chosen sides as demonstrations -> their folder."""
    preferences = models_of(args, seed)[2]
    folder = args.work_dir / (f"chosen_seed{seed}" if args.pairs else "chosen")
    for split in ("train", "test"):
        rows = common.read_jsonl(preferences / f"{split}.jsonl")
        rows = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows]
        common.write_jsonl(folder / f"{split}.jsonl", rows)
    return folder


def job(args, setting):
    """(folder, command) of one run."""
    method = METHODS[setting.name]
    slug = setting.name.lower().replace(", ", "_").replace(" ", "_")
    beta = "" if setting.beta is None else f"_beta_{setting.beta:g}"
    folder = args.work_dir / f"{slug}_lr_{setting.learning_rate:g}{beta}_seed{setting.seed}"
    sft_model, reward_model, preferences = models_of(args, setting.seed)
    flags = {"seed": setting.seed, "learning_rate": setting.learning_rate}
    words = method.flags.format(preferences=preferences).split()
    if method.script == "sft.py":
        flags |= {"model_name_or_path": sft_model, "dataset_name": chosen_sides(args, setting.seed)}
        return common.job(folder, "sft.py", *words, **flags)
    flags |= {"sft_model_path": sft_model, "reward_model_path": reward_model, "beta": setting.beta}
    flags |= {"total_episodes": int(method.budget * args.total_episodes)}
    flags |= {"save_steps": math.gcd(*args.updates)}
    if method.script == "trl_run.py":
        folder, command = common.job(folder, "benchmark/trl_run.py", *words, **flags)
        return folder, ["-c", BECOME, args.trl_python, *command]
    script = args.work_dir / f"{slug}_script/ppo_rlhf.py"
    if not script.exists():
        common.make_copy(script.parent, method.patches)
        if method.edit:
            text = script.read_text()
            assert text.count(method.edit[0]) == 1, f"{method.edit[0]} is not in the patch once"
            script.write_text(text.replace(*method.edit))
    return common.job(folder, script, *words, **flags)


def best_of_n(models, texts):
    """Rows of means, one for each n of BEST_OF: of all sets of n responses to a prompt, from the largest n's
    responses, the one that the reward model likes best."""
    before = common.respond(models.reference, models, texts, seed=0)
    found = []
    start = time.time()
    sets = [common.respond(models.reference, models, texts, seed) for seed in range(1, max(BEST_OF) + 1)]
    seconds = (time.time() - start) / len(sets)
    for n in BEST_OF:
        groups = [sets[i : i + n] for i in range(0, len(sets) - n + 1, n)]
        best = [[max(rows, key=lambda row: row["score"]) for rows in zip(*group)] for group in groups]
        row = {"n": n, "episodes": n * len(texts), "seconds": n * seconds, "responses": len(sum(best, []))}
        row |= common.average(sum(best, [])) | {"kl": math.log(n) - (n - 1) / n}
        row["win_rate"] = mean(common.win_rate(rows, before) for rows in best)
        found.append(row | common.stamp())
    return found


def along(args, setting, folder, models, texts):
    """Rows of means for the SFT model and the checkpoints of a run, with its seconds until then."""
    in_steps = METHODS[setting.name].script == "sft.py"
    updates = None if in_steps else args.updates
    rows = common.along(folder, models, texts, args.samples, setting.seed, updates)
    seconds = common.seconds_of(folder)
    size = sft.Args.per_device_train_batch_size if in_steps else ppo_rlhf.Args.batch_size
    for row in rows:
        row["episodes"] = size * row["update"]
        row["seconds"] = seconds * row["update"] / rows[-1]["update"]
    return [row | common.stamp(folder) for row in rows]


def run_and_judge(args, title, settings):
    """Rows of all `settings`, run where they have not been."""
    jobs = [job(args, setting) for setting in settings]
    common.run_all(jobs, args.parallel, title, keep=True)
    texts = common.held_out(args.limit)
    models = {}
    rows = []
    for setting, (folder, _) in zip(tqdm(settings, desc=f"{title}, judged"), jobs):
        seed = setting.seed
        path = folder / f"judged_{len(texts)}x{args.samples}_at_{'_'.join(map(str, args.updates))}.jsonl"
        sft_model, reward_model, _ = models_of(args, seed)
        if seed not in models and not path.exists():
            models[seed] = common.load(sft_model.parent, reward_model)
        what = {"method": setting.name, **setting._asdict()}
        what["reward_model_seconds"] = METHODS[setting.name].reward_model * common.seconds_of(reward_model)
        del what["name"]
        path_rows = common.cached(path, along, args, setting, folder, models.get(seed), texts)
        rows += [what | row for row in path_rows]
    return rows


# ---- What the rows say ----


def grouped(rows):
    """{(method, KL coefficient): {seed: path}}"""
    found = {}
    for row in rows:
        found.setdefault((row["method"], row.get("beta")), {}).setdefault(row["seed"], []).append(row)
    return found


def at(path, x, level, beyond=False):
    """Gold score where x is `level`, between two checkpoints, not between the SFT model and the first; None
    outside of them, or beyond the last its gold score."""
    for before, after in zip(path, path[1:]):
        first = before.get("update") == 0
        if before[x] <= level <= after[x] and (level == after[x] or not first):
            share = (level - before[x]) / (after[x] - before[x])
            return before["gold"] + share * (after["gold"] - before["gold"])
    return path[-1]["gold"] if beyond and level > path[-1][x] else None


def family(name):
    return "best of n" if name.startswith("best of") else name


def total(row):
    return row["seconds"] + row.get("reward_model_seconds", 0.0)


def show_mean(values, form=".2f"):
    """Mean of those that there are, and of how many where some are missing."""
    known = [value for value in values if value is not None]
    missing = f" ({len(known)})" if len(known) < len(values) else ""
    return f"{mean(known):{form}}{missing}" if known else ""


def print_ends(runs):
    """Where runs end. Differences are to the first one at the same seed."""
    first = next(iter(runs.values()))
    table = []
    for (name, beta), seeds in runs.items():
        last = {seed: path[-1] for seed, path in seeds.items()}
        figure = lambda key, form: show_mean([row.get(key) for row in last.values()], form)  # noqa: B023
        cells = [name, "" if beta is None else f"{beta:g}", len(last)]
        cells.append(common.spread(row["gold"] for row in last.values()))
        for key in ("gold", "kl"):
            pairs = [(row, first[seed][-1]) for seed, row in last.items() if seed in first]
            differences = [row[key] - other[key] for row, other in pairs]
            cells.append("" if seeds is first or not pairs else common.interval(differences))
        cells += [figure("kl", ".1f"), figure("score", ".2f")]
        cells.append(f"{mean(row['score'] - 0.1 * row['kl'] for row in last.values()):.2f}")
        cells.append(figure("length", ".1f"))
        cells += [figure(key, ".2f") for key in ("off_topic", "foreign", "garbled", "repeated")]
        cells += [figure(key, ".2f") for key in ("gold_trained", "gold_held_out")]
        cells += [figure("seconds", ".0f"), f"{mean(map(total, last.values())):.0f}"]
        rates = [row["win_rate"] for row in last.values()]
        cells.append(common.rate_interval(rates, next(iter(last.values()))["responses"]))
        table.append([*cells, figure("episodes", ",.0f")])
    titles = ["", "beta", "seeds", "gold score", "difference, 95% interval", "difference in KL", "KL, nats"]
    titles += ["RM score", "RM score - 0.1 KL", "tokens", "off topic", "foreign a response"]
    titles += ["garbled a response", "repeated a response", "gold, trained topics", "gold, held-out topics"]
    titles += ["s", "s with the reward model", "gold win rate, %", "responses or pairs"]
    common.print_table(titles, table)


def print_on_the_way(runs, episodes):
    """Gold scores at as many samples, and at as many seconds with the reward model's."""
    samples = [episodes // 4, episodes // 2, episodes]
    whole = mean(total(path[-1]) for path in next(iter(runs.values())).values())
    times = [round(share * whole) for share in (0.75, 1.0)]
    table = []
    for (name, beta), seeds in runs.items():
        if len(next(iter(seeds.values()))) == 1:  # best-of-n has no way
            continue
        paths = [[{**row, "total": total(row)} for row in path] for path in seeds.values()]
        cells = [show_mean([at(path, "episodes", level) for path in paths]) for level in samples]
        cells += [show_mean([at(path, "total", level, beyond=True) for path in paths]) for level in times]
        table.append([name, "" if beta is None else f"{beta:g}", *cells])
    print("\nOn the way, between checkpoints (seeds, where not all):\n")
    titles = [f"gold at {level:,} samples" for level in samples]
    common.print_table(["", "beta", *titles, *(f"at {level} s" for level in times)], table)


def frontiers(runs):
    """{method: {seed: finished runs by KL}} of methods with several of them."""
    found = {}
    for (name, _), seeds in runs.items():
        for seed, path in seeds.items():
            found.setdefault(family(name), {}).setdefault(seed, []).append(path[-1])
    for seeds in found.values():
        for seed, ends in seeds.items():
            seeds[seed] = sorted(ends, key=lambda row: row["kl"])
    return {name: seeds for name, seeds in found.items() if len(next(iter(seeds.values()))) > 1}


def print_frontiers(runs):
    """Gold scores at equal KL, between finished runs; differences to the first method at the same seed."""
    found = frontiers(runs)
    table = []
    for name, seeds in found.items():
        cells = [name]
        for level in LEVELS:
            own = {seed: at(ends, "kl", level) for seed, ends in seeds.items()}
            others = {seed: at(ends, "kl", level) for seed, ends in next(iter(found.values())).items()}
            both = [own[seed] - others[seed] for seed in own if None not in (own[seed], others.get(seed))]
            difference = (
                f", {common.interval(both)}" if both and seeds is not next(iter(found.values())) else ""
            )
            cells.append(show_mean(list(own.values())) + difference)
        table.append(cells)
    if table:
        print("\nAt equal KL, between finished runs of several betas: gold score (seeds), difference\n")
        common.print_table(["", "1 nat", *(f"{level} nats" for level in LEVELS[1:])], table)


def draw(runs, path):
    """Where runs end: a line a method through its KL coefficients, means over seeds with their ranges."""
    plt.rcParams.update({"font.size": 9.5, "axes.spines.top": False, "axes.spines.right": False})
    figure, axis = plt.subplots(figsize=(8.5, 5), layout="constrained")
    points = {}  # method: (KL, gold score) of each seed, for each KL coefficient
    for (name, _), seeds in runs.items():
        ends = [(path[-1]["kl"], path[-1]["gold"]) for path in seeds.values()]
        points.setdefault(family(name), []).append(ends)
    for i, (name, own) in enumerate(points.items()):
        own = torch.tensor(
            sorted(own, key=lambda ends: mean(kl for kl, _ in ends))
        )  # [coefficients, seeds, 2]
        middle = own.mean(1)  # [coefficients, 2]
        ranges = torch.stack([middle - own.amin(1), own.amax(1) - middle]).clamp(
            min=0
        )  # [2, coefficients, 2]
        style = {"linestyle": "--" if name.startswith("TRL") else "-", "marker": "os^vDPX<>*"[i % 10]}
        style |= {"color": f"C{i % 10}", "capsize": 2, "elinewidth": 0.8, "label": name}
        axis.errorbar(middle[:, 0], middle[:, 1], ranges[..., 1], ranges[..., 0], **style)
    axis.set_xlabel("KL (nats a response)")
    axis.set_ylabel(f"gold score (at most {common.gold_judge.BEST:g})")
    axis.grid(alpha=0.25, linewidth=0.6)
    figure.legend(loc="outside right center", frameon=False)
    figure.savefig(path, dpi=105)
    plt.close(figure)


def print_tuned(rows):
    """The best learning rate of each method by the gold score."""
    table = []
    ends = {(row["method"], row["learning_rate"]): row for row in rows}  # the last of each run
    for name in dict.fromkeys(row["method"] for row in rows):
        own = [row for (other, _), row in ends.items() if other == name]
        best = max(own, key=lambda row: row["gold"])
        for row in own:
            cells = [f"{row[key]:{form}}" for key, form in (("gold", ".2f"), ("kl", ".1f"), ("score", ".2f"))]
            beta = "" if row["beta"] is None else f"{row['beta']:g}"
            table.append([name, f"{row['learning_rate']:g}", beta, *cells, "best" if row is best else ""])
    common.print_table(["", "learning rate", "beta", "gold score", "KL, nats", "RM score", ""], table)


def main():
    parser = common.parser(__doc__)
    add = parser.add_argument
    add("--trl_python", help="Python of an environment with TRL (benchmark/requirements.txt)")
    add(
        "--methods",
        nargs="+",
        choices=[*METHODS, "best-of-n"],
        default=[*METHODS, "best-of-n"],
        metavar="NAME",
    )
    add("--betas", type=float, nargs="+", default=[0.1], help="KL coefficients; DPO's are twice as large")
    add("--tune", action="store_true", help="run --rates, at the first seed; not on the shipped task")
    add("--rates", type=float, nargs="+", default=RATES, help="learning rates of --tune")
    add("--pairs", type=int, help="pairs of the SFT model's responses to train on; else data/preferences")
    add("--total_episodes", type=int, default=ppo_rlhf.Args.total_episodes)
    add("--updates", type=int, nargs="+", default=[3, 6, 12, 24], help="checkpoints judged beside the last")
    add("--samples", type=int, default=4, help="responses judged to each held-out prompt")
    add("--name", default="methods", help="of the files in --output_dir")
    add("--work_dir", type=lambda x: Path(x).resolve(), default=common.WORLD / "runs/methods")
    args = parser.parse_args()
    if args.tune and common.SHIPPED:
        parser.error("--tune: on the shipped task it would choose on the judged prompts; see --world")
    names = [name for name in args.methods if name in METHODS]
    if any(METHODS[name].script == "trl_run.py" for name in names):
        found = shutil.which(args.trl_python or "python")
        if subprocess.run([found, "-c", "import trl.experimental.ppo"], capture_output=True).returncode:
            parser.error(f"--trl_python {args.trl_python}: cannot import trl.experimental.ppo")
        args.trl_python = Path(found).absolute()  # the runs start in the world's folder
    torch.set_num_threads(1)  # and one for each run, as run_all shares out these
    seeds = args.seeds[:1] if args.tune else args.seeds
    common.baselines(args.base_dir, seeds, args.parallel)
    if args.pairs:
        args.work_dir = args.work_dir.with_name(f"{args.work_dir.name}_{args.pairs}_pairs")
        label(args, seeds)
    settings = []
    for seed in seeds:  # so that a stopped run has complete ones
        for name in names:
            method = METHODS[name]
            if args.tune:
                settings += [Setting(name, rate, method.beta, seed) for rate in args.rates]
            elif method.beta:
                scale = method.beta / 0.1
                settings += [Setting(name, method.learning_rate, scale * beta, seed) for beta in args.betas]
            else:
                settings.append(Setting(name, method.learning_rate, method.beta, seed))
    rows = run_and_judge(args, "runs", settings)
    if "best-of-n" in args.methods and not args.tune:
        texts = common.held_out(args.limit)
        for seed in seeds:
            sft_model, reward_model, _ = models_of(args, seed)
            path = args.work_dir / f"best_of_{max(BEST_OF)}_seed{seed}_judged_{len(texts)}.jsonl"
            models = None if path.exists() else common.load(sft_model.parent, reward_model)
            seconds = {"reward_model_seconds": common.seconds_of(reward_model)}
            for row in common.cached(path, best_of_n, models, texts):
                rows.append({"method": f"best of {row['n']}", "seed": seed, **seconds, **row})
    output = args.output_dir / f"{args.name}{'_tune' if args.tune else ''}.jsonl"
    common.write_results(output, rows)
    if args.tune:
        return print_tuned(rows)
    runs = grouped(rows)
    print_ends(runs)
    print_on_the_way(runs, args.total_episodes)
    print_frontiers(runs)
    draw(runs, output.with_suffix(".png"))


if __name__ == "__main__":
    main()
