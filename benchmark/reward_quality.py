"""Does the reward model's score track the judge? By the number of pairs it saw, along PPO, error by error.

    python benchmark/reward_quality.py --seeds 1 2 3
    python benchmark/reward_quality.py --errors --seeds 1 2 3 4 5

(1) reward_model.py is trained on the first 500, 1,000, ... pairs with default flags otherwise: the fewer
pairs, the fewer steps. Of each: accuracy, loss and expected calibration error on the held-out pairs, and
Spearman's rank correlation with the gold score over SFT samples. (2) Policies along PPO runs at two betas,
made with the reward model of all pairs: scores, gold scores and their rank correlation, by KL. Update 0 is
the SFT model. Both go to reward_quality.jsonl.

--errors, to errors.jsonl: answers to the held-out prompts, and the same with one thing changed, an error or
an edit of make_data.py. The share that the reward model ranks as the judge does, without noise, and how much
its score differs for a point of the judge's (in standard deviations over SFT responses). An error that it
does not know is one that PPO makes.

Reads --base_dir: seed1/{sft,reward_model} and so on, and beta_sweep/seed1/beta_0.1 and so on with the
checkpoints they kept (beta_sweep.py's); all are made where they are missing.
"""

import common
import make_data
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


def changed_pairs(count):
    """{name of an error or edit: [(prompt, better, worse, difference in gold score)]}"""
    dice = make_data.Dice("errors")
    prompts = make_data.split_prompts()["test"].items()
    pairs = {}
    for change in [*make_data.ERRORS, *make_data.EDITS]:
        for prompt, topic in [*prompts] * count:
            before = make_data.compose(dice, topic, make_data.BETTER)
            answers = [" ".join(make_data.write(x)) for x in (before, change(dice, topic, before))]
            golds = [judge(prompt, answer)["score"] for answer in answers]
            if golds[0] != golds[1]:
                worse, better = (answer for _, answer in sorted(zip(golds, answers)))
                kind = change.__name__.replace("_", " ")
                name = "courtesy or rudeness" if kind == "edit" else kind
                pairs.setdefault(name, []).append((prompt, better, worse, abs(golds[0] - golds[1])))
    return pairs


@torch.no_grad()
def margins(models, pairs):
    """Score of the better side minus the worse one's, of each pair."""
    end_ids = stage2.find_end_ids(models.reference, models.tokenizer)
    sides = []
    for prompt, better, worse, _ in pairs:
        row = {"prompt": prompt, "chosen": better, "rejected": worse}
        prompt_ids, *responses = sft.encode(models.tokenizer, end_ids, row, "chosen", "rejected")
        sides.append([prompt_ids + response for response in responses])
    found = []
    for i in range(0, len(sides), 64):
        chosen, rejected, _, _ = stage2.pair_scores(models.reward_model, sides[i : i + 64], "cpu")
        found += ((chosen - rejected) / models.std).tolist()
    return found


def by_error(args):
    """A row a change and seed."""
    rows = []
    for seed in args.seeds:
        models = common.load(args.base_dir / f"seed{seed}")
        for name, pairs in changed_pairs(2).items():
            found = margins(models, pairs)
            row = {"change": name, "seed": seed, "pairs": len(pairs)}
            row |= {"right": common.mean(x > 0 for x in found)}
            row |= {"margin": sum(found) / sum(difference for *_, difference in pairs)}
            rows.append(row)
    common.write_results(args.output_dir / "errors.jsonl", rows)
    table = []
    for name in dict.fromkeys(row["change"] for row in rows):
        own = [row for row in rows if row["change"] == name]
        spreads = (common.spread((row[key] for row in own), ".2f") for key in ("right", "margin"))
        table.append([name, own[0]["pairs"], *spreads])
    common.print_table(["change", "pairs", "ranked right", "score for a point of gold"], table)


def main():
    parser = common.parser(__doc__)
    add = parser.add_argument
    add("--errors", action="store_true", help="which errors it knows, instead of the rest")
    add("--pairs", type=int, nargs="+", default=[500, 1000, 2000, 4500, 9000])
    add("--betas", nargs="+", default=["0.1", "0"])
    add("--total_episodes", type=int, default=Args.total_episodes, help="of a PPO run that is missing")
    add("--samples", type=int, default=4, help="responses judged to each held-out prompt")
    args = parser.parse_args()
    common.baselines(args.base_dir, args.seeds, args.parallel)
    if args.errors:
        return by_error(args)
    everything = len(common.read_jsonl(PAIRS / "train.jsonl"))
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
    common.write_results(args.output_dir / "reward_quality.jsonl", [*sizes, *runs])

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
