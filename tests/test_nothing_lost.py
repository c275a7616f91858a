"""Whatever ends a run, an exception, a signal, a full disk, a NaN, what it had reached is kept, and --resume ends the same to
the bit as if nothing had happened. And nothing that stands in a folder is replaced without being asked to.

Where a test needs a whole process (signals, limits, exit statuses, what stands on stderr), it is forked from this one, in
which all imports are done: milliseconds instead of seconds.
"""

import copy
import dataclasses
import functools
import hashlib
import io
import json
import os
import pickle
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
import traceback
import types
from pathlib import Path

import pytest
import torch
import transformers
from conftest import SCRIPTS, save, tiny_model, tiny_reward_model, tiny_tokenizer, write_jsonl

import ppo_rlhf
import reward_model
import sft

resource = pytest.importorskip("resource")  # and with it os.fork: not on Windows
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")

STAGES = [sft, reward_model, ppo_rlhf]
CLOCKS = {"time", "seconds", "eps", "tokens_per_second", "memory/peak_gb"}  # and time/*: what may differ between two runs
FREE = {"output_dir", "logging_steps", "eval_steps", "track", "save_steps", "save_total_limit", "resume", "overwrite",
        "gradient_checkpointing"}  # fmt: skip
ROUNDING = {ppo_rlhf: {"per_device_train_batch_size", "rollout_batch_size"}}  # changes the order of sums, nothing else
STEPS = 7  # of every run here; checkpoints after 3, 6 and 7, lines in metrics.jsonl after 2, 4, 6 and 7


def label(parameter):
    return getattr(parameter, "__name__", parameter)


every_stage = pytest.mark.parametrize("stage", STAGES, ids=label)

# ---------------------------------------------------------------------------------------------------------------
# Small runs, ways to end them, and what they leave
# ---------------------------------------------------------------------------------------------------------------


def make_world(folder):
    """Models with dropout in their configs, and data of a few batches, so that seven steps are more than one epoch."""
    tokenizer = tiny_tokenizer()
    save(tiny_model("gpt2", dropout=0.1), tokenizer, folder / "base")
    save(tiny_reward_model("gpt2", dropout=0.1, reward_mean=0.5, reward_std=2.0), tokenizer, folder / "rm")
    for split, count in (("train", 10), ("test", 3)):
        rows = [{"prompt": f"{split} {i}" + "?" * (i % 3), "completion": "fine " * (i % 4 + 1), "chosen": "good " * (i % 3 + 1),
                 "rejected": "bad " * (i % 2 + 1)} for i in range(count)]  # fmt: skip
        for name, columns in (("demos", ["completion"]), ("pairs", ["chosen", "rejected"]), ("prompts", [])):
            write_jsonl(folder / name / f"{split}.jsonl", [{c: row[c] for c in ["prompt", *columns]} for row in rows])
    return folder


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("nothing_lost") / "world")


def settings(stage, world, out, **overrides):
    every = dict(output_dir=out, per_device_train_batch_size=2, save_steps=3, logging_steps=2, eval_steps=4, max_new_tokens=5,
                 warmup_steps=2, learning_rate=1e-2)  # fmt: skip
    steps = dict(max_steps=STEPS, gradient_accumulation_steps=2, model_name_or_path=world / "base")
    own = {
        sft: dict(steps, dataset_name=world / "demos"),
        reward_model: dict(steps, dataset_name=world / "pairs", normalization_samples=6),
        ppo_rlhf: dict(sft_model_path=world / "base", reward_model_path=world / "rm", dataset_name=world / "prompts",
                       total_episodes=4 * STEPS, batch_size=4, num_mini_batches=2, num_ppo_epochs=1),
    }[stage]  # fmt: skip
    merged = {**every, **own, **overrides}
    if stage is ppo_rlhf and not isinstance(merged["reward_model_path"], tuple):
        merged["reward_model_path"] = (str(merged["reward_model_path"]),)
    return {name: str(value) if isinstance(value, Path) else value for name, value in merged.items()}


def run(stage, world, out, **overrides):
    """main() in this process."""
    stage.main(stage.Args(**settings(stage, world, out, **overrides)))


def process(stage, world, out, prepare=lambda: None, watch=lambda pid: None, **overrides):
    """`python SCRIPT --flag value ...` in a process of its own -> its status (below 0: the signal it died of), stdout, stderr.

    `prepare` runs in that process before the script, to break something in it; `watch` here, while that process runs."""
    flags = []
    for name, value in settings(stage, world, out, **overrides).items():
        flags += [] if value is False else [f"--{name}"] if value is True else [f"--{name}", *map(str, value if isinstance(value, tuple) else [value])]
    pipes = [os.pipe(), os.pipe()]
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            signal.alarm(60)  # a process that hangs must not hang the tests
            for target, (_, write) in zip((1, 2), pipes):
                os.dup2(write, target)
            sys.stdout, sys.stderr = (open(fd, "w", closefd=False) for fd in (1, 2))
            signal.signal(signal.SIGINT, signal.default_int_handler), signal.signal(signal.SIGTERM, signal.SIG_DFL)
            script = str(SCRIPTS / f"{stage.__name__}.py")
            sys.argv = [script, *flags]
            prepare()
            runpy.run_path(script, run_name="__main__")
            code = 0
        except SystemExit as end:
            code = end.code or 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(code)
    texts = []
    for _, write in pipes:
        os.close(write)
    watch(pid)
    for read, _ in pipes:
        with open(read, encoding="utf-8") as file:
            texts.append(file.read())
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), *texts


class Crash(Exception):
    pass


def crash(parameters=None):
    raise Crash


def at_step(step, action, patch=setattr):
    """Call `action(parameters)` once, in the middle of optimizer step (of PPO: update) `step`: gradients are there, but not
    yet applied. By two functions of torch that every step calls; `patch`: monkeypatch.setattr, or setattr in a process that
    ends."""
    now, seed, clip = [0], torch.manual_seed, torch.nn.utils.clip_grad_norm_

    def manual_seed(number):
        now[0] = number % 2**20 if number >= 2**20 else now[0]
        return seed(number)

    def clip_grad_norm_(parameters, *others):
        parameters = list(parameters)
        if now[0] == step:
            now[0] = 0
            action(parameters)
        return clip(parameters, *others)

    patch(torch, "manual_seed", manual_seed), patch(torch.nn.utils, "clip_grad_norm_", clip_grad_norm_)


def crashed(stage, world, out, step, **overrides):
    """A run that ended by an exception in the middle of `step`. What begins in no folder is run once and copied from then on:
    half of these tests begin so."""
    kept = world.parent / f"crashed {stage.__name__} {step} {sorted(overrides.items())}".replace("/", "_")
    folder = out if out.exists() else kept
    if not kept.exists() or folder is out:
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Crash):
            at_step(step, crash, patch.setattr)
            run(stage, world, folder, **overrides)
    if folder is kept:
        shutil.copytree(kept, out)


def outcome(folder):
    """All that a run is for: weights and configs as checksums, jsonl files as their lines without what a clock said."""
    found = {path.name: hashlib.sha256(path.read_bytes()).hexdigest()
             for path in [*folder.glob("*.safetensors"), *folder.glob("*.json")] if path.name != "args.json"}  # fmt: skip
    for path in folder.glob("*.jsonl"):
        lines = path.read_text(encoding="utf-8").split("\n")
        assert lines.pop() == ""
        found[path.name] = [json.dumps({key: value for key, value in json.loads(line).items()
                                        if key not in CLOCKS and not key.startswith("time/")}) for line in lines]  # fmt: skip
    return found


@pytest.fixture(scope="module")
def finished(world):
    """stage -> folder of its uninterrupted run, made when it is first asked for."""

    def make(stage):
        out = world.parent / f"finished {stage.__name__}"
        if not out.exists():
            run(stage, world, out)
        return out

    return make


@pytest.fixture(scope="module")
def whole(finished):
    """stage -> outcome of its uninterrupted run."""

    def make(stage):
        made = outcome(finished(stage))
        assert {"model.safetensors", "config.json", "metrics.jsonl"} <= set(made) and (stage is not ppo_rlhf or len(made) >= 8)
        return made

    return functools.cache(make)


@pytest.fixture(autouse=True)
def handlers():
    """main() sets signal handlers; pytest gets its own back."""
    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


def checkpoints(out):
    return sorted(out.glob("checkpoint/*.pt"))


def steps(out):
    return [int(path.name[:8]) for path in checkpoints(out)]


def contents(folder):
    """{path: bytes} of everything below a folder, None for folders."""
    return {path: path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


def refused(capsys, stage, world, out, *complaints, **overrides):
    """main() ends with status 2 and one line on stderr that names the trouble, and has changed nothing in its folder."""
    before, _ = contents(out), capsys.readouterr()
    with pytest.raises(SystemExit) as exit:
        run(stage, world, out, **overrides)
    error = capsys.readouterr().err
    assert exit.value.code == 2 and len(error.splitlines()) == 1, error
    assert [complaint for complaint in complaints if complaint not in error] == [], error
    assert contents(out) == before


def one_line(error, *parts):
    """stderr holds one line, with these in it, and no traceback."""
    assert len(error.splitlines()) == 1 and "Traceback" not in error, error
    assert [part for part in parts if part not in error] == [], error


# ---------------------------------------------------------------------------------------------------------------
# Interruptions
# ---------------------------------------------------------------------------------------------------------------


@every_stage
@pytest.mark.parametrize("chain", [[2], [5], [1, 3, 4, 7, "end"]], ids=str)
def test_a_run_that_crashed_ends_as_if_it_had_not(stage, chain, world, whole, tmp_path):
    """An exception in the middle of a step: before the first checkpoint, between two, and several in a row, in the very step
    of a checkpoint, in the last step and, at last, while the final model is written. Catches state that no checkpoint
    holds: optimizer moments, dropout's random state, the place in the data and in an epoch's order, losses since the last
    line of metrics.jsonl; and lines that stand twice in it."""
    for attempt, step in enumerate(chain):
        if step == "end":
            with pytest.MonkeyPatch.context() as patch, pytest.raises(Crash):
                patch.setattr(stage, "write_card", lambda *_: crash())
                run(stage, world, tmp_path / "out", resume=attempt > 0)
        else:
            crashed(stage, world, tmp_path / "out", step, resume=attempt > 0)
    run(stage, world, tmp_path / "out", resume=True)
    assert outcome(tmp_path / "out") == whole(stage)
    assert steps(tmp_path / "out") == [STEPS]


def test_ctrl_c_while_a_run_goes_on(world, tmp_path):
    """A signal from outside, at whatever instant it comes, as soon as the first checkpoint is there: the run stops with a
    checkpoint of the update that it names, and resumed ends as the uninterrupted one."""

    def interrupt(pid):
        deadline = time.time() + 30
        while not checkpoints(tmp_path / "out") and time.time() < deadline:
            time.sleep(0.001)
        os.kill(pid, signal.SIGINT)

    flags = dict(total_episodes=160)  # 40 updates, a second or so
    code, _, error = process(ppo_rlhf, world, tmp_path / "out", watch=interrupt, **flags)
    assert code == 130, error
    (step,) = steps(tmp_path / "out")
    assert 3 <= step < 40
    one_line(error, f"stopped after update {step}", "--resume")
    run(ppo_rlhf, world, tmp_path / "out", resume=True, **flags)
    run(ppo_rlhf, world, tmp_path / "reference", **flags)
    assert outcome(tmp_path / "out") == outcome(tmp_path / "reference")


@every_stage
@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_a_run_after_its_step(stage, number, status, world, whole, tmp_path):
    """In the middle of step 5, which no checkpoint is due after: the step is finished, a checkpoint of it is written, the
    status is the shell's for that signal, one line says how to go on, and going on ends the same. Catches work thrown
    away, half a step, a traceback."""
    code, _, error = process(stage, world, tmp_path / "out", lambda: at_step(5, lambda _: os.kill(os.getpid(), number)))
    assert code == status
    one_line(error, f"{'update' if stage is ppo_rlhf else 'step'} 5", "--resume")
    assert steps(tmp_path / "out") == [5]
    if number == signal.SIGINT:  # the other leaves the same
        run(stage, world, tmp_path / "out", resume=True)
        assert outcome(tmp_path / "out") == whole(stage)


@every_stage
def test_a_second_signal_ends_a_run_at_once(stage, world, tmp_path):
    """Who presses Ctrl-C twice does not want to wait for the end of a step. Nothing more is written, the last checkpoint
    stands."""

    def twice(_):
        os.kill(os.getpid(), signal.SIGINT), os.kill(os.getpid(), signal.SIGINT)

    code, _, error = process(stage, world, tmp_path / "out", lambda: at_step(5, twice))
    assert (code, error, steps(tmp_path / "out")) == (-signal.SIGINT, "", [3])


@every_stage
def test_a_signal_between_two_lines(stage, world, tmp_path, monkeypatch, capsys):
    """A signal may come at any instant, also just after a step found no reason for a checkpoint. The run then stops with a
    checkpoint all the same. Catches a run that says "stopped after step 5" and has kept nothing of it."""
    armed, asked = [], []

    class Late(list):  # what catch_signals returns: from step 5 on it holds a signal, but not when it is asked first
        def __bool__(self):
            asked.extend(armed)
            return len(asked) > 1

    monkeypatch.setattr(stage, "catch_signals", lambda: Late([signal.SIGINT]))
    at_step(5, armed.append, monkeypatch.setattr)
    with pytest.raises(SystemExit) as exit:
        run(stage, world, tmp_path / "out")
    step = int(re.search(r"stopped after \w+ (\d+)", capsys.readouterr().err)[1])
    assert exit.value.code == 130 and steps(tmp_path / "out") == [step]


KILLS = [(sft, "half written"), (reward_model, "without a name"), (ppo_rlhf, "beside the old one")]


@pytest.mark.parametrize("stage, moment", KILLS, ids=label)
def test_a_kill_inside_a_save(stage, moment, world, whole, tmp_path):
    """SIGKILL, as a power cut or the kernel's out-of-memory killer, at three places inside of the save after step 6. There
    is one whole checkpoint at every instant. Catches a checkpoint that is overwritten in place, a half-written one that
    gets a name, an old one that goes too early, and leftovers that are taken for a checkpoint."""

    def kill(*_):
        os.kill(os.getpid(), signal.SIGKILL)

    def arm(_):
        if moment == "half written":
            real = torch.save

            def half(state, file):
                buffer = io.BytesIO()
                real(state, buffer)
                file.write(buffer.getvalue()[: buffer.tell() // 2]), file.flush(), kill()

            torch.save = half
        elif moment == "without a name":
            os.fsync = kill
        else:
            replace = Path.replace
            Path.replace = lambda *paths: (replace(*paths), kill())

    code, _, _ = process(stage, world, tmp_path / "out", lambda: at_step(6, arm))
    assert code == -signal.SIGKILL
    assert steps(tmp_path / "out") == ([3, 6] if moment == "beside the old one" else [3])
    assert (tmp_path / "out" / "checkpoint" / "unfinished").exists() == (moment != "beside the old one")
    run(stage, world, tmp_path / "out", resume=True)
    assert outcome(tmp_path / "out") == whole(stage)
    assert len(contents(tmp_path / "out" / "checkpoint")) == 1


# ---------------------------------------------------------------------------------------------------------------
# What may change before --resume, and what may not
# ---------------------------------------------------------------------------------------------------------------


@every_stage
def test_changed_flags_are_refused(stage, world, tmp_path, capsys):
    """Each flag that changes the result is named, with its old and new value, and nothing is touched. A flag that is added
    to a script later is refused too, or must be added to FREE here. Catches a run that ends as neither the one nor the
    other."""
    out = tmp_path / "out"
    crashed(stage, world, out, 5)
    fields = {field.name for field in dataclasses.fields(stage.Args)}
    args = stage.Args(**settings(stage, world, out))
    for name in sorted(fields - FREE - ROUNDING.get(stage, set())):
        old = getattr(args, name)
        new = old + "/other" if isinstance(old, str) else not old if isinstance(old, bool) else type(old)(old * 2 or 1)
        new = new / 4 if isinstance(old, float) else new  # gamma and lambda may not be above 1
        values = [line for value in (new, old) for line in str(value).splitlines()]  # a template has two
        refused(capsys, stage, world, out, f"--{name} ", "(was ", *values, resume=True, **{name: new})
    changed = {"seed": 5, "temperature": 0.5}
    refused(capsys, stage, world, out, "--seed 5 (was 1)", "--temperature 0.5 (was 0.7)", resume=True, **changed)


@every_stage
def test_flags_that_change_no_result_may_change(stage, world, whole, tmp_path, monkeypatch):
    """The folder's place, how often something is logged, evaluated and saved, Weights & Biases, gradient checkpointing: a
    run goes on with other values and ends with the same weights. Catches a flag that is held to be harmless and is not,
    such as an evaluation that uses up random numbers."""
    crashed(stage, world, tmp_path / "out", 5)
    (tmp_path / "out").rename(tmp_path / "moved")
    monkeypatch.setitem(sys.modules, "wandb", wandb([]))
    changed = dict(logging_steps=1, eval_steps=3, save_steps=1, save_total_limit=2, gradient_checkpointing=True, track=True,
                   overwrite=True)  # fmt: skip
    assert {*changed, "output_dir", "resume"} == FREE
    run(stage, world, tmp_path / "moved", resume=True, **changed)
    made, expected = outcome(tmp_path / "moved"), whole(stage)
    for name in {"metrics.jsonl", "samples.jsonl"} & set(made):  # other lines are due
        assert made.pop(name) != expected[name]
    assert made.items() <= expected.items() and "model.safetensors" in made


def wandb(calls):
    """A module that writes down what it is called with, instead of Weights & Biases."""

    def note(name):
        return lambda *args, **kwargs: calls.append((name, kwargs))

    functions = {name: note(name) for name in ("init", "log", "finish", "Table")}
    return types.SimpleNamespace(run=types.SimpleNamespace(id="an id"), **functions)


@every_stage
def test_the_tracked_run_goes_on(stage, world, tmp_path, monkeypatch):
    """With --track, --resume goes on with the same run of Weights & Biases. Catches two half curves instead of one."""
    calls = []
    monkeypatch.setitem(sys.modules, "wandb", wandb(calls))
    crashed(stage, world, tmp_path / "out", 5, track=True)
    run(stage, world, tmp_path / "out", track=True, resume=True)
    assert [(call["id"], call["resume"]) for name, call in calls if name == "init"] == [(None, "allow"), ("an id", "allow")]


def test_the_micro_batch_of_ppo_may_change(world, finished, tmp_path):
    """Out of memory after some updates: a smaller --per_device_train_batch_size goes on, and changes rounding only."""
    from safetensors.torch import load_file

    crashed(ppo_rlhf, world, tmp_path / "out", 5)
    run(ppo_rlhf, world, tmp_path / "out", resume=True, per_device_train_batch_size=1)
    expected = load_file(finished(ppo_rlhf) / "model.safetensors")
    for name, tensor in load_file(tmp_path / "out" / "model.safetensors").items():
        torch.testing.assert_close(tensor, expected[name], atol=2e-3, rtol=0)


CHANGES = {
    "training data": [sft, reward_model, ppo_rlhf],
    "held-out data": [sft, reward_model, ppo_rlhf],
    "tokenizer": [sft, reward_model],  # PPO refuses a tokenizer that is not the reward model's anyway
    "SFT model": [reward_model, ppo_rlhf],
    "SFT model's last layer": [reward_model, ppo_rlhf],
    "reward model": [ppo_rlhf],
    "reward model's head": [ppo_rlhf],
    "reward model's scale": [ppo_rlhf],
}


@pytest.mark.parametrize("stage, change", [(stage, change) for change, stages in CHANGES.items() for stage in stages], ids=label)
def test_changed_inputs_are_refused(stage, change, world, tmp_path, capsys):
    """Behind the same path stand other data or other weights, be it one row, one layer, or two numbers of a config. Catches
    a run whose second half learns something else than its first, such as PPO against another reward model."""
    crashed(stage, world, tmp_path / "out", 5)
    data = world / {sft: "demos", reward_model: "pairs", ppo_rlhf: "prompts"}[stage]
    folder = data if "data" in change else world / ("rm" if "reward" in change else "base")
    before = contents(folder)
    try:
        if "data" in change:
            path = data / ("train.jsonl" if change == "training data" else "test.jsonl")
            path.write_text(re.sub(r"(.*)(train|test) ", r"\1other ", path.read_text(), flags=re.DOTALL))  # the last row
        elif change == "tokenizer":
            path = folder / "tokenizer.json"
            path.write_text(re.sub(r'"add_prefix_space": *false', '"add_prefix_space": true', path.read_text()))
        elif change == "reward model's scale":
            path = folder / "config.json"
            path.write_text(path.read_text().replace('"reward_std": 2.0', '"reward_std": 3.0'))
        else:
            auto = transformers.AutoModelForSequenceClassification if "reward" in change else transformers.AutoModelForCausalLM
            model = auto.from_pretrained(folder)
            with torch.no_grad():
                weight = (model.score if "head" in change else model.base_model.h[-1].mlp.c_proj if "last" in change
                          else model.get_input_embeddings()).weight  # fmt: skip
                weight += 0.01 * torch.randn_like(weight)
            model.save_pretrained(folder)
        assert contents(folder) != before
        refused(capsys, stage, world, tmp_path / "out", "--resume", "--overwrite", resume=True)
    finally:
        for path, data in before.items():
            path.write_bytes(data)


# ---------------------------------------------------------------------------------------------------------------
# Folders
# ---------------------------------------------------------------------------------------------------------------


@every_stage
def test_a_folder_that_holds_something_is_refused(stage, world, finished, tmp_path, capsys):
    """Without --resume or --overwrite: a stranger's notes, a crashed run, a finished run, a regular file. Nothing in it
    changes, and the line names both flags. Catches hours of training that a second Enter replaces."""
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / ".hidden").write_text("mine")
    crashed(stage, world, tmp_path / "crashed", 5)
    shutil.copytree(finished(stage), tmp_path / "finished")
    for name in ("notes", "crashed", "finished"):
        refused(capsys, stage, world, tmp_path / name, f"--output_dir {tmp_path / name}", "--resume", "--overwrite")
    (tmp_path / "file").write_text("mine")
    refused(capsys, stage, world, tmp_path / "file", "--output_dir")
    assert (tmp_path / "file").read_text() == "mine"


@every_stage
def test_overwrite_removes_the_old_checkpoints(stage, world, whole, tmp_path, capsys):
    """--overwrite over a run of another seed, crashed before its own first checkpoint: a later --resume, here with
    --overwrite, begins the new run; the next one goes on with that. Catches a run that silently goes on with the weights
    that it was to replace, and a job script with both flags that never gets beyond what it reaches in one go."""
    out = tmp_path / "out"
    crashed(stage, world, out, 7, seed=2, save_total_limit=2)
    assert steps(out) == [3, 6]
    (out / "config.json").write_text("{}")  # as of a finished run, whose model the next stage would take for the new one
    crashed(stage, world, out, 2, overwrite=True)
    assert steps(out) == [] and not (out / "config.json").exists()
    crashed(stage, world, out, 5, resume=True, overwrite=True)
    assert steps(out) == [3]
    run(stage, world, out, resume=True, overwrite=True)
    assert f"after step 3 of {out}" in capsys.readouterr().out
    assert outcome(out) == whole(stage)


@every_stage
def test_a_model_without_a_checkpoint_is_not_resumed(stage, world, finished, tmp_path, capsys):
    """A finished run whose checkpoints someone deleted to save space: --resume would train again from the start and
    replace the model, so it is refused."""
    out = tmp_path / "out"
    shutil.copytree(finished(stage), out, ignore=lambda *_: ["checkpoint"])
    refused(capsys, stage, world, out, "--resume", "--overwrite", str(out), resume=True)


@pytest.mark.parametrize("stage, kind", [(sft, "missing"), *[(stage, "empty") for stage in STAGES]], ids=label)
def test_resume_where_nothing_is_starts_at_the_beginning(stage, kind, world, whole, tmp_path):
    """A job that always passes --resume may be started and restarted by one and the same command."""
    if kind == "empty":
        (tmp_path / "out").mkdir()
    run(stage, world, tmp_path / "out", resume=True)
    assert outcome(tmp_path / "out") == whole(stage)


@every_stage
def test_resume_of_a_finished_run_repeats_the_end_only(stage, world, finished, whole, tmp_path, monkeypatch):
    """No step is taken, and the files are the same, also those that were lost since. Catches a model that is trained
    further, and an evaluation that depends on the random numbers before it."""
    out = tmp_path / "out"
    shutil.copytree(finished(stage), out)
    before = contents(out / "checkpoint")
    for name in ("model.safetensors", "metrics.jsonl", "config.json"):
        (out / name).unlink()
    monkeypatch.setattr(torch.optim.AdamW, "step", crash)
    run(stage, world, out, resume=True)
    assert outcome(out) == whole(stage) and contents(out / "checkpoint") == before


@every_stage
def test_as_many_checkpoints_as_asked_for(stage, world, tmp_path):
    """--save_total_limit 2 keeps the newest two, each of which is whole."""
    crashed(stage, world, tmp_path / "out", 7, save_total_limit=2)
    assert steps(tmp_path / "out") == [3, 6]
    run(stage, world, tmp_path / "out", save_total_limit=2, resume=True)
    assert steps(tmp_path / "out") == [6, 7]
    for path in checkpoints(tmp_path / "out"):
        assert torch.load(path, weights_only=True)["step"] == int(path.name[:8])
        assert path.stem.endswith(hashlib.sha256(path.read_bytes()).hexdigest()[:16])


# ---------------------------------------------------------------------------------------------------------------
# Faults of the disk
# ---------------------------------------------------------------------------------------------------------------


def damage(path, kind):
    data = bytearray(path.read_bytes())
    if kind == "truncated":
        data = data[:-1]
    elif kind == "empty":
        data = b""
    else:
        data[len(data) // 2] ^= 16
    path.write_bytes(data)


DAMAGES = [(sft, "truncated"), (sft, "empty"), *[(stage, "one bit flipped") for stage in STAGES]]


@pytest.mark.parametrize("stage, kind", DAMAGES, ids=label)
def test_a_damaged_checkpoint_is_never_used(stage, kind, world, whole, tmp_path, capsys):
    """Cut by one byte, emptied, or one bit of it flipped: with an older one the run goes on from there, says so, and ends
    the same; without, one line says what there is and what to do. Catches weights with a wrong bit, which no library
    notices, and an error from deep inside of one."""
    out = tmp_path / "out"
    crashed(stage, world, out, 7, save_total_limit=2)
    older, newer = checkpoints(out)
    damage(newer, kind)
    shutil.copytree(out, tmp_path / "alone", ignore=lambda *_: [older.name])
    refused(capsys, stage, world, tmp_path / "alone", "of 1 checkpoints", "none is whole", "--overwrite", resume=True)
    run(stage, world, out, resume=True)
    said = capsys.readouterr().out
    assert "after step 3" in said and f"{newer.name} is damaged" in said
    assert outcome(out) == whole(stage)


@every_stage
def test_no_damaged_checkpoint_displaces_a_whole_one(stage, world, whole, tmp_path):
    """The newest of two checkpoints is damaged, and the run goes on from the older one with --save_total_limit 1: of what is
    kept, one is always whole. Catches a limit that counts the damaged one as the newest and deletes every new one."""
    out = tmp_path / "out"
    crashed(stage, world, out, 7, save_total_limit=2)
    damage(checkpoints(out)[-1], "one bit flipped")
    crashed(stage, world, out, 6, save_steps=1, resume=True)  # has saved after 4 and 5
    run(stage, world, out, resume=True)
    assert outcome(out) == whole(stage)


LOGS = [(sft, "missing"), (reward_model, "cut"), *[(ppo_rlhf, kind) for kind in ("cut", "more", "missing")]]


@pytest.mark.parametrize("stage, kind", LOGS, ids=label)
def test_logs_are_those_of_the_checkpoint(stage, kind, world, whole, tmp_path):
    """A kill may leave half a line, lines of steps that are taken again, or (on a disk that lost them) no file: after
    --resume every step stands once in metrics.jsonl and samples.jsonl. Catches a file that no JSON reader accepts."""
    out = tmp_path / "out"
    crashed(stage, world, out, 5)
    for path in out.glob("*.jsonl"):
        if kind == "cut":
            path.write_bytes(path.read_bytes()[:-7])
        elif kind == "more":
            path.write_text(path.read_text() + '{"step": 6, "update": 6}\n{"st')
        else:
            path.unlink()
    run(stage, world, out, resume=True)
    assert outcome(out) == whole(stage)


def full_disk(size=50_000):
    """From now on no file of this process may grow beyond `size` bytes: writes fail as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


FULL = [(sft, "metrics"), *[(stage, what) for what in ("checkpoint", "model") for stage in STAGES]]


@pytest.mark.parametrize("stage, what", FULL, ids=label)
def test_a_full_disk(stage, what, world, whole, tmp_path):
    """While a checkpoint, a line of metrics or the final model is written: status 1, one line that says so and how to go
    on, the earlier checkpoint as it was, and with room again the run ends the same. Catches a traceback, and an old
    checkpoint that made place for one that did not fit."""

    def prepare():
        if what == "model":
            real = transformers.PreTrainedModel.save_pretrained
            transformers.PreTrainedModel.save_pretrained = lambda *args, **kwargs: (full_disk(), real(*args, **kwargs))
        else:
            at_step(5, lambda _: full_disk(50_000 if what == "checkpoint" else 200))

    out = tmp_path / "out"
    code, _, error = process(stage, world, out, prepare)
    assert code == 1, error
    one_line(error, "File too large", "--resume", *["step 6", str(out)] * (what == "checkpoint"))
    assert steps(out) == ([7] if what == "model" else [3])
    run(stage, world, out, resume=True)
    assert outcome(out) == whole(stage)


@every_stage
def test_a_folder_that_cannot_be_made(stage, world, tmp_path):
    """--output_dir below a regular file: one line with its name, status 1 or 2, no traceback."""
    (tmp_path / "file").write_text("mine")
    code, _, error = process(stage, world, tmp_path / "file" / "out")
    assert code in (1, 2)
    one_line(error, "error", str(tmp_path / "file" / "out"))
    assert (tmp_path / "file").read_text() == "mine"


# ---------------------------------------------------------------------------------------------------------------
# Values that are not finite, and no memory left
# ---------------------------------------------------------------------------------------------------------------

# (stage, what turns bad after step or minibatch 4.1): (where the run says that it found it, which tensors it names)
NONFINITE = {
    (sft, "loss"): ("step 5", "loss and gradient norm"),
    (sft, "gradient"): ("step 4", "gradient norm"),
    (reward_model, "loss"): ("step 5", "loss and gradient norm"),
    (reward_model, "gradient"): ("step 4", "gradient norm"),
    (ppo_rlhf, "reward"): ("update 5, scoring", "scores"),
    (ppo_rlhf, "reference"): ("update 5, scoring", "ref_logprobs"),
    (ppo_rlhf, "policy loss"): ("update 4, minibatch 2", "loss and gradient norm"),
    (ppo_rlhf, "gradient"): ("update 4, minibatch 1", "gradient norm"),
}


@pytest.mark.parametrize("stage, kind", NONFINITE, ids=label)
def test_nothing_that_is_not_finite_reaches_a_checkpoint(stage, kind, world, tmp_path, capsys):
    """A NaN or an inf in a loss, a gradient, a score, or from a frozen model: status 1, one line that says what and where;
    the batch is kept in a file that loads without running code; the last checkpoint is that of an unharmed run. Catches a
    model of NaNs after a night of training."""
    armed, copies = [], []
    out, (where, named) = tmp_path / "out", NONFINITE[stage, kind]

    def spoil(module, name, value):
        real = getattr(module, name)
        patch.setattr(module, name, lambda *args, **kwargs: real(*args, **kwargs) * (value if armed else 1.0))

    def deepcopy(thing, *others, real=copy.deepcopy):
        copies.append(real(thing, *others))
        return copies[-1]

    def arm(parameters):
        armed.append(True)
        with torch.no_grad():
            if kind == "gradient":
                parameters[3].grad.view(-1)[0] = torch.nan
            if kind == "reference":
                model = next(model for model in copies if isinstance(model, transformers.PreTrainedModel))
                next(model.parameters())[:] = torch.nan

    with pytest.MonkeyPatch.context() as patch:
        if kind == "loss":
            spoil(*((sft, "completion_loss") if stage is sft else (reward_model.F, "logsigmoid")), torch.nan)
        elif kind == "reward":
            spoil(ppo_rlhf, "reward_fn", torch.nan)
        elif kind == "policy loss":
            spoil(ppo_rlhf, "policy_loss", torch.inf)
        elif kind == "reference":
            patch.setattr(ppo_rlhf.copy, "deepcopy", deepcopy)
        at_step(4, arm, patch.setattr)
        with pytest.raises(SystemExit) as exit:
            run(stage, world, out)
    assert exit.value.code == 1
    one_line(capsys.readouterr().err, f"{where}: {named} not finite", str(out / "nonfinite.pt"))

    assert steps(out) == [3] and not (out / "config.json").exists()
    crashed(stage, world, tmp_path / "unharmed", 4)
    for key in ("policy", "value_head") if stage is ppo_rlhf else ("model",):
        kept, expected = (torch.load(checkpoints(path)[0], weights_only=True)[key] for path in (out, tmp_path / "unharmed"))
        assert all(tensor.isfinite().all() and torch.equal(tensor, expected[name]) for name, tensor in kept.items())

    saved = torch.load(out / "nonfinite.pt", weights_only=True)
    assert any(not value.isfinite().all() for value in saved.values() if isinstance(value, torch.Tensor))
    tokenizer = tiny_tokenizer()
    if stage is ppo_rlhf:
        lengths, ids = saved["lengths"], saved["sequences"]
        texts = [tokenizer.decode(row[:length]) for row, length in zip(ids, lengths)]
        assert len(texts) == len(saved["logprobs"]) == len(saved["scores"]) == 4  # row by row
    else:
        batches = saved["examples" if stage is sft else "pairs"]
        texts = [tokenizer.decode(prompt) for batch in batches for prompt, _ in batch]
        assert len(texts) == 4
    assert all(text.startswith("Prompt: train ") for text in texts)


@every_stage
def test_out_of_gpu_memory(stage, world, whole, tmp_path):
    """One line that names the flags which help, and no traceback; the last checkpoint goes on with one of them."""

    def full(_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee documentation ...")

    code, _, error = process(stage, world, tmp_path / "out", lambda: at_step(5, full))
    assert code == 1
    one_line(error, "out of GPU memory", "--per_device_train_batch_size", "--gradient_checkpointing", "--resume", "2.00 GiB")
    assert steps(tmp_path / "out") == [3]
    run(stage, world, tmp_path / "out", resume=True, gradient_checkpointing=True)
    assert outcome(tmp_path / "out") == whole(stage)


# ---------------------------------------------------------------------------------------------------------------
# Nothing from outside
# ---------------------------------------------------------------------------------------------------------------

TRAP = """
import os, socket
def forbidden(*args, **kwargs):
    with open(os.environ["MARK"], "a") as file:
        file.write(f"{args}\\n")
    raise OSError("no network here")
socket.socket.connect = socket.socket.connect_ex = socket.create_connection = socket.getaddrinfo = forbidden
"""
DRIVER = """
import json, runpy, socket, sys
for script, *flags in json.loads(sys.argv[1]):
    sys.argv = [script, *flags]
    runpy.run_path(script, run_name="__main__")
try:
    socket.create_connection(("example.com", 443))  # the trap works
except OSError:
    pass
"""


def test_local_files_need_no_network(world, tmp_path):
    """All three stages on local folders, without any variable that says offline, in a Python that notes every attempt to
    connect before it fails. Catches libraries that ask a server about local files, wait for it, and hide that it failed."""
    (tmp_path / "sitecustomize.py").write_text(TRAP)
    environment = {name: value for name, value in os.environ.items() if not name.endswith("OFFLINE")}
    environment.update(PYTHONPATH=str(tmp_path), MARK=str(tmp_path / "mark"))
    commands = []
    for stage in STAGES:
        flags = settings(stage, world, tmp_path / stage.__name__).items()
        script = str(SCRIPTS / f"{stage.__name__}.py")
        several = [(name, value if isinstance(value, tuple) else (value,)) for name, value in flags]
        commands.append([script, *(text for name, values in several for text in (f"--{name}", *map(str, values)))])
    done = subprocess.run([sys.executable, "-c", DRIVER, json.dumps(commands)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all((tmp_path / stage.__name__ / "model.safetensors").exists() for stage in STAGES)
    assert (tmp_path / "mark").read_text() == "(('example.com', 443),)\n"


class Trap:
    def __reduce__(self):
        return exec, ("raise SystemExit('a pickle was run')",)


MODELS = [(sft, "model_name_or_path", "base"), (reward_model, "model_name_or_path", "base"),
          (ppo_rlhf, "sft_model_path", "base"), (ppo_rlhf, "reward_model_path", "rm")]  # fmt: skip


@pytest.mark.parametrize("content", ["weights", "trap"])
@pytest.mark.parametrize("stage, flag, kind", MODELS, ids=label)
def test_no_pickle_is_loaded(stage, flag, kind, content, world, tmp_path, capsys):
    """A model folder whose weights are in pytorch_model.bin only: loading a pickle can run any code, so it is refused and
    the flag named, be its content harmless or not; beside safetensors it is not opened."""
    folder = tmp_path / "model"
    shutil.copytree(world / kind, folder)
    auto = transformers.AutoModelForSequenceClassification if kind == "rm" else transformers.AutoModelForCausalLM
    if content == "weights":
        torch.save(auto.from_pretrained(folder).state_dict(), folder / "pytorch_model.bin")
    else:
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Trap()))
        crashed(stage, world, tmp_path / "beside", 1, **{flag: str(folder)})
    (folder / "model.safetensors").unlink()
    refused(capsys, stage, world, tmp_path / "out", f"--{flag} {folder}", **{flag: str(folder)})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("stage, flag, kind", MODELS, ids=label)
def test_an_input_model_that_is_cut_off_is_named(stage, flag, kind, world, tmp_path, capsys):
    """What a copy that ran out of space leaves. Catches an error that speaks of bytes and names no file."""
    shutil.copytree(world / kind, tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    refused(capsys, stage, world, tmp_path / "out", f"--{flag} {tmp_path / 'model'}", **{flag: str(tmp_path / "model")})
    assert not (tmp_path / "out").exists()
