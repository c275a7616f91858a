"""Iterated RLHF (Bai et al. 2022): is a policy better if its reward model has also learnt from the last policy's answers?

    python benchmark/iterated.py --seeds 1 2 3 4 5 --betas 0.1 --rounds 1 --label newest sft     # half an hour on two cores

Reads   --base_dir/seedN/{sft,reward_model,beta_B}, as shipped_task.py leaves them; what is missing is made (round 0).
Writes  --work_dir/seedN/newest_beta_B/roundR/{pairs,reward_model,ppo}; benchmark/results/iterated.jsonl, a row for each round.

Each beta has rounds of its own. A round labels --pairs new pairs of the last round's policy (data/label.py), trains a reward
model on all pairs so far and a policy against it, both anew from the same SFT model. With --label sft the new pairs are answers
of the SFT model instead: what more pairs bring by themselves. What has been run is kept and skipped the next time.

Judged on four answers to each held-out prompt: the gold judge's score, the win rate against the SFT model's answers of the same
luck, the KL, and Spearman's correlation of the round's reward model with the gold judge on the policy's own answers. The
reward model's accuracy is counted on the held-out pairs of data/preferences, and on the new ones that its round held out,
where that of the last round's reward model and the gold judge's own stand beside it.
"""

import argparse
import contextlib
from pathlib import Path

from common import (BASELINES, RESULTS, ROOT, answers, baselines, half_width, held_out, mean, ppo_job, read_jsonl, run_all,
                    write_jsonl)  # fmt: skip

import ppo_rlhf  # this and the next two stand where common has put them into the path
import reward_model as stage2
from judge import judge, spearman

ERRORS = ["garbled", "foreign", "repeated", "misplaced"]  # of the rubric, counted an answer: what the first pairs have little of
TITLES = {"gold": "gold", "win_rate": "win rate", "kl": "KL", "score": "RM score", "spearman": "spearman", "accuracy": "accuracy",
          "accuracy_new": "on new pairs", "accuracy_new_last": "last RM's", "accuracy_new_gold": "gold's"}  # fmt: skip


def load(kind, folder):
    """(model, tokenizer) as ppo_rlhf.py loads them."""
    model, tokenizer = ppo_rlhf.load_model(getattr(ppo_rlhf, f"AutoModelFor{kind}"), str(folder), kind)
    return model.eval(), tokenizer


def accuracy(model, tokenizer, rows):
    """Share of the pairs whose chosen side the reward model scores higher."""
    template = ppo_rlhf.Args.prompt_template
    pairs = [[sum(ppo_rlhf.encode(tokenizer, template, row["prompt"], row[side]), []) for side in ("chosen", "rejected")]
             for row in rows]  # fmt: skip
    return stage2.evaluate(model, pairs, 64, tokenizer.pad_token_id, "cpu", contextlib.nullcontext())["eval/accuracy"]


def gold_accuracy(rows):
    return mean(judge(row["prompt"], row["chosen"])["score"] > judge(row["prompt"], row["rejected"])["score"] for row in rows)


def evaluate(rounds, seed, sft):
    """A row of figures for each of `rounds`, {number: folders of (pairs, reward model, policy)}."""
    reference, tokenizer = load("CausalLM", sft)
    old_pairs = read_jsonl(ROOT / "data/preferences/test.jsonl")
    rows, last, known = [], None, len(old_pairs)
    for number, (pairs, reward_folder, policy_folder) in rounds.items():
        policy, _ = load("CausalLM", policy_folder)
        model, _ = load("SequenceClassification", reward_folder)
        ppo, base = (answers(side, reference, model, tokenizer, held_out() * 4, seed) for side in (policy, reference))
        wins = [(a["gold"] > b["gold"]) + (a["gold"] == b["gold"]) / 2 for a, b in zip(ppo, base)]
        rows.append({
            "round": number, "gold_sft": mean(row["gold"] for row in base), "win_rate": mean(wins),
            **{name: mean(row[name] for row in ppo) for name in ("gold", "kl", "score", "length")},
            **{item: mean(judge(row["prompt"], row["response"])[item] for row in ppo) for item in ERRORS},
            "spearman": spearman([row["score"] for row in ppo], [row["gold"] for row in ppo]),
            "accuracy": accuracy(model, tokenizer, old_pairs),
        })  # fmt: skip
        if pairs:
            new = read_jsonl(pairs / "test.jsonl")[known:]  # the older ones stand first
            rows[-1].update(new_pairs=len(new), accuracy_new=accuracy(model, tokenizer, new),
                            accuracy_new_last=accuracy(last, tokenizer, new), accuracy_new_gold=gold_accuracy(new))  # fmt: skip
            known += len(new)
        last = model
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--betas", type=float, nargs="+", default=[0.1, 0.02])
    parser.add_argument("--rounds", type=int, default=2, help="after the first training, round 0")
    parser.add_argument("--label", nargs="+", default=["newest"], choices=["newest", "sft"], help="whose answers are labelled")
    parser.add_argument("--pairs", type=int, default=3000, help="new pairs a round; with another number, give another --work_dir")
    parser.add_argument("--parallel", type=int, default=2, help="runs at a time")
    parser.add_argument("--base_dir", type=Path, default=BASELINES)
    parser.add_argument("--work_dir", type=Path, default=ROOT / "runs/iterated")
    parser.add_argument("--output", type=Path, default=RESULTS / "iterated.jsonl")
    args = parser.parse_args()
    if args.parallel < 1 or args.rounds < 0 or args.pairs < 10:
        parser.error("--parallel, --rounds and --pairs must be at least 1, 0 and 10")
    base_dir, work_dir = args.base_dir.resolve(), args.work_dir.resolve()
    base = {seed: base_dir / f"seed{seed}" for seed in args.seeds}
    baselines(base_dir, args.seeds, args.parallel)
    first = {(seed, beta): base[seed] / f"beta_{beta}" for seed in args.seeds for beta in args.betas}
    first = {key: run if (run / "wall_seconds").exists() else work_dir / f"seed{key[0]}" / run.name for key, run in first.items()}
    run_all([ppo_job(run, base[seed], seed, "--beta", beta) for (seed, beta), run in first.items()], args.parallel, "round 0")

    chains = {(label, seed, beta): {0: (None, base[seed] / "reward_model", run)}
              for label in args.label for (seed, beta), run in first.items()}  # fmt: skip
    for number in range(1, args.rounds + 1):
        jobs = {"pairs": [], "reward model": [], "PPO": []}
        for (label, seed, beta), rounds in chains.items():
            folder, sft = work_dir / f"seed{seed}" / f"{label}_beta_{beta}" / f"round{number}", base[seed] / "sft"
            older, _, policy = rounds[number - 1]
            pairs, model, ppo = folder / "pairs", folder / "reward_model", folder / "ppo"
            rounds[number] = pairs, model, ppo
            jobs["pairs"].append((pairs, [
                "data/label.py", "--policy", policy if label == "newest" else sft, "--add", older or "data/preferences",
                "--pairs", args.pairs, "--seed", 100 * seed + number, "--output_dir", pairs, "--overwrite"]))  # fmt: skip
            jobs["reward model"].append((model, ["reward_model.py", "--seed", seed, "--model_name_or_path", sft,
                                                 "--dataset_name", pairs, "--output_dir", model, "--resume"]))  # fmt: skip
            jobs["PPO"].append((ppo, ["ppo_rlhf.py", "--seed", seed, "--beta", beta, "--sft_model_path", sft,
                                      "--reward_model_path", model, "--output_dir", ppo, "--resume"]))  # fmt: skip
        for name, stage in jobs.items():
            run_all(stage, args.parallel, f"round {number}, {name}")

    rows = [{"seed": seed, "beta": beta, "labelled": label, **row}
            for (label, seed, beta), rounds in chains.items() for row in evaluate(rounds, seed, base[seed] / "sft")]  # fmt: skip
    write_jsonl(args.output, rows)
    print("labelled  beta  round" + "".join(f"{title:>14}" for title in TITLES.values()))
    for label, beta, number in dict.fromkeys((row["labelled"], row["beta"], row["round"]) for row in rows):
        group = [row for row in rows if (row["labelled"], row["beta"], row["round"]) == (label, beta, number)]
        figures = [f"{mean(row[name] for row in group):14.3f}" if name in group[0] else f"{'-':>14}" for name in TITLES]
        print(f"{label:8}{beta:6}{number:7}" + "".join(figures))
    print("\nagainst round 0, and against the same round with answers of the SFT model: mean [95% interval]")
    gold = {(row["labelled"], row["beta"], row["round"], row["seed"]): row["gold"] for row in rows}
    for label, beta, number in dict.fromkeys(key[:3] for key in gold if key[2]):
        texts = []
        for other in [(label, beta, 0)] + [("sft", beta, number)] * (label != "sft" and "sft" in args.label):
            gains = [gold[label, beta, number, seed] - gold[*other, seed] for seed in args.seeds]
            low, high = (mean(gains) + sign * half_width(gains) for sign in (-1, 1))
            texts.append(f"{mean(gains):+.2f} [{low:+.2f}, {high:+.2f}]")
        print(f"{label:8}{beta:6}{number:7}  gold " + ", ".join(texts))
    print(f"Means over seeds {' '.join(map(str, args.seeds))}; rows in {args.output}")


if __name__ == "__main__":
    main()
