"""The README's table on the shipped task: all three stages over seeds, PPO at several betas, judged by the gold judge.

    python benchmark/shipped_task.py --seeds 1 2 3

Every run is a fresh process with default flags, but for seed, beta, folders and, for beta 0, twice the episodes; two at a time,
each on one thread. What has been run is kept in --base_dir and skipped the next time, so a stopped sweep goes on. Raw rows go to
benchmark/results/shipped_task.jsonl, where those of other seeds and runs stay.

The judge compares the answers of runs/ppo/eval.jsonl: PPO's to the held-out prompts with the SFT model's, drawn with the same luck.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import common

RUNS = {  # label: flags of ppo_rlhf.py
    "beta 0.1": ["--beta", "0.1"],
    "beta 1.0": ["--beta", "1.0"],
    "beta 0.1, long": ["--beta", "0.1", "--total_episodes", "10240"],
    "beta 0, long": ["--beta", "0", "--total_episodes", "10240"],
}
COLUMNS = {"rm_accuracy": 3, "rm_score": 2, "kl": 1, "gold_sft": 2, "gold_ppo": 2, "closed": 2, "win_rate": 3}  # name: digits


def judge(*arguments):
    command = [sys.executable, "data/judge.py", "--json", *arguments]
    return json.loads(subprocess.run(command, cwd=common.ROOT, check=True, capture_output=True).stdout)


def last(path, key):
    return [row[key] for row in common.read_jsonl(path) if key in row][-1]


def figures(label, seed, base, folder):
    """Row of one run."""
    reward_model, judged = base / "reward_model", judge(folder / "eval.jsonl")["files"][0]
    seconds = [round(float((path / "wall_seconds").read_text())) for path in (base / "sft", reward_model, folder)]
    return {"run": label, "seed": seed, "seconds": seconds, "rm_accuracy": last(reward_model / "metrics.jsonl", "eval/accuracy"),
            "kl": last(folder / "metrics.jsonl", "objective/kl"), "length": last(folder / "metrics.jsonl", "response_length"),
            "rm_score": common.mean(row["ppo_score"] for row in common.read_jsonl(folder / "eval.jsonl")),
            **{key: value for key, value in judged.items() if key != "file"}}  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--runs", nargs="+", default=["beta 0.1", "beta 1.0", "beta 0, long"], choices=list(RUNS))
    parser.add_argument("--parallel", type=int, default=2, help="runs at a time, on an equal share of the cores")
    parser.add_argument("--base_dir", type=Path, default=common.BASELINES)
    parser.add_argument("--output_dir", type=Path, default=common.RESULTS)
    args = parser.parse_args()
    base_dir, path = args.base_dir.resolve(), args.output_dir / "shipped_task.jsonl"
    common.baselines(base_dir, args.seeds, args.parallel)
    asked = [(label, seed, base_dir / f"seed{seed}") for label in args.runs for seed in args.seeds]
    folders = [base / label.replace(" ", "_").replace(",", "") for label, _, base in asked]
    common.run_all([common.ppo_job(folder, base, seed, *RUNS[label]) for folder, (label, seed, base) in zip(folders, asked)],
                   args.parallel, "ppo")  # fmt: skip
    rows = {(row["run"], row["seed"]): row for row in (common.read_jsonl(path) if path.exists() else [])}
    rows |= {(label, seed): figures(label, seed, base, folder) for folder, (label, seed, base) in zip(folders, asked)}
    common.write_jsonl(path, [rows[key] for label in RUNS for key in sorted(rows) if key[0] == label])

    print(f"of the held-out labels the gold scores get {judge('--preferences', 'data/preferences/test.jsonl')['gold_agreement']:.1%}")
    print("mean over seeds (range) [95% interval of the mean, Student's t]")
    for label in args.runs:
        for key, digits in COLUMNS.items():
            values = [rows[label, seed][key] for seed in args.seeds]
            print(f"{label:16}{key:14}{common.mean(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f}) "
                  f"[+-{common.half_width(values):.{digits}f}]")  # fmt: skip


if __name__ == "__main__":
    main()
