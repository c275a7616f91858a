"""How long the stages take to read large data sets, and how much memory: seconds from the start of a script
to its first step, for 160,000 pairs of 130 words (stage 2) and 100,000 prompts of 180 words (stage 3).

    python benchmark/prepare.py [--checkout FOLDER] [--scale 1.0]

The words are the shipped task's, and so are the models in runs/: python sft.py && python reward_model.py
"""

import json
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import tyro

ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Args:
    checkout: Path = ROOT  # the scripts that are timed; another one's for a comparison
    scale: float = 1.0  # of the numbers of rows


def write_rows(folder, count, lengths):
    """`count` rows with a text of so many words in each column of `lengths`, and a small test split."""
    words = []
    for line in (ROOT / "data/preferences/train.jsonl").read_text(encoding="utf-8").splitlines():
        words += json.loads(line)["chosen"].split()
    random.seed(1)
    folder.mkdir()
    for split, rows in (("train", count), ("test", 200)):
        with open(folder / f"{split}.jsonl", "w", encoding="utf-8") as file:
            for _ in range(rows):
                row = {name: " ".join(random.choices(words, k=k)) for name, k in lengths.items()}
                file.write(json.dumps(row) + "\n")


def time_to_first_step(command, begins_with):
    """Seconds until the script prints the line before its first step, and peak memory in GiB until then."""
    start = time.time()
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith(begins_with):
            break
    else:
        raise SystemExit(f"{command} ended without a line that begins with {begins_with!r}")
    seconds = time.time() - start
    status = Path(f"/proc/{process.pid}/status").read_text()
    process.kill()
    peak = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return seconds, int(peak.split()[1]) / 2**20


def main(args):
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        pairs = round(160_000 * args.scale)
        prompts = round(100_000 * args.scale)
        write_rows(folder / "pairs", pairs, {"prompt": 65, "chosen": 65, "rejected": 65})
        write_rows(folder / "prompts", prompts, {"prompt": 180})
        long = ["--max_prompt_length", "500", "--max_new_tokens", "8"]
        for script, name, count, flags, line in (
            ("reward_model.py", "pairs", pairs, [], "Reward model on"),
            ("ppo_rlhf.py", "prompts", prompts, long, "PPO on"),
        ):
            data = ["--dataset_name", folder / name, "--output_dir", folder / script]
            # Buffered output would reach the pipe only at the end of the run
            command = [sys.executable, "-u", args.checkout / script, *data, *flags]
            seconds, peak = time_to_first_step([str(word) for word in command], line)
            print(f"{script}: {count:,} {name}, {seconds:.1f} s, {peak:.2f} GiB", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
