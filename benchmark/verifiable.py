"""A reward that can be checked: a model learns to add from demonstrations of which a third are wrong.

    python benchmark/verifiable.py --seeds 1 2 3

The scratch model is trained on worked sums of two-digit numbers, 49+97: `9+7+0=16 4+9+1=14 so 146`. In a
third of the demonstrations the carry is forgotten (`9+7+0=16 4+9+0=13 so 136`), which is most of the sums
that have one: SFT learns the mistake. Then PPO, RLOO and GRPO with forks/rule_reward.patch: 1 for a response
that ends with the row's `answer`. Demonstrations, training prompts and held-out prompts share no sum, and no
run sees a prompt in two updates. A run that was stopped is resumed. Data, models and logs are in
runs/verifiable; figures of each run go to results/verifiable.jsonl, the drawing to results/verifiable.png.
"""

import argparse
import random
from collections import Counter
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
    run_all,
    spread,
    stamp,
    write_jsonl,
)
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import ppo_rlhf

RUNS = ROOT / "runs/verifiable"
SFT_FLAGS = "--learning_rate 1e-3 --per_device_train_batch_size 8 --max_steps 2000"
# A third of the default learning rate, at which the share of right answers falls now and then. No penalty for
# responses that are cut off: they are wrong, and the mean score is then the share of right ones, normalized
FLAGS = (
    "--learning_rate 5e-5 --beta 0.01 --total_episodes 2048 --max_new_tokens 32 --missing_eos_penalty 0 "
    "--per_device_train_batch_size 64"
)
METHODS = {  # name -> patches, flags
    "PPO": ([], ""),  # without a reward model, values are the policy's own
    "PPO, no values": ([], "--vf_coef 0"),
    "PPO, own critic": (["critic_from_policy"], ""),
    "PPO, own critic learns first": (
        ["critic_from_policy"],
        "--critic_warmup_updates 12 --learning_rate 1.5e-4 --total_episodes 3072",
    ),
    "RLOO": (["rloo"], "--num_generations 8 --vf_coef 0"),
    "GRPO": (["grpo"], "--num_generations 8 --vf_coef 0"),
    # The policy stands still, to see what its own states tell a value head
    "value head alone": ([], "--learning_rate 1e-12"),
}
SAMPLES = 8  # responses to each held-out problem


# ---- Data ----


def solve(a, b, forget=False):
    """a + b, worked out digit by digit; with `forget`, nothing is carried from the units to the tens."""
    units = a % 10 + b % 10
    carry = 0 if forget else units // 10
    tens = a // 10 + b // 10 + carry
    steps = f"{a % 10}+{b % 10}+0={units} {a // 10}+{b // 10}+{carry}={tens}"
    return f"{steps} so {10 * tens + units % 10}"


def demonstrations(pairs, rng):
    """Rows of which a third are wrong: sums with a carry, chosen at random."""
    with_carry = [i for i, pair in enumerate(pairs) if solve(*pair) != solve(*pair, forget=True)]
    wrong = set(rng.sample(with_carry, len(pairs) // 3))
    return [{"prompt": f"{a}+{b}", "completion": solve(a, b, i in wrong)} for i, (a, b) in enumerate(pairs)]


def problems(pairs):
    """Prompts, and what a right response ends with: no other number ends with "so " and its digits."""
    return [{"prompt": f"{a}+{b}", "answer": f"so {a + b}"} for a, b in pairs]


def write_data(folder, seed):
    rng = random.Random(seed)
    pairs = [(a, b) for a in range(10, 100) for b in range(10, 100)]
    rng.shuffle(pairs)
    write_jsonl(folder / "prompts/test.jsonl", problems(pairs[:256]))
    write_jsonl(folder / "prompts/train.jsonl", problems(pairs[256:3856]))
    write_jsonl(folder / "demonstrations/test.jsonl", demonstrations(pairs[3856:4056], rng))
    write_jsonl(folder / "demonstrations/train.jsonl", demonstrations(pairs[4056:8056], rng))


# ---- Judging ----


@torch.no_grad()
def judge(policy, reference, tokenizer, dataset):
    """Exact match of a policy on the held-out problems, and its KL from the reference."""
    args = ppo_rlhf.Args(dataset_name=str(dataset), max_new_tokens=32)
    end_ids = ppo_rlhf.find_end_ids(reference, tokenizer)
    prompts = ppo_rlhf.load_prompts(tokenizer, args, "test")
    right = []
    majority = []
    kl = []
    torch.manual_seed(0)  # the same random numbers for every policy
    for start in range(0, len(prompts), 16):
        repeated = [prompt for prompt in prompts[start : start + 16] for _ in range(SAMPLES)]
        batch = ppo_rlhf.sample(policy, tokenizer, repeated, args, end_ids)
        inputs = (batch.sequences, batch.starts, batch.responses, args.temperature)
        logprobs, ref_logprobs = (ppo_rlhf.forward(model, *inputs)[0] for model in (policy, reference))
        kl += ((logprobs - ref_logprobs) * batch.mask).sum(1).tolist()
        texts = tokenizer.batch_decode(batch.responses, skip_special_tokens=True)
        for i in range(0, len(texts), SAMPLES):
            answer = repeated[i].row["answer"]
            right.append([text.endswith(answer) for text in texts[i : i + SAMPLES]])
            answers = Counter(" ".join(text.split()[-2:]) for text in texts[i : i + SAMPLES])
            majority.append(answers.most_common(1)[0][0] == answer)
    args.temperature = 0.001  # greedy
    batch = ppo_rlhf.sample(policy, tokenizer, prompts, args, end_ids)
    texts = tokenizer.batch_decode(batch.responses, skip_special_tokens=True)
    greedy = [text.endswith(prompt.row["answer"]) for prompt, text in zip(prompts, texts)]
    return {
        "greedy": mean(greedy),
        "pass@1": mean(map(mean, right)),
        "majority": mean(majority),
        f"pass@{SAMPLES}": mean(map(any, right)),
        "kl": mean(kl),
    }


def curve(run):
    """Share of right responses in each rollout, to prompts that were not seen before."""
    score_mean, score_std = load_file(run / "value_head.safetensors")["score_scale"].tolist()
    metrics = read_jsonl(run / "metrics.jsonl")
    return [round(score_mean + score_std * row["objective/scores"], 4) for row in metrics]


def episodes_to(shares, level):
    """Episodes until the mean over two updates is at `level`; None if it never is."""
    for end in range(2, len(shares) + 1):
        if mean(shares[end - 2 : end]) >= level:
            return end * ppo_rlhf.Args.batch_size
    return None


def describe(seed, name, base, run):
    """Row of a run, or of the SFT model."""
    policy, tokenizer = ppo_rlhf.load_pretrained(AutoModelForCausalLM, str(run))
    reference, _ = ppo_rlhf.load_pretrained(AutoModelForCausalLM, str(base / "sft"))
    row = {"seed": seed, "method": name, "seconds": round(float((run / "wall_seconds").read_text()))}
    row |= {key: round(x, 4) for key, x in judge(policy, reference, tokenizer, base / "prompts").items()}
    if name != "SFT":
        row["curve"] = curve(run)
        row["episodes_to_90"] = episodes_to(row["curve"], 0.9)
        metrics = read_jsonl(run / "metrics.jsonl")
        row["explained_variance"] = [round(line["val/explained_variance"], 3) for line in metrics]
    return row | stamp(run)


def draw(rows, path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4))
    for name in METHODS:
        curves = [row["curve"] for row in rows if row["method"] == name]
        episodes = [ppo_rlhf.Args.batch_size * (i + 1) for i in range(len(curves[0]))]
        middle = [100 * mean(values) for values in zip(*curves)]
        (line,) = axes.plot(episodes, middle, label=name)
        low, high = ([100 * pick(values) for values in zip(*curves)] for pick in (min, max))
        axes.fill_between(episodes, low, high, color=line.get_color(), alpha=0.12, linewidth=0)
    sft = [row for row in rows if row["method"] == "SFT"]
    for key, style in (("majority", ":"), (f"pass@{SAMPLES}", "--")):
        level = 100 * mean(row[key] for row in sft)
        axes.axhline(level, color="grey", linestyle=style, label=f"SFT model, {key}", linewidth=1)
    axes.set(xlabel="episodes", ylabel="right answers in the rollout, %", ylim=(40, 101))
    axes.legend(fontsize=8, loc="lower right")
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def main():
    as_it_is = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_it_is)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument(
        "--parallel", type=int, default=2, help="runs at a time, on an equal share of the cores"
    )
    parser.add_argument("--output_dir", type=Path, default=RESULTS)
    args = parser.parse_args()
    bases = {seed: RUNS / f"seed{seed}" for seed in args.seeds}
    sft_jobs = []
    for seed, base in bases.items():
        write_data(base, seed)
        data = {"dataset_name": base / "demonstrations"}
        sft_jobs.append(job(base / "sft", "sft.py", *SFT_FLAGS.split(), seed=seed, **data))
    run_all(sft_jobs, args.parallel, "SFT")
    jobs = []
    runs = []
    for name, (patches, flags) in METHODS.items():
        folder = name.replace(",", "").replace(" ", "_")
        script = make_copy(
            RUNS / "scripts" / folder, [f"forks/{patch}" for patch in ["rule_reward", *patches]]
        )
        for seed, base in bases.items():
            inputs = {"sft_model_path": base / "sft", "dataset_name": base / "prompts", "seed": seed}
            jobs.append(job(base / folder, script, *FLAGS.split(), *flags.split(), **inputs))
            runs.append((seed, name, base, base / folder))
    run_all(jobs, args.parallel, "PPO, RLOO, GRPO")
    rows = [describe(seed, "SFT", base, base / "sft") for seed, base in bases.items()]
    rows += [describe(*run) for run in runs]
    write_jsonl(args.output_dir / "verifiable.jsonl", rows)
    draw(rows, args.output_dir / "verifiable.png")
    cells = []
    for name in ("SFT", *METHODS):
        found = [row for row in rows if row["method"] == name]
        line = [name]
        for key in ("greedy", "majority", "pass@1", f"pass@{SAMPLES}"):
            line.append(spread([100 * row[key] for row in found], ".1f"))
        line.append(spread([row["kl"] for row in found], ".2f"))
        episodes = [row.get("episodes_to_90") for row in found]
        line.append(" / ".join(f"{count:,}" if count else "-" for count in episodes))
        values = [row.get("explained_variance", [0.0]) for row in found]
        line.append(spread([max(each) for each in values], ".2f"))
        line.append(spread([row["seconds"] for row in found], ".0f"))
        cells.append(line)
    titles = ("", "greedy", "majority", "pass@1", "pass@8", "KL", "episodes to 90%", "explained", "seconds")
    print_table(titles, cells)


if __name__ == "__main__":
    main()
