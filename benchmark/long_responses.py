"""Responses of some 150 tokens: which lambda, and is a critic of its own worth its time when they are long?

    python benchmark/long_responses.py --seeds 1 2 3

A prompt asks four questions of the shipped task, its response answers them line by line. Demonstrations and
pairs are joined from the shipped ones, four of different topics at a time; in a pair each line is the chosen
or the rejected one by chance, and the sum of the lines' gold scores decides as it does for a single response.
Everything but the data has default flags, save room for the tokens, fewer passes over more tokens, and half
of beta: scores have twice the standard deviation when four are added up, and KL four times the nats.

Gold scores and win rates are those of one line (at most 4.0), over eval.jsonl's response to each of 120
held-out prompts; KL is a response's, over the last five updates. Runs are kept in runs/long_responses, and
results/long_responses.jsonl has a row a variant and seed.
"""

import math
import random
import re

import common
from common import DATA, gold_judge, mean, read_jsonl, write_jsonl
from world import SHARPNESS  # of the labels

PARTS = 4
BETA = 0.05
FOLDER = common.WORLD / "runs/long_responses"
ROWS = {  # data set: rows of its train and test split
    "demonstrations": (2400, 200),
    "preferences": (6000, 600),
    "prompts": (1440, 120),
}
FLAGS = {
    "sft": "--num_train_epochs 4 --max_new_tokens 256",
    "reward_model": "--num_train_epochs 1",
    "ppo": f"--beta {BETA} --max_new_tokens 256 --max_prompt_length 128",
}
VARIANTS = {  # name: (patches, flags)
    "PPO": ((), ""),
    "lambda 0.95": ((), "--lam 0.95"),
    "shared backbone": ((), "--no-separate_critic"),
    "no value head": ((), "--no-separate_critic --vf_coef 0"),
}


def gold(prompt, response):
    """Gold score of each line of a response; a question that got no line has an empty one."""
    questions = re.split(r"(?<=[.?!])\s+", prompt)
    lines = response.strip().split("\n")
    lines = [*lines[: PARTS - 1], " ".join(lines[PARTS - 1 :])]  # what is too much belongs to the last
    lines += [""] * (PARTS - len(lines))
    return [gold_judge.judge(*pair)["score"] for pair in zip(questions, lines, strict=True)]


def draw(rows, dice):
    """Rows of different topics."""
    found = {}
    while len(found) < PARTS:
        row = dice.choice(rows)
        found.setdefault(gold_judge.TOPIC_OF_PROMPT[row["prompt"]], row)
    return list(found.values())


def join(rows, dice):
    """One row of several: questions in one line, responses in a line each; None for a pair worth the same."""
    prompt = " ".join(row["prompt"] for row in rows)
    if "completion" in rows[0]:
        return {"prompt": prompt, "completion": "\n".join(row["completion"] for row in rows)}
    if "chosen" not in rows[0]:
        return {"prompt": prompt}
    sides = [dice.sample([row["chosen"], row["rejected"]], 2) for row in rows]
    first, second = ("\n".join(lines) for lines in zip(*sides))
    difference = sum(gold(prompt, first)) - sum(gold(prompt, second))
    if not difference:
        return None
    if dice.random() > 1 / (1 + math.exp(-SHARPNESS * difference)):
        first, second = second, first
    return {"prompt": prompt, "chosen": first, "rejected": second}


def make_data():
    dice = random.Random(0)
    for name, counts in ROWS.items():
        for split, count in zip(("train", "test"), counts):
            rows = read_jsonl(DATA / f"{name}/{split}.jsonl")
            joined = []
            while len(joined) < count:
                row = join(draw(rows, dice), dice)
                joined += [row] if row else []
            write_jsonl(FOLDER / f"data/{name}/{split}.jsonl", joined)


def judged(folder):
    """Means of a finished PPO run."""
    rows = read_jsonl(folder / "eval.jsonl")
    sides = {side: [gold(row["prompt"], row[side]) for row in rows] for side in ("sft", "ppo")}
    pairs = [pair for lines in zip(*sides.values()) for pair in zip(*lines)]
    metrics = read_jsonl(folder / "metrics.jsonl")
    last = {key: mean(row[key] for row in metrics[-5:]) for key in metrics[-1]}
    return {
        "gold_sft": mean(sft for sft, _ in pairs),
        "gold": mean(ppo for _, ppo in pairs),
        "win_rate": mean((ppo > sft) + (ppo == sft) / 2 for sft, ppo in pairs),
        "score": mean(row["ppo_score"] for row in rows),
        "kl": last["objective/kl"],
        "length": last["response_length"],
        "explained_variance": last.get("val/explained_variance"),
        "seconds": common.seconds_of(folder),
        **common.stamp(folder),
    }


def print_table(rows):
    """Differences are to the first variant at the same seed."""
    first = {row["seed"]: row for row in rows if row["variant"] == rows[0]["variant"]}
    penalized = lambda row: row["score"] - BETA * row["kl"]
    table = []
    for name in dict.fromkeys(row["variant"] for row in rows):
        own = [row for row in rows if row["variant"] == name]
        cells = [name, len(own)]
        for figure in (lambda row: row["score"], penalized):
            cells.append(f"{mean(map(figure, own)):.2f}")
            cells.append(common.interval([figure(row) - figure(first[row["seed"]]) for row in own]))
        cells += [f"{mean(row['kl'] for row in own):.1f}", common.spread(row["gold"] for row in own)]
        explained = [row["explained_variance"] for row in own if row["explained_variance"] is not None]
        cells += [f"{mean(row['win_rate'] for row in own):.0%}", f"{mean(row['length'] for row in own):.0f}"]
        cells.append(f"{mean(explained):.2f}" if explained else "")
        cells.append(f"{mean(row['seconds'] for row in own):.0f}")
        table.append(cells)
    titles = ["variant", "seeds", "RM score", "difference", "score - beta * KL", "difference", "KL, nats"]
    titles += ["gold score", "gold win rate", "tokens", "variance explained", "s"]
    common.print_table(titles, table)
    print(f"\ngold score of the SFT models {common.spread({row['gold_sft'] for row in rows})}")


def main():
    parser = common.parser(__doc__)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="NAME")
    args = parser.parse_args()
    if not (FOLDER / "data/prompts/test.jsonl").exists():
        make_data()
    for stage, name in (("sft", "demonstrations"), ("reward_model", "preferences")):
        jobs = []
        for seed in args.seeds:
            base = FOLDER / f"seed{seed}"
            start = {"model_name_or_path": base / "sft"} if stage == "reward_model" else {}
            flags = {"seed": seed, "dataset_name": FOLDER / "data" / name, **start}
            jobs.append(common.job(base / stage, f"{stage}.py", *FLAGS[stage].split(), **flags))
        common.run_all(jobs, args.parallel, stage)
    jobs = {}
    for seed in args.seeds:
        for name in args.variants:
            patches, flags = VARIANTS[name]
            base = FOLDER / f"seed{seed}"
            folder = base / name.replace(" ", "_")
            script = common.make_copy(FOLDER / "scripts" / folder.name, patches)
            words = f"{FLAGS['ppo']} {flags}".split()
            data = FOLDER / "data/prompts"
            jobs[name, seed] = common.ppo_job(folder, base, seed, *words, script=script, dataset_name=data)
    common.run_all(list(jobs.values()), args.parallel, "ppo")
    rows = [{"variant": name, "seed": seed, **judged(job[0])} for (name, seed), job in jobs.items()]
    common.write_results(args.output_dir / "long_responses.jsonl", rows)
    print_table(rows)


if __name__ == "__main__":
    main()
