"""The shipped task: its files, its gold judge and the judge's command line."""

import json
import subprocess
import sys

import pytest
from conftest import REPOSITORY, read_jsonl

DATA = REPOSITORY / "data"
sys.path.insert(0, str(DATA))

import judge as gold  # noqa: E402
import world  # noqa: E402

FILES = [f"{folder}/{split}.jsonl" for folder in ("demonstrations", "preferences", "prompts") for split in ("train", "test")]
COLUMNS = {"demonstrations": ["prompt", "completion"], "preferences": ["prompt", "chosen", "rejected"], "prompts": ["prompt"]}


def run(*arguments):
    return subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True, encoding="utf-8")


def test_every_file_is_reproduced_byte_for_byte(tmp_path):
    """Catches a file edited by hand, a generator changed without its files, and randomness that differs between
    machines (hash order, random.choice)."""
    done = run(DATA / "make_data.py", "--output_dir", tmp_path)
    assert done.returncode == 0, done.stderr
    assert sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*.jsonl")) == sorted(FILES)
    for name in FILES:
        assert (tmp_path / name).read_bytes() == (DATA / name).read_bytes(), name


@pytest.mark.parametrize("name", FILES)
def test_columns_and_texts(name):
    """The columns of the standard formats, in every row, as texts that are not blank; and the loader of the scripts
    takes them."""
    import ppo_rlhf

    folder, split = name.removesuffix(".jsonl").split("/")
    rows = read_jsonl(DATA / name)
    assert all(list(row) == COLUMNS[folder] for row in rows)
    assert all(text.strip() == text != "" for row in rows for text in row.values())
    assert ppo_rlhf.load_rows(str(DATA / folder), split, COLUMNS[folder]) == rows


def prompts(folder, split):
    return {row["prompt"] for row in read_jsonl(DATA / folder / f"{split}.jsonl")}


def test_no_training_file_holds_a_held_out_prompt():
    """Of any folder: what one stage has seen in training must not be another's test. And the held-out prompts are new
    combinations of topics and phrasings that training does show. Catches a leak, which would make every reported
    win rate a memory test."""
    train = set.union(*(prompts(folder, "train") for folder in COLUMNS))
    test = set.union(*(prompts(folder, "test") for folder in COLUMNS))
    assert not train & test
    assert prompts("prompts", "test") == test and len(test) > 100
    topics = {split: {world.split_prompts()[split][p] for p in ps} for split, ps in (("train", train), ("test", test))}
    assert topics["train"] == topics["test"] == set(world.TOPICS)


def test_size_of_the_world():
    """At least 40 topics in at least 6 phrasings, and all files together under 4 MB."""
    assert len(world.TOPICS) >= 40
    every = [*world.split_prompts()["train"].items(), *world.split_prompts()["test"].items()]
    assert len(dict(every)) == len(every), "two topics share a prompt"
    for topic in world.TOPICS:
        assert sum(t == topic for _, t in every) >= 6
    assert sum((DATA / name).stat().st_size for name in FILES) < 4e6


def test_labels_are_as_noisy_as_people():
    """10 to 20% of the labels disagree with the gold score: a reward model has noise to learn through, and something
    to learn. Catches a flipped or a noiseless draw."""
    for split in ("train", "test"):
        rows = read_jsonl(DATA / "preferences" / f"{split}.jsonl")
        margins = [
            gold.judge(row["prompt"], row["chosen"])["score"] - gold.judge(row["prompt"], row["rejected"])["score"]
            for row in rows
        ]
        assert 0.10 <= sum(m < 0 for m in margins) / len(rows) <= 0.20
        assert 0 not in margins


def test_demonstrations_leave_room():
    """Mixed quality: neither hopeless nor already good, and some of each. Catches a world in which RLHF has nothing
    to do."""
    scores = [gold.judge(r["prompt"], r["completion"])["score"] for r in read_jsonl(DATA / "demonstrations" / "train.jsonl")]
    assert 0 < sum(scores) / len(scores) < 0.6 * gold.BEST
    assert max(scores) == gold.BEST and min(scores) < 0


# ---------------------------------------------------------------------------------------------------------------
# The judge, on answers written here
# ---------------------------------------------------------------------------------------------------------------

PROMPT, TOPIC = next(iter(world.split_prompts()["test"].items()))
A, B, C, D = world.TOPICS[TOPIC]
OTHER = next(steps[0] for topic, steps in world.TOPICS.items() if topic != TOPIC)
OPENING, CLOSING, RUDE, FILLER, VAGUE = (
    world.SENTENCES[kind][0] for kind in ("opening", "closing", "rude", "filler", "vague")
)
STEPS = f"First {A}. Then {B}. Next {C}. Finally {D}."


@pytest.mark.parametrize(
    "answer, items",
    [
        (f"{OPENING} {STEPS} {CLOSING}", dict(opening=1, steps=4, closing=1)),
        (STEPS, dict(steps=4)),
        (f"  {STEPS}\n", dict(steps=4)),  # blanks around an answer say nothing
        (f"First {A}. Finally {D}.", dict(steps=2)),
        (f"First {B}. Then {A}. Next {C}. Finally {D}.", dict(steps=3, disordered=1)),
        (f"First {D}. Then {C}. Next {B}. Finally {A}.", dict(steps=1, disordered=3)),
        (f"First {A}. Then {A}. Finally {B}.", dict(steps=2, repeated=1)),
        (f"First {A}. Then {OTHER}. Finally {C}.", dict(steps=2, foreign=1)),
        (f"{RUDE} {STEPS}", dict(rude=1, steps=4)),
        (f"First {A}. {FILLER} Finally {B}. {FILLER}", dict(steps=2, filler=2, repeated=1)),
        (VAGUE, dict(vague=1)),
        (f"{STEPS} {OPENING}", dict(steps=4, misplaced=1)),  # a greeting at the end
        (f"{OPENING} {OPENING} {STEPS}", dict(opening=1, misplaced=1, steps=4)),
        (f"{CLOSING} {STEPS}", dict(misplaced=1, steps=4)),
        (f"First {A}. Then {B.rsplit(' ', 1)[0]}", dict(steps=1, garbled=1)),  # cut short
        (f"First {A}. Then {' '.join(reversed(B.split()))}.", dict(steps=1, garbled=1)),
        (f"{A}.", dict(garbled=1)),  # no connective: not a sentence of this world
        ("", {}),
    ],
)
def test_judge_counts(answer, items):
    """Every item of the rubric alone and with others. Catches steps credited out of order or twice, a reward for
    stuffing courtesies, and language that is not of this world going unpunished."""
    verdict = gold.judge(PROMPT, answer)
    assert {k: n for k, n in verdict.items() if n and k != "score"} == items
    assert verdict["score"] == sum(gold.WEIGHTS[k] * n for k, n in items.items())


def test_best_score_and_signs():
    """The full answer is worth exactly 4.0, what is good adds and what is bad takes away."""
    assert gold.judge(PROMPT, f"{OPENING} {STEPS} {CLOSING}")["score"] == gold.BEST == 4.0
    assert {k for k, w in gold.WEIGHTS.items() if w > 0} == {"steps", "opening", "closing"}


def test_judge_refuses_prompts_of_another_world():
    """A prompt that it has no rubric for is an error, not a score of 0."""
    with pytest.raises(ValueError, match="not of this world"):
        gold.judge("What is love?", STEPS)


# ---------------------------------------------------------------------------------------------------------------
# The judge's command line
# ---------------------------------------------------------------------------------------------------------------


def write_eval(path, sides):
    """sides: (sft answer, ppo answer, sft score, ppo score) a row."""
    rows = [{"prompt": PROMPT, "sft": s, "ppo": p, "sft_score": x, "ppo_score": y} for s, p, x, y in sides]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_judge_compares_policies(tmp_path):
    """Two wins, a tie, a loss, by hand. Catches sides that are swapped, a tie counted as a win, a share that is not
    of the distance to the best."""
    best, steps, half = f"{OPENING} {STEPS} {CLOSING}", STEPS, f"First {A}. Finally {B}."
    step = gold.WEIGHTS["steps"]  # the three are worth 4.0, 4 steps and 2 steps
    path = write_eval(tmp_path / "eval.jsonl", [(half, best, 0, 3), (half, steps, 0, 2), (steps, steps, 1, 2), (best, half, 3, 0)])
    done = run(DATA / "judge.py", path, "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)["files"][0]
    assert result["prompts"] == 4
    assert result["gold_sft"] == pytest.approx((2 * step + 2 * step + 4 * step + 4) / 4)
    assert result["gold_ppo"] == pytest.approx((4 + 4 * step + 4 * step + 2 * step) / 4)
    assert result["closed"] == pytest.approx((result["gold_ppo"] - result["gold_sft"]) / (4 - result["gold_sft"]))
    assert (result["win"], result["tie"], result["loss"], result["win_rate"]) == (0.5, 0.25, 0.25, 0.625)
    low, high = result["win_rate_interval"]
    assert 0 <= low <= 0.625 <= high <= 1
    assert result["rank_correlation_ppo"] == pytest.approx(1.0)  # best, steps, steps, half against 3, 2, 2, 0
    assert result["items"]["opening"] == {"sft": 0.25, "ppo": 0.25}
    table = run(DATA / "judge.py", path)
    assert table.returncode == 0 and "win rate" in table.stdout and "62.5" in table.stdout


def test_judge_counts_agreement_with_the_labels():
    """The ceiling for every reward model, as printed, equals a count made here."""
    path = DATA / "preferences" / "test.jsonl"
    rows = read_jsonl(path)
    right = [gold.judge(r["prompt"], r["chosen"])["score"] > gold.judge(r["prompt"], r["rejected"])["score"] for r in rows]
    done = run(DATA / "judge.py", "--preferences", path, "--json")
    assert json.loads(done.stdout)["gold_agreement"] == pytest.approx(sum(right) / len(rows))


@pytest.mark.parametrize(
    "content, complaint",
    [
        (None, "No such file"),
        ("", "empty"),
        ('{"prompt": "x"', "line 1: is not JSON"),
        ('{"prompt": "x", "sft": "a", "sft_score": 1, "ppo_score": 1}', "has no 'ppo'"),
        ('{"prompt": "x", "sft": "a", "ppo": "b", "sft_score": NaN, "ppo_score": 1}', "finite"),
        ('{"prompt": "x", "sft": "a", "ppo": "b", "sft_score": 0, "ppo_score": 1}', "not of this world"),
    ],
)
def test_judge_names_what_is_wrong(content, complaint, tmp_path):
    """Bad input ends with the file, the line and the reason on stderr, status 2 and no traceback."""
    path = tmp_path / "eval.jsonl"
    if content is not None:
        path.write_text(content)
    done = run(DATA / "judge.py", path)
    assert done.returncode == 2 and complaint in done.stderr and str(path) in done.stderr
    assert "Traceback" not in done.stderr and done.stdout == ""
