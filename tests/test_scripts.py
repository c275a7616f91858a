"""The scripts as a user meets them: one file each, three commands, run folders, data formats."""

import ast
import inspect
import json
import math
import os
import re
import subprocess
import sys
import types

import pytest
import torch
import transformers
import tyro
from conftest import (REPOSITORY, SCRIPTS, read_jsonl, save, tiny_model, tiny_reward_model,
                      tiny_tokenizer, write_jsonl)  # fmt: skip

import ppo_rlhf
import reward_model
import sft

STAGES = {"sft": sft, "reward_model": reward_model, "ppo_rlhf": ppo_rlhf}
SOURCES = {name: (SCRIPTS / f"{name}.py").read_text(encoding="utf-8") for name in STAGES}


# ---------------------------------------------------------------------------------------------------------------
# Files that stand alone
# ---------------------------------------------------------------------------------------------------------------


def functions(source):
    """{name: source text with decorators} of the top-level functions."""
    lines = source.splitlines()
    found = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef):
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            found[node.name] = "\n".join(lines[first - 1 : node.end_lineno])
    return found


def test_shared_helpers_are_the_same_to_the_letter():
    """The price of files that stand alone is that some helpers are written twice. Catches a fix that reached only one
    of the copies, a copy that lost its mark, and a mark on something that is not shared."""
    copies = {}
    for script, source in SOURCES.items():
        for name, text in functions(source).items():
            copies.setdefault(name, {})[script] = text
    shared = {name for name, texts in copies.items() if any("# [shared]" in t for t in texts.values())}
    assert len(shared) >= 5
    for name, texts in copies.items():
        if name in shared:
            assert len(texts) >= 2, f"{name} is marked as shared but stands in one script only"
            assert len(set(texts.values())) == 1, f"the copies of {name} in {sorted(texts)} differ"
        elif name != "main":
            assert len(texts) == 1, f"{name} stands in {sorted(texts)}: mark it as shared"


@pytest.mark.parametrize("script", STAGES)
def test_no_script_imports_another(script):
    """Each file can be copied into a fork on its own. Catches an import of a sibling or of a local package."""
    imported = set()
    for node in ast.walk(ast.parse(SOURCES[script])):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            imported.add(node.module.split(".")[0])
    local = {path.stem for path in REPOSITORY.glob("*.py")} | {"data", "tests", "benchmark", "judge", "world"}
    assert not imported & local


@pytest.mark.parametrize("script", STAGES)
def test_every_flag_is_explained_and_has_an_effect(script):
    """Each field of Args has a docstring under it and is read somewhere. Catches flags without effect, the commonest
    lie of training scripts."""
    tree = ast.parse(SOURCES[script])
    (args,) = (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Args")
    fields = []
    for node, following in zip(args.body, [*args.body[1:], None]):
        if isinstance(node, ast.AnnAssign):
            fields.append(node.target.id)
            explained = isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)
            assert explained and len(following.value.value) > 10, f"{node.target.id} has no docstring"
    read = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "args"
    }
    assert len(fields) > 15
    assert set(fields) <= read, f"no effect: {set(fields) - read}"
    assert read <= set(fields), f"read but not declared: {read - set(fields)}"


def test_flags_that_stages_share_have_one_meaning():
    """The stages must agree on what a prompt looks like, on the temperature and on the longest answer, or the reward
    model is normalized on one policy and used on another."""
    for name in ("prompt_template", "temperature", "max_new_tokens"):
        assert len({getattr(stage.Args, name) for stage in STAGES.values()}) == 1, name
    assert sft.Args.output_dir == reward_model.Args.model_name_or_path == ppo_rlhf.Args.sft_model_path
    assert (reward_model.Args.output_dir,) == ppo_rlhf.Args.reward_model_path
    for stage in STAGES.values():
        assert (REPOSITORY / stage.Args.dataset_name / "train.jsonl").exists()


def test_both_spellings_of_a_flag():
    """--missing-eos-penalty and --missing_eos_penalty, a float given as an int, a switch."""
    for flag in ("--missing-eos-penalty", "--missing_eos_penalty"):
        args = tyro.cli(ppo_rlhf.Args, args=[flag, "2", "--beta", "0", "--gradient-checkpointing"])
        assert args.missing_eos_penalty == 2.0 and args.beta == 0.0 and args.gradient_checkpointing


@pytest.mark.parametrize("script", STAGES)
def test_help(script, tmp_path):
    """--help in a terminal of 80 columns: an example that stands in the file, every flag as the README spells it, each text
    in full lines, the groups of flags by the names that they have in the file. Catches the line breaks of the source in the
    middle of a line of text."""
    done = subprocess.run([sys.executable, SCRIPTS / f"{script}.py", "--help"], cwd=tmp_path, capture_output=True, text=True,
                          encoding="utf-8", env=dict(os.environ, COLUMNS="80"))  # fmt: skip
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and done.stderr == "" and max(map(len, lines)) <= 80
    assert lines[2] == STAGES[script].__doc__.splitlines()[0] and f"    python {script}.py" in done.stdout
    words = " ".join(" ".join(line.strip("│ ") for line in lines).split())
    for node, text in zip(*[iter(ast.parse(inspect.getsource(STAGES[script].Args)).body[0].body)] * 2):
        name, text = node.target.id, " ".join(text.value.value.split())
        assert f"--{name} " in words and text in words, name
    texts = [line.strip("│").rstrip() for line in lines if line.startswith("│" + 21 * " ")]
    for line, following in zip(texts, texts[1:]):  # a line ends where the next word does not fit
        ends = line.endswith((")", "----")) or following.strip().startswith("----") or "(default: 'Prompt:" in line or "Response:" in line
        assert ends or len(line) + 1 + len(following.split()[0]) > 77, line
    groups = re.findall(r"# (---- .* ----)", inspect.getsource(STAGES[script].Args))
    assert len(groups) >= 5 and re.findall(r"---- .* ----", done.stdout) == groups


@pytest.mark.parametrize("flags", [["--betta", "0.1"], ["--batch_size", "ten"], ["--seed"], ["stray"]])
def test_a_mistyped_flag(flags, tmp_path):
    """The flag or the word is named, status 2, no traceback, nothing is written."""
    done = command(tmp_path, SCRIPTS / "ppo_rlhf.py", *flags)
    assert done.returncode == 2 and flags[-1].strip("-") in done.stderr and "Traceback" not in done.stderr
    assert done.stdout == "" and not [*tmp_path.iterdir()]


# ---------------------------------------------------------------------------------------------------------------
# End to end
# ---------------------------------------------------------------------------------------------------------------


def command(folder, *arguments):
    """As a user runs it, in a folder of its own."""
    return subprocess.run([sys.executable, *map(str, arguments)], cwd=folder, capture_output=True, text=True,
                          encoding="utf-8", env=dict(os.environ, HF_DATASETS_OFFLINE="1", COLUMNS="200"))  # fmt: skip


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """The three commands, one after the other, on a few rows of the shipped task -> their folder."""
    folder = tmp_path_factory.mktemp("pipeline")
    for name in ("demonstrations", "preferences", "prompts"):
        for split, count in (("train", 64), ("test", 12)):
            write_jsonl(folder / "data" / name / f"{split}.jsonl", read_jsonl(REPOSITORY / "data" / name / f"{split}.jsonl")[:count])
    commands = [
        "sft.py --max_steps 6 --n_layer 1 --n_embd 32 --vocab_size 320 --warmup-steps 2 --logging_steps 2 --eval_steps 4",
        "reward_model.py --max_steps 4 --normalization_samples 24 --max_new_tokens 12 --eval_steps 2 --logging_steps 1",
        "ppo_rlhf.py --beta 0.1 --total_episodes 48 --batch-size 16 --per_device_train_batch_size 8 --max_new_tokens 12"
        " --eval_steps 2 --num_ppo_epochs 2",
    ]
    outputs = []
    for line in commands:
        script, *flags = line.split()
        done = command(folder, SCRIPTS / script, *flags)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "Traceback" not in done.stderr
        outputs.append(done.stdout)
    return folder, outputs


def test_each_stage_says_what_comes_next(pipeline):
    """The last line of each stage names the next command. Catches a pointer to a command that is not there."""
    _, (one, two, three) = pipeline
    assert "Next: python reward_model.py" in one and "Next: python ppo_rlhf.py" in two
    assert "Next: python data/judge.py runs/ppo/eval.jsonl" in three


def test_run_folders_hold_what_they_promise(pipeline):
    """The contract with everything that comes after: models, tokenizers, arguments, metrics, samples, evaluation."""
    folder, _ = pipeline
    for run in ("sft", "reward_model", "ppo"):
        files = {path.name for path in (folder / "runs" / run).iterdir()}
        assert {"config.json", "model.safetensors", "tokenizer.json", "metrics.jsonl", "args.json"} <= files
        assert json.loads((folder / "runs" / run / "args.json").read_text())["seed"] == 1
        metrics = read_jsonl(folder / "runs" / run / "metrics.jsonl")
        assert metrics and all(math.isfinite(value) for line in metrics for value in line.values())
    assert {"value_head.safetensors", "samples.jsonl", "eval.jsonl"} <= {p.name for p in (folder / "runs" / "ppo").iterdir()}
    assert [m["step"] for m in read_jsonl(folder / "runs/sft/metrics.jsonl")] == [2, 4, 6]
    assert [m["update"] for m in read_jsonl(folder / "runs/ppo/metrics.jsonl")] == [1, 2, 3]
    samples = read_jsonl(folder / "runs/ppo/samples.jsonl")
    assert {s["update"] for s in samples} == {1, 2, 3} and {"prompt", "response", "score", "kl"} <= set(samples[0])
    evaluated = read_jsonl(folder / "runs/ppo/eval.jsonl")
    assert [row["prompt"] for row in evaluated] == [row["prompt"] for row in read_jsonl(folder / "data/prompts/test.jsonl")]
    for row in evaluated:
        assert list(row) == ["prompt", "sft", "sft_score", "ppo", "ppo_score"]
        assert math.isfinite(row["sft_score"]) and math.isfinite(row["ppo_score"]) and "<eos>" not in row["ppo"]


def test_judge_reads_the_evaluation(pipeline):
    """The command that the last stage names works on what it wrote."""
    folder, _ = pipeline
    done = command(folder, REPOSITORY / "data" / "judge.py", "runs/ppo/eval.jsonl")
    assert done.returncode == 0 and "win rate" in done.stdout, done.stderr


def test_checkpoints_load_in_stock_transformers(pipeline):
    """SFT model and policy as AutoModelForCausalLM, without missing or unexpected weights, and `generate` works; the
    policy differs from where it started. Catches wrappers, prefixes and heads that only these scripts can load."""
    folder, _ = pipeline
    prompt = "Prompt: Hi\nResponse:"
    weights = []
    for run in ("sft", "ppo"):
        model, info = transformers.AutoModelForCausalLM.from_pretrained(folder / "runs" / run, output_loading_info=True)
        assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "runs" / run)
        assert tokenizer.eos_token_id is not None and tokenizer.pad_token_id is not None
        out = model.generate(**tokenizer(prompt, return_tensors="pt"), max_new_tokens=4, do_sample=False)
        assert tokenizer.decode(out[0]).startswith(prompt)
        weights.append(torch.cat([p.flatten() for p in model.parameters()]))
    assert not torch.equal(*weights)


def test_reward_model_ranks_identically_in_the_stock_class(pipeline):
    """AutoModelForSequenceClassification.from_pretrained gives the raw scores of what stage 3 normalizes: the same
    order, the same differences up to one factor. Catches a normalization hidden in code that stock classes lack."""
    folder, _ = pipeline
    path = str(folder / "runs" / "reward_model")
    stock, info = transformers.AutoModelForSequenceClassification.from_pretrained(path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and stock.config.num_labels == 1
    ours, tokenizer = ppo_rlhf.load_model(transformers.AutoModelForSequenceClassification, path, "--reward_model_path")
    rows = [sum(ppo_rlhf.encode(tokenizer, ppo_rlhf.Args.prompt_template, r["prompt"], r["chosen"]), [])
            for r in read_jsonl(folder / "data/preferences/test.jsonl")]  # fmt: skip
    with torch.no_grad():
        raw = torch.stack([stock.eval()(input_ids=torch.tensor([row])).logits[0, 0] for row in rows])
    lengths = torch.tensor([len(row) for row in rows])
    ids = torch.tensor([row + [tokenizer.pad_token_id] * (int(lengths.max()) - len(row)) for row in rows])
    scores = ppo_rlhf.reward_fn(ours.eval(), tokenizer, ids, lengths, lengths)
    assert scores.argsort().tolist() == raw.argsort().tolist()
    expected = (raw - stock.config.reward_mean) / stock.config.reward_std
    torch.testing.assert_close(scores, expected, atol=1e-3, rtol=1e-4)


def test_value_head_loads(pipeline):
    """The critic is not thrown away: a linear layer on the policy's hidden state, trained."""
    from safetensors.torch import load_file

    folder, _ = pipeline
    head = torch.nn.Linear(32, 1)
    head.load_state_dict(load_file(folder / "runs" / "ppo" / "value_head.safetensors"))
    assert head.weight.abs().sum() > 0


@pytest.mark.parametrize(
    "script, missing, remedy",
    [("ppo_rlhf.py", "runs/sft", "python sft.py"), ("reward_model.py", "runs/sft", "python sft.py")],
)
def test_a_stage_before_its_time_names_the_missing_command(script, missing, remedy, tmp_path):
    """On an empty folder: what is missing, the command that makes it, status 2, no traceback."""
    done = command(tmp_path, SCRIPTS / script)
    assert done.returncode == 2
    assert missing in done.stderr and f"`{remedy}`" in done.stderr and "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "runs").exists()


# ---------------------------------------------------------------------------------------------------------------
# Data formats, in this process: faster, and the same main()
# ---------------------------------------------------------------------------------------------------------------

PROMPTS = ["Hi", "How are you?", "Tell me", "What now", "Go on", "Why"]
MESSAGES = [[{"role": "system", "content": "Be brief."}, {"role": "user", "content": p}] for p in PROMPTS]
GOOD, BAD = [{"role": "assistant", "content": "good"}], [{"role": "assistant", "content": "bad"}]


def dialogues(side):
    return [f"\n\nHuman: {p}\n\nAssistant: Well?\n\nHuman: So?\n\nAssistant: {side}" for p in PROMPTS]


def arguments(stage, folder, **overrides):
    """Small settings for a stage; data of every kind stands in `folder`."""
    small = {
        sft: dict(model_name_or_path=folder / "base", dataset_name=folder / "demos", max_steps=1, max_new_tokens=4),
        reward_model: dict(model_name_or_path=folder / "base", dataset_name=folder / "pairs", max_steps=1, max_new_tokens=4,
                           normalization_samples=8),
        ppo_rlhf: dict(sft_model_path=folder / "base", reward_model_path=folder / "rm", dataset_name=folder / "prompts",
                       total_episodes=8, batch_size=4, max_new_tokens=4, num_mini_batches=2, num_ppo_epochs=1),
    }[stage]  # fmt: skip
    small.update(output_dir=folder / "out" / stage.__name__, overwrite=True)
    small = {key: str(value) if hasattr(value, "parts") else value for key, value in {**small, **overrides}.items()}
    return {**small, "reward_model_path": (small["reward_model_path"],)} if stage is ppo_rlhf else small


@pytest.fixture
def folder(tmp_path):
    tokenizer = tiny_tokenizer(chat=True)
    save(tiny_model("gpt2"), tokenizer, tmp_path / "base")
    save(tiny_reward_model("gpt2"), tokenizer, tmp_path / "rm")

    def write(name, rows):
        write_jsonl(tmp_path / name / "train.jsonl", rows[:4])
        write_jsonl(tmp_path / name / "test.jsonl", rows[4:])

    write("demos", [{"prompt": p, "completion": "fine"} for p in PROMPTS])
    write("pairs", [{"prompt": p, "chosen": "good", "rejected": "bad"} for p in PROMPTS])
    write("prompts", [{"prompt": p} for p in PROMPTS])
    write("chat demos", [{"prompt": m, "completion": GOOD} for m in MESSAGES])
    write("chat pairs", [{"prompt": m, "chosen": GOOD, "rejected": BAD} for m in MESSAGES])
    write("chat dialogues", [{"chosen": m + GOOD, "rejected": m + BAD} for m in MESSAGES])
    write("dialogues", [{"chosen": a, "rejected": b} for a, b in zip(dialogues("good"), dialogues("bad"))])
    write("chat prompts", [{"prompt": m, "other": 1} for m in MESSAGES])
    write("whole chats", [{"messages": m + GOOD, "prompt": "the first turn, as text"} for m in MESSAGES])
    write("open chats", [{"messages": m} for m in MESSAGES])
    write("demos of two messages", [{"prompt": m[:1], "completion": m[1:] + GOOD} for m in MESSAGES])
    write("pairs of two messages", [{"prompt": m[:1], "chosen": m[1:] + GOOD, "rejected": m[1:] + BAD} for m in MESSAGES])
    write("chats beside messages", [{"prompt": m, "chosen": m + GOOD, "rejected": m + BAD} for m in MESSAGES])
    write("chats beside a text", [{"prompt": "the first turn", "chosen": m + GOOD, "rejected": m + BAD} for m in MESSAGES])
    return tmp_path


@pytest.mark.parametrize("stage, name", [
    (sft, "chat demos"), (sft, "whole chats"), (sft, "demos of two messages"), (reward_model, "chat pairs"),
    (reward_model, "chats beside a text"), (reward_model, "chats beside messages"), (reward_model, "pairs of two messages"),
    (ppo_rlhf, "chat prompts"), (ppo_rlhf, "whole chats"), (ppo_rlhf, "open chats"),
])  # fmt: skip
def test_chat_messages_go_through_the_chat_template(stage, name, folder, monkeypatch):
    """Prompts as lists of messages, or whole chats in `messages`, in every stage: what is trained and sampled is the
    tokenizer's chat template with the assistant's turn opened, and not --prompt_template. Catches a stage that prefers
    the text in `prompt`, so that the stages would train on two formats, an answer that stays in PPO's prompt, and messages
    before the last one of an answer that are lost."""
    seen = []
    real = stage.encode
    monkeypatch.setattr(stage, "encode", lambda *a, **k: seen.append(real(*a, **k)) or seen[-1])
    stage.main(stage.Args(**arguments(stage, folder, dataset_name=folder / name)))
    texts = {tiny_tokenizer().decode(prompt) for prompt, _ in seen}
    assert texts == {f"[system] Be brief.\n[user] {p}\n[assistant] " for p in PROMPTS}
    answers = {tiny_tokenizer().decode(completion) for _, completion in seen}
    assert answers == {sft: {"good<eos>"}, reward_model: {"good<eos>", "bad<eos>"}, ppo_rlhf: {"<eos>"}}[stage]
    if stage is ppo_rlhf:
        rows = read_jsonl(folder / "out" / "ppo_rlhf" / "eval.jsonl")
        assert [row["prompt"] for row in rows] == MESSAGES[4:]


@pytest.mark.parametrize("name", ["dialogues", "chat dialogues"])
def test_preferences_without_a_prompt_column(name, folder, monkeypatch):
    """Whole dialogues, as text (hh-rlhf) or as messages: both sides hold the whole dialogue and end with their own
    last reply and EOS."""
    seen = []
    real = reward_model.pair_batch
    monkeypatch.setattr(reward_model, "pair_batch", lambda pairs, *a: seen.extend(pairs) or real(pairs, *a))
    reward_model.main(reward_model.Args(**arguments(reward_model, folder, dataset_name=folder / name)))
    tokenizer = tiny_tokenizer()
    texts = {(tokenizer.decode(chosen), tokenizer.decode(rejected)) for chosen, rejected in seen}
    if name == "dialogues":
        expected = {(a + "<eos>", b + "<eos>") for a, b in zip(dialogues("good"), dialogues("bad"))}
    else:
        turns = [f"[system] Be brief.\n[user] {p}\n[assistant] " for p in PROMPTS]
        expected = {(t + "good<eos>", t + "bad<eos>") for t in turns}
    assert texts == expected


def test_a_foreign_reward_model_is_used_raw(folder, capsys):
    """A reward model made elsewhere has no mean and deviation in its config: it works, and the run says so."""
    ppo_rlhf.main(ppo_rlhf.Args(**arguments(ppo_rlhf, folder)))
    assert "raw scores" in capsys.readouterr().out


def test_tokenizer_without_pad(folder):
    """GPT-2's and Llama's tokenizers ship no pad token. All three stages run, and the saved policy ends its answers."""
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    for name in ("base", "rm"):
        tokenizer.save_pretrained(folder / name)
    assert transformers.AutoTokenizer.from_pretrained(folder / "base").pad_token_id is None
    sft.main(sft.Args(**arguments(sft, folder)))
    reward_model.main(reward_model.Args(**arguments(reward_model, folder, model_name_or_path=folder / "out" / "sft")))
    ppo_rlhf.main(ppo_rlhf.Args(**arguments(ppo_rlhf, folder, sft_model_path=folder / "out" / "sft",
                                            reward_model_path=folder / "out" / "reward_model")))  # fmt: skip
    metrics = read_jsonl(folder / "out" / "ppo_rlhf" / "metrics.jsonl")
    assert metrics[0]["objective/kl"] == pytest.approx(0, abs=1e-5)


def test_same_seed_same_run(folder):
    """Two runs of PPO with one seed are equal to the last bit, another seed is not. Catches randomness that no seed
    reaches."""
    results = []
    for i, seed in enumerate((1, 1, 2)):
        out = folder / str(i)
        ppo_rlhf.main(ppo_rlhf.Args(**arguments(ppo_rlhf, folder, output_dir=out, seed=seed)))
        results.append((out / "model.safetensors").read_bytes())
    assert results[0] == results[1] != results[2]


# ---------------------------------------------------------------------------------------------------------------
# What goes on inside of a run
# ---------------------------------------------------------------------------------------------------------------


def test_sampling_near_the_end_of_the_context(folder):
    """sft.py --max_length 40 builds a model with 40 positions, and its sample completions go beyond: the run must not
    end with an IndexError at its first evaluation."""
    sft.main(sft.Args(**arguments(sft, folder, model_name_or_path="scratch", max_length=40, max_new_tokens=64,
                                  n_layer=1, n_embd=32, vocab_size=300)))  # fmt: skip


def test_normalization_samples_the_training_prompts(folder, monkeypatch):
    """All of them, equally often, though every one stands in the test split too (with a held-out prompt besides, which
    is not sampled). Catches a normalization that finds no prompt after the training is done, and a scale that is set
    on held-out prompts."""
    seen, real = [], reward_model.sample
    monkeypatch.setattr(reward_model, "sample", lambda m, t, prompts, *a: seen.extend(prompts) or real(m, t, prompts, *a))
    rows = [{"prompt": p, "chosen": "good", "rejected": "bad"} for p in PROMPTS]
    write_jsonl(folder / "same" / "train.jsonl", rows * 2)
    write_jsonl(folder / "same" / "test.jsonl", [*rows, {**rows[0], "prompt": "held out"}])
    reward_model.main(reward_model.Args(**arguments(reward_model, folder, dataset_name=folder / "same",
                                                    normalization_samples=2 * len(PROMPTS))))  # fmt: skip
    texts = [tiny_tokenizer().decode(prompt) for prompt in seen]
    assert sorted(texts) == sorted(2 * [f"Prompt: {p}\nResponse:" for p in PROMPTS])
    config = transformers.AutoConfig.from_pretrained(folder / "out" / "reward_model")
    assert math.isfinite(config.reward_mean) and config.reward_std > 0
    seen.clear()
    reward_model.main(reward_model.Args(**arguments(reward_model, folder, dataset_name=folder / "same", normalization_samples=3)))
    assert [tiny_tokenizer().decode(prompt) for prompt in seen] == [f"Prompt: {p}\nResponse:" for p in PROMPTS[::2]]


@pytest.mark.parametrize("dtype", [torch.int64, torch.float64])
def test_a_reward_of_ones_own(dtype, folder, monkeypatch):
    """`reward_fn` may return integers, as a rule does, or float64, as NumPy does."""
    monkeypatch.setattr(ppo_rlhf, "reward_fn", lambda model, tokenizer, ids, starts, lengths: torch.ones(len(ids), dtype=dtype))
    ppo_rlhf.main(ppo_rlhf.Args(**arguments(ppo_rlhf, folder, missing_eos_penalty=0)))
    assert [row["objective/scores"] for row in read_jsonl(folder / "out/ppo_rlhf/metrics.jsonl")] == [1, 1]


def test_the_first_update_is_logged(folder):
    """Whatever --logging_steps says: the last table and the model card say how it began."""
    ppo_rlhf.main(ppo_rlhf.Args(**arguments(ppo_rlhf, folder, logging_steps=100, total_episodes=12)))
    assert [row["update"] for row in read_jsonl(folder / "out/ppo_rlhf/metrics.jsonl")] == [1, 3]


def test_what_replaces_texts_finds_each_of_them(monkeypatch):
    """benchmark/details.py and tests/mutations.py replace texts of ppo_rlhf.py: each must stand there exactly once."""
    monkeypatch.syspath_prepend(REPOSITORY / "benchmark")
    import details
    import mutations

    texts = [text for _, edits, _ in details.DETAILS.values() for text in edits] + [text for _, text, _ in details.CHECKS.values()]
    texts += [text for text, _ in mutations.MUTANTS.values()]
    source = (REPOSITORY / "ppo_rlhf.py").read_text(encoding="utf-8")  # not a mutant's
    assert {text: source.count(text) for text in texts} == dict.fromkeys(texts, 1)


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="the benchmark reads peak memory where Linux keeps it")
def test_the_benchmark_of_speed_runs(tmp_path, monkeypatch):
    """It reads ppo_rlhf.py's flags, clock and progress bar, none of which is an interface: a change may leave it behind."""
    monkeypatch.syspath_prepend(REPOSITORY / "benchmark")
    monkeypatch.setitem(sys.modules, "ppo_rlhf", ppo_rlhf)  # each job loads a fresh one, and changes it
    import speed

    options = types.SimpleNamespace(device="cpu", updates=1, memory_cap=None, micro_batch=None)
    monkeypatch.setattr(speed, "start", lambda script, spec: speed.make_models(spec) or [])
    spec = speed.prepare("smoke", speed.WORKLOADS["smoke"], tmp_path / "inputs", options)
    spec.update(scratch=str(tmp_path), batches=[2])
    for contender in ("ours", "ours_separate_critic"):
        _, second = speed.ours({**spec, "contender": contender})
        assert 0 < second["rollout"] + second["score"] + second["optimize"] <= second["seconds"]
        critic = torch.load(next(tmp_path.glob("ppo/checkpoint/*.pt")))["critic"]
        assert (critic is not None) == (contender == "ours_separate_critic")
    phases = ["rollout", "score", "update"]
    assert [row["phase"] for row in speed.memory_job(spec)] == ["load", *phases, "between", *phases, "between", *phases]
    (row,) = speed.decode_job(spec)
    weights = 512 * 64 + 2 * (12 * 64**2 + 13 * 64) + 2 * 64  # head, two layers, last norm; of the positions one row a token is read
    cache = 2 * 2 * 64 * 2 * (12 + (4 + 8) / 2)  # keys and values, two layers, width 64, two rows, prompt and half of the answer
    assert row["gb"] == pytest.approx(4e-9 * (weights + cache)) and row["step_ms"] > row["floor_ms"] > 0
    assert 0 < speed.mfu_job(spec)[0]["tflop"] < 1e-3
