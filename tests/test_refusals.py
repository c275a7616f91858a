"""A user's mistake ends a run with status 2 and one line that names it, before anything is written."""

import json
import math
import runpy
import shutil

import conftest
import pytest
import torch
import tyro
from conftest import make_inputs, read_jsonl, run_stage, save, tiny_model, tiny_tokenizer, write_jsonl

import ppo_rlhf
import reward_model
import sft

STAGES = {"sft": sft, "reward_model": reward_model, "ppo_rlhf": ppo_rlhf}
EVERY = tuple(STAGES)
TRAINED, SFT, RM, PPO = EVERY[:2], EVERY[:1], EVERY[1:2], EVERY[2:]
ROW = {"prompt": "Hi", "completion": "Hello", "chosen": "good", "rejected": "bad"}


def main(stage, **other):
    if stage == "ppo_rlhf" and "model_name_or_path" in other:
        other["sft_model_path"] = other.pop("model_name_or_path")
    run_stage(STAGES[stage], **other)


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """Models and data without a mistake."""
    return make_inputs(tmp_path_factory.mktemp("good"), [ROW] * 4)


@pytest.fixture
def world(good, tmp_path, monkeypatch):
    """A copy of them, as the working directory."""
    shutil.copytree(good, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def tree(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# ---- Numbers ----

SIGNED = ("max_steps", "missing_eos_penalty", "length_penalty")
MAY_BE_0 = ("warmup_steps", "seed", "max_grad_norm", "weight_decay", "beta", "gamma", "lam", "lm_coef")


def wrong(name, default):
    """The nearest number that is refused: counts are at least 1, unless 0 stands for "choose"."""
    return -0.1 if isinstance(default, float) else 0 if default and name not in MAY_BE_0 else -1


@pytest.mark.parametrize("stage", EVERY)
def test_numbers(stage, tmp_path, monkeypatch, refused):
    """Those that would train nothing, or the wrong way, are refused before all else; others are not."""
    monkeypatch.chdir(tmp_path)
    defaults = vars(STAGES[stage].Args()).items()
    numbers = [(name, x) for name, x in defaults if type(x) in (int, float) and name not in SIGNED]
    cases = [(name, wrong(name, x)) for name, x in numbers]
    cases += [
        (name, x) for name, x in (("gamma", 1.5), ("lam", 1.5), ("temperature", 0.0)) if name in dict(numbers)
    ]
    for name, value in cases:
        with refused(f"--{name}"):
            main(stage, **{name: value})
    allowed = {name: 0 * x for name, x in numbers if name in MAY_BE_0}
    allowed |= {name: -1 for name in SIGNED if name in dict(defaults)}
    STAGES[stage].check_numbers(STAGES[stage].Args(**allowed))
    assert not tree(tmp_path)


# ---- Ways to spoil what a stage reads; each is called with the folder ----


def rows(*rows):
    return lambda folder: [write_jsonl(folder / f"data/{split}.jsonl", rows) for split in ("train", "test")]


def edit(name, **changes):
    def spoil(folder):
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return spoil


def tokenizer(**changes):
    def spoil(folder):
        changed = tiny_tokenizer()
        for field, value in changes.items():
            setattr(changed, field, value)
        (folder / "base/chat_template.jinja").unlink()
        changed.save_pretrained(folder / "base")

    return spoil


def model(make, name="base"):
    return lambda folder: save(make(), tiny_tokenizer(), folder / name)


def judge(**config):
    return model(lambda: tiny_model("gpt2", 1, "SequenceClassification", **config), "rm")


def shifted(folder):
    """The letters of the reward model's tokenizer have other ids."""
    path = folder / "rm/tokenizer.json"
    other = json.loads(path.read_text())
    pad, eos, first, *letters = sorted(other["model"]["vocab"], key=other["model"]["vocab"].get)
    other["model"]["vocab"] = {token: i for i, token in enumerate([pad, eos, *letters, first])}
    path.write_text(json.dumps(other))


def template(old, new):
    def spoil(folder):
        path = folder / "rm/chat_template.jinja"
        path.write_text(path.read_text().replace(old, new))

    return spoil


PARTS = "{% for m in messages %}{% for part in m.content %}{{ part.text }}{% endfor %}{% endfor %}"
LONG = {**ROW, "prompt": "x" * 90}
RESUME = {"resume": True}
nothing = lambda folder: None
# One stage where what refuses is shared by all. name: (stages, what is spoilt, flags, words of the message)
CASES = {
    "no SFT model yet": (EVERY[1:], nothing, {"model_name_or_path": "runs/sft"}, "runs/sft"),
    "no reward model yet": (PPO, nothing, {"reward_model_path": "runs/rm"}, "runs/rm"),
    "no model in a folder": (SFT, nothing, {"model_name_or_path": "data"}, "no model in data"),
    "output_dir in use": (
        EVERY,
        lambda folder: write_jsonl(folder / "out/x.jsonl", []),
        {},
        "out is not empty",
    ),
    "output_dir is the input": (EVERY, nothing, {"out": "base"}, "base is the folder of an input"),
    "... with --overwrite": (PPO, nothing, {"out": "data/../base", "overwrite": True}, "input"),
    "output_dir is the reward model": (PPO, nothing, {"out": "rm", "overwrite": True}, "input"),
    "no data set": (RM, nothing, {"dataset_name": "nowhere"}, "nowhere"),
    "a file as data set": (SFT, nothing, {"dataset_name": "data/train.jsonl"}, "folder"),
    "no split": (EVERY, nothing, {"dataset_train_split": "trian"}, "trian"),
    "no test split": (PPO, lambda folder: (folder / "data/test.jsonl").unlink(), {}, "data, test"),
    "not JSON": (SFT, lambda folder: (folder / "data/train.jsonl").write_text('{"prompt":\n'), {}, "row 1"),
    "no rows": (SFT, rows(), {}, "no rows"),
    "all too long": (TRAINED, nothing, {"max_length": 3}, "max_length"),
    "all prompts too long": (PPO, nothing, {"max_prompt_length": 3}, "max_prompt_length"),
    "beyond the context": (TRAINED, rows({**ROW, "prompt": "x" * 120}), {}, "context"),
    "beyond the context, sampled": (("sft", "ppo_rlhf"), rows(ROW, LONG), {"max_new_tokens": 40}, "context"),
    "... of the reward model": (PPO, judge(num_labels=1, positions=11), {}, "context of 11"),
    "no episodes of that number": (PPO, nothing, {"total_episodes": 10}, "--total_episodes"),
    "no minibatches of that number": (PPO, nothing, {"num_mini_batches": 3}, "--num_mini_batches"),
    "no groups of that size": (PPO, nothing, {"num_generations": 3}, "--num_generations"),
    "beta 0 that is to adapt": (PPO, nothing, {"beta": 0.0, "adaptive_kl_target": 3.0}, "--beta"),
    "no rule": (PPO, nothing, {"reward_model_path": ""}, "write it into reward_fn"),
    "no EOS": (SFT, tokenizer(eos_token=None), {}, "EOS"),
    "a template that writes no text": (EVERY, tokenizer(chat_template=PARTS), {}, "template"),
    "another tokenizer": (PPO, shifted, {}, "tokenizer"),
    "another template": (PPO, template("Q: ", "Q:"), {}, "template"),
    "a template that ends otherwise": (PPO, template("eos_token", "'.'"), {}, "template"),
    "a weight missing": (RM, edit("base/config.json", n_layer=3), {}, "h.2."),
    "a weight left over": (EVERY, edit("base/config.json", n_layer=1), {}, "h.1."),
    "a classifier as model": (EVERY, model(lambda: conftest.tiny_reward_model("gpt2")), {}, "score.weight"),
    "a language model as reward": (PPO, model(lambda: tiny_model("gpt2"), "rm"), {}, "score.weight"),
    "two labels": (PPO, judge(num_labels=2), {}, "one label"),
    "a changed flag": (EVERY, nothing, {"seed": 5, **RESUME}, "--seed 5"),
    "another learning rate": (EVERY, nothing, {"learning_rate": 5e-3, **RESUME}, "--learning_rate 0.005"),
    "changed data": (EVERY, rows(ROW, {**ROW, "prompt": "Ho"}), RESUME, "data have changed"),
    "the run of another stage": (TRAINED, lambda folder: main("ppo_rlhf"), RESUME, "no flag of this stage"),
    "a model, no checkpoint": (EVERY, model(lambda: tiny_model("gpt2"), "out"), RESUME, "no checkpoint"),
}
FINISHED = ("a changed flag", "another learning rate", "changed data")


@pytest.mark.parametrize("name, stage", [(name, stage) for name, case in CASES.items() for stage in case[0]])
def test_refused(name, stage, world, refused):
    """One line on stderr, status 2, and no file has changed."""
    _, spoil, other, words = CASES[name]
    if name in FINISHED:
        main(stage)
    spoil(world)
    before = tree(world)
    with refused(words):
        main(stage, **other)
    assert tree(world) == before


def test_code_of_a_model_is_not_run(world, monkeypatch):
    """Nor is standard input asked about it, where a pipe may say yes."""
    edit("base/config.json", model_type="mine", auto_map={"AutoConfig": "mine.Config"})(world)
    (world / "base/mine.py").write_text("raise RuntimeError('this ran')")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(ValueError, match="trust_remote_code"):
        main("sft")


def test_ids_that_the_reward_model_has_no_embedding_for(tmp_path, refused):
    """Neither an IndexError of the critic, which has the same embeddings, nor a device assert."""
    policy = tiny_model("gpt2")
    policy.resize_token_embeddings(400)
    flags = conftest.ppo_flags(
        tmp_path, policy, conftest.tiny_reward_model("gpt2"), tiny_tokenizer(), ["a", "bcd"]
    )
    with refused("no embedding"):
        ppo_rlhf.main(ppo_rlhf.Args(**flags, total_episodes=8, batch_size=8, max_new_tokens=8))


@pytest.mark.parametrize("stage", EVERY)
def test_a_loss_that_is_not_finite(stage, world, monkeypatch, refused):
    """Nothing is stepped, the last checkpoint and all figures stand, and --resume continues from there."""
    other = {"save_steps": 2, "eval_steps": 1, "per_device_train_batch_size": 4}
    other |= {"total_episodes": 20} if stage == "ppo_rlhf" else {"max_steps": 5}
    clip, calls = torch.nn.utils.clip_grad_norm_, []
    # In stage 3 of two passes over two minibatches; not an update's first
    third = 3 if stage != "ppo_rlhf" else 2 * 2 * 2 + 2

    def clip_grad_norm_(parameters, *limit):
        parameters = list(parameters)
        calls.append(0)
        if len(calls) == third:
            next(p for p in parameters if p.grad is not None).grad[0] = math.nan
        return clip(parameters, *limit)

    with monkeypatch.context() as patch, refused(" 3: gradient not finite"):
        patch.setattr(torch.nn.utils, "clip_grad_norm_", clip_grad_norm_)
        main(stage, **other)
    assert [row.get("step", row.get("update")) for row in read_jsonl(world / "out/metrics.jsonl")] == [1, 2]
    state = torch.load(world / "out/checkpoint/state.pt")
    assert all(value.isfinite().all() for value in state["model"].values())
    assert not (world / "out/config.json").exists()
    main(stage, **other, resume=True)
    main(stage, **other, out="whole")
    assert (world / "out/model.safetensors").read_bytes() == (world / "whole/model.safetensors").read_bytes()


@pytest.mark.parametrize("stage", EVERY)
def test_ctrl_c(stage, monkeypatch, refused):
    """It says how to continue."""
    monkeypatch.setattr(tyro, "cli", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    with refused("--resume continues"):
        runpy.run_path(STAGES[stage].__file__, run_name="__main__")
