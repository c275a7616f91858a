"""Every patch in benchmark/forks and benchmark/ablations applies to ppo_rlhf.py, trains a tiny model for two
updates, and does the one thing that it is about."""

import copy
import importlib.util
import subprocess
import sys
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from conftest import REPOSITORY, read_jsonl, save, tiny_model, tiny_reward_model, tiny_tokenizer, write_jsonl
from transformers import AutoModelForCausalLM

import ppo_rlhf

PATCHES = sorted(REPOSITORY.glob("benchmark/forks/*.patch"))
PATCHES += sorted(REPOSITORY.glob("benchmark/ablations/*.patch"))
ROWS = {}
FLAGS = {
    "rloo": {"num_generations": 4},
    "grpo": {"num_generations": 4, "beta": 0.5},
    "ensemble": {"ensemble_coef": float("inf")},
    "value_warmup": {"value_warmup_updates": 1},
    "decoupled_gae": {"lam": 0.5},
    "dual_clip": {"dual_clip": 1.5},
    "sentiment": {"reward_model_path": ""},
}
# In place of vaderSentiment, which benchmarks alone need
WORDS = SimpleNamespace(polarity_scores=lambda text: {"compound": sum(map(ord, text))})
VADER = SimpleNamespace(SentimentIntensityAnalyzer=lambda: WORDS)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    tokenizer = tiny_tokenizer()
    save(tiny_model("gpt2"), tokenizer, folder / "sft")
    for seed in (1, 2):
        save(tiny_reward_model("gpt2", seed=seed), tokenizer, folder / f"reward_{seed}")
    prompts = [{"prompt": text, "answer": text[4:]} for text in ("one", "to", "three", "a", "five", "sixth")]
    demonstrations = [{"prompt": "one", "completion": "two"}, {"prompt": "a", "completion": "bc"}]
    for split in ("train", "test"):
        write_jsonl(folder / f"prompts/{split}.jsonl", prompts)
        write_jsonl(folder / f"demonstrations/{split}.jsonl", demonstrations)
    return folder


def run(patch, inputs, folder, monkeypatch):
    """Two updates of the patched script -> what `main` knows at phase 4 of each and at the end, and
    what `score` returned before."""
    (folder / "ppo_rlhf.py").write_bytes((REPOSITORY / "ppo_rlhf.py").read_bytes())
    subprocess.run(["git", "apply", patch], cwd=folder, check=True)
    spec = importlib.util.spec_from_file_location(f"patched_{patch.stem}", folder / "ppo_rlhf.py")
    script = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, script)
    monkeypatch.setitem(sys.modules, "vaderSentiment.vaderSentiment", VADER)
    spec.loader.exec_module(script)
    seen = []
    raw = []

    def spy(*arguments, **named):  # phase 4 and the end begin with a defaultdict
        seen.append(dict(sys._getframe(1).f_locals, raw=list(raw)))
        pairs = zip(seen[-1]["policy"].parameters(), seen[-1]["reference"].parameters())
        seen[-1]["moved"] = any(not torch.equal(a, b) for a, b in pairs)
        return defaultdict(*arguments, **named)

    def score(*arguments):
        raw.append(real_score(*arguments))
        return raw[-1]

    def load_rows(name, split):  # of each data set once: reading takes most of a run's time
        if (name, split) not in ROWS:
            ROWS[name, split] = real_load_rows(name, split)
        return copy.deepcopy(ROWS[name, split])

    real_score = script.score
    real_load_rows = script.load_rows
    monkeypatch.setattr(script, "load_rows", load_rows)
    monkeypatch.setattr(script, "defaultdict", spy)
    monkeypatch.setattr(script, "score", score)
    known = script.Args.__dataclass_fields__
    reward = {"reward_model_path": str(inputs / "reward_1")}
    if patch.stem == "ensemble":
        reward = {"reward_model_path": (str(inputs / "reward_1"), str(inputs / "reward_2"))}
    flags = {
        "sft_model_path": str(inputs / "sft"),
        "dataset_name": str(inputs / "prompts"),
        "output_dir": str(folder / "run"),
        "total_episodes": 32,
        "batch_size": 16,
        "num_mini_batches": 2,
        "max_new_tokens": 8,
        "learning_rate": 0.01,
        "warmup_steps": 0,
        **({} if patch.stem == "rule_reward" else reward),
        **FLAGS.get(patch.stem, {}),
    }
    if "ptx_dataset_name" in known:
        flags["ptx_dataset_name"] = str(inputs / "demonstrations")
    script.main(script.Args(**flags))
    return seen, read_jsonl(folder / "run/metrics.jsonl")


@pytest.mark.parametrize("patch", PATCHES, ids=[patch.stem for patch in PATCHES])
def test_patch(patch, inputs, tmp_path, monkeypatch):
    seen, metrics = run(patch, inputs, tmp_path, monkeypatch)
    assert len(metrics) == 2 and len(read_jsonl(tmp_path / "run/eval.jsonl")) == 6
    assert seen[-1]["moved"] or patch.stem == "lora"  # whose reference is the policy itself
    at = seen[1]  # update 2, before its first minibatch; names of minibatches are those of update 1's last
    mask = at["mask"]
    close = lambda a, b: torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    if patch.stem in ("rloo", "grpo"):
        advantages = at["advantages"][:, 0].view(-1, 4)
        close(advantages.mean(1), torch.zeros(4))
        assert all(len({row["prompt"] for row in at["rows"][i : i + 4]}) == 1 for i in (0, 4, 8, 12))
        if patch.stem == "grpo":
            close(advantages.std(1), torch.ones(4))
    elif patch.stem == "whiten_rewards":
        mean = (at["rewards"] * mask).sum() / mask.sum()
        close(((at["rewards"] - mean) ** 2 * mask).sum() / mask.sum(), torch.tensor(1.0))
    elif patch.stem == "ensemble":
        each = (torch.stack(at["raw"][-2:]) - at["score_mean"]) / at["score_std"]
        close(at["scores"], each.amin(0) - 1.0 * ~at["batch"].ended)
    elif patch.stem == "decoupled_gae":
        close(at["returns"][:, 0], at["rewards"].sum(1))
    elif patch.stem == "value_warmup":
        assert not at["moved"] and at["value_head"].weight.any()
    elif patch.stem == "clip_higher":
        ratio = seen[-1]["ratio"]
        assert (ratio > 1.2).any()
        close(seen[-1]["clipped_ratio"], ratio.clamp(0.8, 1.28))
    elif patch.stem == "dual_clip":
        negative = (seen[-1]["mb_advantages"] < 0) & (seen[-1]["ratio"] > 1.5)
        assert negative.any()
        close(seen[-1]["pg_loss"][negative], -1.5 * seen[-1]["mb_advantages"][negative])
    elif patch.stem == "kl_in_loss":
        close(at["rewards"].sum(1), at["scores"])
        assert all((estimate >= 0).all() for name, estimate in at["estimates"].items() if name != "k1")
    elif patch.stem == "process_reward":
        close(at["rewards"].sum(1), at["scores"] - at["beta"] * at["kl"].sum(1))
        assert at["gains"][:, 0].any()
    elif patch.stem == "rule_reward":
        assert {*torch.cat(at["raw"]).tolist()} == {0.0, 1.0}
    elif patch.stem == "sentiment":
        texts = at["tokenizer"].batch_decode(at["batch"].responses, skip_special_tokens=True)
        assert at["raw"][-1].tolist() == [sum(map(ord, text)) for text in texts]
    elif patch.stem == "no_value_head":
        assert not any("value" in name for name in [*metrics[0], *(p.name for p in tmp_path.glob("run/*"))])
    elif patch.stem == "lora":
        with torch.no_grad():
            for idx, *inputs, t in ppo_rlhf.micro_batches(at["batch"], torch.arange(16), 16):
                expected, _, _ = ppo_rlhf.forward(tiny_model("gpt2"), *inputs, 0.7)
                close(at["ref_logprobs"][idx, :t], expected)
        assert metrics[0]["objective/kl"] == pytest.approx(0, abs=1e-4) != metrics[1]["objective/kl"]
        saved, info = AutoModelForCausalLM.from_pretrained(tmp_path / "run", output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]  # plain weights
        changed = [not torch.equal(a, b) for a, b in zip(saved.parameters(), tiny_model("gpt2").parameters())]
        assert 0 < sum(changed) < len(changed)
    elif patch.stem == "ptx":
        assert all(row["loss/ptx_avg"] > 0 for row in metrics)
    elif patch.stem == "dropout_on":
        assert metrics[0]["objective/kl"] != 0
