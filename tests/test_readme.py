"""What the README says of commands and files is true."""

import re
import subprocess
import sys

import pytest
import torch
from conftest import (
    EOS,
    REPOSITORY,
    ppo_flags,
    read_jsonl,
    save,
    tiny_model,
    tiny_reward_model,
    tiny_tokenizer,
    write_jsonl,
)
from safetensors.torch import load_file

import ppo_rlhf

README = (REPOSITORY / "README.md").read_text(encoding="utf-8")


def test_ci_runs_the_test_command():
    """Both commands make an environment of their own; the second is what CI runs, as it stands."""
    run, test = re.findall(r"^    (python3 -m venv .*)$", README, re.MULTILINE)
    for script in ("sft.py", "reward_model.py", "ppo_rlhf.py"):
        assert f"python {script}" in run
    assert (REPOSITORY / ".ci/run").read_text().splitlines()[-1] == test


def test_files_that_it_names_exist():
    """Links, and paths in code, that are of this repository."""
    links = re.findall(r"\]\((?!https?:)([^)#\s]+)", README)
    code = re.findall(
        r"`((?:data|benchmark|tests)/[\w./-]+|(?:sft|reward_model|ppo_rlhf)\.py|requirements\.txt)`", README
    )
    assert {"sft.py", "reward_model.py", "ppo_rlhf.py"} <= {*links, *code}
    assert [name for name in {*links, *code} if not (REPOSITORY / name).exists()] == []


def test_tables_are_what_the_rows_say():
    done = subprocess.run(
        [sys.executable, "benchmark/check_tables.py"], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(re.search(r"(\d+) cells agree, 0 do not", done.stdout)[1]) > 200


def speaking_model():
    """It samples printable ASCII, so that texts can be read back, and ends one token in seven or so."""
    model = tiny_model("gpt2", initializer_range=0.02)
    direction = torch.nn.functional.one_hot(torch.tensor(0), 32).float()
    with torch.no_grad():
        model.transformer.ln_f.bias += 5 * direction
        for i in range(model.config.vocab_size):
            text = tiny_tokenizer().decode([i])
            model.transformer.wte.weight[i] -= 0 if text.isascii() and text.isalnum() else 5 * direction
        model.transformer.wte.weight[EOS] = 0.5 * direction
    return model


@pytest.mark.parametrize("chats", [False, True])
@pytest.mark.parametrize("pad_is_eos", [False, True])
def test_scores_by_stock_code(chats, pad_is_eos, tmp_path, monkeypatch):
    """Its lines run as they stand, and give the scores of eval.jsonl, for a batch of texts or of chats."""
    monkeypatch.chdir(tmp_path)
    judge = tiny_reward_model("gpt2")
    judge.config.pad_token_id = None if pad_is_eos else judge.config.pad_token_id  # as stage 2 leaves it
    tokenizer = tiny_tokenizer(pad_is_eos)
    tokenizer.chat_template = tokenizer.chat_template.replace("{% else %} ", "{% else %}")  # no space
    flags = ppo_flags(tmp_path, speaking_model(), judge, tokenizer, ["a", "bc"] * 8, ["x", "yz yz"] * 8)
    if chats:
        turns = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
        for path in tmp_path.glob("data/*.jsonl"):
            rows = [[*turns, {"role": "user", "content": row["prompt"]}] for row in read_jsonl(path)]
            write_jsonl(path, [{"prompt": row} for row in rows])
    sizes = {"total_episodes": 16, "batch_size": 16, "num_mini_batches": 4, "max_new_tokens": 40}
    ppo_rlhf.main(ppo_rlhf.Args(**flags, **sizes))
    mean, deviation = load_file("ppo/value_head.safetensors")["score_scale"].tolist()
    rows = [row for row in read_jsonl("ppo/eval.jsonl") if len(row["ppo"]) < 40]  # those that ended
    assert len(rows) > 8 and len({len(row["ppo"]) for row in rows}) > 3
    prompts = [row["prompt"] if chats else [{"role": "user", "content": row["prompt"]}] for row in rows]
    chats = [[*prompt, {"role": "assistant", "content": row["ppo"]}] for prompt, row in zip(prompts, rows)]
    save(judge, tokenizer, tmp_path / "runs/reward_model")
    code = re.search(r"```python\n(.*?)```", README, re.DOTALL)[1]
    exec(code, {})
    names = {"chats": chats}
    exec(re.sub(r"^chats = .*$", "", code, flags=re.MULTILINE), names)
    wanted = [row["ppo_score"] * deviation + mean for row in rows]
    assert names["scores"].flatten().tolist() == pytest.approx(wanted, abs=1e-4)
