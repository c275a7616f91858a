"""The shipped task: its files, its gold judge and the judge's command line."""

import json
import runpy
import subprocess
import sys

import pytest
import transformers
from conftest import REPOSITORY, read_jsonl, write_jsonl

DATA = REPOSITORY / "data"
SCRATCH = DATA / "scratch"
sys.path.insert(0, str(DATA))

import judge as gold  # noqa: E402
import make_data  # noqa: E402
import make_scratch  # noqa: E402
import world  # noqa: E402

COLUMNS = {"demonstrations": ["prompt", "completion"], "preferences": ["prompt", "chosen", "rejected"]}
COLUMNS["prompts"] = ["prompt"]
FILES = [f"{folder}/{split}.jsonl" for folder in COLUMNS for split in ("train", "test")]


def run(*arguments):
    line = [sys.executable, *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, encoding="utf-8")


def test_every_file_is_reproduced_byte_for_byte(tmp_path):
    """No file is edited by hand, no generator changed without its files; columns are the standard ones."""
    done = run(DATA / "make_data.py", "--output_dir", tmp_path)
    assert done.returncode == 0, done.stderr
    assert sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*.jsonl")) == sorted(FILES)
    for name in FILES:
        assert (tmp_path / name).read_bytes() == (DATA / name).read_bytes(), name
        columns = COLUMNS[name.split("/")[0]]
        assert all([*row] == columns and all(map(str.strip, row.values())) for row in read_jsonl(DATA / name))


def test_scratch_is_reproduced(tmp_path):
    """The shipped vocabulary, merges, template and config of a model of 0.7M parameters."""
    make_scratch.main(tmp_path)
    read = lambda path, name: json.loads((path / name).read_text())
    made, shipped = (read(path, "tokenizer.json") for path in (tmp_path, SCRATCH))
    for part in ("vocab", "merges"):
        assert made["model"][part] == shipped["model"][part]
    assert made["added_tokens"] == shipped["added_tokens"]
    made, shipped = (read(path, "config.json") | {"transformers_version": 0} for path in (tmp_path, SCRATCH))
    assert made == shipped and {p.name for p in tmp_path.iterdir()} == {p.name for p in SCRATCH.iterdir()}
    model = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**shipped))
    assert 0.6e6 < model.num_parameters() < 0.8e6
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
    for path in (tmp_path, SCRATCH):
        tokenizer = transformers.AutoTokenizer.from_pretrained(path)
        assert tokenizer.apply_chat_template(chat, tokenize=False) == "Prompt: Hi\nResponse: Hello.<eos>"
        assert (len(tokenizer), tokenizer.pad_token_id, tokenizer.eos_token_id) == (
            shipped["vocab_size"],
            0,
            1,
        )


def prompts(folder, split):
    return {row["prompt"] for row in read_jsonl(DATA / folder / f"{split}.jsonl")}


def test_no_training_file_holds_a_held_out_prompt():
    """Held-out prompts are new combinations of topics and phrasings that training does show."""
    train = set.union(*(prompts(folder, "train") for folder in COLUMNS))
    test = set.union(*(prompts(folder, "test") for folder in COLUMNS))
    assert not train & test
    assert prompts("prompts", "test") == test and len(test) > 100
    for split, prompts_of in (("train", train), ("test", test)):
        assert {make_data.split_prompts()[split][prompt] for prompt in prompts_of} == set(world.TOPICS)


def test_rotations_hold_out_other_prompts():
    """The quarters are all prompts, each once; the shipped files are not replaced by those of another."""
    quarters = [set(make_data.split_prompts(rotation)["test"]) for rotation in range(4)]
    assert quarters[0] == prompts("prompts", "test")
    assert set.union(*quarters) == set(gold.TOPIC_OF_PROMPT) and sum(map(len, quarters)) == 480
    done = run(DATA / "make_data.py", "--rotation", 1)
    assert done.returncode == 2 and "--output_dir" in done.stderr


def test_second_world(tmp_path):
    """It has every constant of the shipped world, no topic, phrasing or sentence of it, and its folder holds
    what the stages and benchmarks take from data/: with --world, common.py has its judge and prompts."""
    folder = tmp_path / "second"
    constants = DATA / "second_world.py"
    flags = ("--constants", constants, "--held_out_topics", 6)
    done = run(DATA / "make_world.py", "--output_dir", folder, *flags)
    assert done.returncode == 0, done.stderr
    second = runpy.run_path(str(folder / "data/world.py"))
    for name, value in vars(world).items():
        assert not name.isupper() or type(second[name]) is type(value), name
    for name in ("TOPICS", "TASK_PHRASINGS", "EXPLANATION_PHRASINGS", "CONNECTIVES"):
        assert not {*vars(world)[name]} & {*second[name]}
    steps = [step for own in second["TOPICS"].values() for step in own]
    said = [sentence for sentences in second["SENTENCES"].values() for sentence in sentences]
    assert len({*steps, *said}) == len(steps + said) and all(" " in text for text in steps + said)
    assert not {*said} & {*gold.KIND_OF_SENTENCE} and not {*steps} & {*gold.TOPIC_OF_STEP}
    assert {*COLUMNS, "scratch", "judge.py"} <= {path.name for path in (folder / "data").iterdir()}
    assert (folder / "sft.py").samefile(REPOSITORY / "sft.py")
    rows = {name: read_jsonl(folder / f"data/{name}/train.jsonl") for name in COLUMNS}
    texts = {name: " ".join(text for row in own for text in row.values()) for name, own in rows.items()}
    for name, count in (("demonstrations", 32), ("preferences", 26)):  # 6 of the 32 are held out
        assert sum(any(step in texts[name] for step in steps) for steps in second["TOPICS"].values()) == count
    assert len(rows["prompts"]) == 26 * 9
    code = "import common; print(common.gold_judge.BEST, len(common.held_out()), common.BASELINES)"
    line = [sys.executable, "-c", code, "--world", folder]
    done = subprocess.run(line, capture_output=True, text=True, cwd=REPOSITORY / "benchmark")
    assert done.stdout.split() == ["5.0", "96", f"{folder.resolve()}/runs/baselines"], done.stderr


def test_labels_are_as_noisy_as_people():
    """10 to 20% disagree with the gold score. Catches a flipped or a noiseless draw."""
    for split in ("train", "test"):
        rows = read_jsonl(DATA / "preferences" / f"{split}.jsonl")
        gold_of = lambda row, side: gold.judge(row["prompt"], row[side])["score"]
        margins = [gold_of(row, "chosen") - gold_of(row, "rejected") for row in rows]
        assert 0.10 <= sum(m < 0 for m in margins) / len(rows) <= 0.20
        assert 0 not in margins


# ---- The judge, on answers written here ----

PROMPT, TOPIC = next(iter(make_data.split_prompts()["test"].items()))
A, B, C, D = world.TOPICS[TOPIC]
OTHER = next(steps[0] for topic, steps in world.TOPICS.items() if topic != TOPIC)
KINDS = ("opening", "closing", "rude", "filler", "vague")
OPENING, CLOSING, RUDE, FILLER, VAGUE = (world.SENTENCES[kind][0] for kind in KINDS)
STEPS = f"First {A}. Then {B}. Next {C}. Finally {D}."


ANSWERS = [
    (f"{OPENING} {STEPS} {CLOSING}", dict(opening=1, steps=4, closing=1)),
    (STEPS, dict(steps=4)),
    (f"First {B}. Then {A}. Next {C}. Finally {D}.", dict(steps=3, disordered=1)),
    (f"First {D}. Then {C}. Next {B}. Finally {A}.", dict(steps=1, disordered=3)),
    (f"First {A}. Then {A}. Finally {B}.", dict(steps=2, repeated=1)),
    (f"First {A}. Then {OTHER}. Finally {C}.", dict(steps=2, foreign=1)),
    (f"{RUDE} {STEPS}", dict(rude=1, steps=4)),
    (f"First {A}. {FILLER} Finally {B}. {FILLER}", dict(steps=2, filler=2, repeated=1)),
    (VAGUE, dict(vague=1)),
    (f"{STEPS} {OPENING}", dict(steps=4, misplaced=1)),  # a greeting at the end
    (f"{CLOSING} {STEPS}", dict(misplaced=1, steps=4)),
    (f"First {A}. Then {B.rsplit(' ', 1)[0]}", dict(steps=1, garbled=1)),  # cut short
    (f"{A}.", dict(garbled=1)),  # no connective: not a sentence of this world
    ("", {}),
]


@pytest.mark.parametrize("answer, items", ANSWERS)
def test_judge_counts(answer, items):
    """Also steps out of order or twice, stuffed courtesies, and language that is not of this world."""
    verdict = gold.judge(PROMPT, answer)
    assert {k: n for k, n in verdict.items() if n and k != "score"} == items
    assert verdict["score"] == sum(gold.WEIGHTS[k] * n for k, n in items.items())


def test_judge_compares_policies(tmp_path):
    """Two wins, a tie, a loss, by hand. Catches swapped sides, a tie counted as a win, a wrong share."""
    best, half = f"{OPENING} {STEPS} {CLOSING}", f"First {A}. Finally {B}."  # worth 4 and 1; the steps are 2
    rows = [(half, best, 0, 3), (half, STEPS, 0, 2), (STEPS, STEPS, 1, 2), (best, half, 3, 0)]
    path, names = tmp_path / "eval.jsonl", ("sft", "ppo", "sft_score", "ppo_score")
    write_jsonl(path, [{"prompt": PROMPT, **dict(zip(names, row))} for row in rows])
    result = json.loads(run(DATA / "judge.py", path, "--json").stdout)["files"][0]
    wanted = {"prompts": 4, "gold_sft": 2.0, "gold_ppo": 2.25, "closed": 0.125, "rank_correlation_ppo": 1.0}
    wanted |= {"win": 0.5, "tie": 0.25, "loss": 0.25, "win_rate": 0.625}
    assert {name: result[name] for name in wanted} == pytest.approx(wanted)
    low, high = result["win_rate_interval"]
    assert 0 <= low <= 0.625 <= high <= 1 and result["items"]["opening"] == {"sft": 0.25, "ppo": 0.25}
    table = run(DATA / "judge.py", path)
    assert table.returncode == 0 and "win rate" in table.stdout and "62.5" in table.stdout


WRONG = [
    ('{"prompt": "x"', "line 1: is not JSON"),
    ('{"prompt": "x", "sft": "a", "sft_score": 1, "ppo_score": 1}', "has no 'ppo'"),
    ('{"prompt": "x", "sft": "a", "ppo": "b", "sft_score": 0, "ppo_score": 1}', "not of this world"),
]


@pytest.mark.parametrize("content, complaint", WRONG)
def test_judge_names_what_is_wrong(content, complaint, tmp_path):
    """Bad input ends with the file, the line and the reason on stderr, status 2 and no traceback."""
    (tmp_path / "eval.jsonl").write_text(content)
    done = run(DATA / "judge.py", tmp_path / "eval.jsonl")
    assert done.returncode == 2 and complaint in done.stderr and "eval.jsonl" in done.stderr
    assert "Traceback" not in done.stderr and done.stdout == ""
