"""Forwards of policy, value head and reward model on padded batches, against plain forwards of single
rows."""

import contextlib
from types import SimpleNamespace

import pytest
import torch
from conftest import EOS, PAD, plain_logits, tiny_model, tiny_reward_model

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


def make_batch(pad_id):
    """What `sample` hands on, made by hand."""
    rows = [prompt + response for prompt, response in zip(PROMPTS, RESPONSES)]
    lengths = torch.tensor([len(row) for row in rows])
    response_lengths = torch.tensor([len(response) for response in RESPONSES])
    pads = [pad_id] * (max(map(len, PROMPTS)) + T)
    return SimpleNamespace(
        sequences=torch.tensor([(row + pads)[: len(pads)] for row in rows]),
        starts=torch.tensor([len(prompt) for prompt in PROMPTS]),
        lengths=lengths,
        cpu_lengths=lengths,
        responses=torch.tensor([(response + pads)[:T] for response in RESPONSES]),
        response_lengths=response_lengths,
        cpu_response_lengths=response_lengths,
        mask=(torch.arange(T) < response_lengths[:, None]).float(),
    )


def forward(model, batch, temperature=0.9, size=5, **other):
    """`forward` over micro-batches, put together -> log-probs, entropies [5, T], hidden states [5, T, d]."""
    out = torch.zeros(5, T), torch.zeros(5, T), torch.zeros(5, T, 32)
    for mb, *texts in ppo.micro_batches(batch, EVERY, size):
        for whole, part in zip(out, ppo.forward(model, *texts, temperature, **other)):
            whole[mb] = part
    return out


@pytest.mark.parametrize("size", [1, 3, 7])
def test_micro_batches_are_a_partition(size):
    """Every row once, no more than asked, similar lengths together, cut to the longest sequence and response:
    a lost remainder or a cut too short would silently take tokens out of the loss."""
    batch = make_batch(PAD)
    seen = list(ppo.micro_batches(batch, torch.tensor([4, 0, 2, 1]), size))
    order = torch.cat([rows for (rows, _), *_ in seen])
    assert order.tolist() == [1, 4, 0, 2] and len(seen) == -(-4 // size)
    for mb, ids, starts, labels in seen:
        rows = mb[0]
        assert 1 <= len(rows) <= size
        assert torch.equal(ids, batch.sequences[rows, : max(batch.lengths[rows])])
        longest = max(len(RESPONSES[i]) for i in rows)
        assert torch.equal(starts, batch.starts[rows]) and torch.equal(
            labels, batch.responses[rows, :longest]
        )
        assert batch.mask[mb].shape == labels.shape


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


# ---- The reward model ----


def stock_score(model, ids):
    """What the stock class says of one unpadded sequence, told of no pad token."""
    model.config.pad_token_id = None
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[0, 0].item()


@pytest.mark.parametrize("size", [1, 2, 5])
def test_score_is_read_at_the_last_real_token(family, pad_id, size):
    """The score of a padded row is that of the row alone in the stock class, whatever the micro-batch: one
    read at a pad, at the last slot, or one token early where EOS is taken for a pad."""
    model = tiny_reward_model(family)
    expected = [stock_score(model, prompt + response) for prompt, response in zip(PROMPTS, RESPONSES)]
    prompts = [SimpleNamespace(row={})] * 5
    early = [stock_score(model, (prompt + response)[:-1]) for prompt, response in zip(PROMPTS, RESPONSES)]
    scores = ppo.score(model, None, make_batch(pad_id), prompts, size)
    assert scores.tolist() == pytest.approx(expected, abs=1e-5)
    assert scores.dtype == torch.float32 and not scores.requires_grad
    assert min(abs(a - b) for a, b in zip(early, expected)) > 1e-3 and len({*expected}) == 5


WRONG = {"mean": torch.mean, "shape [1]": lambda x: x[:1], "column": lambda x: x[:, None]}
RIGHT = {"tensor": lambda x: x, "list": lambda x: x.tolist(), "numpy": lambda x: x.double().numpy()}


@pytest.mark.parametrize("form", [*WRONG, *RIGHT])
def test_one_number_a_response(form, monkeypatch, refused):
    """A rule's scores by row, whatever holds them; one number for all is refused, not spread over them."""
    numbers = lambda rows: torch.tensor([row["number"] for row in rows])
    monkeypatch.setattr(ppo, "reward_fn", lambda *given: (WRONG | RIGHT)[form](numbers(given[-1])))
    prompts = [SimpleNamespace(row={"number": 0.5 + i}) for i in range(5)]
    with refused("one number per response") if form in WRONG else contextlib.nullcontext():
        assert ppo.score(None, None, make_batch(PAD), prompts, 2).tolist() == [0.5, 1.5, 2.5, 3.5, 4.5]
