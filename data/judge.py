"""The gold judge of the shipped task: a deterministic rubric that nothing is trained on.

It labels the preference pairs (through noise) and says at the end whether RLHF made the answers
better, or only the reward model's opinion of them:

    python data/judge.py runs/ppo/eval.jsonl [more eval.jsonl ...] [--json]
    python data/judge.py --preferences data/preferences/test.jsonl [--json]
"""

import argparse
import json
import math
import random
import re
import sys
from bisect import bisect_left

from world import CONNECTIVES, PHRASINGS, SENTENCES, TOPICS, WEIGHTS

# A courtesy, the four steps in order, a courtesy
BEST = WEIGHTS["opening"] + 4 * WEIGHTS["steps"] + WEIGHTS["closing"]

TOPIC_OF_PROMPT = {phrasing.format(topic): topic for topic in TOPICS for phrasing in PHRASINGS[topic]}
TOPIC_OF_STEP = {step: topic for topic, steps in TOPICS.items() for step in steps}
KIND_OF_SENTENCE = {sentence: kind for kind, sentences in SENTENCES.items() for sentence in sentences}
STEP_SENTENCE = re.compile(rf"(?:{'|'.join(CONNECTIVES)}) (.*)\.")


def judge(prompt, response):
    """Return {"score": ..., "steps": 3, "opening": 1, ...}: the score and the count of every item."""
    topic = TOPIC_OF_PROMPT.get(prompt)
    if topic is None:
        raise ValueError(f"the prompt {prompt!r} is not of this world; take prompts from data/prompts/")
    sentences = [s for s in re.split(r"(?<=[.!?])\s+", response.strip()) if s]
    count = dict.fromkeys(WEIGHTS, 0)
    said, order = set(), []  # order: the places of the topic's steps, as the answer gives them
    for i, sentence in enumerate(sentences):
        match = STEP_SENTENCE.fullmatch(sentence)
        step = match[1] if match and match[1] in TOPIC_OF_STEP else None
        kind = "step" if step else KIND_OF_SENTENCE.get(sentence, "garbled")
        if kind in ("opening", "closing"):
            in_place = i == (0 if kind == "opening" else len(sentences) - 1)
            count[kind if in_place else "misplaced"] += 1
            continue
        content = step or sentence  # the same step behind another connective is said again
        repeated = content in said
        said.add(content)
        count["repeated"] += repeated
        if kind != "step":
            count[kind] += 1
        elif TOPIC_OF_STEP[step] != topic:
            count["foreign"] += 1
        elif not repeated:
            order.append(TOPICS[topic].index(step))
    count["steps"] = longest_increasing(order)
    count["disordered"] = len(order) - count["steps"]
    return {"score": sum(WEIGHTS[item] * n for item, n in count.items()), **count}


def longest_increasing(numbers):
    """Length of the longest increasing subsequence (patience sorting)."""
    tails = []  # tails[n]: the smallest number that an increasing subsequence of length n + 1 ends with
    for number in numbers:
        i = bisect_left(tails, number)
        tails[i : i + 1] = [number]
    return len(tails)


# Statistics


def mean(numbers):
    """The mean of those that are defined; None if none is."""
    numbers = [x for x in numbers if x is not None]
    return math.fsum(numbers) / len(numbers) if numbers else None


def ranks(numbers):
    """Ranks from 0; equal numbers share the mean of their ranks."""
    rank = {}
    for i, x in enumerate(sorted(numbers)):
        first, _ = rank.get(x, (i, i))
        rank[x] = (first, i)
    return [sum(rank[x]) / 2 for x in numbers]


def spearman(xs, ys):
    """Spearman's rank correlation, None where one side is constant."""
    center = (len(xs) - 1) / 2
    xs, ys = ([r - center for r in ranks(side)] for side in (xs, ys))
    norm = math.sqrt(sum(x * x for x in xs) * sum(y * y for y in ys))
    return sum(x * y for x, y in zip(xs, ys)) / norm if norm else None


def bootstrap_interval(numbers, resamples=2000, seed=0):
    """95% interval of the mean: percentiles over samples drawn with replacement from the prompts."""
    draw = random.Random(seed)
    means = sorted(mean(draw.choices(numbers, k=len(numbers))) for _ in range(resamples))
    return [means[round(q * (resamples - 1))] for q in (0.025, 0.975)]


def evaluate(rows):
    """All figures for the rows of one eval.jsonl, as `read_judged` returns them."""
    sft, ppo = ([row[side]["score"] for row in rows] for side in ("sft", "ppo"))
    sft_rm, ppo_rm = ([row[side + "_score"] for row in rows] for side in ("sft", "ppo"))
    points = [(a > b) + (a == b) / 2 for a, b in zip(ppo, sft)]
    room = BEST - mean(sft)
    return {
        "prompts": len(rows),
        "gold_sft": mean(sft),
        "gold_ppo": mean(ppo),
        "closed": (mean(ppo) - mean(sft)) / room if room else None,
        "win": points.count(1) / len(rows),
        "tie": points.count(0.5) / len(rows),
        "loss": points.count(0) / len(rows),
        "win_rate": mean(points),
        "win_rate_interval": bootstrap_interval(points),
        "rank_correlation_sft": spearman(sft_rm, sft),
        "rank_correlation_ppo": spearman(ppo_rm, ppo),
        "rank_correlation_both": spearman(sft_rm + ppo_rm, sft + ppo),
        "items": {
            item: {side: mean(row[side][item] for row in rows) for side in ("sft", "ppo")} for item in WEIGHTS
        },
    }


def mean_over_files(results, pooled):
    """The mean of each figure over the files; the interval is that of their rows pooled."""

    def average(values):
        if isinstance(values[0], dict):
            return {key: average([value[key] for value in values]) for key in values[0]}
        return mean(values)

    total = {key: average([r[key] for r in results]) for key in results[0] if key != "win_rate_interval"}
    return {**total, "prompts": len(pooled), "win_rate_interval": evaluate(pooled)["win_rate_interval"]}


# Input


class InputError(Exception):
    """What is wrong with a file, where, and what to do about it."""


def is_text(value):
    return isinstance(value, str)


def is_number(value):
    return isinstance(value, (int, float)) and math.isfinite(value)


def read_judged(path, answers, scores, remedy):
    """The rows of a jsonl file, each of its answers replaced by the judge's verdict on it."""
    try:
        with open(path, encoding="utf-8") as file:
            lines = file.read().split("\n")
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; {remedy}") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: is not UTF-8 text; {remedy}") from None

    checks = {"prompt": is_text, **dict.fromkeys(answers, is_text), **dict.fromkeys(scores, is_number)}
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"{where}: is not JSON ({error}); {remedy}") from None
        # Of a data set of messages, the prompt is the last of them
        if isinstance(row, dict) and isinstance(row.get("prompt"), list) and row["prompt"]:
            row["prompt"] = row["prompt"][-1].get("content")
        for key, check in checks.items():
            if not isinstance(row, dict) or key not in row:
                raise InputError(f"{where}: has no {key!r}; {remedy}")
            if not check(row[key]):
                kind = "a text" if check is is_text else "a finite number"
                raise InputError(f"{where}: {key!r} is not {kind}; {remedy}")
        try:
            rows.append({**row, **{key: judge(row["prompt"], row[key]) for key in answers}})
        except ValueError as error:
            raise InputError(f"{where}: {error}") from None
    if not rows:
        raise InputError(f"{path}: is empty; {remedy}")
    return rows


# Output


def show(number, form):
    return "-" if number is None else format(number, form)


def print_evaluation(paths, results, total):
    """One line a file, their mean, and what the answers are made of."""
    names = [*paths, f"mean of {len(paths)} files"] if len(paths) > 1 else paths
    width = max(map(len, names))
    print(f"{'':{width}}    gold score    closed    PPO against SFT, %   win rate, %       rank correlation")
    print(
        f"{'':{width}}    SFT    PPO    of {BEST}    win   tie  loss   [95% interval]     SFT    PPO   both"
    )
    for name, r in zip(names, [*results, total]):
        low, high = r["win_rate_interval"]
        print(
            f"{name:{width}}  {r['gold_sft']:5.2f}  {r['gold_ppo']:5.2f}   {show(r['closed'], '6.1%'):>6}"
            f"   {100 * r['win']:5.1f} {100 * r['tie']:5.1f} {100 * r['loss']:5.1f}"
            f"  {100 * r['win_rate']:5.1f} [{100 * low:4.1f}, {100 * high:5.1f}]"
            + "".join(
                f"  {show(r['rank_correlation_' + side], '5.2f'):>5}" for side in ("sft", "ppo", "both")
            )
        )
    print("\nmean per answer      weight     SFT     PPO")
    for item, means in total["items"].items():
        print(f"{item:18}  {WEIGHTS[item]:+7.3f}  {means['sft']:6.2f}  {means['ppo']:6.2f}")


def main():
    parser = argparse.ArgumentParser(description="Judge answers of the shipped task by the gold rubric.")
    parser.add_argument(
        "eval", nargs="*", help="eval.jsonl of a PPO run: prompt, sft, ppo, sft_score, ppo_score"
    )
    parser.add_argument(
        "--preferences", metavar="FILE", help="pairs: how many labels does the gold score agree with?"
    )
    parser.add_argument("--json", action="store_true", help="print the same as one JSON object")
    args = parser.parse_args()
    if bool(args.eval) == bool(args.preferences):
        parser.error("give one or more eval.jsonl, or --preferences FILE")

    if args.preferences:
        path, remedy = args.preferences, "python data/make_data.py writes data/preferences/test.jsonl"
        rows = read_judged(path, ("chosen", "rejected"), (), remedy)
        margins = [row["chosen"]["score"] - row["rejected"]["score"] for row in rows]
        agreement = mean((margin > 0) + (margin == 0) / 2 for margin in margins)
        if args.json:
            print(json.dumps({"file": path, "pairs": len(rows), "gold_agreement": agreement}))
        else:
            print(f"{path}: the gold score agrees with {agreement:.1%} of {len(rows)} labels")
        return

    remedy = "python ppo_rlhf.py writes eval.jsonl at the end of a run"
    judged = [read_judged(path, ("sft", "ppo"), ("sft_score", "ppo_score"), remedy) for path in args.eval]
    results = [evaluate(rows) for rows in judged]
    total = mean_over_files(results, [row for rows in judged for row in rows])
    if args.json:
        files = [{"file": path, **result} for path, result in zip(args.eval, results)]
        print(json.dumps({"files": files, "mean": total}, indent=2))
    else:
        print_evaluation(args.eval, results, total)


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        print(f"judge.py: {error}", file=sys.stderr)
        sys.exit(2)
