"""The mathematics of ppo_rlhf.py: pure functions against hand-made numbers, brute force and calculus."""

import pytest
import torch

import ppo_rlhf as ppo

# ---------------------------------------------------------------------------------------------------------------
# Rewards
# ---------------------------------------------------------------------------------------------------------------

LOGPROBS = torch.tensor([[-2.0, -1.5, -3.0, -2.5, -1.8]])
REF_LOGPROBS = torch.tensor([[-2.1, -1.6, -2.8, -2.6, -1.9]])


@pytest.mark.parametrize(
    "beta, rewards, total",
    [
        (0.0, [0.000, 0.000, 0.00, 0.000, 7.500], 7.50),
        (0.05, [-0.005, -0.005, 0.01, -0.005, 7.495], 7.49),
        (0.1, [-0.010, -0.010, 0.02, -0.010, 7.490], 7.48),
        (0.2, [-0.020, -0.020, 0.04, -0.020, 7.480], 7.46),
        (0.5, [-0.050, -0.050, 0.10, -0.050, 7.450], 7.40),
    ],
)
def test_worked_example_of_the_penalized_reward(beta, rewards, total):
    """Five tokens worked by hand. Catches a flipped sign of the KL, a beta that is squared or left out, a score that
    is spread over the tokens or replaces the last token's KL penalty instead of joining it."""
    out = ppo.penalized_rewards(torch.tensor([7.5]), LOGPROBS, REF_LOGPROBS, torch.ones(1, 5), beta)
    torch.testing.assert_close(out, torch.tensor([rewards]), atol=1e-6, rtol=0)
    assert out.sum().item() == pytest.approx(total, abs=1e-5)


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5])
def test_score_lands_on_the_last_real_token(length):
    """Catches the score one slot late (on padding, where nothing learns from it) for every length, the full one
    included, where `late` would fall off the end; and a KL penalty on padding."""
    mask = (torch.arange(5) < length).float()[None]
    out = ppo.penalized_rewards(torch.tensor([7.5]), LOGPROBS, REF_LOGPROBS, mask, 0.0)
    assert out[0].tolist() == [7.5 if t == length - 1 else 0.0 for t in range(5)]
    garbage = 1e6 * (1 - mask)
    out = ppo.penalized_rewards(torch.tensor([7.5]), LOGPROBS + garbage, REF_LOGPROBS, mask, 0.1)
    assert out[0, length:].eq(0).all()
    expected = 7.5 - 0.1 * (LOGPROBS - REF_LOGPROBS)[0, :length].sum().item()
    assert out.sum().item() == pytest.approx(expected, abs=1e-5)


def test_rewards_do_not_mix_the_rows():
    """Catches a score that is written to another row, or broadcast over all."""
    mask = torch.tensor([[1.0, 0, 0], [1, 1, 0], [1, 1, 1]])
    zeros = torch.zeros(3, 3)
    out = ppo.penalized_rewards(torch.tensor([1.0, 2.0, 3.0]), zeros, zeros, mask, 0.1)
    assert out.tolist() == [[1, 0, 0], [0, 2, 0], [0, 0, 3]]


# ---------------------------------------------------------------------------------------------------------------
# Advantages
# ---------------------------------------------------------------------------------------------------------------


def gae_by_definition(rewards, values, gamma, lam):
    """Schulman et al. 2015, eq. 16, of one episode, as the double sum that it is: lists of floats."""
    n = len(rewards)
    after = list(values[1:]) + [0.0]  # the value after the last token: the episode is over
    deltas = [rewards[t] + gamma * after[t] - values[t] for t in range(n)]
    return [sum((gamma * lam) ** (s - t) * deltas[s] for s in range(t, n)) for t in range(n)]


def test_worked_example_of_gae():
    """Ten tokens, reward 5.0 on the last: the double sum, and the digits that it prints. Catches gamma and lambda
    mixed up, a bootstrap past the end, an off-by-one in next_value, returns without the values."""
    rewards = torch.zeros(1, 10)
    rewards[0, -1] = 5.0
    values = torch.tensor([[2, 2.5, 3, 3.5, 4, 4.2, 4.5, 4.8, 5, 5]])
    advantages, returns = ppo.gae(rewards, values, torch.ones(1, 10), 0.99, 0.95)
    expected = gae_by_definition(rewards[0].tolist(), values[0].tolist(), 0.99, 0.95)
    assert advantages[0].tolist() == pytest.approx(expected, abs=1e-5)
    printed = "2.2637 1.9019 1.5225 1.1244 0.7064 0.5831 0.3488 0.1030 -0.0500 0.0000"
    assert [f"{x:.4f}" for x in advantages[0].tolist()] == printed.split()
    printed = "4.2637 4.4019 4.5225 4.6244 4.7064 4.7831 4.8488 4.9030 4.9500 5.0000"
    assert [f"{x:.4f}" for x in returns[0].tolist()] == printed.split()


@pytest.mark.parametrize("gamma, lam", [(1.0, 1.0), (1.0, 0.95), (0.99, 0.95), (0.9, 0.0), (0.0, 0.9)])
def test_gae_of_ragged_rows_equals_the_double_sum(gamma, lam):
    """One row of every length, from EOS as the first token to no EOS at all, in one batch, with garbage on the
    padding of rewards and values. Catches a value read after the end and recursion over padding."""
    T = 7
    mask = torch.ones(T, T).tril()  # row i is i + 1 long
    rewards, values = torch.randn(2, T, T)
    garbage = torch.where(torch.rand(T, T) < 0.5, 1e6, -1e6) * (1 - mask)
    inputs = [x.clone() for x in (rewards * mask + garbage, values + garbage)]
    advantages, returns = ppo.gae(*inputs, mask, gamma, lam)
    for i in range(T):
        n = i + 1
        expected = gae_by_definition(rewards[i, :n].tolist(), values[i, :n].tolist(), gamma, lam)
        assert advantages[i, :n].tolist() == pytest.approx(expected, abs=1e-5)
        assert returns[i, :n].tolist() == pytest.approx([a + v for a, v in zip(expected, values[i].tolist())], abs=1e-5)
        assert advantages[i, n:].eq(0).all() and returns[i, n:].eq(0).all()
    assert torch.equal(inputs[1], values + garbage), "gae changed its input in place"


@pytest.mark.parametrize("beta", [0.0, 0.1, 1.0])
def test_undiscounted_return_of_the_first_token_is_score_minus_kl(beta):
    """With gamma = lambda = 1 the return is what the objective says, whatever the values are. Catches a penalty or a
    score that gets lost between rewards and returns, as one on padding does."""
    mask = torch.ones(6, 6).tril()
    scores = torch.randn(6)
    logprobs, ref_logprobs, values = torch.randn(3, 6, 6)
    rewards = ppo.penalized_rewards(scores, logprobs, ref_logprobs, mask, beta)
    _, returns = ppo.gae(rewards, values, mask, 1.0, 1.0)
    kl = ((logprobs - ref_logprobs) * mask).sum(1)
    torch.testing.assert_close(returns[:, 0], scores - beta * kl, atol=1e-5, rtol=0)


def test_perfect_values_leave_no_advantage():
    """If V already is the return, nothing is better or worse than expected. Catches V_t taken after token t."""
    rewards = torch.tensor([[0.0, 0, 0, 5]])
    advantages, _ = ppo.gae(rewards, torch.full((1, 4), 5.0), torch.ones(1, 4), 1.0, 0.95)
    torch.testing.assert_close(advantages, torch.zeros(1, 4))


# ---------------------------------------------------------------------------------------------------------------
# Means and whitening
# ---------------------------------------------------------------------------------------------------------------


def test_masked_mean_and_variance_see_real_tokens_only():
    """Catches division by all slots and a variance around the mean of everything."""
    x = torch.tensor([[1.0, 2, 1e4], [3, 4, 5]])
    mask = torch.tensor([[1.0, 1, 0], [1, 1, 1]])
    assert ppo.masked_mean(x, mask).item() == pytest.approx(3.0)
    assert ppo.masked_var(x, mask).item() == pytest.approx(2.0)  # (4 + 1 + 0 + 1 + 4) / 5


def test_whitening_is_pinned():
    """1, 2, 3, 4 among garbage. Catches an inverted mean shift (torchtune's), padding in the statistics, a division
    by the variance, and anything but 0 on padding."""
    x = torch.tensor([[1.0, 2, 1e6], [3, 4, -1e6]])
    mask = torch.tensor([[1.0, 1, 0], [1, 1, 0]])
    expected = torch.tensor([[-1.3416408, -0.4472136, 0], [0.4472136, 1.3416408, 0]])
    torch.testing.assert_close(ppo.whiten(x, mask), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("shift, scale", [(0, 1), (100, 1), (-3, 1e-2), (0, 1e3)])
def test_whitening_gives_mean_0_and_deviation_1(shift, scale):
    """Whatever the scale of the rewards. Catches a step size that depends on the reward's scale or on the padding."""
    mask = torch.ones(16, 16).tril()
    out = ppo.whiten(torch.randn(16, 16) * scale + shift, mask)
    real = out[mask.bool()].double()
    assert real.mean().item() == pytest.approx(0, abs=2e-4)
    assert real.std(correction=0).item() == pytest.approx(1, abs=1e-3)
    assert out[mask == 0].eq(0).all()


def test_whitening_of_equal_advantages_is_finite():
    """All advantages equal (one-token answers with one score): 0, not NaN."""
    assert ppo.whiten(torch.full((2, 3), 7.0), torch.ones(2, 3)).abs().max() < 1e-2


# ---------------------------------------------------------------------------------------------------------------
# Losses, by calculus in float64
# ---------------------------------------------------------------------------------------------------------------

RATIOS = [0.5, 0.79, 0.81, 1.0, 1.19, 1.21, 2.0]  # around both edges of the clip at 0.2


def slope(f, x, h=1e-6):
    return (f(x + h) - f(x - h)) / (2 * h)


@pytest.mark.parametrize("advantage", [1.7, -1.7, 0.0])
@pytest.mark.parametrize("ratio", RATIOS)
def test_policy_loss_and_its_gradient(ratio, advantage):
    """Value by the paper's formula, gradient by finite differences; a token past the clip in the direction of its
    advantage has a gradient of exactly 0, one past it in the other direction is still pulled back. Catches a min
    for the max (clip on the wrong side), a lost sign, a clamp on the log-ratio."""
    old = torch.tensor([[-1.3]], dtype=torch.float64)
    a = torch.tensor([[advantage]], dtype=torch.float64)
    new = (old + torch.tensor(ratio, dtype=torch.float64).log()).requires_grad_()

    def loss(x):
        return ppo.policy_loss(x, old, a, 0.2)

    surrogate = min(ratio * advantage, max(0.8, min(1.2, ratio)) * advantage)
    assert loss(new).item() == pytest.approx(-surrogate, abs=1e-12)
    loss(new).sum().backward()
    assert new.grad.item() == pytest.approx(slope(loss, new.detach()).item(), abs=1e-7)
    clipped = (advantage > 0 and ratio > 1.2) or (advantage < 0 and ratio < 0.8) or advantage == 0
    if clipped:
        assert new.grad.item() == 0.0
    else:
        assert new.grad.item() == pytest.approx(-advantage * ratio, abs=1e-12)


@pytest.mark.parametrize("ret", [3.0, 1.05, 1.0, -2.0])
@pytest.mark.parametrize("moved", [-1.0, -0.21, -0.19, 0.0, 0.07, 0.19, 0.21, 1.0])
def test_value_loss_and_its_gradient(moved, ret):
    """Value by formula, gradient by finite differences; a value that has moved past the clip towards its return gets
    a gradient of exactly 0, one that has moved away is pulled back. Catches a min for the max, a clip around the
    return instead of the old value, a lost factor 0.5."""
    old = torch.tensor([[1.0]], dtype=torch.float64)
    r = torch.tensor([[ret]], dtype=torch.float64)
    new = (old + moved).requires_grad_()

    def loss(x):
        return ppo.value_loss(x, old, r, 0.2)

    plain, clipped = (1 + moved - ret) ** 2, (1 + max(-0.2, min(0.2, moved)) - ret) ** 2
    assert loss(new).item() == pytest.approx(0.5 * max(plain, clipped), abs=1e-12)
    loss(new).sum().backward()
    assert new.grad.item() == pytest.approx(slope(loss, new.detach()).item(), abs=1e-7)
    if abs(moved) > 0.2 and clipped > plain:
        assert new.grad.item() == 0.0
    else:
        assert new.grad.item() == pytest.approx(1 + moved - ret, abs=1e-12)


# ---------------------------------------------------------------------------------------------------------------
# Log-probs, entropy, KL
# ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 30.0, 1e4])
def test_logprobs_and_entropies(scale):
    """Against log_softmax in float64. Catches labels taken along another axis, overflow for confident models, NaN
    where a probability underflows to 0, a flipped sign of the entropy."""
    logits, labels = torch.randn(3, 4, 11) * scale, torch.randint(11, (3, 4))
    log_p = logits.double().log_softmax(-1)
    expected = log_p.gather(-1, labels[..., None])[..., 0]
    torch.testing.assert_close(ppo.logprobs(logits, labels).double(), expected, atol=1e-5, rtol=1e-6)
    expected = -(log_p.exp() * log_p).sum(-1)
    torch.testing.assert_close(ppo.entropies(logits.log_softmax(-1)).double(), expected, atol=1e-5 * scale, rtol=1e-6)


def test_k1_and_k3_of_the_logprobs_average_to_the_exact_kl():
    """Summed over the whole vocabulary with the policy's probabilities, the per-token penalty is KL(policy||reference)
    exactly, and so is k3 = r - 1 - log r. Catches a KL in the wrong direction (reference||policy), which a few
    samples cannot tell apart."""
    V = 13
    logits, ref_logits = torch.randn(2, V).double() * 2
    every = torch.arange(V)
    log_p = ppo.logprobs(logits.expand(V, V), every)
    log_q = ppo.logprobs(ref_logits.expand(V, V), every)
    exact = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=logits), torch.distributions.Categorical(logits=ref_logits)
    )
    no_scores, one_token = torch.zeros(V).double(), torch.ones(V, 1).double()
    penalties = -ppo.penalized_rewards(no_scores, log_p[:, None], log_q[:, None], one_token, 1.0)[:, 0]
    assert (log_p.exp() * penalties).sum().item() == pytest.approx(exact.item(), abs=1e-12)
    k3 = (log_q - log_p).exp() - 1 - (log_q - log_p)
    assert (log_p.exp() * k3).sum().item() == pytest.approx(exact.item(), abs=1e-12)
    assert k3.min() >= 0 and exact > 0.5  # the two distributions differ, so the test can fail
