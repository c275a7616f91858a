"""Iterated RLHF (Bai et al. 2022): is a policy better if its reward model also learned from the last policy?

    python benchmark/iterated.py --seeds 1 2 3 4 5 --betas 0.1 --rounds 1 --label newest sft

A round labels --pairs new pairs of the last round's policy (data/label.py), trains a reward model on all
pairs so far and a policy against it, both trained from the same SFT model. With --label sft the new pairs are
responses of the SFT model instead: what more pairs bring by themselves. Runs are kept in --work_dir.

Judged on four responses to each held-out prompt. The reward model's accuracy is counted on the held-out pairs
of data/preferences, and on the new ones that its round held out, beside the last round's and the judge's own.
"""

from pathlib import Path

import common
from common import mean, read_jsonl
from judge import judge, spearman
from reward_quality import accuracy

import ppo_rlhf

TITLES = {"gold": "gold score", "win_rate": "gold win rate", "kl": "KL, nats", "score": "RM score"}
TITLES |= {"spearman": "rank correlation", "accuracy": "accuracy", "accuracy_new": "on new pairs"}
TITLES |= {"accuracy_new_last": "last RM's", "accuracy_new_gold": "gold score's"}


def evaluate(rounds, seed, base, texts):
    """A row of figures for each of `rounds`, {number: folders of (pairs, reward model, policy)}."""
    old_pairs = read_jsonl(common.DATA / "preferences/test.jsonl")
    rows = []
    last = None
    known = len(old_pairs)
    for number, (pairs, reward_model, policy) in rounds.items():
        models = common.load(base, reward_model)
        end_ids = ppo_rlhf.find_end_ids(models.reference, models.tokenizer)
        ppo = common.respond(common.load_policy(policy), models, texts, seed)
        sft = common.respond(models.reference, models, texts, seed)
        correlation = spearman([row["score"] for row in ppo], [row["gold"] for row in ppo])
        row = {"round": number, "win_rate": common.win_rate(ppo, sft), "spearman": correlation}
        row |= common.average(ppo)
        row["accuracy"] = accuracy(models.reward_model, models.tokenizer, old_pairs, end_ids)
        if pairs:
            new = read_jsonl(pairs / "test.jsonl")[known:]  # the older ones stand first
            known += len(new)
            row["accuracy_new"] = accuracy(models.reward_model, models.tokenizer, new, end_ids)
            row["accuracy_new_last"] = accuracy(last, models.tokenizer, new, end_ids)
            gold = [[judge(x["prompt"], x[side])["score"] for side in ("chosen", "rejected")] for x in new]
            row["accuracy_new_gold"] = mean(chosen > rejected for chosen, rejected in gold)
        last = models.reward_model
        rows.append(row)
    return rows


def main():
    parser = common.parser(__doc__)
    add = parser.add_argument
    add("--betas", type=float, nargs="+", default=[0.1, 0.02])
    add("--rounds", type=int, default=2, help="after the first training, round 0")
    add("--label", nargs="+", default=["newest"], choices=["newest", "sft"], help="whose responses")
    add("--pairs", type=int, default=3000, help="new pairs a round; another number wants another --work_dir")
    add("--total_episodes", type=int, default=ppo_rlhf.Args.total_episodes)
    add("--work_dir", type=lambda x: Path(x).resolve(), default=common.WORLD / "runs/iterated")
    args = parser.parse_args()
    common.baselines(args.base_dir, args.seeds, args.parallel)
    base = {seed: args.base_dir / f"seed{seed}" for seed in args.seeds}
    chains = {}
    jobs = []
    for seed in args.seeds:
        for beta in args.betas:
            run = args.work_dir / f"seed{seed}/beta_{beta}"
            jobs.append(common.ppo_job(run, base[seed], seed, beta=beta, total_episodes=args.total_episodes))
            for label in args.label:
                chains[label, seed, beta] = {0: (None, base[seed] / "reward_model", run)}
    common.run_all(jobs, args.parallel, "round 0")
    for number in range(1, args.rounds + 1):
        jobs = {"pairs": [], "reward model": [], "PPO": []}
        for (label, seed, beta), rounds in chains.items():
            folder = args.work_dir / f"seed{seed}/{label}_beta_{beta}/round{number}"
            sft = base[seed] / "sft"
            older, _, policy = rounds[number - 1]
            pairs, model, ppo = rounds[number] = [folder / name for name in ("pairs", "reward_model", "ppo")]
            add = {"policy": policy if label == "newest" else sft, "add": older or "data/preferences"}
            add |= {"pairs": args.pairs, "seed": 100 * seed + number, "output_dir": pairs}
            words = [word for name, value in add.items() for word in (f"--{name}", value)]
            jobs["pairs"].append((pairs, [common.DATA / "label.py", *words, "--overwrite"]))
            add = {"seed": seed, "model_name_or_path": sft, "dataset_name": pairs}
            jobs["reward model"].append(common.job(model, "reward_model.py", **add))
            add = {"beta": beta, "reward_model_path": model, "total_episodes": args.total_episodes}
            jobs["PPO"].append(common.ppo_job(ppo, base[seed], seed, **add))
        for name, stage in jobs.items():
            common.run_all(stage, args.parallel, f"round {number}, {name}")

    rows = []
    texts = common.held_out(args.limit) * 4
    for (label, seed, beta), rounds in chains.items():
        for row in evaluate(rounds, seed, base[seed], texts):
            rows.append({"seed": seed, "beta": beta, "labelled": label, **row})
    common.write_jsonl(args.output_dir / "iterated.jsonl", rows)
    gold = {(row["labelled"], row["beta"], row["round"], row["seed"]): row["gold"] for row in rows}
    table = []
    for label, beta, number in dict.fromkeys(key[:3] for key in gold):
        own = [row for row in rows if (row["labelled"], row["beta"], row["round"]) == (label, beta, number)]
        cells = [f"{mean(row[key] for row in own):.3f}" if key in own[0] else "" for key in TITLES]
        for other in ((label, beta, 0), ("sft", beta, number)):
            gains = [gold[label, beta, number, seed] - gold.get((*other, seed), 0) for seed in args.seeds]
            known = (*other, args.seeds[0]) in gold and other != (label, beta, number)
            cells.append(common.interval(gains) if known else "")
        table.append([label, beta, number, *cells])
    titles = ["labelled", "beta", "round", *TITLES.values(), "gold - round 0's", "gold - SFT's pairs'"]
    common.print_table(titles, table)


if __name__ == "__main__":
    main()
