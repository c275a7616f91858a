"""Forwards of policy, value head and reward model on padded batches, against plain forwards of single rows."""

import contextlib

import pytest
import torch
import transformers
from conftest import EOS, PAD, plain_logits, save, tiny_model, tiny_reward_model, tiny_tokenizer

import ppo_rlhf as ppo

V = 258
# Ragged in both parts. Response lengths for T = 5: EOS at once, in the middle, in the last slot, none at all; the
# fourth response holds the pad id as an ordinary token, so a mask made from ids is wrong for it.
PROMPTS = [[5, 6, 7, 8, 9, 10], [33], [70, 3, 3, 90], [40, 2], [12, 130, 14]]
RESPONSES = [[EOS], [50, 60, EOS], [20, 30, 40, 50, EOS], [20, PAD, 21, PAD, 22], [9, 9, 9, EOS]]
T = 5


@pytest.fixture(params=["pad != eos", "pad == eos"])
def pad_id(request):
    return PAD if request.param == "pad != eos" else EOS


def batch(pad_id, garbage=False):
    """What main() hands to `forward`: sequences [B, P+T], prompt_lengths [B], responses [B, T], mask [B, T]."""
    prompts, _, prompt_lengths = ppo.left_pad(PROMPTS, pad_id, "cpu")
    responses = torch.tensor([r + [pad_id] * (T - len(r)) for r in RESPONSES])
    lengths = torch.tensor([len(r) for r in RESPONSES])
    mask = (torch.arange(T) < lengths[:, None]).float()
    if garbage:
        responses = torch.where(mask.bool(), responses, torch.randint(2, V, responses.shape))
        prompts = torch.where(torch.arange(prompts.shape[1]) >= prompts.shape[1] - prompt_lengths[:, None], prompts, 99)
    return ppo.roll_left(prompts, responses, prompt_lengths), prompt_lengths, responses, mask


def forward(model, head, batch, temperature, entropy_grad=False):
    return ppo.forward(model, head, *batch, temperature, contextlib.nullcontext(), entropy_grad)


def test_left_pad_and_roll_left():
    """Every pair of lengths, EOS and pads among the real ids. Catches a roll by one too few, a row that is rolled by
    its neighbour's padding, a mask taken from ids."""
    prompts = [[7] * n + [PAD, EOS] for n in range(5)]
    ids, mask, lengths = ppo.left_pad(prompts, PAD, "cpu")
    assert ids.tolist() == [[PAD] * (6 - len(p)) + p for p in prompts]
    assert mask.tolist() == [[0] * (6 - len(p)) + [1] * len(p) for p in prompts]
    assert lengths.tolist() == [len(p) for p in prompts]
    responses = torch.arange(100, 115).view(5, 3)
    sequences = ppo.roll_left(ids, responses, lengths)
    for i, prompt in enumerate(prompts):
        real = prompt + responses[i].tolist()
        assert sequences[i].tolist() == real + [PAD] * (9 - len(real))


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
def test_micro_batches_are_a_partition(size):
    """Every row once, none longer than it says, no more rows than asked. Catches a lost remainder and a cut that is
    shorter than the longest row: tokens would silently leave the loss."""
    lengths, response_lengths = [9, 4, 12, 7, 7, 30, 5], [2, 1, 6, 3, 1, 8, 2]
    rows = [6, 2, 0, 5, 3]
    chunks = ppo.micro_batches(rows, lengths, response_lengths, size, "cpu")
    assert all(chunk.dtype == torch.long for chunk, _, _ in chunks)
    chunks = [(chunk.tolist(), *longest) for chunk, *longest in chunks]
    assert sorted(row for chunk, _, _ in chunks for row in chunk) == sorted(rows)
    for chunk, longest, longest_response in chunks:
        assert 1 <= len(chunk) <= size
        assert longest == max(lengths[i] for i in chunk) and longest_response == max(response_lengths[i] for i in chunk)
    assert len(chunks) == -(-len(rows) // size)


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.0])
def test_a_row_in_a_batch_equals_the_row_alone(family, pad_id, temperature):
    """Log-probs, entropies and values of a padded batch against an unpadded forward of each row, on every real
    token, and 0 on padding. Catches wrong positions, pads that are seen, the output layer or the value head on the
    wrong slot, a missing temperature, a value of the state after the token, a mask rebuilt from ids."""
    model, head = tiny_model(family), torch.nn.Linear(32, 1)
    with torch.no_grad():
        new_logprobs, entropy, values = forward(model, head, batch(pad_id), temperature)
    for i, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES)):
        n, ids = len(response), prompt + response
        log_p = (plain_logits(model, ids).double() / temperature).log_softmax(-1)[len(prompt) - 1 : -1]  # [n, V]
        expected = log_p[range(n), response]
        torch.testing.assert_close(new_logprobs[i, :n].double(), expected, atol=1e-5, rtol=1e-5)
        expected = -(log_p.exp() * log_p).sum(-1)
        torch.testing.assert_close(entropy[i, :n].double(), expected, atol=1e-5, rtol=1e-5)
        with torch.no_grad():
            hidden = model(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states[-1][0]
            expected = head(hidden[len(prompt) - 1 : -1])[:, 0]  # V before token t is of the state that predicts t
        torch.testing.assert_close(values[i, :n], expected, atol=1e-5, rtol=1e-5)
        for x in (new_logprobs, entropy, values):
            assert x[i, n:].eq(0).all()


def test_garbage_after_eos_changes_nothing(family, pad_id):
    """Other ids on all padding: not one log-prob, value or gradient changes. Catches anything that looks right of
    the last real token, in the forward or in the backward pass."""
    model, head = tiny_model(family), torch.nn.Linear(32, 1)
    results = []
    for garbage in (False, True):
        model.zero_grad(), head.zero_grad()
        outputs = forward(model, head, batch(pad_id, garbage), 0.9, entropy_grad=True)
        (outputs[0].sum() + outputs[1].sum() + outputs[2].sum()).backward()
        results.append([*outputs, *(p.grad.clone() for p in (*model.parameters(), *head.parameters()))])
    for clean, dirty in zip(*results):
        torch.testing.assert_close(clean, dirty, atol=1e-5, rtol=1e-5)
    assert sum(g.abs().sum() for g in results[0][3:]) > 0


def test_entropies_have_a_gradient_only_if_asked_for():
    """The figure is the same either way; a backward pass through it is what an entropy bonus needs, and what a run
    without one is spared. Catches a bonus whose gradient is 0."""
    model, head = tiny_model("gpt2"), torch.nn.Linear(32, 1)
    plain, wanted = (forward(model, head, batch(PAD), 0.9, entropy_grad=flag)[1] for flag in (False, True))
    assert torch.equal(plain, wanted) and not plain.requires_grad
    wanted.sum().backward()
    assert model.transformer.ln_f.weight.grad.norm() > 0.1


def test_trimmed_micro_batch_equals_the_whole(family):
    """Cut to its own longest sequence and response, a micro-batch gives what the full width gives. Catches a clamp or
    a cut that moves the slots."""
    model, head = tiny_model(family), torch.nn.Linear(32, 1)
    sequences, starts, responses, mask = batch(PAD)
    rows, L, t = [1, 4], 7, 4
    with torch.no_grad():
        whole = forward(model, head, (sequences, starts, responses, mask), 0.9)
        part = forward(model, head, (sequences[rows, :L], starts[rows], responses[rows, :t], mask[rows, :t]), 0.9)
    for x, y in zip(whole, part):
        torch.testing.assert_close(x[rows, :t], y, atol=1e-5, rtol=1e-5)
        assert x[rows, t:].eq(0).all()


# ---------------------------------------------------------------------------------------------------------------
# Reward model
# ---------------------------------------------------------------------------------------------------------------


def stock_score(model, ids):
    """What Hugging Face's own forward says of one unpadded sequence, told of no pad token."""
    model.config.pad_token_id = None
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[0, 0].item()


def test_score_is_read_at_the_last_real_token(family, pad_id):
    """Ragged rows that end with EOS or are cut off, pad == eos too: the score of each is that of the row alone in the
    stock class. Catches a score read at the first pad, at the last slot, or one token early when EOS is taken for a
    pad; and batch-dependent scores."""
    model = tiny_reward_model(family)
    sequences, prompt_lengths, _, mask = batch(pad_id)
    lengths = prompt_lengths + mask.sum(1).long()
    with torch.no_grad():
        scores = ppo.score_sequences(model, sequences, lengths)
    expected = [stock_score(model, p + r) for p, r in zip(PROMPTS, RESPONSES)]
    assert scores.tolist() == pytest.approx(expected, abs=1e-5)
    assert len({round(s, 3) for s in expected}) == len(expected)
    early = [stock_score(model, (p + r)[:-1]) for p, r in zip(PROMPTS, RESPONSES)]
    assert min(abs(a - b) for a, b in zip(early, expected)) > 1e-3, "one token early must make a difference"


def test_score_equals_the_stock_forward_of_a_padded_batch(family):
    """With pad != eos and no pad id among the real tokens, the stock batched forward reads the same score. This is
    what makes the checkpoint worth the same to every other library."""
    model = tiny_reward_model(family)
    model.config.pad_token_id = PAD
    rows = [p + r for p, r in zip(PROMPTS, RESPONSES) if PAD not in r]
    ids = torch.tensor([row + [PAD] * (12 - len(row)) for row in rows])
    lengths = torch.tensor([len(row) for row in rows])
    with torch.no_grad():
        stock = model(input_ids=ids, attention_mask=(ids != PAD).long()).logits[:, 0]
        torch.testing.assert_close(ppo.score_sequences(model, ids, lengths), stock, atol=1e-5, rtol=1e-5)


def test_a_saved_reward_model_scores_the_same(family, tmp_path):
    """Through save_pretrained and the loader of stage 3: the same scores, normalized by the mean and deviation that
    lie in the checkpoint. Catches a head or a bias that is dropped on the way, and a normalization that is lost,
    inverted or applied twice."""
    model, tokenizer = tiny_reward_model(family), tiny_tokenizer()
    model.config.reward_mean, model.config.reward_std = -3.5, 0.25
    raw = [stock_score(model, p + r) for p, r in zip(PROMPTS, RESPONSES)]
    save(model, tokenizer, tmp_path)
    loaded, _ = ppo.load_model(transformers.AutoModelForSequenceClassification, str(tmp_path), "--reward_model_path")
    sequences, prompt_lengths, _, mask = batch(PAD)
    scores = ppo.reward_fn(loaded.eval(), tokenizer, sequences, prompt_lengths, prompt_lengths + mask.sum(1).long())
    assert scores.tolist() == pytest.approx([(x + 3.5) / 0.25 for x in raw], abs=2e-4)
    assert scores.dtype == torch.float32 and scores.shape == (len(PROMPTS),) and not scores.requires_grad


def test_loaded_models_have_no_dropout(family, tmp_path):
    """A model configured with dropout has none after loading, even in training mode. Catches dropout in PPO's update,
    which makes every ratio random."""
    save(tiny_model(family, dropout=0.3), tiny_tokenizer(), tmp_path)
    loaded, _ = ppo.load_model(transformers.AutoModelForCausalLM, str(tmp_path), "--sft_model_path")
    ids = torch.tensor([PROMPTS[0]])
    loaded.train()
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, loaded(input_ids=ids).logits)
        torch.testing.assert_close(loaded(input_ids=ids).logits[0], plain_logits(loaded.eval(), PROMPTS[0]))
