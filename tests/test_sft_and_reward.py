"""Stages 1 and 2: losses and gradients against loops over single sequences, data handling, and whether they learn."""

import math

import pytest
import torch
import torch.nn.functional as F
import transformers
from conftest import EOS, PAD, plain_logits, read_jsonl, save, tiny_model, tiny_reward_model, tiny_tokenizer, write_jsonl

import ppo_rlhf
import reward_model
import sft

EXAMPLES = [([5, 6, 7, 8], [50, EOS]), ([9], [10, 11, 12, 13, EOS]), ([3, PAD, 4], [PAD, 77, EOS]), ([8, 8], [EOS])]


# ---------------------------------------------------------------------------------------------------------------
# Losses
# ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pad_id", [PAD, EOS])
def test_sft_loss_is_that_of_the_completions_alone(family, pad_id):
    """The batch's loss is the sum over single, unpadded sequences of -log p of every completion token, EOS included
    and nothing else. Catches loss on the prompt or on padding, EOS left out of it (the model would never learn to
    stop, as happens when pad == eos and labels are masked by id), targets shifted by one."""
    model = tiny_model(family)
    expected = 0.0
    for prompt, completion in EXAMPLES:
        log_p = plain_logits(model, prompt + completion).log_softmax(-1)
        expected -= sum(log_p[len(prompt) - 1 + t, token].item() for t, token in enumerate(completion))
    with torch.no_grad():
        assert sft.completion_loss(model, EXAMPLES, pad_id, "cpu").item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("pad_id", [PAD, EOS])
def test_pairs_are_scored_at_their_last_tokens(family, pad_id):
    """Chosen and rejected, of different lengths in one padded batch, against the stock class on single sequences.
    Catches halves that are swapped or interleaved, lengths of other rows, and scores read at pads."""
    model = tiny_reward_model(family)
    model.config.pad_token_id = None
    pairs = [(a + b, c + d) for (a, b), (c, d) in zip(EXAMPLES, EXAMPLES[::-1])]
    with torch.no_grad():
        ids, lengths = reward_model.pair_batch(pairs, pad_id, "cpu")
        assert lengths.tolist() == [len(pair[side]) for side in (0, 1) for pair in pairs]
        assert ids.shape == (2 * len(pairs), max(lengths))
        scores = reward_model.score_sequences(model, ids, lengths).chunk(2)
        hidden = model.base_model(input_ids=ids).last_hidden_state
        assert torch.equal(reward_model.read_scores(model, hidden, lengths), torch.cat(scores))
        for side in (0, 1):
            expected = [model(input_ids=torch.tensor([pair[side]])).logits.item() for pair in pairs]
            assert scores[side].tolist() == pytest.approx(expected, abs=1e-5)


def first_gradients(module, monkeypatch, parameters=None, **args):
    """Gradients of every optimizer step of module.main(); a list given as `parameters` gets those before the steps."""
    steps = []

    class ListeningAdamW(torch.optim.AdamW):
        def step(self, *args, **kwargs):
            (group,) = self.param_groups
            steps.append(torch.cat([p.grad.flatten() for p in group["params"]]))
            if parameters is not None:
                parameters.append([p.detach().clone() for p in group["params"]])
            return super().step(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim, "AdamW", ListeningAdamW)
        module.main(module.Args(**args))
    return steps


PROMPTS = ["Hi", "How are you?", "Tell me more", "Why"]
DEMONSTRATIONS = [{"prompt": p, "completion": "fine " * (i + 1)} for i, p in enumerate(PROMPTS)]
PREFERENCES = [{"prompt": p, "chosen": "good " * (4 - i), "rejected": "bad"} for i, p in enumerate(PROMPTS)]


@pytest.fixture
def base(tmp_path):
    """A folder with a tiny base model and both kinds of data."""
    for name, rows in (("demos", DEMONSTRATIONS), ("pairs", PREFERENCES)):
        write_jsonl(tmp_path / name / "train.jsonl", rows)
        write_jsonl(tmp_path / name / "test.jsonl", [{**row, "prompt": row["prompt"] + "!"} for row in rows])
    save(tiny_model("gpt2"), tiny_tokenizer(), tmp_path / "base")
    return tmp_path


def stage(base, module, name, **overrides):
    data = "demos" if module is sft else "pairs"
    shared = dict(model_name_or_path=str(base / "base"), dataset_name=str(base / data), output_dir=str(base / name),
                  max_steps=1, warmup_steps=0, max_new_tokens=8)  # fmt: skip
    return {**shared, **({} if module is sft else {"normalization_samples": 32}), **overrides}


@pytest.mark.parametrize(
    "module, coefficients",
    [
        (sft, {}),
        (reward_model, dict(lm_coef=0.0, center_coef=0.3)),
        (reward_model, dict(lm_coef=0.5)),
    ],
)
def test_accumulation_changes_nothing(module, coefficients, base, monkeypatch):
    """All four examples in one batch, in two halves of different length, or one by one: the same gradient, and one
    optimizer step. Catches a mean per micro-batch (short examples would weigh more) and a step per micro-batch."""
    gradients = []
    for i, (size, accumulation) in enumerate([(4, 1), (2, 2), (1, 4)]):
        args = stage(base, module, str(i), per_device_train_batch_size=size, gradient_accumulation_steps=accumulation,
                     gradient_checkpointing=size == 2, **coefficients)  # fmt: skip
        steps = first_gradients(module, monkeypatch, **args)
        assert len(steps) == 1
        gradients.append(steps[0])
    for other in gradients[1:]:
        torch.testing.assert_close(gradients[0], other, atol=1e-6, rtol=1e-4)
    assert gradients[0].norm() > 0.1


def test_sft_gradient_is_the_mean_over_tokens(base, monkeypatch):
    """Against autograd on single sequences: sum of -log p over all completion tokens, divided by their number."""
    (ours,) = first_gradients(sft, monkeypatch, **stage(base, sft, "out", per_device_train_batch_size=3, max_grad_norm=1e9,
                                                        gradient_accumulation_steps=2))  # fmt: skip
    model, tokenizer = transformers.AutoModelForCausalLM.from_pretrained(base / "base"), tiny_tokenizer()
    losses = []
    for row in DEMONSTRATIONS:
        prompt, completion = sft.encode(tokenizer, sft.Args.prompt_template, row["prompt"], row["completion"])
        logits = model(input_ids=torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
        losses.append(F.cross_entropy(logits, torch.tensor(completion), reduction="none"))
    torch.cat(losses).mean().backward()
    theirs = torch.cat([p.grad.flatten() for p in model.parameters()])
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("lm_coef, center_coef", [(0.0, 0.0), (0.7, 0.0), (0.0, 0.3), (0.5, 0.2)])
def test_reward_gradient_is_that_of_three_losses(lm_coef, center_coef, base, monkeypatch):
    """Against autograd in float64 on single sequences with stock classes: Bradley-Terry, mean over the pairs; -log p
    of the chosen sequences, mean over their tokens, through the output layer of the SFT model, which stays as it is;
    and the squared sum of the two scores, mean over the pairs. Catches a flipped or missing term, a coefficient on
    another term, a language-model loss on rejected sequences or on pads, an output layer that is trained too."""
    before = []
    (ours,) = first_gradients(reward_model, monkeypatch, before, **stage(
        base, reward_model, "out", max_grad_norm=1e9, lm_coef=lm_coef, center_coef=center_coef))  # fmt: skip
    double = dict(dtype=torch.float64)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(base / "base", num_labels=1, **double).eval()
    model.config.pad_token_id = None  # then the stock forward reads the last token
    with torch.no_grad():
        for parameter, value in zip(model.parameters(), before[0], strict=True):
            parameter.copy_(value)
    head = transformers.AutoModelForCausalLM.from_pretrained(base / "base", **double).lm_head.weight.detach()
    tokenizer, bradley_terry, center, tokens = tiny_tokenizer(), [], [], []
    for row in PREFERENCES:
        scores = {}
        for side in ("chosen", "rejected"):
            ids = sum(reward_model.encode(tokenizer, reward_model.Args.prompt_template, row["prompt"], row[side]), [])
            out = model(input_ids=torch.tensor([ids]), output_hidden_states=True)
            scores[side] = out.logits[0, 0]
            if side == "chosen":
                log_p = (out.hidden_states[-1][0] @ head.T).log_softmax(-1)
                tokens += [-log_p[t, token] for t, token in enumerate(ids[1:])]
        bradley_terry.append(torch.log1p(torch.exp(scores["rejected"] - scores["chosen"])))
        center.append((scores["chosen"] + scores["rejected"]) ** 2)
    losses = [sum(terms) / len(terms) for terms in (bradley_terry, tokens, center)]
    (losses[0] + lm_coef * losses[1] + center_coef * losses[2]).backward()
    theirs = torch.cat([p.grad.flatten() for p in model.parameters()])
    torch.testing.assert_close(ours.double(), theirs, atol=1e-5, rtol=1e-4)
    assert all(loss.item() > 0.1 for loss in losses)
    logged = read_jsonl(base / "out" / "metrics.jsonl")[0]["loss/train"]  # the pairs' loss alone, to compare with eval/loss
    assert logged == pytest.approx(losses[0].item(), abs=1e-5)


# ---------------------------------------------------------------------------------------------------------------
# Do they learn?
# ---------------------------------------------------------------------------------------------------------------


def test_sft_learns_its_demonstrations(base):
    """Four demonstrations by heart, EOS included: sampled at a low temperature, the saved model answers as it was
    shown and stops. Catches a loss that is not of what the model will be asked to continue."""
    sft.main(sft.Args(**stage(base, sft, "sft", max_steps=120, learning_rate=5e-3, per_device_train_batch_size=4)))
    model = transformers.AutoModelForCausalLM.from_pretrained(base / "sft").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(base / "sft")
    for row in DEMONSTRATIONS:
        prompt, completion = sft.encode(tokenizer, sft.Args.prompt_template, row["prompt"], row["completion"])
        (response,) = sft.sample(model, tokenizer, [prompt], 0.05, 40, 0)
        assert response == completion
    losses = [m["loss/train"] for m in read_jsonl(base / "sft" / "metrics.jsonl")]
    assert losses[-1] < 0.1 < losses[0]


def test_reward_model_learns_and_is_normalized(base):
    """It prefers the chosen sides; the mean and deviation beside its weights are those of the SFT model's own samples,
    and stage 3's scores use them. Catches a flipped Bradley-Terry loss, a normalization by other samples (greedy,
    without EOS, of the pairs), or one that is not saved."""
    rows = [{"prompt": f"{a} {b}", "chosen": f"{b}. good", "rejected": f"{b}. bad"} for a in "abcdefgh" for b in PROMPTS]
    write_jsonl(base / "many" / "train.jsonl", [row for i, row in enumerate(rows) if i % 5])
    write_jsonl(base / "many" / "test.jsonl", rows[::5])
    args = reward_model.Args(**stage(base, reward_model, "rm", dataset_name=str(base / "many"), max_steps=60,
                                     learning_rate=2e-3, normalization_samples=200, per_device_train_batch_size=16))  # fmt: skip
    reward_model.main(args)
    final = read_jsonl(base / "rm" / "metrics.jsonl")[-1]
    assert final["eval/accuracy"] == 1.0 and final["eval/loss"] < 0.3 and final["eval/margin"] > 1

    # Fresh samples of the base model, drawn with stage 3's own sampler, scored as stage 3 scores.
    model, tokenizer = ppo_rlhf.load_model(transformers.AutoModelForSequenceClassification, str(base / "rm"), "")
    policy = transformers.AutoModelForCausalLM.from_pretrained(base / "base").eval()
    prompts = [ppo_rlhf.encode(tokenizer, args.prompt_template, row["prompt"])[0] for row in rows] * 20
    ids, mask, starts = ppo_rlhf.left_pad(prompts, PAD, "cpu")
    uniforms = torch.rand(args.max_new_tokens, len(prompts))
    responses, lengths = ppo_rlhf.rollout(policy, ids, mask, uniforms, args.temperature, EOS, PAD)
    sequences = ppo_rlhf.roll_left(ids, responses, starts)
    scores = ppo_rlhf.reward_fn(model.eval(), tokenizer, sequences, starts, starts + lengths)
    assert scores.mean().item() == pytest.approx(0, abs=0.25) and scores.std().item() == pytest.approx(1, abs=0.25)


# ---------------------------------------------------------------------------------------------------------------
# Helpers
# ---------------------------------------------------------------------------------------------------------------


def test_prompt_and_completion_are_tokenized_apart():
    """The prompt's ids are those that PPO will sample from, whatever follows; the completion starts with one blank
    and ends with EOS. Catches tokens merged across the border, a doubled or missing blank, a missing EOS."""
    tokenizer, template = tiny_tokenizer(chat=True), "Prompt: {prompt}\nResponse:"
    for completion in ("Sure.", " Sure.", "\nSure."):
        prompt_ids, ids = sft.encode(tokenizer, template, "A {b} c", completion)
        assert tokenizer.decode(prompt_ids) == "Prompt: A {b} c\nResponse:"
        assert tokenizer.decode(ids) == (completion if completion[0].isspace() else " " + completion) + "<eos>"
        assert prompt_ids == sft.encode(tokenizer, template, "A {b} c")[0]
    messages = [{"role": "user", "content": "Hi"}]
    for completion in ("Sure.", [{"role": "assistant", "content": "Sure."}]):
        prompt_ids, ids = sft.encode(tokenizer, template, messages, completion)
        assert tokenizer.decode(prompt_ids) == "[user] Hi\n[assistant] "
        assert tokenizer.decode(ids) == "Sure.<eos>"
    prompt_ids, ids = sft.encode(tokenizer, template, "Hi", [{"role": "assistant", "content": "Sure."}])
    assert tokenizer.decode(prompt_ids + ids) == "Prompt: Hi\nResponse: Sure.<eos>"


def test_epoch_batches():
    """Each epoch holds every example once, is a function of the seed, differs between seeds and groups by length.
    Catches lost remainders and a shuffle that never changes."""
    lengths = [(7 * i) % 23 for i in range(103)]
    first, again, other = (sft.epoch_batches(lengths, 4, seed) for seed in (1, 1, 2))
    assert first == again != other
    for batches in (first, other):
        assert sorted(i for batch in batches for i in batch) == list(range(103))
        assert all(1 <= len(batch) <= 4 for batch in batches)
    spread = sum(max(lengths[i] for i in b) - min(lengths[i] for i in b) for b in first) / len(first)
    assert spread < 4  # of random batches of four: about 13


def test_warmup_cosine():
    """Linear from 1/warmup to 1, then half a cosine to exactly 0 at the last step."""
    rates = [sft.warmup_cosine(step, 4, 12) for step in range(1, 13)]
    expected = [0.25, 0.5, 0.75, 1.0] + [0.5 * (1 + math.cos(math.pi * k / 8)) for k in range(1, 9)]
    assert rates == pytest.approx(expected)
    assert rates[-1] == pytest.approx(0) and sft.warmup_cosine(1, 0, 10) > 0.9


def test_stock_sampling_is_plain(base):
    """The samples of stages 1 and 2 obey nothing of the model's own generation config (top-k, penalties), end with
    EOS or at the limit, and leave the global random state and that config alone. Catches scores normalized on another
    policy, and a checkpoint that is saved with the settings of a sample."""
    model, tokenizer = tiny_model("gpt2"), tiny_tokenizer()
    model.generation_config = transformers.GenerationConfig(do_sample=True, top_k=1, repetition_penalty=9.0)
    prompt = [40, 41, 42]
    state, kept = torch.random.get_rng_state(), model.generation_config
    responses = sft.sample(model, tokenizer, [prompt, [9]] * 500, 1.0, 3, 0)
    assert torch.equal(state, torch.random.get_rng_state()) and model.generation_config is kept
    assert all(1 <= len(r) <= 3 and EOS not in r[:-1] for r in responses)
    assert all(len(r) == 3 or r[-1] == EOS for r in responses)
    p = plain_logits(model, prompt)[-1].softmax(-1)
    frequency = torch.bincount(torch.tensor([r[0] for r in responses[::2]]), minlength=258) / 500
    deviation = (frequency - p) / (p * (1 - p) / 500).sqrt()  # in standard errors
    assert deviation[p > 0.01].abs().max() < 4.5 and (p > 0.01).sum() > 10


@pytest.mark.parametrize(
    "dialogue, prompt, reply",
    [
        ("\n\nHuman: Hi\n\nAssistant: Yes", "\n\nHuman: Hi\n\nAssistant:", " Yes"),
        ("\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: d", "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:", " d"),
        (
            [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}],
            [{"role": "user", "content": "Hi"}],
            "Yes",
        ),
    ],
)  # fmt: skip
def test_whole_dialogues_are_split_before_the_last_reply(dialogue, prompt, reply):
    """As in Anthropic's hh-rlhf and as chat messages. Catches a split at the first reply."""
    assert reward_model.split_dialogue(dialogue) == (prompt, reply)
