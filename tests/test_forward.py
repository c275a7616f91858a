"""Forwards of policy, value head and reward model on padded batches, against plain forwards of single
rows."""

from types import SimpleNamespace

import pytest
import torch
from conftest import EOS, PAD, plain_logits, tiny_model, tiny_reward_model, tiny_tokenizer

import ppo_rlhf as ppo

V = 258
# Ragged in both parts. Responses for T = 5: EOS at once, in the middle, in the last slot, none; the fourth
# holds the pad id as an ordinary token, so that a mask made from ids is wrong for it.
PROMPTS = [[5, 6, 7, 8, 9, 10], [33], [70, 3, 3, 90], [40, 2], [12, 130, 14]]
RESPONSES = [[EOS], [50, 60, EOS], [20, 30, 40, 50, EOS], [20, PAD, 21, PAD, 22], [9, 9, 9, EOS]]
T = 5
EVERY = torch.arange(5)


@pytest.fixture(params=["pad != eos", "pad == eos"])
def pad_id(request):
    return PAD if request.param == "pad != eos" else EOS


def make_batch(pad_id, garbage=False):
    """What `sample` hands on, made by hand; with `garbage`, other ids on all padding."""

    def fill(n):
        return torch.randint(2, V, (n,)).tolist() if garbage else [pad_id] * n

    width = max(map(len, PROMPTS)) + T
    rows = [prompt + response for prompt, response in zip(PROMPTS, RESPONSES)]
    return SimpleNamespace(
        sequences=torch.tensor([row + fill(width - len(row)) for row in rows]),
        starts=torch.tensor([len(prompt) for prompt in PROMPTS]),
        lengths=torch.tensor([len(row) for row in rows]),
        responses=torch.tensor([response + fill(T - len(response)) for response in RESPONSES]),
        response_lengths=torch.tensor([len(response) for response in RESPONSES]),
        mask=torch.tensor([[1.0] * len(r) + [0.0] * (T - len(r)) for r in RESPONSES]),
    )


def forward(model, batch, temperature=0.9, size=5, **other):
    """`forward` over micro-batches, put together -> log-probs, entropies [5, T], hidden states [5, T, d]."""
    out = torch.zeros(5, T), torch.zeros(5, T), torch.zeros(5, T, 32)
    for mb, *texts, t in ppo.micro_batches(batch, EVERY, size):
        for whole, part in zip(out, ppo.forward(model, *texts, temperature, **other)):
            whole[mb, :t] = part
    return out


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_micro_batches_are_a_partition(size):
    """Every row once, no more than asked, similar lengths together, cut to the longest sequence and response:
    a lost remainder or a cut too short would silently take tokens out of the loss."""
    batch = make_batch(PAD)
    rows = torch.tensor([4, 0, 2, 1])
    seen = list(ppo.micro_batches(batch, rows, size))
    assert sorted(int(i) for mb, *_ in seen for i in mb) == [0, 1, 2, 4] and len(seen) == -(-4 // size)
    order = [batch.lengths[i] for mb, *_ in seen for i in mb]
    assert order == sorted(order)
    for mb, ids, starts, labels, t in seen:
        assert 1 <= len(mb) <= size
        assert t == max(len(RESPONSES[i]) for i in mb)
        assert torch.equal(ids, batch.sequences[mb, : max(batch.lengths[mb])])
        assert torch.equal(starts, batch.starts[mb]) and torch.equal(labels, batch.responses[mb, :t])


@pytest.mark.parametrize("temperature, size", [(1.0, 5), (0.7, 2)])
def test_a_row_in_a_batch_equals_the_row_alone(family, pad_id, temperature, size):
    """Log-probs, entropies and hidden states of every real token: wrong positions, pads that are seen, the
    output layer on the wrong slot, a missing temperature, the state after the token instead of the one before
    it."""
    model, critic = tiny_model(family), tiny_model(family, seed=7).base_model
    with torch.no_grad():
        logprobs, entropy, hidden = forward(model, make_batch(pad_id), temperature, size)
        *with_critic, critic_hidden = forward(model, make_batch(pad_id), temperature, size, critic=critic)
    assert torch.equal(with_critic[0], logprobs) and torch.equal(with_critic[1], entropy)
    for i, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES)):
        n, ids = len(response), prompt + response
        before = slice(len(prompt) - 1, -1)
        log_p = (plain_logits(model, ids)[before].double() / temperature).log_softmax(-1)  # [n, V]
        expected = log_p[range(n), response]
        torch.testing.assert_close(logprobs[i, :n].double(), expected, atol=1e-5, rtol=1e-5)
        expected = -(log_p.exp() * log_p).sum(-1)
        torch.testing.assert_close(entropy[i, :n].double(), expected, atol=1e-5, rtol=1e-5)
        for backbone, states in ((model.base_model, hidden), (critic, critic_hidden)):
            with torch.no_grad():
                expected = backbone(torch.tensor([ids])).last_hidden_state[0, before]
            torch.testing.assert_close(states[i, :n], expected, atol=1e-5, rtol=1e-5)


def test_garbage_on_padding_changes_no_gradient(family, pad_id):
    """Anything that looks right of the last real token, in the forward or in the backward pass."""
    model = tiny_model(family)
    results = []
    for garbage in (False, True):
        model.zero_grad()
        batch = make_batch(pad_id, garbage)
        outputs = forward(model, batch, entropy_coef=1.0)
        mask = batch.mask[..., None]
        real = [x.view(5, T, -1) * mask for x in outputs]
        sum(x.sum() for x in real).backward()
        results.append([*real, *(p.grad.clone() for p in model.parameters())])
    for clean, dirty in zip(*results):
        torch.testing.assert_close(clean, dirty, atol=1e-5, rtol=1e-5)
    assert sum(g.abs().sum() for g in results[0][3:]) > 1


# ---- The reward model ----


def stock_score(model, ids):
    """What the stock class says of one unpadded sequence, told of no pad token."""
    model.config.pad_token_id = None
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[0, 0].item()


@pytest.mark.parametrize("size", [1, 2, 5])
def test_score_is_read_at_the_last_real_token(family, pad_id, size):
    """The score of a padded row is that of the row alone in the stock class, whatever the micro-batch and
    whatever is on the padding: a score read at a pad, at the last slot, or one token early where EOS is taken
    for a pad."""
    model = tiny_reward_model(family)
    expected = [stock_score(model, prompt + response) for prompt, response in zip(PROMPTS, RESPONSES)]
    early = [stock_score(model, (prompt + response)[:-1]) for prompt, response in zip(PROMPTS, RESPONSES)]
    for garbage in (False, True):
        scores = ppo.score(model, tiny_tokenizer(), make_batch(pad_id, garbage), [{}] * 5, size)
        assert scores.tolist() == pytest.approx(expected, abs=1e-5)
        assert scores.dtype == torch.float32 and not scores.requires_grad
    assert min(abs(a - b) for a, b in zip(early, expected)) > 1e-3 and len({*expected}) == 5


def test_an_unknown_id_is_refused(capsys):
    """A policy with more embeddings than the reward model: one line, exit status 2, not an index error on
    CUDA."""
    model = tiny_reward_model("gpt2", vocab_size=V - 1)
    batch = make_batch(PAD)
    ppo.score(model, tiny_tokenizer(), batch, [{}] * 5, 5)
    batch.sequences[2, 0] = V - 2  # the last one that there is
    ppo.score(model, tiny_tokenizer(), batch, [{}] * 5, 5)
    batch.sequences[2, 0] = V - 1
    with pytest.raises(SystemExit) as refusal:
        ppo.score(model, tiny_tokenizer(), batch, [{}] * 5, 5)
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert refusal.value.code == 2 and f"id {V - 1}" in line
