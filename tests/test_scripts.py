"""The scripts as a user meets them: one file each, three commands, run folders, tracking."""

import ast
import json
import math
import os
import shutil
import subprocess
import sys
import types

import pytest
from conftest import REPOSITORY, make_inputs, read_jsonl, run_stage, write_jsonl

import ppo_rlhf
import reward_model
import sft

STAGES = {"sft": sft, "reward_model": reward_model, "ppo_rlhf": ppo_rlhf}
SOURCES = {name: (REPOSITORY / f"{name}.py").read_text(encoding="utf-8") for name in STAGES}


def test_shared_functions_are_the_same_to_the_letter():
    """Catches a fix that reached one copy, a copy without its mark, a mark on what is not shared."""
    copies = {}
    for script, source in SOURCES.items():
        for node in ast.parse(source).body:
            if isinstance(node, ast.FunctionDef) and node.name != "main":
                first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
                text = "\n".join(source.splitlines()[first - 1 : node.end_lineno])
                copies.setdefault(node.name, {})[script] = text
    assert sum(len(texts) > 1 for texts in copies.values()) >= 10
    for name, texts in copies.items():
        assert len({*texts.values()}) == 1, f"the copies of {name} in {sorted(texts)} differ"
        assert all(("# [shared]" in text) == (len(texts) > 1) for text in texts.values()), name


def test_no_script_imports_another():
    """Each file can be copied into a fork on its own."""
    local = {path.stem for path in REPOSITORY.rglob("*.py") if ".venv" not in path.parts}
    for source in SOURCES.values():
        for node in ast.walk(ast.parse(source)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or "."] if isinstance(node, ast.ImportFrom) else []
            assert not {name.split(".")[0] for name in names} & (local | {"", "data", "tests", "benchmark"})


def test_format_and_lint():
    """`ruff format --check` and `ruff check` pass on every file."""
    ruff = shutil.which("ruff") or shutil.which("ruff", path=os.path.dirname(sys.executable))
    if not ruff:
        pytest.skip("ruff is not installed")
    for command in (["format", "--check"], ["check", "--output-format", "concise"]):
        line = [ruff, *command, "--no-cache", "."]
        done = subprocess.run(line, cwd=REPOSITORY, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


def python(folder, *arguments):
    """A command in a folder, to an output that knows ASCII alone -> what it printed."""
    environment = dict(os.environ, PYTHONIOENCODING="ascii")
    line = [sys.executable, *map(str, arguments)]
    done = subprocess.run(line, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stdout + done.stderr
    return done.stdout


PPO = "--beta 0.1 --total_episodes 48 --batch-size 16 --max_new_tokens 12 --eval_steps 2"
PATHS = "--sft_model_path runs/sft --reward_model_path runs/reward_model"
COMMANDS = {  # stage: flags, run folder, steps, what to do next
    "sft": ("--max_steps 6 --warmup-steps 2 --eval_steps 4", "sft", 6, "--model_name_or_path runs/sft\n"),
    "reward_model": (
        "--max_steps 4 --eval_steps 2",
        "reward_model",
        4,
        f"Next: python ppo_rlhf.py {PATHS}\n",
    ),
    "ppo_rlhf": (PPO, "ppo", 3, "held-out score: SFT"),
}


def test_three_commands(tmp_path):
    """By their defaults, on a few rows of the shipped task: models, tokenizers, arguments, figures, samples
    and evaluation where all that comes after looks for them."""
    shutil.copytree(REPOSITORY / "data/scratch", tmp_path / "data/scratch")
    config = tmp_path / "data/scratch/config.json"
    small = {"num_hidden_layers": 1, "hidden_size": 32, "head_dim": 8, "intermediate_size": 64}
    config.write_text(json.dumps(json.loads(config.read_text()) | small))
    for name in ("demonstrations", "preferences", "prompts"):
        for split, count in (("train", 48), ("test", 12)):
            rows = read_jsonl(REPOSITORY / f"data/{name}/{split}.jsonl")[:count]
            rows[0] = {column: f"{text} ąę 🦊" for column, text in rows[0].items()}
            write_jsonl(tmp_path / f"data/{name}/{split}.jsonl", rows)
    for script, (flags, run, steps, told) in COMMANDS.items():
        output = python(tmp_path, REPOSITORY / f"{script}.py", *flags.split())
        assert f"saved to runs/{run}" in output and told in output
        out = tmp_path / "runs" / run
        files = {path.name for path in out.iterdir()}
        assert {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"} <= files
        assert (out / "checkpoint/state.pt").exists()
        assert json.loads((out / "args.json").read_text()).keys() == vars(STAGES[script].Args()).keys()
        metrics = read_jsonl(out / "metrics.jsonl")
        assert all(math.isfinite(value) for row in metrics for value in row.values())
        assert [row.get("step", row.get("update")) for row in metrics] == [*range(1, steps + 1)]
    evaluated = read_jsonl(tmp_path / "runs/ppo/eval.jsonl")
    # The judge knows this world's prompts alone
    write_jsonl(tmp_path / "runs/ppo/known.jsonl", evaluated[1:])
    assert "win rate" in python(tmp_path, REPOSITORY / "data/judge.py", "runs/ppo/known.jsonl")


def test_tracking(tmp_path, monkeypatch):
    """--track gives wandb the flags, every figure by its step and samples as a table, in the project that the
    environment names; a resumed run continues its own. Without it wandb is not imported."""
    calls, logged = [], []
    fake = types.SimpleNamespace(Table=lambda columns, data: (columns, data), id="abc")
    fake.init = lambda **given: calls.append(given) or fake
    fake.log = lambda metrics, step: logged.append((step, metrics))
    make_inputs(tmp_path, [{"prompt": x, "completion": "b", "chosen": "c", "rejected": "d"} for x in "abcd"])
    for name, stage in STAGES.items():
        calls.clear()
        logged.clear()
        out = tmp_path / name
        monkeypatch.delenv("WANDB_PROJECT", raising=False)
        monkeypatch.setitem(sys.modules, "wandb", None)
        run_stage(stage, tmp_path, out)
        monkeypatch.setitem(sys.modules, "wandb", fake)
        run_stage(stage, tmp_path, out, overwrite=True, track=True, save_steps=1)
        assert [step for step, metrics in logged if "samples" not in metrics] == [1, 2]
        assert {*read_jsonl(out / "metrics.jsonl")[1]} in [{*metrics} for _, metrics in logged]
        monkeypatch.setenv("WANDB_PROJECT", "mine")
        run_stage(stage, tmp_path, out, resume=True, track=True, save_steps=1)
        assert [(given["id"], given["project"]) for given in calls] == [(None, "ppo_rlhf"), ("abc", "mine")]
        assert calls[1]["resume"] == "allow" and calls[0]["config"]["per_device_train_batch_size"] == 2
    columns, cells = logged[-1][1]["samples"]
    samples = read_jsonl(out / "samples.jsonl")
    assert columns == [*samples[0]] and cells == [[str(x) for x in row.values()] for row in samples[-4:]]
