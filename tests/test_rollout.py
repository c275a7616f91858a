"""The sampler: left padding, a static cache and inverse-CDF sampling against plain forwards of single rows."""

import pytest
import torch
import transformers
from conftest import EOS, NEVER, PAD, PROMPTS, plain_logits, tiny_model

import ppo_rlhf as ppo

V = 24


def sample(model, prompts, uniforms, temperature=1.0, eos_id=EOS, pad_id=PAD):
    ids, mask, _ = ppo.left_pad(prompts, PAD, "cpu")
    return ppo.rollout(model, ids, mask, uniforms, temperature, eos_id, pad_id)


def cut(row, eos_id):
    return row[: row.index(eos_id) + 1] if eos_id in row else row


def test_greedy_sampling_equals_generate(family):
    """At a temperature near 0, the sampler and Hugging Face's own greedy `generate` write the same answers to ragged
    prompts. Catches wrong position ids under left padding, a cache slot off by one, pads that are attended to."""
    model, T = tiny_model(family, vocab_size=V), 12
    responses, lengths = sample(model, PROMPTS, torch.rand(T, len(PROMPTS)), temperature=1e-5)
    ids, mask, _ = ppo.left_pad(PROMPTS, PAD, "cpu")
    expected = model.generate(
        input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=T, pad_token_id=PAD, eos_token_id=EOS
    )[:, ids.shape[1] :].tolist()
    for i in range(len(PROMPTS)):
        assert responses[i, : lengths[i]].tolist() == cut(expected[i], EOS)
    assert len({tuple(row) for row in responses.tolist()}) > 3, "the model ignores its prompt: the test shows nothing"


@pytest.mark.parametrize("temperature, V", [(0.7, 24), (1.3, 24), (1.3, 600)])
def test_sampled_tokens_are_the_inverse_cdf_of_a_plain_forward(family, temperature, V):
    """Every token is the one that its uniform picks from softmax(logits / temperature) of an unpadded, uncached
    forward of its row alone. Catches, beyond position ids and masks: a temperature left out or inverted, a uniform of
    another row or step, ranks instead of ids, a vocabulary that is added up in parts, wrongly. The logits that the sampler
    saw are compared too, to 1e-5."""
    model, T = tiny_model(family, vocab_size=V), 11
    uniforms = torch.rand(T, len(PROMPTS))
    seen = []
    hook = model.get_output_embeddings().register_forward_hook(lambda module, inputs, output: seen.append(output))
    responses, _ = sample(model, PROMPTS, uniforms, temperature, eos_id=NEVER)
    hook.remove()
    assert len(seen) == T
    for i, prompt in enumerate(PROMPTS):
        answer = responses[i].tolist()
        logits = plain_logits(model, prompt + answer)[len(prompt) - 1 : -1]  # [T, V]
        torch.testing.assert_close(torch.stack(seen)[:, i], logits, atol=1e-5, rtol=1e-5)
        cdf = (logits.double() / temperature).softmax(-1).cumsum(-1)
        for t, token in enumerate(answer):
            below = cdf[t, token - 1].item() if token else 0.0
            assert below - 1e-5 <= uniforms[t, i].item() <= cdf[t, token].item() + 1e-5


@pytest.mark.parametrize("V", [24, 256, 600])
def test_a_uniform_that_rounding_makes_one(V):
    """It picks the last token. Catches an id beyond the vocabulary, which ends in an index error of the next step."""
    responses, _ = sample(tiny_model("gpt2", vocab_size=V), PROMPTS, torch.ones(3, len(PROMPTS)), eos_id=NEVER)
    assert (responses == V - 1).all()


@pytest.mark.parametrize("size", [1, 2, 3, 128])
def test_slices_change_nothing(family, size):
    """Sampled a few rows at a time, every prompt gets the answer that it gets in the whole batch. Catches a slice with the
    uniforms of another one, and rows that come back in another order."""
    model, T = tiny_model(family, vocab_size=V), 11
    ids, mask, _ = ppo.left_pad(PROMPTS, PAD, "cpu")
    batch = ids, mask, torch.rand(T, len(PROMPTS)), 1.0, EOS, PAD
    for sliced, whole in zip(ppo.rollout_in_slices(model, *batch, size), ppo.rollout(model, *batch)):
        assert torch.equal(sliced, whole)


def test_frequencies_match_the_scored_probabilities(family):
    """The distribution that is sampled is the one that is scored, though the model ships a generation config with
    top-k, top-p, a repetition penalty and a temperature. Catches a sampler that obeys any of them: log-probs in
    the loss would be of another policy than the one that wrote. The uniforms are a regular grid, so frequencies
    are exact to the spacing of the grid and no luck is involved."""
    model, n, temperature = tiny_model(family, vocab_size=V), 128, 0.8
    model.generation_config = transformers.GenerationConfig(
        do_sample=True, top_k=2, top_p=0.3, temperature=0.1, repetition_penalty=5.0, no_repeat_ngram_size=1
    )
    grid = (torch.arange(n) + 0.5) / n
    uniforms = torch.stack([grid.repeat_interleave(n), grid.repeat(n)])  # [2, n * n]: every pair of grid points
    prompt = [5, 6, 6, 7]
    responses, _ = sample(model, [prompt] * n * n, uniforms, temperature, eos_id=NEVER)

    # What the update scores: the policy's log-probs of these responses, by the function that the loss uses.
    head = torch.nn.Linear(32, 1)
    starts = torch.full((n * n,), len(prompt))
    sequences = torch.cat([torch.tensor([prompt] * n * n), responses], 1)
    with torch.no_grad():
        scored, _, _ = ppo.forward(
            model, head, sequences, starts, responses, torch.ones(n * n, 2), temperature, torch.autocast("cpu", enabled=False)
        )
    for first in responses[:, 0].unique():
        rows = responses[:, 0] == first
        probability = scored[rows, 0].exp().mean().item()
        assert rows.float().mean().item() == pytest.approx(probability, abs=1.01 / n)
        for second in responses[rows, 1].unique():
            again = rows & (responses[:, 1] == second)
            probability = scored[again, 1].exp().mean().item()
            assert again.sum().item() / rows.sum().item() == pytest.approx(probability, abs=1.01 / n)
    assert len(responses[:, 0].unique()) > 8


@pytest.mark.parametrize("pad_id", [PAD, "eos"])
def test_eos_ends_a_row_and_changes_nothing_else(family, pad_id):
    """Whatever token is declared EOS, the answers are those of a sampler that never stops, cut after the first EOS.
    Catches a length that leaves EOS out, a done row that goes on sampling, a stop that disturbs its neighbours, a
    loop that stops too early, and the length rebuilt from `id != pad` (with pad == eos, and with a pad id that is
    sampled as an ordinary token)."""
    model, T = tiny_model(family, vocab_size=V), 19
    uniforms = torch.rand(T, len(PROMPTS))
    endless, lengths = sample(model, PROMPTS, uniforms, eos_id=NEVER)
    assert lengths.eq(T).all()
    seen = set()
    for eos_id in range(V):
        pad = eos_id if pad_id == "eos" else pad_id
        responses, lengths = sample(model, PROMPTS, uniforms, eos_id=eos_id, pad_id=pad)
        assert responses.shape == (len(PROMPTS), T) and lengths.shape == (len(PROMPTS),)
        for i, row in enumerate(endless.tolist()):
            expected = cut(row, eos_id)
            assert lengths[i].item() == len(expected)
            assert responses[i].tolist() == expected + [pad] * (T - len(expected))
            seen.add("no EOS" if eos_id not in row else "at once" if len(expected) == 1 else "later")
    assert seen == {"no EOS", "at once", "later"}, "the seed shows too few cases"


def test_eos_in_the_last_slot_is_counted():
    """The answer that ends exactly at max_new_tokens is complete. Catches `no padding, so it was cut off`."""
    model = tiny_model("gpt2", vocab_size=V)
    uniforms = torch.rand(6, len(PROMPTS))
    endless, _ = sample(model, PROMPTS, uniforms, eos_id=NEVER)
    row = next(i for i, r in enumerate(endless.tolist()) if r[-1] not in r[:-1])
    eos_id = endless[row, -1].item()
    responses, lengths = sample(model, PROMPTS, uniforms, eos_id=eos_id)
    assert lengths[row] == 6 and responses[row, -1] == eos_id


def test_decoding_stops_when_all_rows_are_done():
    """Catches a loop that always runs to max_new_tokens: rollouts would cost as much as the longest answer allowed."""
    model, T = tiny_model("gpt2", vocab_size=V), 60
    with torch.no_grad():
        model.transformer.ln_f.bias.zero_()
        model.transformer.ln_f.weight.zero_()  # all logits 0: uniform
    steps = []
    hook = model.get_output_embeddings().register_forward_hook(lambda *_: steps.append(1))
    uniforms = torch.full((T, 2), (EOS + 0.5) / V)  # EOS at once
    responses, lengths = sample(model, PROMPTS[:2], uniforms)
    hook.remove()
    assert lengths.tolist() == [1, 1] and responses[:, 0].eq(EOS).all() and responses[:, 1:].eq(PAD).all()
    assert len(steps) <= 10


def test_a_row_alone_gets_the_answer_it_gets_in_a_batch(family):
    """Catches every way in which neighbours leak: padding, positions, a shared uniform, a shared stop."""
    model, T = tiny_model(family, vocab_size=V), 12
    uniforms = torch.rand(T, len(PROMPTS))
    responses, lengths = sample(model, PROMPTS, uniforms)
    assert len(set(lengths.tolist())) > 1
    for i, prompt in enumerate(PROMPTS):
        alone, length = sample(model, [prompt], uniforms[:, i : i + 1])
        assert torch.equal(alone[0], responses[i]) and length[0] == lengths[i]


def test_content_under_the_left_padding_is_never_read(family):
    """Ids under the mask are garbage to be ignored. Catches a mask that is not passed to one of the two forwards."""
    model, T = tiny_model(family, vocab_size=V), 8
    uniforms = torch.rand(T, len(PROMPTS))
    ids, mask, _ = ppo.left_pad(PROMPTS, PAD, "cpu")
    expected = ppo.rollout(model, ids, mask, uniforms, 1.0, EOS, PAD)
    garbage = torch.where(mask.bool(), ids, torch.randint(V, ids.shape))
    for a, b in zip(ppo.rollout(model, garbage, mask, uniforms, 1.0, EOS, PAD), expected):
        assert torch.equal(a, b)


def test_uniforms_are_all_the_randomness():
    """The same uniforms give the same answers whatever the global generator does, even for a model with dropout in
    evaluation mode; and the sampler draws nothing from it. Catches hidden randomness, which would break resuming."""
    model = tiny_model("gpt2", vocab_size=V, dropout=0.5)
    uniforms = torch.rand(9, len(PROMPTS))
    torch.manual_seed(1)
    first = sample(model, PROMPTS, uniforms)
    state = torch.random.get_rng_state()
    torch.manual_seed(1)
    assert torch.equal(state, torch.random.get_rng_state())
    torch.manual_seed(2)
    assert all(torch.equal(a, b) for a, b in zip(first, sample(model, PROMPTS, uniforms)))


@pytest.mark.parametrize("u", [0.0, 1 - 2**-24])
def test_no_token_of_probability_zero_is_ever_sampled(u):
    """The ends of [0, 1), with the first and the last ids of the vocabulary impossible. Catches a search that picks
    index 0 at u = 0, or runs past the last possible token when the cumulative sum rounds: one such token in a
    rollout has a log-prob of -inf and turns the loss to NaN."""
    model = tiny_model("llama", vocab_size=V)
    hidden = []
    hook = model.base_model.register_forward_hook(lambda module, inputs, output: hidden.append(output.last_hidden_state[:, -1]))
    sample(model, PROMPTS[:1], torch.full((1, 1), u))
    hook.remove()
    with torch.no_grad():  # the first and the last 8 ids get a logit far below all others
        direction = hidden[0][0] / hidden[0][0].norm() ** 2
        head = model.get_output_embeddings().weight
        head[:8] = -500 * direction
        head[-8:] = -500 * direction
    responses, _ = sample(model, PROMPTS[:1], torch.full((1, 1), u))
    log_p = plain_logits(model, PROMPTS[0])[-1].log_softmax(-1)
    assert log_p[:8].max() < -200 and log_p[-8:].max() < -200
    assert 8 <= responses[0, 0].item() < V - 8


def test_a_single_token_can_be_sampled():
    """--max_new_tokens 1: a rollout without a decode step."""
    responses, lengths = sample(tiny_model("gpt2", vocab_size=V), PROMPTS, torch.rand(1, len(PROMPTS)))
    assert responses.shape == (len(PROMPTS), 1) and lengths.eq(1).all()
