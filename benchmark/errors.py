"""Which errors does the reward model know?

    python benchmark/errors.py --seeds 1 2 3 4 5

Answers to the held-out prompts, and the same with one thing changed: an error or an edit of make_data.py. The
share that the reward model ranks as the judge does, without noise, and how much its score differs for a point
of the judge's (in standard deviations over SFT responses). An error that it does not know is one that PPO
makes. Reads --base_dir: seed1/{sft,reward_model} and so on, made where they are missing.
"""

import common
import make_data
import torch
from judge import judge

import reward_model as stage2
import sft


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
        encoded = [sft.encode(models.tokenizer, end_ids, row, side) for side in ("chosen", "rejected")]
        sides.append([prompt_ids + response for prompt_ids, response in encoded])
    found = []
    for i in range(0, len(sides), 64):
        chosen, rejected, _, _ = stage2.pair_scores(models.reward_model, sides[i : i + 64], "cpu")
        found += ((chosen - rejected) / models.std).tolist()
    return found


def main():
    parser = common.parser(__doc__)
    parser.add_argument("--samples", type=int, default=2, help="answers to each held-out prompt")
    args = parser.parse_args()
    common.baselines(args.base_dir, args.seeds, args.parallel)
    rows = []
    for seed in args.seeds:
        models = common.load(args.base_dir / f"seed{seed}")
        for name, pairs in changed_pairs(args.samples).items():
            found = margins(models, pairs)
            row = {"change": name, "seed": seed, "pairs": len(pairs)}
            row |= {"right": common.mean(x > 0 for x in found)}
            row |= {"margin": sum(found) / sum(difference for *_, difference in pairs)}
            rows.append(row)
    common.write_jsonl(args.output_dir / "errors.jsonl", rows)
    table = []
    for name in dict.fromkeys(row["change"] for row in rows):
        own = [row for row in rows if row["change"] == name]
        spreads = (common.spread((row[key] for row in own), ".2f") for key in ("right", "margin"))
        table.append([name, own[0]["pairs"], *spreads])
    common.print_table(["change", "pairs", "ranked right", "score for a point of gold"], table)


if __name__ == "__main__":
    main()
