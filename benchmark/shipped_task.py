"""The README's table on the shipped task: all three stages over seeds, PPO at several betas, judged by the gold judge.

    python benchmark/shipped_task.py --seeds 1 2 3          # 35 minutes on two CPU cores

Every run is a fresh process with default flags, but for seed, beta, folders and, for beta 0, twice the episodes. What has
been run is kept in --work_dir and skipped the next time, so a stopped sweep goes on. Raw rows go to
benchmark/results/shipped_task.jsonl.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# label: flags of ppo_rlhf.py
RUNS = {
    "beta 0.1": ["--beta", "0.1"],
    "beta 1.0": ["--beta", "1.0"],
    "beta 0.1, long": ["--beta", "0.1", "--total_episodes", "10240"],
    "beta 0, long": ["--beta", "0", "--total_episodes", "10240"],
}


def stage(script, folder, *flags):
    """Run one stage unless its folder says that it is done; -> wall seconds of the whole process."""
    done = folder / "wall_seconds"
    if not done.exists():
        start = time.time()
        with open(folder.parent / f"{folder.name}.log", "w") as log:
            command = [sys.executable, script, "--output_dir", folder, "--resume", *flags]  # goes on if it was stopped
            subprocess.run(command, cwd=ROOT, check=True, stdout=log, stderr=log)
        done.write_text(str(time.time() - start))
    return float(done.read_text())


def judge(*arguments):
    out = subprocess.run([sys.executable, "data/judge.py", "--json", *arguments], cwd=ROOT, check=True, capture_output=True)
    return json.loads(out.stdout)


def last(path, key):
    return [row[key] for row in map(json.loads, path.read_text().splitlines()) if key in row][-1]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--runs", nargs="+", default=["beta 0.1", "beta 1.0", "beta 0, long"], choices=list(RUNS))
    parser.add_argument("--work_dir", type=Path, default=ROOT / "runs/shipped_task")
    args = parser.parse_args()
    ceiling = judge("--preferences", "data/preferences/test.jsonl")["gold_agreement"]
    rows = []
    for label in args.runs:  # the first label over all seeds first: a stopped sweep has the main result
        for seed in args.seeds:
            base = (args.work_dir / f"seed{seed}").resolve()
            base.mkdir(parents=True, exist_ok=True)
            sft, reward_model, ppo = base / "sft", base / "reward_model", base / label.replace(" ", "_").replace(",", "")
            seconds = [stage("sft.py", sft, "--seed", str(seed))]
            seconds += [stage("reward_model.py", reward_model, "--seed", str(seed), "--model_name_or_path", sft)]
            seconds += [stage("ppo_rlhf.py", ppo, "--seed", str(seed), "--sft_model_path", sft, "--reward_model_path", reward_model,
                              *RUNS[label])]  # fmt: skip
            evaluation = [json.loads(line) for line in open(ppo / "eval.jsonl")]
            rows.append({
                "run": label, "seed": seed, "seconds": [round(s) for s in seconds],
                "rm_accuracy": last(reward_model / "metrics.jsonl", "eval/accuracy"), "gold_accuracy": ceiling,
                "kl": last(ppo / "metrics.jsonl", "objective/kl"), "length": last(ppo / "metrics.jsonl", "response_length"),
                "rm_score": sum(row["ppo_score"] for row in evaluation) / len(evaluation), **judge(ppo / "eval.jsonl")["files"][0],
            })  # fmt: skip
            print(json.dumps(rows[-1]), flush=True)
    results = ROOT / "benchmark/results"
    results.mkdir(exist_ok=True)
    (results / "shipped_task.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()
