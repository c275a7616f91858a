"""Does the reward model's score track the judge? By the number of pairs it saw, and along PPO, which pulls the two apart.

    python benchmark/reward_quality.py --seeds 1 2 3

(1) reward_model.py is trained on the first 500, 1,000, ... pairs (--pairs) with default flags otherwise, so with two passes over
them: the fewer pairs, the fewer steps, and up to 800 pairs all of them fall into the 50 steps of warm-up. The reward model in
--base_dir is that of all 9,000. Of each: accuracy, loss and calibration on the held-out pairs, and Spearman's rank correlation
with the gold score over SFT samples, --samples answers to each held-out prompt.
(2) The policies along PPO runs at two betas, made with that full reward model, answer the held-out prompts: mean score, mean gold
score and their rank correlation, by KL. Update 0 is the SFT model.

Reads   --base_dir: seed1/{sft,reward_model} and so on, made by default flags where they are missing; --ppo_dir:
        seed1/beta_0.1 and so on with their checkpoints, made where they are missing (as benchmark/beta_sweep.py makes them).
Writes  benchmark/results/reward_quality.jsonl, a row for each reward model and for each checkpoint, and reward_quality.png. The
        models are kept in --work_dir and skipped the next time, so a stopped sweep goes on.
Takes   12 reward models and, where they are missing, 6 PPO runs of 10,240 episodes for three seeds, two at a time.
"""

import argparse
import copy
import itertools
import statistics
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # files only, no window
import matplotlib.pyplot as plt
import torch
from common import (BASELINES, COLOURS, RESULTS, ROOT, answers, baselines, checkpoints, held_out, load, mean, ppo_job, ppo_rlhf,
                    read_jsonl, run_all, write_jsonl)  # fmt: skip
from judge import judge, spearman
from reward_model import pair_batch
from tqdm import tqdm
from transformers import AutoModelForSequenceClassification

PAIRS = ROOT / "data/preferences"
STYLES = [("-", "o"), ("--", "s"), (":", "^"), ("-.", "D"), ((0, (1, 1)), "v"), ((0, (5, 1)), "P"), ((0, (3, 1, 1, 1)), "X")]


def fail(message):
    print(f"reward_quality.py: error: {message}", file=sys.stderr)
    raise SystemExit(2)


def number(text):
    """Text of a number, as it stands in the name of a folder."""
    float(text)
    return text


@torch.no_grad()
def margins(reward_model, tokenizer, rows):
    """Raw score of the chosen side minus the rejected one's: [N]."""
    found = []
    for start in range(0, len(rows), 64):
        pairs = [[sum(ppo_rlhf.encode(tokenizer, ppo_rlhf.Args.prompt_template, row["prompt"], row[side]), [])
                  for side in ("chosen", "rejected")] for row in rows[start : start + 64]]  # fmt: skip
        ids, lengths = pair_batch(pairs, tokenizer.pad_token_id, reward_model.device)  # [2b, L], [2b]
        chosen, rejected = ppo_rlhf.score_sequences(reward_model, ids, lengths).chunk(2)  # [b], [b]
        found.append(chosen - rejected)
    return torch.cat(found)


def calibration(margin):
    """Ten bins of the confidence in the preferred side, 0.5 to 1 -> [[pairs in the bin, mean confidence, share right]]."""
    right, confidence = (margin > 0).float(), torch.sigmoid(margin.abs())  # [N], [N]
    bins = ((confidence - 0.5) * 20).long().clamp(max=9)  # [N]
    return [[(bins == b).sum().item(), confidence[bins == b].mean().item(), right[bins == b].mean().item()]
            for b in range(10) if (bins == b).any()]  # fmt: skip


def judged(policy, reference, reward_model, tokenizer, texts, samples):
    """Figures over `samples` answers to each of `texts`."""
    rows = [row for seed in range(samples) for row in answers(policy, reference, reward_model, tokenizer, texts, seed)]
    score, gold = [row["score"] for row in rows], [row["gold"] for row in rows]
    return {"kl": mean(row["kl"] for row in rows), "score": mean(score), "gold": mean(gold), "score_std": statistics.stdev(score),
            "gold_std": statistics.stdev(gold), "rank_correlation": spearman(score, gold), "answers": len(rows)}  # fmt: skip


def by_pairs(folder, pairs, seed, models, texts, test, samples):
    """Row of the reward model in `folder`; models: (SFT model, its tokenizer)."""
    sft, tokenizer = models
    reward_model, _ = ppo_rlhf.load_model(AutoModelForSequenceClassification, str(folder), "reward model")
    evaluation = [row for row in read_jsonl(folder / "metrics.jsonl") if "eval/accuracy" in row][-1]
    quality = judged(sft, sft, reward_model.eval(), tokenizer, texts, samples)
    return {"pairs": pairs, "seed": seed, "accuracy": evaluation["eval/accuracy"], "loss": evaluation["eval/loss"],
            "calibration_error": evaluation["eval/calibration_error"], "rank_correlation": quality["rank_correlation"],
            "bins": calibration(margins(reward_model, tokenizer, test))}  # fmt: skip


def along(run, base, beta, seed, texts, samples):
    """Rows of the SFT model in `base` and of each checkpoint of a PPO run from it."""
    reference, reward_model, tokenizer = load(base)
    policy = copy.deepcopy(reference)
    rows, states = [], itertools.chain([(0, reference.state_dict())], checkpoints(run))
    for update, state in tqdm(states, desc=f"seed {seed}, beta {beta}"):
        policy.load_state_dict(state)
        figures = judged(policy, reference, reward_model, tokenizer, texts, samples)
        rows.append({"beta": beta, "seed": seed, "update": update, **figures})
    return rows


def over_seeds(rows, key):
    """{value of `key`: rows} in order."""
    return {value: [row for row in rows if row[key] == value] for value in sorted({row[key] for row in rows})}


def spread(values, form):
    return f"{mean(values):{form}}" + (f" ({min(values):{form}} to {max(values):{form}})" if len(values) > 1 else "")


def print_tables(rows, runs, ceiling):
    print(f"| pairs | held-out accuracy (gold scores: {ceiling:.1%}) | held-out loss | calibration error | rank correlation |")
    print("| --- " * 5 + "|")
    for pairs, own in over_seeds(rows, "pairs").items():
        cells = [spread([row[key] for row in own], form) for key, form in (
            ("accuracy", ".1%"), ("loss", ".3f"), ("calibration_error", ".3f"), ("rank_correlation", ".2f"))]  # fmt: skip
        print(f"| {pairs:,} |", " | ".join(cells), "|")
    print("\n| beta | update | KL, nats an answer | score, SDs | gold score | rank correlation |")
    print("| --- " * 6 + "|")
    for beta, own in over_seeds(runs, "beta").items():
        updates = list(over_seeds(own, "update").items())
        for update, group in [*updates[: -1 : max(1, len(updates) // 4)], updates[-1]]:
            cells = [spread([row[key] for row in group if row[key] is not None] or [float("nan")], form) for key, form in (
                ("kl", ".1f"), ("score", ".2f"), ("gold", ".2f"), ("rank_correlation", ".2f"))]  # fmt: skip
            print(f"| {beta} | {update} |", " | ".join(cells), "|")


def draw_sizes(axis, rows, ceiling):
    """Accuracy and rank correlation, both shares of 1, against the number of pairs."""
    groups = over_seeds(rows, "pairs")
    for key, colour, (style, marker), label in (
        ("accuracy", COLOURS[0], STYLES[0], "held-out accuracy"),
        ("rank_correlation", COLOURS[3], STYLES[1], "rank correlation\nwith gold"),
    ):
        means = [mean(row[key] for row in own) for own in groups.values()]
        axis.plot([*groups], means, color=colour, linestyle=style, marker=marker, markersize=4, label=label)
        axis.plot([row["pairs"] for row in rows], [row[key] for row in rows], ".", color=colour, markersize=3)
    axis.axhline(ceiling, color="black", linewidth=1, linestyle=":", label="accuracy of the\ngold scores")
    axis.set_xscale("log")
    axis.set_xticks([*groups], [f"{pairs:,}" for pairs in groups], rotation=45)
    axis.minorticks_off()
    axis.set_title("(a) accuracy, correlation (dots: seeds)", loc="left")
    axis.set_xlabel("training pairs"), axis.set_ylabel("share of held-out pairs; correlation")
    axis.legend(frameon=False)


def draw_calibration(axis, rows):
    """Share right against confidence: the diagonal is a model that knows how often it is right."""
    axis.plot([0.5, 1], [0.5, 1], color="black", linewidth=1, linestyle=":")
    groups = over_seeds(rows, "pairs")
    for i, (pairs, own) in enumerate(groups.items()):
        bins = [b for row in own for b in row["bins"]]
        points = []
        for low in range(10):  # the seeds' pairs thrown together; a bin with few is noise
            group = [b for b in bins if low == min(9, int((b[1] - 0.5) * 20))]
            n = sum(b[0] for b in group)
            if n >= 30:
                points.append((sum(b[0] * b[1] for b in group) / n, sum(b[0] * b[2] for b in group) / n))
        axis.plot(*zip(*points), color=COLOURS[i % len(COLOURS)], linestyle=STYLES[i % len(STYLES)][0], linewidth=1.2,
                  marker=STYLES[i % len(STYLES)][1], markersize=4, label=f"{pairs:,} pairs")  # fmt: skip
    axis.set_title("(b) calibration on held-out pairs", loc="left")
    axis.set_xlabel("confidence in the preferred side"), axis.set_ylabel("share of pairs where it was right")
    axis.legend(frameon=False)


def draw_along(axis, runs):
    """Score and gold score in the same unit: standard deviations of the SFT model's answers, from their mean."""
    for i, (beta, own) in enumerate(over_seeds(runs, "beta").items()):
        start = {row["seed"]: row for row in own if row["update"] == 0}
        updates = over_seeds(own, "update").values()
        x = [mean(row["kl"] for row in group) for group in updates]
        for key, style, marker, label in (("score", "-", "o", "reward model"), ("gold", "--", "s", "judge")):
            gains = [mean((row[key] - start[row["seed"]][key]) / start[row["seed"]][f"{key}_std"] for row in group)
                     for group in updates]  # fmt: skip
            axis.plot(x, gains, color=COLOURS[[3, 0, 2, 5][i % 4]], linestyle=style, marker=marker, markersize=3.5, linewidth=1.2,
                      label=f"beta {beta}, {label}")  # fmt: skip
    axis.axhline(0, color="black", linewidth=0.6)
    axis.set_xscale("symlog", linthresh=1)  # from 0, and what a small beta does in the first nats can still be seen
    most = max(row["kl"] for row in runs)
    axis.set_xticks([x for x in (0, 1, 3, 10, 30, 100, 300) if x <= most + 1])
    axis.set_xlim(-0.2, 1.3 * most + 0.2)
    axis.xaxis.set_major_formatter("{x:g}")
    axis.set_title("(c) score and gold score along PPO", loc="left")
    axis.set_xlabel("KL (nats an answer; logarithmic above 1)"), axis.set_ylabel("gain over SFT (SDs of SFT answers)")
    axis.legend(frameon=False)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, nargs="+", default=[500, 1000, 2000, 4500, 9000])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--betas", type=number, nargs="+", default=["0.1", "0"])
    parser.add_argument("--total_episodes", type=int, default=10240, help="of a PPO run that is missing")
    parser.add_argument("--samples", type=int, default=4, help="answers judged to each held-out prompt")
    parser.add_argument("--limit", type=int, help="held-out prompts; all without it")
    parser.add_argument("--base_dir", type=Path, default=BASELINES)
    parser.add_argument("--ppo_dir", type=Path, help="default: beta_sweep in --base_dir")
    parser.add_argument("--work_dir", type=Path, default=ROOT / "runs/reward_quality")
    parser.add_argument("--output_dir", type=Path, default=RESULTS)
    parser.add_argument("--parallel", type=int, default=2, help="runs at a time")
    args = parser.parse_args()
    test = read_jsonl(PAIRS / "test.jsonl")
    everything = len(read_jsonl(PAIRS / "train.jsonl"))
    if min(args.parallel, args.samples) < 1 or args.limit is not None and args.limit < 2:
        fail("--parallel and --samples must be at least 1, --limit at least 2")
    if not all(1 <= pairs <= everything for pairs in args.pairs):
        fail(f"--pairs: each must be 1 to {everything}, the pairs in {PAIRS / 'train.jsonl'}")
    base, work_dir = args.base_dir.resolve(), args.work_dir.resolve()
    ppo_dir = (args.ppo_dir or base / "beta_sweep").resolve()

    baselines(base, args.seeds, args.parallel)
    folders = {(pairs, seed): base / f"seed{seed}/reward_model" if pairs == everything else work_dir / f"seed{seed}/pairs_{pairs}"
               for pairs in sorted({*args.pairs}, reverse=True) for seed in args.seeds}  # fmt: skip
    run_all([(folder, ["reward_model.py", "--seed", seed, "--model_name_or_path", base / f"seed{seed}/sft", "--resume",
                       "--output_dir", folder, "--dataset_train_split", f"train[:{pairs}]"])
             for (pairs, seed), folder in folders.items() if pairs != everything], args.parallel, "reward models")  # fmt: skip
    run_all([ppo_job(ppo_dir / f"seed{seed}/beta_{beta}", base / f"seed{seed}", seed, "--beta", beta, "--total_episodes",
                     args.total_episodes, "--save_steps", 5, "--save_total_limit", 1000)
             for beta in args.betas for seed in args.seeds], args.parallel, "ppo")  # fmt: skip

    texts, sizes, runs = held_out(args.limit), [], []
    for seed in args.seeds:
        reference, _, tokenizer = load(base / f"seed{seed}")
        for pairs in tqdm(sorted({*args.pairs}), desc=f"seed {seed}"):
            sizes.append(by_pairs(folders[pairs, seed], pairs, seed, (reference, tokenizer), texts, test, args.samples))
    for beta in args.betas:
        for seed in args.seeds:
            runs += along(ppo_dir / f"seed{seed}/beta_{beta}", base / f"seed{seed}", beta, seed, texts, args.samples)
    write_jsonl(args.output_dir / "reward_quality.jsonl", [*sizes, *runs])

    gold = [judge(row["prompt"], row["chosen"])["score"] - judge(row["prompt"], row["rejected"])["score"] for row in test]
    ceiling = mean((margin > 0) + (margin == 0) / 2 for margin in gold)
    print_tables(sizes, runs, ceiling)
    plt.rcParams.update({"font.size": 9, "axes.titlesize": 10, "axes.spines.top": False, "axes.spines.right": False})
    figure, (a, b, c) = plt.subplots(1, 3, figsize=(10, 3.7), layout="constrained")
    draw_sizes(a, sizes, ceiling), draw_calibration(b, sizes), draw_along(c, runs)
    for axis in (a, b, c):
        axis.grid(alpha=0.25, linewidth=0.6)
    figure.savefig(args.output_dir / "reward_quality.png", dpi=105)
    print(f"{args.output_dir / 'reward_quality.png'}: {len(sizes)} reward models, {len(runs)} policies along PPO, {args.samples} "
          f"answers to each of {len(texts)} held-out prompts")  # fmt: skip


if __name__ == "__main__":
    main()
