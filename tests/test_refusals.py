"""A user's mistake ends a run with status 2 and one line that names it, before anything is written."""

import json
import math
import shutil

import conftest
import pytest
import torch
import transformers
import tyro
from conftest import read_jsonl, save, tiny_model, tiny_reward_model, tiny_tokenizer, write_jsonl

import ppo_rlhf
import reward_model
import sft

STAGES = {"sft": sft, "reward_model": reward_model, "ppo_rlhf": ppo_rlhf}
EVERY = tuple(STAGES)
TRAINED, SFT, RM, PPO = EVERY[:2], EVERY[:1], EVERY[1:2], EVERY[2:]
ROW = {"prompt": "Hi", "completion": "Hello", "chosen": "good", "rejected": "bad"}
LAST = {"sft": "completion", "reward_model": "rejected", "ppo_rlhf": "prompt"}


def main(stage, **other):
    flags = {"dataset_name": "data", "output_dir": "out", "per_device_train_batch_size": 2}
    if stage == "ppo_rlhf":
        flags |= {"sft_model_path": other.pop("model_name_or_path", "base"), "reward_model_path": "rm"}
        flags |= {"total_episodes": 8, "batch_size": 4, "num_mini_batches": 2}
    else:
        flags |= {"model_name_or_path": "base", "max_steps": 2}
    if stage != "reward_model":
        flags["max_new_tokens"] = 4
    STAGES[stage].main(STAGES[stage].Args(**flags | other))


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """Models and data without a mistake."""
    folder = tmp_path_factory.mktemp("good")
    save(tiny_model("gpt2"), tiny_tokenizer(), folder / "base")
    save(tiny_reward_model("gpt2"), tiny_tokenizer(), folder / "rm")
    for split in ("train", "test"):
        write_jsonl(folder / f"data/{split}.jsonl", [ROW] * 4)
    return folder


@pytest.fixture
def world(good, tmp_path, monkeypatch):
    """A copy of them, as the working directory."""
    shutil.copytree(good, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def tree(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# ---- Ways to spoil what a stage reads; each is called with the folder and the stage's name ----


def rows(make):
    """Other rows, made of a good one and the stage's last column, in both splits: one schema."""

    def spoil(folder, stage):
        content = make(ROW, LAST[stage])
        lines = content if isinstance(content, str) else "".join(json.dumps(row) + "\n" for row in content)
        for split in ("train", "test"):
            (folder / f"data/{split}.jsonl").write_text(lines)

    return spoil


def last(value):
    """The last column is something else, in the second of three rows, or in all to be of one type."""
    everywhere = not isinstance(value, str | None)
    return rows(lambda row, name: [{**row, name: value} if everywhere or i == 1 else row for i in range(3)])


def without(row, name):
    """Neither the column nor another that would do in its place."""
    return [{"prompt": "Hi"} if name != "prompt" else {"completion": "Hello"}] * 2


PARTS = "{% for m in messages %}{% for part in m.content %}{{ part.text }}{% endfor %}{% endfor %}"


def tokenizer(name="base", **changes):
    def spoil(folder, stage):
        changed = tiny_tokenizer()
        for field, value in changes.items():
            setattr(changed, field, value)
        (folder / name / "chat_template.jinja").unlink()
        changed.save_pretrained(folder / name)

    return spoil


def model(make, name="base"):
    return lambda folder, stage: save(make(), tiny_tokenizer(), folder / name)


def scaled(folder, stage):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "head_dim": 8, "vocab_size": 258, "initializer_range": 1.0}
    config = transformers.Gemma2Config(**sizes, final_logit_softcapping=5.0)
    model(lambda: transformers.AutoModelForCausalLM.from_config(config))(folder, stage)


def with_bias():
    changed = tiny_reward_model("gpt2")
    changed.score = torch.nn.Linear(32, 1)
    return changed


def shift_ids(folder, stage):
    """The letters of the reward model's tokenizer have other ids."""
    path = folder / "rm/tokenizer.json"
    other = json.loads(path.read_text())
    pad, eos, first, *letters = sorted(other["model"]["vocab"], key=other["model"]["vocab"].get)
    other["model"]["vocab"] = {token: i for i, token in enumerate([pad, eos, *letters, first])}
    path.write_text(json.dumps(other))


def used(folder, stage):
    write_jsonl(folder / "out/metrics.jsonl", [{"step": 1}])


def missing(name):
    return lambda folder, stage: (folder / name).unlink()


def edit(name, **changes):
    def spoil(folder, stage):
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return spoil


def finished(folder, stage):
    main(stage)


nothing = None
# One stage where what refuses is shared by all. name: (stages, what is spoilt, flags, words of the message)
CASES = {
    "no SFT model yet": (EVERY[1:], nothing, {"model_name_or_path": "runs/sft"}, "runs/sft"),
    "no reward model yet": (PPO, nothing, {"reward_model_path": "runs/rm"}, "runs/rm"),
    "output_dir in use": (EVERY, used, {}, "out is not empty"),
    "output_dir is the input": (EVERY, nothing, {"output_dir": "base"}, "base is the folder of an input"),
    "... with --overwrite": (PPO, nothing, {"output_dir": "data/../base", "overwrite": True}, "input"),
    "output_dir is the reward model": (PPO, nothing, {"output_dir": "rm", "overwrite": True}, "input"),
    "no data set": (RM, nothing, {"dataset_name": "nowhere"}, "nowhere"),
    "no split": (EVERY, nothing, {"dataset_train_split": "trian"}, "trian"),
    "no test split": (PPO, missing("data/test.jsonl"), {}, "split test"),
    "not JSON": (SFT, rows(lambda row, name: json.dumps(row) + '\n{"prompt":\n'), {}, "data"),
    "no rows": (SFT, rows(lambda row, name: []), {}, "data"),
    "column missing": (EVERY, rows(without), {}, "row 1"),
    "column empty": (EVERY, last(""), {}, "row 2"),
    "column null": (
        SFT,
        rows(lambda row, name: [{"prompt": "Hi", name: x} for x in ("a", None)]),
        {},
        "row 2",
    ),
    "column of numbers": (RM, last(3), {}, "row 1"),
    "messages without content": (SFT, last([{"role": "user", "content": None}]), {}, "row 1"),
    "no messages": (RM, last([]), {}, "row 1"),
    "all too long": (TRAINED, nothing, {"max_length": 3}, "max_length"),
    "all prompts too long": (PPO, nothing, {"max_prompt_length": 3}, "max_prompt_length"),
    "no pair differs": (RM, rows(lambda row, name: [{**row, name: "good"}]), {}, "pairs"),
    "beyond the context": (EVERY, rows(lambda row, name: [{**row, "prompt": "x" * 120}]), {}, "context"),
    "beyond the context, sampled": (PPO, nothing, {"max_new_tokens": 90}, "context"),
    "no episodes of that number": (PPO, nothing, {"total_episodes": 10}, "--total_episodes"),
    "no minibatches of that number": (PPO, nothing, {"num_mini_batches": 3}, "--num_mini_batches"),
    "temperature 0": (PPO, nothing, {"temperature": 0.0}, "--temperature"),
    "beta below 0": (PPO, nothing, {"beta": -0.1}, "--beta"),
    "beta 0 that is to adapt": (
        PPO,
        nothing,
        {"beta": 0.0, "adaptive_kl_target": 3.0},
        "--adaptive_kl_target",
    ),
    "no EOS": (SFT, tokenizer(eos_token=None), {}, "EOS"),
    "a template that writes no text": (EVERY, tokenizer(chat_template=PARTS), {}, "template"),
    "another tokenizer": (PPO, shift_ids, {}, "tokenizer"),
    "a weight missing": (RM, edit("base/config.json", n_layer=3), {}, "h.2."),
    "a weight left over": (EVERY, edit("base/config.json", n_layer=1), {}, "h.1."),
    "a classifier as model": (EVERY, model(lambda: tiny_reward_model("gpt2")), {}, "score.weight"),
    "a language model as reward": (PPO, model(lambda: tiny_model("gpt2"), "rm"), {}, "score.weight"),
    "a reward head with a bias": (PPO, model(with_bias, "rm"), {}, "score.bias"),
    "scaled logits": (EVERY, scaled, {}, "gemma2"),
    "a changed flag": (EVERY, finished, {"resume": True, "seed": 5}, "--seed 5"),
}


@pytest.mark.parametrize("name, stage", [(name, stage) for name, case in CASES.items() for stage in case[0]])
def test_refused(name, stage, world, capsys):
    """One line on stderr, status 2, and no file has changed."""
    _, spoil, other, words = CASES[name]
    if spoil:
        spoil(world, stage)
    before = tree(world)
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        main(stage, **other)
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1, error
    assert words in error
    assert tree(world) == before


def test_ids_that_the_reward_model_has_no_embedding_for(tmp_path, capsys):
    """Neither an IndexError of the critic, which has the same embeddings, nor a device assert."""
    policy = tiny_model("gpt2")
    policy.resize_token_embeddings(400)
    flags = conftest.ppo_flags(tmp_path, policy, tiny_reward_model("gpt2"), tiny_tokenizer(), ["a", "bcd"])
    flags |= dict(total_episodes=8, batch_size=8, max_new_tokens=8)
    with pytest.raises(SystemExit) as end:
        ppo_rlhf.main(ppo_rlhf.Args(**flags))
    assert end.value.code == 2 and "no embedding" in capsys.readouterr().err


@pytest.mark.parametrize("stage", EVERY)
def test_a_mistyped_flag(stage, capsys):
    """It is named, with status 2, before anything is read."""
    with pytest.raises(SystemExit) as end:
        tyro.cli(STAGES[stage].Args, args=["--out_dir", "x"])
    assert end.value.code == 2 and "--out_dir" in capsys.readouterr().err.replace("-dir", "_dir")


@pytest.mark.parametrize("stage", EVERY)
def test_a_loss_that_is_not_finite(stage, world, monkeypatch, capsys):
    """Nothing is stepped, the last checkpoint and the figures until then stand, and --resume goes on from
    there."""
    other = {"save_steps": 2, "eval_steps": 1, "per_device_train_batch_size": 4}
    other |= {"total_episodes": 20} if stage == "ppo_rlhf" else {"max_steps": 5}
    clip, calls = torch.nn.utils.clip_grad_norm_, []
    third = (
        3 if stage != "ppo_rlhf" else 2 * 2 * 2 + 2
    )  # of two passes over two minibatches; not an update's first

    def clip_grad_norm_(parameters, *limit):
        parameters = list(parameters)
        calls.append(0)
        if len(calls) == third:
            next(p for p in parameters if p.grad is not None).grad[0] = math.nan
        return clip(parameters, *limit)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(torch.nn.utils, "clip_grad_norm_", clip_grad_norm_)
        main(stage, **other)
    error = capsys.readouterr().err
    assert end.value.code == 2 and " 3: " in error and "not finite" in error and error.count("\n") == 1
    assert [row.get("step", row.get("update")) for row in read_jsonl(world / "out/metrics.jsonl")] == [1, 2]
    state = torch.load(world / "out/checkpoint/state.pt")
    assert all(value.isfinite().all() for value in state["model"].values())
    assert not (world / "out/config.json").exists()
    main(stage, **other, resume=True)
    main(stage, **other | {"output_dir": "whole"})
    assert (world / "out/model.safetensors").read_bytes() == (world / "whole/model.safetensors").read_bytes()


@pytest.mark.parametrize("stage", TRAINED)
def test_max_steps_of_minus_1_are_none(stage, world):
    """As elsewhere, -1 leaves it to the epochs. Catches an untrained model that is saved as a trained one."""
    main(stage, max_steps=-1, num_train_epochs=3)
    assert len(read_jsonl("out/metrics.jsonl")) == 6
