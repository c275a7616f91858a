"""The mathematics of ppo_rlhf.py against numbers by hand and brute force. (Both losses are in the loop
itself: test_ppo_step.py compares them and their gradients with an oracle.)"""

import pytest
import torch

import ppo_rlhf as ppo

KL = torch.tensor([[0.1, 0.1, -0.2, 0.1, 0.1]])


@pytest.mark.parametrize("beta, last, total", [(0.0, 7.5, 7.5), (0.1, 7.49, 7.48), (0.5, 7.45, 7.4)])
def test_worked_example_of_the_penalized_reward(beta, last, total):
    """A flipped sign of the KL, a beta that is squared, a score that replaces the last token's KL penalty."""
    out = ppo.penalized_rewards(torch.tensor([7.5]), KL, torch.ones(1, 5), beta)
    assert out[0].tolist() == pytest.approx(
        [-0.1 * beta, -0.1 * beta, 0.2 * beta, -0.1 * beta, last], abs=1e-6
    )
    assert out.sum().item() == pytest.approx(total, abs=1e-5)


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


def test_masked_mean_and_variance_see_real_tokens_only():
    """Division by all slots, and a variance around the mean of everything."""
    x = torch.tensor([[1.0, 2, 1e4], [3, 4, 5]])
    mask = torch.tensor([[1.0, 1, 0], [1, 1, 1]])
    assert ppo.masked_mean(x, mask).item() == pytest.approx(3.0)
    assert ppo.masked_var(x, mask).item() == pytest.approx(2.0)  # (4 + 1 + 0 + 1 + 4) / 5


def test_whitening_is_pinned():
    """1, 2, 3, 4 among garbage: an inverted shift, padding in the statistics, division by the variance."""
    x = torch.tensor([[1.0, 2, 1e6], [3, 4, -1e6]])
    mask = torch.tensor([[1.0, 1, 0], [1, 1, 0]])
    expected = torch.tensor([[-1.3416408, -0.4472136, 0], [0.4472136, 1.3416408, 0]])
    torch.testing.assert_close(ppo.whiten(x, mask), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("shift, scale", [(0, 1), (100, 1), (-3, 1e-2), (0, 1e3)])
def test_whitening_gives_mean_0_and_deviation_1(shift, scale):
    """Whatever the scale of the rewards; and equal advantages become 0, not NaN."""
    mask = torch.ones(16, 16).tril()
    out = ppo.whiten(torch.randn(16, 16) * scale + shift, mask)
    real = out[mask.bool()].double()
    assert real.mean().item() == pytest.approx(0, abs=2e-4)
    assert real.std(correction=0).item() == pytest.approx(1, abs=1e-3)
    assert out[mask == 0].eq(0).all()
    assert ppo.whiten(torch.full((16, 16), 7.0), mask).abs().max() < 1e-2


def test_gather_logprobs_takes_labels_of_the_vocabulary():
    """Every entry by hand: labels along another axis, of another row or another slot."""
    all_logprobs, labels = torch.randn(3, 4, 11), torch.randint(11, (3, 4))
    out = ppo.gather_logprobs(all_logprobs, labels)
    assert out.tolist() == [[all_logprobs[b, t, labels[b, t]].item() for t in range(4)] for b in range(3)]
