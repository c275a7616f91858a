"""A run that is stopped and resumed ends as if nothing had happened, to the bit."""

import functools
import json
import shutil

import pytest
import torch
from conftest import make_inputs, read_jsonl, run_stage

import ppo_rlhf
import reward_model
import sft

STAGES = [sft, reward_model, ppo_rlhf]
every_stage = pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.__name__)
STEPS = 12


class Killed(BaseException):
    """Stands for whatever ends a run."""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Models with dropout in their configs, and data of a few batches, so that a run is several epochs."""
    rows = [{"prompt": f"q{'?' * i}", "completion": "fine " * (i % 4 + 1)} for i in range(10)]
    rows = [row | {"chosen": "good " * (i % 3 + 1), "rejected": "bad"} for i, row in enumerate(rows)]
    return make_inputs(tmp_path_factory.mktemp("resume"), rows, dropout=0.1)


def run(stage, world, out, **other):
    flags = {"save_steps": 3, "eval_steps": 5, "warmup_steps": 2, "learning_rate": 1e-2}
    if stage is ppo_rlhf:
        flags |= {"total_episodes": 4 * STEPS, "adaptive_kl_target": 1.0}
    else:
        flags |= {"max_steps": STEPS, "gradient_accumulation_steps": 2}
    run_stage(stage, world, out, **flags | other)


def outcome(folder):
    """All that a run is for: weights to the bit, figures without what a clock said."""
    found = {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}
    for path in folder.glob("*.jsonl"):
        rows = [row.items() for row in read_jsonl(path)]
        found[path.name] = [
            [item for item in row if item[0] != "eps" and item[0][:5] != "time/"] for row in rows
        ]
    return found | {"config": json.loads((folder / "config.json").read_text())}


@pytest.fixture(scope="module")
def whole(world):
    """stage -> folder and outcome of its uninterrupted run, made when it is first asked for."""

    @functools.cache
    def get(stage):
        folder = world / f"whole {stage.__name__}"
        run(stage, world, folder)
        assert len(read_jsonl(folder / "metrics.jsonl")) == STEPS
        return folder, outcome(folder)

    return get


def stopped(stage, world, out, calls, **other):
    """A run that ends right before its checkpoint number `calls`."""
    real, count = stage.save_checkpoint, []

    def save_checkpoint(*arguments):
        count.append(0)
        if len(count) == calls:
            raise Killed
        real(*arguments)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(stage, "save_checkpoint", save_checkpoint)
        run(stage, world, out, **other)


@every_stage
def test_resumed_between_checkpoints(stage, world, whole, tmp_path):
    """Ended after figures that no checkpoint holds, or before the first: figures do not stand twice; moments
    of Adam, dropout, the order of the data, beta and the scale of scores continue."""
    stopped(stage, world, tmp_path / "out", 1, resume=True)
    assert not (tmp_path / "out/checkpoint/state.pt").exists()
    stopped(stage, world, tmp_path / "out", 3, resume=True)
    run(stage, world, tmp_path / "out", resume=True)
    assert outcome(tmp_path / "out") == whole(stage)[1]
    # A finished run trains no more; one that was stopped while it saved is completed
    (tmp_path / "out/model.safetensors").unlink()
    run(stage, world, tmp_path / "out", resume=True)
    assert outcome(tmp_path / "out") == whole(stage)[1]


def test_memory_flags_may_change_on_resume(world, tmp_path):
    """Stage 3's micro-batches and checkpointing change results by rounding alone."""
    stopped(ppo_rlhf, world, tmp_path / "out", 2)
    other = {"per_device_train_batch_size": 3, "rollout_batch_size": 2, "gradient_checkpointing": True}
    run(ppo_rlhf, world, tmp_path / "out", resume=True, **other)
    assert len(read_jsonl(tmp_path / "out/metrics.jsonl")) == STEPS


@every_stage
def test_overwrite_leaves_nothing_old(stage, world, whole, tmp_path):
    """From its first step on a new run's folder has no model, checkpoint or figures of the older one."""
    out = tmp_path / "out"
    shutil.copytree(whole(stage)[0], out)
    stopped(stage, world, out, 1, overwrite=True, seed=7)
    assert not any((out / name).exists() for name in ("config.json", "eval.jsonl", "checkpoint/state.pt"))
    assert len(read_jsonl(out / "metrics.jsonl")) <= 3
    assert json.loads((out / "args.json").read_text())["seed"] == 7
    run(stage, world, out, overwrite=True)
    assert outcome(out) == whole(stage)[1]


def test_checkpoints_are_written_atomically(world, tmp_path, monkeypatch):
    """Half a file in place of the third checkpoint leaves the second as it was."""
    real, files = torch.save, []

    def torch_save(state, path):
        files.append(str(path))
        if len(files) == 3:
            with open(path, "wb") as file:
                file.write(b"half")
            raise Killed
        real(state, path)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(torch, "save", torch_save)
        run(sft, world, tmp_path / "out")
    assert torch.load(tmp_path / "out/checkpoint/state.pt")["progress"] == 6
    assert str(tmp_path / "out/checkpoint/state.pt") not in files
