"""A reward of your own, without a reward model: a pretrained model learns to continue sentences positively.

    pip install -r benchmark/requirements.txt
    python benchmark/sentiment.py --model HuggingFaceTB/SmolLM2-135M-Instruct  # Hub name, folder or .gguf

The reward is VADER's `compound`, the sentiment of a response from -1 to 1 by a list of words:
forks/sentiment.patch puts it into `reward_fn`. The prompts are beginnings of neutral sentences (openings/).
The model gets a chat template that adds nothing to them; there is no SFT. A run that was stopped is resumed.
Models and logs are in --base_dir. Held-out responses of both models go to results/sentiment.jsonl,
sentiment and KL of each update to results/sentiment_curve.jsonl.
"""

import argparse
from pathlib import Path

import torch
from common import (
    RESULTS,
    ROOT,
    job,
    make_copy,
    mean,
    print_table,
    read_jsonl,
    run_once,
    stamp,
    write_results,
)
from real_model import from_gguf
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from sft import chat_template

# No penalty for responses that are cut off: at 20 tokens nearly all are
FLAGS = (
    "--learning_rate 5e-5 --beta 0.05 --total_episodes 768 --batch_size 48 --num_ppo_epochs 1 "
    "--max_new_tokens 20 --missing_eos_penalty 0 --lam 0.95 --save_steps 4"
)


def plain_start(name, folder):
    """The model `name` with a chat template that is the prompt alone -> its folder."""
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(name)
    tokenizer.chat_template = chat_template("{prompt}", tokenizer)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def main():
    as_it_is = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_it_is)
    parser.add_argument("--model", required=True, help="Hub name, folder or .gguf")
    parser.add_argument("--base_dir", type=Path, default=ROOT / "runs/sentiment")
    parser.add_argument("--output_dir", type=Path, default=RESULTS)
    parser.add_argument("--ppo_flags", default=FLAGS, help=f"of the run (default: {FLAGS})")
    args = parser.parse_args()
    base = args.base_dir.resolve()
    if args.model.endswith(".gguf"):
        args.model = from_gguf(Path(args.model), base / "model")
    start = plain_start(args.model, base / "start")
    script = make_copy(base / "script", ["forks/sentiment"])
    openings = ROOT / "benchmark/openings"
    inputs = {"sft_model_path": start, "reward_model_path": "", "dataset_name": openings}
    run, command = job(base / "ppo", script, *args.ppo_flags.split(), **inputs)
    seconds = run_once(run, command)
    # Scores in the logs are normalized; sentiment is what `reward_fn` returned
    score_mean, score_std = load_file(run / "value_head.safetensors")["score_scale"].tolist()
    sentiment = lambda score: round(score_mean + score_std * score, 4)
    curve = []
    for row in read_jsonl(run / "metrics.jsonl"):
        figures = {"kl": row["objective/kl"], "sentiment": sentiment(row["objective/scores"])}
        figures["seconds"] = sum(row[f"time/{phase}"] for phase in ("rollout", "score", "update"))
        curve.append({"update": row["update"], **figures, **stamp(run)})
    responses = read_jsonl(run / "eval.jsonl")
    for row in responses:
        for name in ("sft", "ppo"):
            row[f"{name}_sentiment"] = sentiment(row.pop(f"{name}_score"))
        row |= stamp(run)
    write_results(args.output_dir / "sentiment.jsonl", responses)
    write_results(args.output_dir / "sentiment_curve.jsonl", curve)
    print("Each update's rollout, by the policy before the update:\n")
    cells = [(row["update"], f"{row['kl']:z.2f}", f"{row['sentiment']:z.2f}") for row in curve]
    print_table(("update", "KL, nats", "sentiment"), cells)
    print("\nResponses to held-out openings, before and after:\n")
    for row in responses[:10]:
        print(f"{row['prompt']} ...")
        for name in ("sft", "ppo"):
            print(f"    {row[f'{name}_sentiment']:z5.2f}  {' '.join(row[name].split())}")
    before, after = (mean(row[f"{name}_sentiment"] for row in responses) for name in ("sft", "ppo"))
    print(f"\nsentiment on {len(responses)} held-out openings: {before:.2f} before, {after:.2f} after")
    each = mean(row["seconds"] for row in curve)
    print(f"KL in the last rollout: {curve[-1]['kl']:z.1f} nats; {seconds:.0f} s, {each:.1f} s an update")


if __name__ == "__main__":
    main()
