"""The scripts as a user meets them: one file each, three commands, flags, run folders."""

import ast
import json
import math
import os
import re
import shutil
import subprocess
import sys
import types

import pytest
import torch
import transformers
import tyro
from conftest import REPOSITORY, read_jsonl, save, tiny_model, tiny_tokenizer, write_jsonl
from safetensors.torch import load_file

import ppo_rlhf
import reward_model
import sft

STAGES = {"sft": sft, "reward_model": reward_model, "ppo_rlhf": ppo_rlhf}
SOURCES = {name: (REPOSITORY / f"{name}.py").read_text(encoding="utf-8") for name in STAGES}
every_script = pytest.mark.parametrize("script", STAGES)


def functions(source):
    """{name: source text with decorators} of the top-level functions."""
    lines, found = source.splitlines(), {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            found[node.name] = "\n".join(lines[first - 1 : node.end_lineno])
    return found


def test_shared_functions_are_the_same_to_the_letter():
    """Catches a fix that reached one copy, a copy without its mark, a mark on what is not shared."""
    copies = {}
    for script, source in SOURCES.items():
        for name, text in functions(source).items():
            copies.setdefault(name, {})[script] = text
    shared = [name for name, texts in copies.items() if any("# [shared]" in text for text in texts.values())]
    assert len(shared) >= 10
    for name, texts in copies.items():
        assert name == "main" or (name in shared) == (len(texts) >= 2), f"{name} stands in {sorted(texts)}"
        assert name == "main" or len(set(texts.values())) == 1, (
            f"the copies of {name} in {sorted(texts)} differ"
        )


@every_script
def test_no_script_imports_another(script):
    """Each file can be copied into a fork on its own."""
    tree = ast.walk(ast.parse(SOURCES[script]))
    imports = [node for node in tree if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {alias.name for node in imports if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module if not node.level else "." for node in imports if isinstance(node, ast.ImportFrom)}
    local = {path.stem for path in REPOSITORY.rglob("*.py") if ".venv" not in path.parts}
    assert not {name.split(".")[0] for name in names} & (local | {"", "data", "tests", "benchmark"})


@every_script
def test_every_flag_has_help_and_an_effect(script, capsys, monkeypatch):
    """Each field of Args has a comment, which --help shows, and is read somewhere."""
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as end:
        tyro.cli(STAGES[script].Args, args=["--help"], description=STAGES[script].__doc__)
    shown = " ".join(re.sub(r"[│╭╮╰╯─]", " ", capsys.readouterr().out).split())
    assert end.value.code == 0 and STAGES[script].__doc__.splitlines()[0].split(": python")[0] in shown
    body = next(node for node in ast.parse(SOURCES[script]).body if getattr(node, "name", "") == "Args").body
    lines = SOURCES[script].splitlines()
    for node in body:
        text = "\n".join(lines[node.lineno - 1 : node.end_lineno])
        (comment,) = re.findall(r"# (.*)$", text, re.MULTILINE)
        name = node.target.id
        assert re.search(rf"--{name.replace('_', '[-_]')}[ ,]", shown), name
        assert len(comment) > 4 and " ".join(comment.split()) in shown, name
        assert re.search(rf"\bargs\.{name}\b", SOURCES[script]), f"--{name} has no effect"
    declared = {node.target.id for node in body}
    assert {*re.findall(r"\bargs\.(\w+)", SOURCES[script])} <= declared | {"json"} and len(declared) > 15


def test_both_spellings_of_a_flag():
    """--missing-eos-penalty and --missing_eos_penalty, a float given as an int, a switch."""
    for flag in ("--missing-eos-penalty", "--missing_eos_penalty"):
        args = tyro.cli(ppo_rlhf.Args, args=[flag, "2", "--beta", "0", "--gradient-checkpointing"])
        assert args.missing_eos_penalty == 2.0 and args.beta == 0.0 and args.gradient_checkpointing


def test_format_and_lint():
    """`ruff format --check` and `ruff check` pass on every file."""
    ruff = shutil.which("ruff") or shutil.which("ruff", path=os.path.dirname(sys.executable))
    if not ruff:
        pytest.skip("ruff is not installed")
    for command in (["format", "--check"], ["check", "--output-format", "concise"]):
        done = subprocess.run(
            [ruff, *command, "--no-cache", "."], cwd=REPOSITORY, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout


def python(folder, *arguments):
    """A command in a folder, to an output that knows ASCII alone -> what it printed."""
    environment = dict(os.environ, PYTHONIOENCODING="ascii")
    line = [sys.executable, *map(str, arguments)]
    done = subprocess.run(line, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stdout + done.stderr
    return done.stdout


NEXT = {"sft": "reward_model.py --model_name_or_path runs/sft", "ppo": ""}
NEXT["reward_model"] = "ppo_rlhf.py --reward_model_path runs/reward_model"
COMMANDS = [
    "sft.py --max_steps 6 --warmup-steps 2 --eval_steps 4",
    "reward_model.py --max_steps 4 --eval_steps 2",
    "ppo_rlhf.py --beta 0.1 --total_episodes 48 --batch-size 16 --max_new_tokens 12 --eval_steps 2",
]


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """The three commands by their defaults, on a few rows of the shipped task -> folder, outputs."""
    folder = tmp_path_factory.mktemp("pipeline")
    shutil.copytree(REPOSITORY / "data/scratch", folder / "data/scratch")
    config = folder / "data/scratch/config.json"
    small = {"num_hidden_layers": 1, "hidden_size": 32, "head_dim": 8, "intermediate_size": 64}
    config.write_text(json.dumps(json.loads(config.read_text()) | small))
    for name in ("demonstrations", "preferences", "prompts"):
        for split, count in (("train", 48), ("test", 12)):
            rows = read_jsonl(REPOSITORY / f"data/{name}/{split}.jsonl")[:count]
            rows[0] = {column: f"{text} ąę 🦊" for column, text in rows[0].items()}
            write_jsonl(folder / f"data/{name}/{split}.jsonl", rows)
    lines = [line.split() for line in COMMANDS]
    return folder, [python(folder, REPOSITORY / script, *flags) for script, *flags in lines]


def test_run_folders_hold_what_they_promise(pipeline):
    """The contract with all that comes after: models, tokenizers, arguments, figures, samples, evaluation."""
    folder, outputs = pipeline
    for run, script, output in zip(("sft", "reward_model", "ppo"), STAGES, outputs):
        out = folder / "runs" / run
        files = {path.name for path in out.iterdir()}
        assert {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"} <= files
        assert (out / "checkpoint/state.pt").exists() and f"saved to runs/{run}" in output
        assert json.loads((out / "args.json").read_text()).keys() == vars(STAGES[script].Args()).keys()
        metrics = read_jsonl(out / "metrics.jsonl")
        assert all(math.isfinite(value) for row in metrics for value in row.values())
        steps = [row.get("step", row.get("update")) for row in metrics]
        assert steps == [*range(1, {"sft": 6, "reward_model": 4, "ppo": 3}[run] + 1)]
        assert f"Next: python {NEXT[run]}" in output or run == "ppo"
    samples = read_jsonl(folder / "runs/ppo/samples.jsonl")
    assert {row["update"] for row in samples} == {1, 2, 3}
    assert {"prompt", "response", "score", "kl"} <= {*samples[0]}
    evaluated = read_jsonl(folder / "runs/ppo/eval.jsonl")
    prompts = [row["prompt"] for row in read_jsonl(folder / "data/prompts/test.jsonl")]
    assert [row["prompt"] for row in evaluated] == prompts
    for row in evaluated:
        assert {*row} == {"prompt", "sft", "sft_score", "ppo", "ppo_score"} and "<eos>" not in row["ppo"]
    write_jsonl(folder / "runs/ppo/known.jsonl", evaluated[1:])  # the judge knows this world's prompts alone
    assert "win rate" in python(folder, REPOSITORY / "data/judge.py", "runs/ppo/known.jsonl")


def test_run_folders_load_in_stock_classes(pipeline):
    """Without missing or left-over weights; the policy is not its start; scores are those of stage 3; the
    value head is a trained linear layer."""
    folder, _ = pipeline
    causal, classifier = transformers.AutoModelForCausalLM, transformers.AutoModelForSequenceClassification
    models = {}
    for run, auto_class in (("sft", causal), ("ppo", causal), ("reward_model", classifier)):
        models[run], info = auto_class.from_pretrained(folder / "runs" / run, output_loading_info=True)
        assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "runs" / run)
        assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 1)
    weights = [torch.cat([p.flatten() for p in models[run].parameters()]) for run in ("sft", "ppo")]
    assert not torch.equal(*weights)
    rows = [row | {"where": ""} for row in read_jsonl(folder / "data/preferences/test.jsonl")[:4]]
    sides = [sum(reward_model.encode(tokenizer, [1], row, "chosen"), []) for row in rows]
    lengths = torch.tensor([len(side) for side in sides])
    padded = torch.nn.utils.rnn.pad_sequence([torch.tensor(side) for side in sides], batch_first=True)
    with torch.no_grad():
        stock = models["reward_model"].eval()
        scores = ppo_rlhf.reward_fn(stock, tokenizer, padded, lengths - 1, lengths, rows)
        assert scores.tolist() == pytest.approx(stock(input_ids=padded).logits[:, 0].tolist(), abs=1e-5)
    head = load_file(folder / "runs/ppo/value_head.safetensors")
    assert head["weight"].shape == (1, 32) and head["weight"].abs().sum() > 0


def test_tracking(tmp_path, monkeypatch):
    """--track gives wandb the flags and every figure by its step; without it wandb is not imported."""
    calls = []
    fake = types.SimpleNamespace(init=lambda **given: calls.append(given["config"]))
    fake.log = lambda metrics, step: calls.append((step, {*metrics}))
    for split in ("train", "test"):
        write_jsonl(tmp_path / f"data/{split}.jsonl", [{"prompt": "a", "completion": "b"}] * 2)
    base = save(tiny_model("gpt2"), tiny_tokenizer(), tmp_path / "base")
    flags = {"model_name_or_path": base, "dataset_name": str(tmp_path / "data"), "max_new_tokens": 2}
    flags |= {"output_dir": str(tmp_path / "out"), "max_steps": 2, "warmup_steps": 1}
    for track, module in ((False, None), (True, fake)):
        monkeypatch.setitem(sys.modules, "wandb", module)
        sft.main(sft.Args(**flags, track=track, overwrite=True))
    assert calls[0]["max_steps"] == 2 and [call[0] for call in calls[1:]] == [1, 2]
    assert {"train/loss", "eval/loss", "lr"} <= calls[2][1]
