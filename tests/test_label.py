"""data/label.py: new pairs of a policy's answers; the model is tiny, its tokens are whole sentences."""

import shutil
import sys

import pytest
import torch
import transformers
from conftest import REPOSITORY, read_jsonl, save, tiny_model, tiny_tokenizer, write_jsonl

import ppo_rlhf

DATA = REPOSITORY / "data"
sys.path.insert(0, str(DATA))

import label  # noqa: E402
from judge import judge  # noqa: E402
from world import SENTENCES  # noqa: E402

SPLITS = ("train", "test")
PROMPTS = {split: [row["prompt"] for row in read_jsonl(DATA / f"prompts/{split}.jsonl")] for split in SPLITS}


def make_policy(folder, temperature=1.0, max_new_tokens=4, pad_is_eos=False):
    """A random model that says sentences and seldom anything else, saved as ppo_rlhf.py saves one."""
    tokenizer = tiny_tokenizer(pad_is_eos)
    tokenizer.add_tokens([f" {sentence}" for sentences in SENTENCES.values() for sentence in sentences])
    model = tiny_model("gpt2", vocab_size=len(tokenizer), positions=128, tie_word_embeddings=False)
    with torch.no_grad():
        model.transformer.ln_f.bias[0] += 8  # through this one feature, 8 nats for a sentence against a byte
        model.lm_head.weight[:, 0] = (torch.arange(len(tokenizer)) >= 258).float()
    plain = {"do_sample": True, "temperature": temperature, "top_k": 0, "max_new_tokens": max_new_tokens}
    ends = {"eos_token_id": [tokenizer.eos_token_id], "pad_token_id": tokenizer.pad_token_id}
    model.generation_config = transformers.GenerationConfig(**plain, **ends)
    return save(model, tokenizer, folder)


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return make_policy(tmp_path_factory.mktemp("label") / "policy")


def run(monkeypatch, line):
    monkeypatch.setattr(sys, "argv", ["label.py", *line.split()])
    label.main()


def margin(row):
    return judge(row["prompt"], row["chosen"])["score"] - judge(row["prompt"], row["rejected"])["score"]


def test_new_pairs_stand_behind_the_old_ones(policy, tmp_path, monkeypatch):
    """Old pairs as they are, no held-out prompt, none of the new test pairs in the new train pairs."""
    first = {split: {"prompt": PROMPTS[split][0], "chosen": "a", "rejected": "b"} for split in SPLITS}
    for split in SPLITS:
        write_jsonl(tmp_path / f"old/{split}.jsonl", [first[split] | {"who": "x"}] * 2)
    line = f"--policy {policy} --add {tmp_path}/old --output_dir {tmp_path}/new --pairs 400 --samples 3"
    run(monkeypatch, line)
    asked = {}
    for split, count in (("train", 400), ("test", 40)):
        assert len(ppo_rlhf.load_rows(str(tmp_path / "new"), split)) == count + 2
        *old, _ = read_jsonl(tmp_path / f"new/{split}.jsonl")[:3]
        new = read_jsonl(tmp_path / f"new/{split}.jsonl")[2:]
        assert old == [first[split]] * 2
        assert all(list(row) == label.COLUMNS and margin(row) for row in new)
        asked[split] = {row["prompt"] for row in new}
    assert not asked["train"] & asked["test"] and asked["test"] <= set(PROMPTS["train"][::10])
    assert asked["train"] <= set(PROMPTS["train"]) and len(asked["train"]) > 100


def test_same_seed_same_files(policy, tmp_path, monkeypatch):
    """The seed decides answers and labels, to the byte, and another seed gives others."""
    for name, flags in (("a", ""), ("b", ""), ("c", ""), ("c", "--seed 2 --overwrite")):
        run(monkeypatch, f"--policy {policy} --output_dir {tmp_path}/{name} --pairs 20 {flags}")
    a, b, c = ([(tmp_path / f"{name}/{split}.jsonl").read_bytes() for split in SPLITS] for name in "abc")
    assert a == b and a[0] != c[0] and a[1] != c[1]


def test_answers_are_the_policys_own(tmp_path):
    """Without noise an answer is the greedy one to its prompt alone, whatever the pads and other rows."""
    folder = make_policy(tmp_path, temperature=1e-4, pad_is_eos=True)  # then no pad is known by its id
    model, tokenizer = ppo_rlhf.load_pretrained(label.AutoModelForCausalLM, folder)
    prompts = sorted(PROMPTS["train"], key=len)[:: len(PROMPTS["train"]) // 7]
    answers = label.answer(model.eval(), tokenizer, prompts, 2)
    assert [prompt for prompt, _ in answers] == prompts and len({texts[0] for _, texts in answers}) > 1
    for prompt, texts in answers:
        ids = tokenizer(f"Q: {prompt}\nA:").input_ids
        greedy = model.generate(input_ids=torch.tensor([ids]), do_sample=False)[0, len(ids) :]
        assert texts == [tokenizer.decode(greedy, skip_special_tokens=True).strip()] * 2


def pairs(**row):
    return lambda folder: [write_jsonl(folder / f"old/{split}.jsonl", [row]) for split in SPLITS]


CASES = {  # complaint: (what is prepared in the folder, further flags)
    "--policy nowhere: there is no model": (lambda folder: None, "--policy nowhere"),
    "new is not empty": (lambda folder: write_jsonl(folder / "new/kept.jsonl", [1]), ""),
    "row 1": (pairs(prompt="a"), "--add old"),
    "held-out prompt": (pairs(prompt=PROMPTS["test"][0], chosen="a", rejected="b"), "--add old"),
}


@pytest.mark.parametrize("complaint", CASES)
def test_bad_input_is_refused_in_one_line(complaint, policy, tmp_path, monkeypatch, capsys):
    """Status 2, one line that says what is wrong, and nothing written."""
    prepare, flags = CASES[complaint]
    shutil.copytree(policy, tmp_path / "policy")
    prepare(tmp_path)
    monkeypatch.chdir(tmp_path)
    before = sorted((tmp_path / "new").glob("*"))
    with pytest.raises(SystemExit) as end:
        run(monkeypatch, f"--policy policy --output_dir new {flags}")
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.count("\n") == 1 and complaint in error, error
    assert sorted((tmp_path / "new").glob("*")) == before
