"""A folder with another task than the shipped one, to tune on: what is chosen there is not chosen on the
prompts that are reported.

    python data/make_world.py --output_dir runs/second_world --constants data/second_world.py
    python data/make_world.py --output_dir runs/rotation1 --rotation 1

The first is a second world, the second the shipped one with another quarter of its prompts held out. With
--held_out_topics 6 six topics are in no training pair and no training prompt, but still in demonstrations and
test files. The folder is laid out as the repository: data/ holds the world, its judge, data sets and starting
model; the scripts are links. In it the commands are the usual ones, python sft.py and so on; the benchmarks
that start from runs/shipped_task take it as --world.
"""

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main():
    as_it_is = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_it_is)
    add = parser.add_argument
    add("--output_dir", type=Path, required=True, help="a folder that is not there yet")
    add("--constants", type=Path, default=ROOT / "data/world.py", help="a file of the names of data/world.py")
    add("--rotation", type=int, choices=range(4), default=0, help="which quarter of the prompts is held out")
    add("--held_out_topics", type=int, default=0, help="topics in no training pair and no training prompt")
    args = parser.parse_args()
    folder = args.output_dir.resolve()
    if folder.exists():
        parser.error(f"--output_dir {args.output_dir} is there already; name another, or remove it")
    (folder / "data").mkdir(parents=True)
    for path in (ROOT / "data").glob("*.py"):
        shutil.copy(path, folder / "data")
    shutil.copy(args.constants, folder / "data/world.py")
    for name in ("sft.py", "reward_model.py", "ppo_rlhf.py"):
        (folder / name).symlink_to(os.path.relpath(ROOT / name, folder))
    make_data = ["data/make_data.py", "--output_dir", "data", "--rotation", str(args.rotation)]
    make_data += ["--held_out_topics", str(args.held_out_topics)]
    for words in (make_data, ["data/make_scratch.py"]):
        subprocess.run([sys.executable, *words], cwd=folder, check=True)


if __name__ == "__main__":
    main()
