"""TRL 1.12.0's PPOTrainer and ppo_rlhf.py with the same budget: whose responses are better, how far from SFT?

    python benchmark/same_budget.py --trl_python trl_env/bin/python

All start from the same SFT and reward models and make --total_episodes responses, 128 an update. First the
learning rate of each is chosen from the same few (--learning_rates), at beta 0.1 and the first seed, by the
gold score at the end, on the prompts that are reported; then each runs with its own at every beta and seed.
Every checkpoint is judged by the same code, with the same random numbers.

Made equal, by what TRL offers: prompts, temperature, the stop at EOS and the penalty without it, beta and
the k1 estimate of the KL, gamma, lambda, clip ranges, weight of the value loss, whitened advantages, no
dropout, Adam with eps 1e-5, warm-up and linear decay, 2 epochs of 8 minibatches (TRL's own default, 4 of 1,
makes a quarter of the steps). Scores are normalized for both, so that beta means the same: for TRL the scale
is put into the head (trl_ppo.py), from SFT responses to the held-out prompts; ours is that of the first
rollout.

Left as TRL does it: the critic starts as the reward model with its head (ours: its backbone, the head at
zero; "shared backbone": the policy's own); the score falls one slot after the last token,
where a value is learned too, unless the response fills the last slot; old log-probs are the sampler's;
gradients are not clipped; each pass leaves out the prompts that fill no batch.

Runs are kept in --work_dir; another budget wants another. Three rates, betas and seeds are 11 runs for each.
"""

import json
import shutil
import subprocess
from dataclasses import asdict
from pathlib import Path

import common
from tqdm import tqdm

import ppo_rlhf

CONTENDERS = {"ours": [], "ours, shared backbone": ["--no-separate_critic"], "TRL": None}
GRID_BETA = 0.1
LEVELS = [1, 2, 3, 4]  # nats a response, where they are compared
BECOME = "import os, sys; os.execv(sys.argv[1], sys.argv[1:])"  # turns run_once's Python into TRL's


def job(args, contender, learning_rate, beta, seed):
    """(folder, command) of one run."""
    name = f"{contender}_lr_{learning_rate:g}_beta_{beta:g}_seed{seed}".lower().replace(", ", "_")
    folder = args.work_dir / name.replace(" ", "_")
    base = args.base_dir / f"seed{seed}"
    flags = {"beta": beta, "learning_rate": learning_rate}
    flags |= {"total_episodes": args.total_episodes, "save_steps": args.save_steps}
    if contender != "TRL":
        return common.ppo_job(folder, base, seed, *CONTENDERS[contender], **flags)
    if not (folder / "wall_seconds").exists():
        models = common.load(base)
        paths = {"sft_model_path": str(base / "sft"), "reward_model_path": str(base / "reward_model")}
        settings = asdict(ppo_rlhf.Args(**paths, output_dir=str(folder), seed=seed, **flags))
        settings |= {"score_mean": models.mean, "score_std": models.std}
        settings |= {"device": "cpu", "contender": contender}
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "args.json").write_text(json.dumps(settings, indent=2))
    return folder, ["-c", BECOME, args.trl_python, common.ROOT / "benchmark/trl_ppo.py", folder]


def run_and_judge(args, name, settings):
    """{(contender, learning rate, beta, seed): rows} of all `settings`, run where they have not been."""
    jobs = [job(args, *setting) for setting in settings]
    common.run_all(jobs, args.parallel, name, keep=True)
    found = {}
    for setting, (folder, _) in zip(tqdm(settings, desc=f"{name}, judged"), jobs):
        contender, learning_rate, beta, seed = setting
        path = folder / f"judged_{args.samples}.jsonl"
        models = None if path.exists() else common.load(args.base_dir / f"seed{seed}")
        texts = common.held_out(args.limit)
        rows = common.cached(path, common.along, folder, models, texts, args.samples, seed)
        what = {"contender": contender, "learning_rate": learning_rate, "beta": beta, "seed": seed}
        what["seconds"] = float((folder / "wall_seconds").read_text())
        found[setting] = [{**what, **row} for row in rows]
    return found


def gold_at(rows, level):
    """Gold score where a run's KL first comes to `level`, between two checkpoints; None if it never does."""
    for before, after in zip(rows, rows[1:]):
        if before["kl"] < level <= after["kl"]:
            share = (level - before["kl"]) / (after["kl"] - before["kl"])
            return before["gold"] + share * (after["gold"] - before["gold"])


def print_tables(args, runs):
    """`runs`: {(contender, beta): rows of each seed, in the order of the seeds}."""
    table = []
    for (contender, beta), seeds in runs.items():
        last = [rows[-1] for rows in seeds]
        cells = [common.spread(row[key] for row in last) for key in ("gold", "kl", "score")]
        cells += [common.spread((100 * row["win_rate"] for row in last), ".0f")]
        cells += [common.spread((row["seconds"] for row in last), ".0f")]
        for level in LEVELS:  # over the seeds in which all contenders come there
            groups = zip(*(runs[name, beta] for name in CONTENDERS))
            groups = [[gold_at(rows, level) for rows in group] for group in groups]
            own = [group[list(CONTENDERS).index(contender)] for group in groups if None not in group]
            cells.append(f"{common.mean(own):.2f} ({len(own)})" if own else "")
        table.append([contender, beta, *cells])
    titles = ["", "beta", "gold score", "KL, nats", "RM score", "gold win rate, %", "s a run"]
    common.print_table([*titles, *(f"gold at {level} nats (seeds)" for level in LEVELS)], table)


def main():
    parser = common.parser(__doc__)
    add = parser.add_argument
    add("--trl_python", required=True, help="Python of an environment with TRL (benchmark/requirements.txt)")
    add("--learning_rates", type=float, nargs="+", default=[3e-5, 1e-4, 3e-4])
    add("--betas", type=float, nargs="+", default=[0.05, 0.1, 0.2])
    add("--total_episodes", type=int, default=ppo_rlhf.Args.total_episodes)
    add("--save_steps", type=int, default=5, help="updates between two checkpoints, all of which are judged")
    add("--samples", type=int, default=1, help="responses to each held-out prompt")
    add("--work_dir", type=lambda x: Path(x).resolve(), default=common.WORLD / "runs/same_budget")
    args = parser.parse_args()
    found = shutil.which(args.trl_python)
    check = [found, "-c", "import trl.experimental.ppo"]
    if not found or subprocess.run(check, capture_output=True).returncode:
        parser.error(f"--trl_python {args.trl_python}: cannot import trl.experimental.ppo")
    args.trl_python = Path(found).absolute()  # the runs start in the repository's root
    common.baselines(args.base_dir, args.seeds, args.parallel)
    grid = [(name, rate, GRID_BETA, args.seeds[0]) for rate in args.learning_rates for name in CONTENDERS]
    runs = run_and_judge(args, "grid", grid)
    best = {}
    for contender in CONTENDERS:
        gold = {rate: rows[-1]["gold"] for (name, rate, _, _), rows in runs.items() if name == contender}
        best[contender] = max(gold, key=gold.get)
        print(f"{contender}: gold score by learning rate {gold}, best {best[contender]:g}")
    pairs = [(beta, seed) for beta in args.betas for seed in args.seeds]
    chosen = [(name, best[name], *pair) for pair in pairs for name in CONTENDERS]
    runs |= run_and_judge(args, "runs", chosen)
    common.write_jsonl(args.output_dir / "same_budget.jsonl", [row for rows in runs.values() for row in rows])
    compared = {}
    for contender in CONTENDERS:
        for beta in args.betas:
            compared[contender, beta] = [runs[contender, best[contender], beta, seed] for seed in args.seeds]
    print_tables(args, compared)


if __name__ == "__main__":
    main()
