"""Does it learn? A rule that counts lower-case letters, a policy that starts nearly uniform, a few
seconds."""

import math

import pytest
import torch
from conftest import ppo_flags, read_jsonl, tiny_model, tiny_tokenizer
from safetensors.torch import load_file

import ppo_rlhf as ppo

T = 8
SHARE = 26 / 258  # of the vocabulary are letters, so the start is about 0.8 of 8


def count_letters(reward_model, tokenizer, sequences, starts, lengths, rows):
    """0 ... T: a reward as a fork would write it, texts in, floats out."""
    spans = zip(sequences, starts, lengths)
    texts = [tokenizer.decode(ids[a:b], skip_special_tokens=True) for ids, a, b in spans]
    return torch.tensor([float(sum("a" <= c <= "z" for c in text)) for text in texts])


def train(folder, monkeypatch, **overrides):
    """-> (letters per response, KL) over the last five updates, standard deviation of the first scores."""
    monkeypatch.setattr(ppo, "reward_fn", count_letters)
    policy = tiny_model("gpt2", initializer_range=0.02)
    flags = ppo_flags(folder, policy, None, tiny_tokenizer(), ["one", "two two", "three?", "4"], ["five"])
    flags |= dict(max_new_tokens=T, batch_size=64, total_episodes=64 * 24, num_mini_batches=2)
    flags |= dict(num_ppo_epochs=4, per_device_train_batch_size=32, learning_rate=6e-3)
    flags |= dict(temperature=1.0, missing_eos_penalty=0.0, beta=0.0) | overrides
    ppo.main(ppo.Args(**flags))
    mean, std = load_file(folder / "ppo/value_head.safetensors")["score_scale"].tolist()
    metrics = read_jsonl(folder / "ppo/metrics.jsonl")
    score, kl = (sum(m[f"objective/{name}"] for m in metrics[-5:]) / 5 for name in ("scores", "kl"))
    return score * std + mean, kl, std


def test_a_high_beta_pins_the_policy(tmp_path, monkeypatch):
    """At 30 per nat no letter is worth the KL."""
    letters, kl, _ = train(tmp_path, monkeypatch, beta=30.0, total_episodes=64 * 5)
    assert kl < 0.5 and letters < 1.6


def test_beta_leads_to_the_optimum_that_theory_names(tmp_path, monkeypatch):
    """The best policy under a KL penalty is proportional to reference * exp(score / beta), the score in units
    of the first rollout's deviation, so that a byte is a letter with probability q. A beta that is off by a
    factor."""
    beta = 0.35
    letters, kl, std = train(tmp_path, monkeypatch, beta=beta, learning_rate=3e-3)
    odds = SHARE / (1 - SHARE) * math.exp(1 / (beta * std))
    q = odds / (1 + odds)
    assert letters == pytest.approx(T * q, rel=0.1)  # at twice the beta 2.9, at half of it 7.8
    expected = T * (q * math.log(q / SHARE) + (1 - q) * math.log((1 - q) / (1 - SHARE)))
    assert kl == pytest.approx(expected, rel=0.2)
    (answer,) = read_jsonl(tmp_path / "ppo/eval.jsonl")
    assert answer["ppo_score"] > answer["sft_score"]
