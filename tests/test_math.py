"""The mathematics of ppo_rlhf.py against numbers by hand and brute force. (Both losses are in the loop
itself: test_ppo_step.py compares them and their gradients with an oracle.)"""

import re

import pytest
import torch

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
    advantages, returns = ppo.gae(rewards, torch.tensor([value["values"]]), mask, 1.0, 0.5)
    assert advantages[0].tolist() == pytest.approx(value["advantages"], abs=1e-6)
    assert returns[0].tolist() == pytest.approx(value["returns"], abs=1e-6)
    after = [*value["values"][1:4], 0.0]
    deltas = [r + v1 - v0 for r, v1, v0 in zip(reward["rewards"], after, value["values"])]
    assert deltas == pytest.approx(value["delta"], abs=1e-6)


def test_score_lands_on_the_last_real_token_of_its_own_row():
    """Rows of every length: a score one slot late falls on padding, or off the end of the longest row."""
    mask = torch.ones(5, 5).tril()
    kl = torch.randn(5, 5) * mask
    kl_before = kl.clone()
    scores = torch.arange(1.0, 6.0)
    assert torch.equal(ppo.penalized_rewards(scores, kl, mask, 0.0), scores.diag())
    torch.testing.assert_close(ppo.penalized_rewards(scores, kl, mask, 0.3), scores.diag() - 0.3 * kl)
    assert torch.equal(kl, kl_before), "the input was changed in place"


def gae_by_definition(rewards, values, gamma, lam):
    """Schulman et al. 2015, eq. 16, of one episode, as the double sum that it is: lists of floats."""
    n = len(rewards)
    after = [*values[1:], 0.0]  # the value after the last token: the episode is over
    deltas = [rewards[t] + gamma * after[t] - values[t] for t in range(n)]
    return [sum((gamma * lam) ** (s - t) * deltas[s] for s in range(t, n)) for t in range(n)]


@pytest.mark.parametrize("gamma, lam", [(1.0, 1.0), (1.0, 0.95), (0.99, 0.95), (0.9, 0.0), (0.0, 0.9)])
def test_gae_of_ragged_rows_equals_the_double_sum(gamma, lam):
    """Rows of every length, from EOS at once to the last slot; nothing leaks out of garbage on padding."""
    T = 7
    mask = torch.ones(T, T).tril()
    rewards, values = torch.randn(2, T, T)
    garbage = torch.where(torch.rand(T, T) < 0.5, 1e6, -1e6) * (1 - mask)
    inputs = [rewards * mask + garbage, values * mask + garbage]
    before = inputs[1].clone()
    advantages, returns = ppo.gae(*inputs, mask, gamma, lam)
    for i in range(T):
        n = i + 1
        expected = gae_by_definition(rewards[i, :n].tolist(), values[i, :n].tolist(), gamma, lam)
        assert advantages[i, :n].tolist() == pytest.approx(expected, abs=1e-5)
        torch.testing.assert_close(returns[i, :n], advantages[i, :n] + values[i, :n])
        assert advantages[i, n:].eq(0).all() and returns[i, n:].eq(0).all()
    assert torch.equal(inputs[1], before), "gae changed its input in place"


def test_whitening_is_pinned():
    """1, 2, 3, 4 among garbage: an inverted shift, padding in the statistics, division by the variance."""
    x = torch.tensor([[1.0, 2, 1e6], [3, 4, -1e6]])
    mask = torch.tensor([[1.0, 1, 0], [1, 1, 0]])
    expected = torch.tensor([[-1.3416408, -0.4472136, 0], [0.4472136, 1.3416408, 0]])
    torch.testing.assert_close(ppo.whiten(x, mask), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("shift, scale", [(100, 1), (-3, 1e-2), (0, 1e3)])
def test_whitening_gives_mean_0_and_deviation_1(shift, scale):
    """Whatever the scale of the rewards; and equal advantages become 0, not NaN."""
    mask = torch.ones(16, 16).tril()
    out = ppo.whiten(torch.randn(16, 16) * scale + shift, mask)
    real = out[mask.bool()].double()
    assert real.mean().item() == pytest.approx(0, abs=2e-4)
    assert real.std(correction=0).item() == pytest.approx(1, abs=1e-3)
    assert ppo.whiten(torch.full((16, 16), 7.0), mask).abs().max() < 1e-2
