"""Does a run that is killed and resumed end as if nothing had happened? SIGKILL at random moments, then --resume.

    python benchmark/faults.py                      # 50 kills, a quarter of an hour on two CPU cores

Small runs of the three stages on a part of the shipped data, a checkpoint at almost every step. Most kills come at a moment
drawn uniformly between a process's start and its end, so also while it starts and while it writes the final model; every
third waits from its moment on until a checkpoint is being written. Three in ten resumed runs are killed again. What stands
in the folder at last, weights, configs and all lines of the jsonl files but for times and memory, is compared to an
uninterrupted run, bit for bit. Raw rows go to benchmark/results/faults.jsonl, the table to stdout.
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
ROWS = {"demonstrations": (256, 32), "preferences": (256, 64), "prompts": (64, 24)}  # of the shipped data: train, test
EVERY = "--per_device_train_batch_size 8 --logging_steps 3 --eval_steps 7 --warmup_steps 2 --max_new_tokens 16"
STAGES = {  # how many steps, where the data is, and the other flags; the inputs are the uninterrupted runs of the stages before
    "sft": (40, "demonstrations", f"{EVERY} --max_steps 40 --save_steps 2 --n_layer 2 --vocab_size 512"),
    "reward_model": (24, "preferences", f"{EVERY} --max_steps 24 --save_steps 1 --normalization_samples 64 "
                     "--gradient_accumulation_steps 2 --model_name_or_path sft"),
    "ppo_rlhf": (10, "prompts", f"{EVERY} --total_episodes 160 --batch_size 16 --num_mini_batches 2 --num_ppo_epochs 2 "
                 "--save_steps 1 --sft_model_path sft --reward_model_path reward_model"),
}  # fmt: skip
CLOCKS = ("time", "seconds", "eps", "tokens_per_second", "memory/peak_gb")  # and time/*


def start(stage, out, work_dir, *flags):
    """The stage as a process, in the folder with scripts, data and the uninterrupted runs."""
    _, data, settings = STAGES[stage]
    command = [sys.executable, f"{stage}.py", "--output_dir", out, "--dataset_name", f"data/{data}", *settings.split(), *flags]
    with open(work_dir / "log", "ab") as log:
        return subprocess.Popen(command, cwd=work_dir, stdout=log, stderr=log, env=dict(os.environ, OMP_NUM_THREADS="1"))


def outcome(folder):
    """{file: its bytes, or its lines without what a clock or a memory meter said} of all that a run is for."""
    found = {path.name: path.read_bytes() for pattern in ("*.safetensors", "*.json") for path in folder.glob(pattern)}
    found.pop("args.json")
    for path in folder.glob("*.jsonl"):
        found[path.name] = [{key: value for key, value in json.loads(line).items() if key not in CLOCKS and key[:5] != "time/"}
                            for line in path.read_text(encoding="utf-8").splitlines()]  # fmt: skip
    return found


def saving(out, since):
    """Is a checkpoint being written, by a process that began at `since`?"""
    try:
        return (out / "checkpoint" / "unfinished").stat().st_mtime >= since
    except FileNotFoundError:
        return False


def kill(process, out, steps, seconds, aimed):
    """SIGKILL after `seconds`, if `aimed` as soon after that as a save goes on -> where it struck, None if too late."""
    since = time.time()
    while process.poll() is None and (time.time() < since + seconds or aimed and not saving(out, since)):
        time.sleep(0.0003)
    process.kill()
    if process.wait() == 0:
        return None
    paths = sorted(out.glob("checkpoint/*.pt"))
    if saving(out, since) or len(paths) > 1 and paths[-1].stat().st_mtime >= since:  # not yet named, or the old one still there
        return "inside a save"
    last = int(paths[-1].name[:8]) if paths else 0
    return {0: "before any checkpoint", steps: "after the last step"}.get(last, "between saves")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--work_dir", type=Path, default=ROOT / "runs", help="a new folder is made in it")
    args = parser.parse_args()
    rng, rows = random.Random(args.seed), []
    args.work_dir.mkdir(parents=True, exist_ok=True)
    work_dir = Path(tempfile.mkdtemp(prefix="faults_", dir=args.work_dir.resolve()))
    for stage in STAGES:  # copies, so that an edit meanwhile changes nothing
        shutil.copy(ROOT / f"{stage}.py", work_dir)
    for name, counts in ROWS.items():
        for split, count in zip(("train", "test"), counts):
            lines = (ROOT / "data" / name / f"{split}.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
            (work_dir / "data" / name).mkdir(parents=True, exist_ok=True)
            (work_dir / "data" / name / f"{split}.jsonl").write_text("".join(lines[:count]), encoding="utf-8")
    whole, duration = {}, {}
    for stage in STAGES:
        began = time.time()
        if start(stage, work_dir / stage, work_dir).wait():
            sys.exit(f"the uninterrupted run of {stage} failed, see {work_dir / 'log'}")
        whole[stage], duration[stage] = outcome(work_dir / stage), time.time() - began

    progress, out = tqdm(total=args.kills, desc="kills"), work_dir / "killed"
    while progress.n < args.kills:
        stage, struck = list(STAGES)[len(rows) % len(STAGES)], []
        while not struck or rng.random() < 0.3:
            process = start(stage, out, work_dir, *["--resume"] * bool(struck))
            where = kill(process, out, STAGES[stage][0], rng.uniform(0, duration[stage]), aimed=rng.random() < 1 / 3)
            if where:
                struck.append(where)
                progress.update()
            elif struck:  # resumed, and done before the second kill
                break
            else:  # done before the first: begin again
                shutil.rmtree(out)
        status = start(stage, out, work_dir, "--resume").wait()
        identical = status == 0 and outcome(out) == whole[stage]
        rows.append({"stage": stage, "kills": struck, "status": status, "bit_identical": identical})
        out.rename(work_dir / f"different_{len(rows)}") if not identical else shutil.rmtree(out)
    progress.close()

    results = ROOT / "benchmark/results"
    results.mkdir(exist_ok=True)
    (results / "faults.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    places = ["before any checkpoint", "between saves", "inside a save", "after the last step"]
    print("| stage | runs | kills |", *(f"{place} |" for place in places), "bit-identical |")
    print("| --- " * (len(places) + 4) + "|")
    for stage in STAGES:
        own = [row for row in rows if row["stage"] == stage]
        struck = [where for row in own for where in row["kills"]]
        print(f"| `{stage}.py` | {len(own)} | {len(struck)} |", *(f"{struck.count(place)} |" for place in places),
              f"{sum(row['bit_identical'] for row in own)} of {len(own)} |")  # fmt: skip
    if not all(row["bit_identical"] for row in rows):
        sys.exit(f"those that differ, and a log of all, are in {work_dir}")
    shutil.rmtree(work_dir)


if __name__ == "__main__":
    main()
