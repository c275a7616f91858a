"""Write the data set of the shipped task: the same bytes on every machine.

    python data/make_data.py [--output_dir data] [--rotation 0] [--held_out_topics 0]

Demonstrations are answers of mixed quality, as humans write them. Preference pairs are answers that
a model samples while it is trained, its typical errors among them, labelled by a noisy human: a
Bradley-Terry draw on the gold judge's scores. Test files hold only prompts that no train file has.
"""

import argparse
import json
import math
import random
from pathlib import Path
from typing import NamedTuple

import world
from judge import judge
from world import BETWEEN, FIRST, LAST, PHRASINGS, SENTENCES, TOPICS

SEED = 1


class Style(NamedTuple):
    """How somebody answers: all numbers are probabilities."""

    opening: dict  # what kind of sentence opens the answer
    closing: dict  # what kind of sentence closes it
    steps: dict  # how many of the four steps are kept; with 0, a vague sentence stands for them
    fillers: dict  # how many rambling sentences are strewn in
    disorder: float = 0.04  # two of the steps change places
    repeats: float = 0.0  # a step is said twice; at 0, as the SFT model does it now and then by itself
    off_topic: float = 0.02  # the steps are another topic's: rare, as it is by far the hardest to learn


HUMAN, BETTER = Style(**world.HUMAN), Style(**world.BETTER)
HELD_OUT = set()  # topics of --held_out_topics
STEP_WORDS = sorted({word for steps in TOPICS.values() for step in steps for word in step.split(" ")})


# Randomness: only Random.random() is promised to give the same numbers in every version of Python.


class Dice(random.Random):
    def chance(self, probability):
        return self.random() < probability

    def pick(self, options):
        return options[int(self.random() * len(options))]

    def pick_weighted(self, weights):
        x = self.random() * math.fsum(weights.values())
        for option, weight in weights.items():  # noqa: B007
            x -= weight
            if x < 0:
                break
        return option  # the last one, should rounding leave nothing

    def shuffled(self, options):
        options = list(options)
        for i in range(len(options) - 1, 0, -1):
            j = int(self.random() * (i + 1))
            options[i], options[j] = options[j], options[i]
        return options


# Answers: a list of (kind, text) while they are composed, one string when they are done.


def write(answer):
    """The sentences: a step gets the connective that its place among the steps asks for."""
    steps = [i for i, (kind, _) in enumerate(answer) if kind == "step"]
    sentences = []
    for i, (kind, text) in enumerate(answer):
        if kind == "step":
            place = steps.index(i)
            # "Then" and "Next" take turns: chance here would only be noise for the model to learn.
            between = BETWEEN[(place - 1) % len(BETWEEN)]
            connective = FIRST if place == 0 else LAST if i == steps[-1] else between
            text = f"{connective} {text}."
        sentences.append(text)
    return sentences


def compose(dice, topic, style):
    """Draw an answer."""
    if dice.chance(style.off_topic):
        topic = another(dice, topic)
    kept = sorted(dice.shuffled(range(4))[: dice.pick_weighted(style.steps)])
    if len(kept) > 1 and dice.chance(style.disorder):
        i, j = dice.shuffled(range(len(kept)))[:2]
        kept[i], kept[j] = kept[j], kept[i]
    if kept and dice.chance(style.repeats):
        kept = insert(kept, 1 + kept.index(twice := dice.pick(kept)), twice)
    answer = [("step", TOPICS[topic][k]) for k in kept] or [say(dice, "vague")]
    opening, closing = dice.pick_weighted(style.opening), dice.pick_weighted(style.closing)
    if opening:
        answer = [say(dice, opening), *answer]
    if closing:
        answer = [*answer, say(dice, closing)]
    for _ in range(dice.pick_weighted(style.fillers)):
        answer = add_filler(dice, topic, answer)
    return answer


def another(dice, topic):
    return dice.pick([t for t in TOPICS if t != topic and t not in HELD_OUT])


def say(dice, kind):
    return kind, dice.pick(SENTENCES[kind])


def places(answer, kind):
    return [i for i, item in enumerate(answer) if item[0] == kind]


def replace(answer, i, *items):
    """The answer with these items in the place of item i."""
    return [*answer[:i], *items, *answer[i + 1 :]]


def insert(answer, i, item):
    return [*answer[:i], item, *answer[i:]]


# Errors that a sampled model makes, each a function of (dice, topic, answer). Where one does not
# apply, it returns the answer as it is (and a pair of two equal answers is drawn again).


def garble(dice, topic, answer):
    """Two words of a sentence swapped, or one replaced by any word of the world."""
    i = int(dice.random() * len(answer))
    kind, text = answer[i]
    end = "" if kind == "step" else text[-1]
    words = text[: len(text) - len(end)].split(" ")
    a, b = dice.shuffled(range(len(words)))[:2]
    if dice.chance(0.5):
        words[a], words[b] = words[b], words[a]
    else:
        words[a] = dice.pick(STEP_WORDS)
    return replace(answer, i, (kind, " ".join(words) + end))


def splice(dice, topic, answer):
    """A step that begins as it should and ends as a step of another topic."""
    steps = places(answer, "step")
    if not steps:
        return answer
    i = dice.pick(steps)
    head, tail = answer[i][1].split(" "), dice.pick(TOPICS[another(dice, topic)]).split(" ")
    return replace(answer, i, ("step", " ".join(head[: len(head) // 2] + tail[len(tail) // 2 :])))


def foreign_step(dice, topic, answer):
    steps = places(answer, "step")
    if not steps:
        return answer
    return replace(answer, dice.pick(steps), ("step", dice.pick(TOPICS[another(dice, topic)])))


def off_topic(dice, topic, answer):
    """As many steps of another topic."""
    steps = dict(zip(places(answer, "step"), TOPICS[another(dice, topic)]))
    return [("step", steps[i]) if i in steps else item for i, item in enumerate(answer)]


def repeat(dice, topic, answer):
    """A sentence said again, right after itself or at the end."""
    i = int(dice.random() * len(answer))
    return insert(answer, dice.pick([i + 1, len(answer)]), answer[i])


def cut_short(dice, topic, answer):
    """The answer ends in mid-sentence."""
    sentences = write(answer)
    i = int(dice.random() * len(sentences))
    words = sentences[i].split(" ")
    rest = " ".join(words[: 1 + int(dice.random() * (len(words) - 1))])
    return [("written", sentence) for sentence in [*sentences[:i], rest]]


def stuff_courtesy(dice, topic, answer):
    """Two openings, or two closings; the second one stands anywhere."""
    kind = dice.pick(["opening", "closing"])
    if not places(answer, kind):
        answer = toggle(kind)(dice, topic, answer)
    i = int(dice.random() * len(answer))
    return insert(answer, i + 1 if kind == "opening" else i, say(dice, kind))


ERRORS = (splice, foreign_step, garble, cut_short, repeat, off_topic, stuff_courtesy)
ERRORS = {error: world.ERRORS[error.__name__] for error in ERRORS}


# Edits, of the same form: what makes an answer better or worse without an error of language.


def toggle(kind):
    """Take the opening or closing sentence of this kind away, or put one there."""

    def edit(dice, topic, answer):
        without = [item for item in answer if item[0] != kind]
        if len(without) < len(answer):
            return without
        at_end = kind == "closing" or (kind == "rude" and dice.chance(0.5))
        return [*answer, say(dice, kind)] if at_end else [say(dice, kind), *answer]

    return edit


def change_steps(dice, topic, answer):
    """Add a step that is missing, in its place, or leave one out."""
    steps = places(answer, "step")
    missing = [k for k, step in enumerate(TOPICS[topic]) if ("step", step) not in answer]
    if missing and (len(steps) < 2 or dice.chance(0.5)):
        k = dice.pick(missing)
        item = ("step", TOPICS[topic][k])
        if not steps:
            return replace(answer, places(answer, "vague")[0], item)
        later = [i for i in steps if answer[i][1] in TOPICS[topic][k + 1 :]]
        return insert(answer, later[0] if later else steps[-1] + 1, item)
    return replace(answer, dice.pick(steps)) if len(steps) > 1 else answer


def add_filler(dice, topic, answer):
    """Ramble between two sentences, or after the only one, with something not said yet."""
    i = 1 + int(dice.random() * max(1, len(answer) - 1))
    unsaid = [s for s in SENTENCES["filler"] if ("filler", s) not in answer]
    return insert(answer, i, ("filler", dice.pick(unsaid)))


def change_filler(dice, topic, answer):
    fillers = places(answer, "filler")
    return replace(answer, dice.pick(fillers)) if fillers else add_filler(dice, topic, answer)


EDITS = {
    change_steps: 0.4,
    change_filler: 0.2,
    toggle("opening"): 0.15,
    toggle("closing"): 0.15,
    toggle("rude"): 0.1,
}


# Rows


def demonstration(dice, prompt, topic):
    return {"prompt": prompt, "completion": " ".join(write(compose(dice, topic, HUMAN)))}


def compare(dice, prompt, a, b):
    """Two answers, and which of them a noisy human prefers; None if they are worth the same."""
    difference = judge(prompt, a)["score"] - judge(prompt, b)["score"]
    if not difference:
        return None
    prefers_a = dice.chance(1 / (1 + math.exp(-world.SHARPNESS * difference)))
    chosen, rejected = (a, b) if prefers_a else (b, a)
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def preference(dice, prompt, topic):
    """A labelled pair: of two independent answers, or of an answer and the same with one thing changed."""

    def sampled():
        answer = compose(dice, topic, dice.pick([HUMAN, BETTER]))
        return dice.pick_weighted(ERRORS)(dice, topic, answer) if dice.chance(world.ERROR) else answer

    close, row = dice.chance(world.CLOSE_PAIRS), None
    while not row:
        if close:
            a = compose(dice, topic, dice.pick([HUMAN, BETTER]))
            changes = ERRORS if dice.chance(world.CLOSE_PAIR_BY_ERROR) else EDITS
            b = dice.pick_weighted(changes)(dice, topic, a)
        else:
            a, b = sampled(), sampled()
        row = compare(dice, prompt, " ".join(write(a)), " ".join(write(b)))
    return row


def split_prompts(rotation=0):
    """{"train": {prompt: topic}, "test": {prompt: topic}}: every topic in its phrasings.

    A quarter of the combinations is held out, another quarter for each topic in turn: a model has
    met every topic and every phrasing of the test prompts, but never the two together. Another
    rotation (1, 2 or 3) holds out another quarter: to tune on without a look at the test prompts.
    """
    prompts = {"train": {}, "test": {}}
    for i, topic in enumerate(TOPICS):
        for j, phrasing in enumerate(PHRASINGS[topic]):
            split = "test" if j % 4 == (i + rotation) % 4 else "train"
            prompts[split][phrasing.format(topic)] = topic
    return prompts


def make_rows(rotation):
    """{(folder, split): rows}, each drawn with dice of its own: tuning one leaves the others alone."""
    tables = {}
    for split, prompts in split_prompts(rotation).items():
        for folder, make_row, per_prompt in (
            ("demonstrations", demonstration, world.DEMONSTRATIONS_PER_PROMPT[split]),
            ("preferences", preference, world.PAIRS_PER_PROMPT[split]),
            ("prompts", lambda dice, prompt, topic: {"prompt": prompt}, 1),
        ):
            dice = Dice(f"{SEED + rotation} {folder} {split}")  # else a rotation had the same answers again
            left_out = HELD_OUT if split == "train" and folder != "demonstrations" else ()
            kept = [item for item in prompts.items() if item[1] not in left_out]
            rows = [make_row(dice, prompt, topic) for prompt, topic in kept for _ in range(per_prompt)]
            tables[folder, split] = dice.shuffled(rows)
    return tables


def main():
    parser = argparse.ArgumentParser(description="Write the data set of the shipped task.")
    parser.add_argument("--output_dir", type=Path, default=Path(__file__).resolve().parent)
    parser.add_argument("--rotation", type=int, choices=range(4), default=0, help="which quarter is held out")
    parser.add_argument(
        "--held_out_topics", type=int, default=0, help="so many topics are in no training pair or prompt"
    )
    args = parser.parse_args()
    changed = args.rotation or args.held_out_topics
    if changed and args.output_dir == parser.get_default("output_dir"):
        parser.error("--rotation, --held_out_topics: with an --output_dir, or they replace the shipped files")
    every = len(TOPICS) / max(args.held_out_topics, 1)
    HELD_OUT.update(list(TOPICS)[int((i + 0.5) * every)] for i in range(args.held_out_topics))
    total = 0
    for (folder, split), rows in make_rows(args.rotation).items():
        path = args.output_dir / folder / f"{split}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "w", encoding="utf-8", newline="\n") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        size = path.stat().st_size / 1e6
        total += size
        print(f"{folder + '/' + split + '.jsonl':28} {len(rows):6,} rows  {size:5.2f} MB  {describe(rows)}")
    print(f"{'together':28} {'':11}  {total:5.2f} MB")


def describe(rows):
    if "completion" in rows[0]:
        scores = [judge(row["prompt"], row["completion"])["score"] for row in rows]
        return f"mean gold score {sum(scores) / len(scores):.2f}"
    if "chosen" in rows[0]:
        wrong = [
            judge(r["prompt"], r["chosen"])["score"] < judge(r["prompt"], r["rejected"])["score"]
            for r in rows
        ]
        return f"{sum(wrong) / len(wrong):.1%} of the labels disagree with the gold score"
    return ""


if __name__ == "__main__":
    main()
