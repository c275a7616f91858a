"""Does the reward model's score track the judge? By the number of pairs it saw, and along PPO.

    python benchmark/reward_quality.py --seeds 1 2 3

(1) reward_model.py is trained on the first 500, 1,000, ... pairs with default flags otherwise: the fewer
pairs, the fewer steps. Of each: accuracy, loss and expected calibration error on the held-out pairs, and
Spearman's rank correlation with the gold score over SFT samples. (2) Policies along PPO runs at two betas,
made with the reward model of all pairs: scores, gold scores and their rank correlation, by KL. Update 0 is
the SFT model.

Reads --base_dir: seed1/{sft,reward_model} and so on, and beta_sweep/seed1/beta_0.1 and so on with the
checkpoints they kept (beta_sweep.py's); all are made where they are missing.
"""

import common
import torch
from judge import judge, spearman
from tqdm import tqdm

import reward_model as stage2
import sft
from ppo_rlhf import Args

PAIRS = common.DATA / "preferences"


def by_pairs(folder, models, texts, samples):
    """Figures of the reward model in `folder`."""
    evaluation = [row for row in common.read_jsonl(folder / "metrics.jsonl") if "eval/accuracy" in row][-1]
    models.reward_model = common.load_reward_model(folder)
    rows = common.respond(models.reference, models, texts * samples, seed=0)
    correlation = spearman([row["score"] for row in rows], [row["gold"] for row in rows])
    figures = {name: evaluation[f"eval/{name}"] for name in ("accuracy", "loss", "ece")}
    return {**figures, "rank_correlation": correlation, "responses": len(rows)}


@torch.no_grad()
def accuracy(model, tokenizer, rows, end_ids):
    """Share of pairs whose chosen side the reward model scores higher."""
    pairs = []
    for row in rows:
        sides = [sft.encode(tokenizer, end_ids, row, side) for side in ("chosen", "rejected")]
        pairs.append([prompt + response for prompt, response in sides])
    return float(stage2.evaluate(model, pairs, 64, "cpu")["eval/accuracy"])


def main():
    parser = common.parser(__doc__)
    add = parser.add_argument
    add("--pairs", type=int, nargs="+", default=[500, 1000, 2000, 4500, 9000])
    add("--betas", nargs="+", default=["0.1", "0"])
    add("--total_episodes", type=int, default=Args.total_episodes, help="of a PPO run that is missing")
    add("--samples", type=int, default=4, help="responses judged to each held-out prompt")
    args = parser.parse_args()
    everything = len(common.read_jsonl(PAIRS / "train.jsonl"))
    common.baselines(args.base_dir, args.seeds, args.parallel)
    folders = {}
    jobs = []
    ppo = {}
    for seed in args.seeds:
        base = args.base_dir / f"seed{seed}"
        for pairs in args.pairs:
            folders[pairs, seed] = folder = base / f"reward_quality/pairs_{pairs}"
            if pairs == everything:
                folders[pairs, seed] = base / "reward_model"
                continue
            flags = {"model_name_or_path": base / "sft", "dataset_train_split": f"train[:{pairs}]"}
            jobs.append(common.job(folder, "reward_model.py", seed=seed, **flags))
        for beta in args.betas:
            run = args.base_dir / f"beta_sweep/seed{seed}/beta_{beta}"
            flags = {"beta": beta, "total_episodes": args.total_episodes, "save_steps": 3}
            ppo[beta, seed] = common.ppo_job(run, base, seed, **flags)
    common.run_all(jobs, args.parallel, "reward models")
    common.run_all(list(ppo.values()), args.parallel, "ppo", keep=True)

    texts = common.held_out(args.limit)
    sizes = []
    runs = []
    for seed in tqdm(args.seeds, desc="judging"):
        models = common.load(args.base_dir / f"seed{seed}")
        for beta in args.betas:
            found = common.along(ppo[beta, seed][0], models, texts, args.samples)
            runs += [{"beta": beta, "seed": seed, **row} for row in found]
        for pairs in args.pairs:
            figures = by_pairs(folders[pairs, seed], models, texts, args.samples)
            sizes.append({"pairs": pairs, "seed": seed, **figures})
    common.write_jsonl(args.output_dir / "reward_quality.jsonl", [*sizes, *runs])

    test = common.read_jsonl(PAIRS / "test.jsonl")
    golds = [[judge(row["prompt"], row[side])["score"] for side in ("chosen", "rejected")] for row in test]
    ceiling = common.mean((a > b) + (a == b) / 2 for a, b in golds)
    columns = {"accuracy": ".1%", "loss": ".3f", "ece": ".3f", "rank_correlation": ".2f"}
    titles = ["pairs", f"held-out accuracy (gold scores: {ceiling:.1%})", "held-out loss"]
    table = []
    for pairs in args.pairs:
        own = [row for row in sizes if row["pairs"] == pairs]
        cells = [common.spread((row[key] for row in own), form) for key, form in columns.items()]
        table.append([f"{pairs:,}", *cells])
    common.print_table([*titles, "expected calibration error", "rank correlation"], table)
    columns = {"kl": ".1f", "score": ".2f", "gold": ".2f", "rank_correlation": ".2f"}
    table = []
    for beta, update in dict.fromkeys((row["beta"], row["update"]) for row in runs):
        own = [row for row in runs if (row["beta"], row["update"]) == (beta, update)]
        cells = [common.spread((row[key] or 0.0 for row in own), form) for key, form in columns.items()]
        table.append([beta, update, *cells])
    common.print_table(["beta", "update", "KL, nats", "RM score", "gold score", "rank correlation"], table)


if __name__ == "__main__":
    main()
