"""Label new pairs for a second round of RLHF: a policy answers the training prompts, the noisy human of
make_data.py compares.

    python data/label.py --policy runs/ppo --add data/preferences --output_dir runs/pairs

Reads   the policy's folder, with the generation_config.json that ppo_rlhf.py saves; data/prompts/train.jsonl;
        the pairs of --add.
Writes  train.jsonl and test.jsonl in --output_dir, columns prompt, chosen and rejected: the pairs of --add
        first, as they are, then the new ones, --pairs of them in train.jsonl, a tenth as many in test.jsonl.
Next    python reward_model.py --dataset_name runs/pairs --output_dir runs/reward_model_2

The held-out prompts (data/prompts/test.jsonl) are never answered. Every tenth training prompt is kept for the
new test pairs, in every round the same ones: their answers are new to the reward model, though the pairs of
--add have shown it their prompts. A pair whose answers the gold judge finds worth the same is drawn again, as
in make_data.py. The same --seed writes the same files on the same machine. Takes a minute and a half on one
CPU core.
"""

import argparse
import json
import math
import sys
from itertools import combinations
from pathlib import Path

import torch
import transformers
from tqdm import tqdm
from transformers import AutoModelForCausalLM

DATA = Path(__file__).resolve().parent
sys.path.insert(0, str(DATA.parent))

from make_data import Dice, compare, describe  # noqa: E402

from ppo_rlhf import fail, load_pretrained, load_rows, render  # noqa: E402

COLUMNS = ["prompt", "chosen", "rejected"]
BATCH = 128  # prompts answered at a time


@torch.no_grad()
def answer(policy, tokenizer, prompts, samples):
    """`samples` answers of the policy to each prompt, by stock `generate` -> [(prompt, [text, ...]), ...]."""
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
    texts = [render(tokenizer, {}, chat, add_generation_prompt=True) for chat in chats]
    rows = {"input_ids": tokenizer(texts, add_special_tokens=False).input_ids}
    inputs = tokenizer.pad(rows, padding_side="left", return_tensors="pt").to(policy.device)  # [b, P]
    width = inputs.input_ids.shape[1]
    longest = width + policy.generation_config.max_new_tokens
    context = getattr(policy.config, "max_position_embeddings", math.inf)
    if longest > context:
        fail(f"--policy: its context is {context} tokens, prompt and max_new_tokens take {longest}")
    sequences = policy.generate(**inputs, num_return_sequences=samples)  # [b * samples, P+T]
    texts = tokenizer.batch_decode(sequences[:, width:], skip_special_tokens=True)
    texts = [text.strip() for text in texts]
    return [(prompt, texts[i * samples :][:samples]) for i, prompt in enumerate(prompts)]


def collect(policy, tokenizer, prompts, samples, count, dice, name):
    """`count` labelled pairs of the policy's answers, round and round the prompts -> rows, pairs drawn."""
    rows, drawn, left = [], 0, []
    progress = tqdm(total=count, desc=name, disable=None)
    while len(rows) < count:
        left = left or dice.shuffled(prompts)
        batch, left = left[:BATCH], left[BATCH:]
        answered = answer(policy, tokenizer, batch, samples)
        pairs = [(prompt, a, b) for prompt, texts in answered for a, b in combinations(texts, 2)]
        labelled = [compare(dice, *pair) for pair in pairs if all(pair)]
        rows, drawn = rows + [row for row in labelled if row], drawn + len(pairs)
        progress.update(min(len(rows), count) - progress.n)
        if drawn >= 1000 and len(rows) < drawn / 100:
            fail(f"--policy: of {drawn} pairs of answers {len(rows)} are neither blank nor worth the same")
    progress.close()
    return rows[:count], drawn


def main():
    as_it_is = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_it_is)
    add = parser.add_argument
    add("--policy", default="runs/ppo", help="folder of the model that answers (default: %(default)s)")
    add("--add", metavar="FOLDER", help="older pairs, which go in first: with train.jsonl and test.jsonl")
    add("--output_dir", type=Path, default="runs/pairs", help="where the pairs go (default: %(default)s)")
    add("--pairs", type=int, default=3000, help="new pairs in train.jsonl (default: %(default)s)")
    add("--samples", type=int, default=2, help="answers compared with each other (default: %(default)s)")
    add("--seed", type=int, default=1, help="of the answers and the labels (default: %(default)s)")
    add("--overwrite", action="store_true", help="write to a folder that is not empty")
    args = parser.parse_args()

    if args.pairs < 10 or args.samples < 2 or args.seed < 0:
        given = f"--pairs {args.pairs} --samples {args.samples} --seed {args.seed}"
        fail(f"{given}: must be at least 10, 2 and 0")
    folder = args.output_dir
    if folder.exists() and not args.overwrite and (folder.is_file() or any(folder.iterdir())):
        fail(f"--output_dir {folder} is not empty: replace its pairs by --overwrite, or name another")
    if not Path(args.policy, "config.json").exists():
        fail(f"--policy {args.policy}: there is no model in this folder; `python ppo_rlhf.py` makes runs/ppo")
    train = [row["prompt"] for row in load_rows(str(DATA / "prompts"), "train")]
    held_out = [row["prompt"] for row in load_rows(str(DATA / "prompts"), "test")]
    tables = {"train": [], "test": []}
    for split in tables if args.add else []:
        if not Path(args.add, f"{split}.jsonl").is_file():
            fail(f"--add {args.add}: has no {split}.jsonl; give a folder of pairs, such as data/preferences")
        for number, row in enumerate(load_rows(args.add, split), 1):
            if not all(isinstance(row.get(column), str) for column in COLUMNS):
                fail(f"{args.add}, {split}, row {number}: it must have {', '.join(COLUMNS)}")
            tables[split].append({column: row[column] for column in COLUMNS})
    for row in tables["train"]:
        if row["prompt"] in held_out:
            fail(f"--add {args.add}: its train.jsonl has pairs of a held-out prompt, {row['prompt']!r:.80}")

    policy, tokenizer = load_pretrained(AutoModelForCausalLM, args.policy)
    if not (policy.generation_config.do_sample and policy.generation_config.max_new_tokens):
        fail(f"--policy {args.policy}: its generation_config.json does not sample, as ppo_rlhf.py's does")
    policy.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    torch.manual_seed(args.seed)
    asked = {"train": [prompt for i, prompt in enumerate(train) if i % 10], "test": train[::10]}
    for split, prompts in asked.items():
        count = args.pairs if split == "train" else args.pairs // 10
        dice = Dice(f"{args.seed} {split}")
        rows, drawn = collect(policy, tokenizer, prompts, args.samples, count, dice, split)
        older = len(tables[split])
        print(f"{split}: {older} older pairs, {len(rows)} new ones of {drawn} drawn: {describe(rows)}")
        tables[split] += rows
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in tables.items():
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{split}.jsonl").write_text(lines, encoding="utf-8")
    flags = f"--dataset_name {folder} --output_dir runs/reward_model_2"
    print(f"saved to {folder}. Next: python reward_model.py {flags}")


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        main()
    except OSError as error:  # a full disk, a folder that may not be written
        fail(" ".join(str(error).split()))
