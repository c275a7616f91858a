"""What the oracle of test_ppo_step.py does not see: the examples in docstrings, scales at which numbers could
get lost, and whether the whole leads where theory says."""

import math
import re

import pytest
import torch
from conftest import ppo_flags, read_jsonl, tiny_model, tiny_tokenizer
from safetensors.torch import load_file

import ppo_rlhf as ppo


def example(function):
    """The rows of numbers in a docstring, by name."""
    found = re.findall(r"^ +([a-z]+)((?: +-?[0-9.]+)+)", function.__doc__, re.MULTILINE)
    return {name: [float(number) for number in numbers.split()] for name, numbers in found}


def test_worked_examples():
    """Of the docstrings: penalized rewards, and what GAE makes of them."""
    reward, value = example(ppo.penalized_rewards), example(ppo.gae)
    mask, kl = torch.tensor([reward["mask"]]), torch.tensor([reward["kl"]])
    rewards = ppo.penalized_rewards(torch.tensor([1.0]), kl, mask, 0.5)
    assert rewards[0].tolist() == pytest.approx(reward["rewards"]) and mask.sum() == 4
    rewards[0, 4] = 5.0  # on padding, where nothing is read
    advantages, returns = ppo.gae(rewards, torch.tensor([value["values"]]), mask, 1.0, 0.5)
    assert advantages[0].tolist() == pytest.approx(value["advantages"], abs=1e-6)
    assert returns[0].tolist() == pytest.approx(value["returns"], abs=1e-6)
    after = [*value["values"][1:4], 0.0]
    deltas = [r + v1 - v0 for r, v1, v0 in zip(reward["rewards"], after, value["values"])]
    assert deltas == pytest.approx(value["delta"], abs=1e-6)


@pytest.mark.parametrize("shift, scale", [(100, 1), (-3, 1e-2), (0, 1e3)])
def test_whitening(shift, scale):
    """Mean 0 and deviation 1 whatever the scale of the rewards; equal advantages become 0, not NaN."""
    mask = torch.ones(16, 16).tril()
    real = ppo.whiten(torch.randn(16, 16) * scale + shift, mask)[mask.bool()].double()
    assert real.mean().item() == pytest.approx(0, abs=2e-4)
    assert real.std(correction=0).item() == pytest.approx(1, abs=1e-3)
    assert ppo.whiten(torch.full((16, 16), 7.0), mask).abs().max() < 1e-2


def test_beta_leads_to_the_optimum_that_theory_names(tmp_path, monkeypatch):
    """The best policy under a KL penalty is proportional to reference * exp(score / beta), the score in units
    of the first rollout's deviation. The rule counts letters, so a byte is one with probability q."""

    def count_letters(reward_model, tokenizer, sequences, starts, lengths, rows):
        spans = zip(sequences, starts, lengths)
        texts = [tokenizer.decode(ids[a:b], skip_special_tokens=True) for ids, a, b in spans]
        return [sum("a" <= c <= "z" for c in text) for text in texts]

    monkeypatch.setattr(ppo, "reward_fn", count_letters)
    share, beta, T = 26 / 258, 0.35, 8  # of the vocabulary are letters, and the policy starts nearly uniform
    policy, prompts = tiny_model("gpt2", initializer_range=0.02), ["one", "two two", "three?", "4"]
    flags = ppo_flags(tmp_path, policy, None, tiny_tokenizer(), prompts, ["five"])
    flags |= dict(max_new_tokens=T, batch_size=64, total_episodes=64 * 24, num_mini_batches=2)
    flags |= dict(num_ppo_epochs=4, per_device_train_batch_size=32, learning_rate=3e-3, beta=beta)
    ppo.main(ppo.Args(**flags, temperature=1.0, missing_eos_penalty=0.0))
    mean, std = load_file(tmp_path / "ppo/value_head.safetensors")["score_scale"].tolist()
    last = read_jsonl(tmp_path / "ppo/metrics.jsonl")[-5:]
    score, kl = (sum(row[f"objective/{name}"] for row in last) / 5 for name in ("scores", "kl"))
    odds = share / (1 - share) * math.exp(1 / (beta * std))
    q = odds / (1 + odds)
    assert score * std + mean == pytest.approx(T * q, rel=0.1)  # at twice the beta 2.9, at half of it 7.8
    expected = T * (q * math.log(q / share) + (1 - q) * math.log((1 - q) / (1 - share)))
    assert kl == pytest.approx(expected, rel=0.2)
    (answer,) = read_jsonl(tmp_path / "ppo/eval.jsonl")
    assert answer["ppo_score"] > answer["sft_score"]
