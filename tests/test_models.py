"""Model families, saved and loaded from disk, through all three stages: the same as stock classes read, or
refused in one line, by benchmark/families.py's own comparisons.

Some families scale or cap their logits after the output layer, some ignore the mask of a static cache. None
of them crashes: the policy that is trained is silently not the model that is saved."""

import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY, read_jsonl

sys.path.append(str(REPOSITORY / "benchmark"))
import families  # noqa: E402

# What people use most (gpt_neox: Pythia; llama: SmolLM too), and other kinds of positions, experts and states
WORK = "llama qwen2 qwen3 gpt_neox gpt2 gemma gemma3_text mistral phi3 olmo2 smollm3".split()
WORK += "opt mpt bloom mixtral qwen3_5_text".split()
# Family: (which stage refuses it, what it says)
REFUSED = {
    "gemma2": ("stage 1", "not supported"),
    "cohere": ("stage 1", "not supported"),
    "granite": ("stage 1", "not supported"),
    "llama4_text": ("stage 1", "not supported"),
    "olmoe": ("stage 2", "no sequence-classification class for model family olmoe"),
    "minimax": ("stage 3", "model family minimax keeps no keys and values"),
    "gpt_neo": ("stage 3", "log-probs of sampler and forward differ"),
}
FOLDERS = {"stage 1": "sft", "stage 2": "reward_model", "stage 3": "ppo"}


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    families.prepare()


@pytest.mark.parametrize("family", WORK)
def test_equal_to_stock(family):
    row = families.try_family(family)
    assert families.outcome(row) == "works", row
    metrics = read_jsonl("ppo/metrics.jsonl")
    assert len(metrics) == 2 and all(m["val/sampler_logprob_gap"] < 1e-4 for m in metrics)


@pytest.mark.parametrize("family", REFUSED)
def test_refused_in_one_line(family):
    """And said by stage 1, if it is stage 2 or 3 that cannot: before its training, not after it."""
    stage, message = REFUSED[family]
    row = families.try_family(family)
    assert message in row[stage] and families.TRACEBACK not in row[stage]
    assert not Path(FOLDERS[stage], "model.safetensors").exists()
    assert all(not row[earlier] for earlier in FOLDERS if earlier < stage)
    if family in ("olmoe", "minimax"):
        assert f"{family} can be fine-tuned, but" in row["note"]
    if family == "olmoe":  # its policy is trained as well as others, against another family's reward model
        assert families.outcome(row) == "no sequence-classification class"
