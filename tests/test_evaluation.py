"""What a run of stage 3 leaves behind, checked by hand."""

import contextlib
import math
from types import SimpleNamespace

import pytest
import torch
import transformers
from conftest import EOS, PAD, ppo_flags, read_jsonl, tiny_model, tiny_reward_model, tiny_tokenizer
from safetensors.torch import load_file

import ppo_rlhf as ppo

T, B = 7, 4
ENDS = [EOS, *range(60, 80)]  # by the generation config: about half of the responses end
TEST = ["a", "bcd efg", "What?", "Say it", "x y", "ghi", "Why so long?", "j", "k"]  # two batches and one row


def run(folder, **overrides):
    """main() on tiny models -> args, and (name, arguments, result) of each call of three functions."""
    tokenizer = tiny_tokenizer()
    policy = tiny_model("gpt2")
    sampled = dict(do_sample=True, top_k=3, repetition_penalty=2.0)
    policy.generation_config = transformers.GenerationConfig(eos_token_id=ENDS, **sampled)
    judge = tiny_reward_model("gpt2")
    test = [*TEST[:5], "One too long!", *TEST[5:]]
    flags = ppo_flags(folder, policy, judge, tokenizer, ["q", "rs", "tuv", "w"] * 2, test)
    flags |= dict(max_prompt_length=len("Q: Why so long?\nA:"))
    flags |= dict(max_new_tokens=T, total_episodes=5 * B, batch_size=B, num_mini_batches=2)
    flags |= dict(per_device_train_batch_size=3, learning_rate=3e-3, eval_steps=2, temperature=0.8, seed=3)
    args = ppo.Args(**(flags | overrides))
    seen, real = [], {name: getattr(ppo, name) for name in ("sample", "score", "penalized_rewards")}
    with pytest.MonkeyPatch.context() as patch:
        for name in real:
            spy = lambda *a, name=name: seen.append((name, a, real[name](*a))) or seen[-1][2]
            patch.setattr(ppo, name, spy)
        ppo.main(args)
    return args, seen


def generate(path, args):
    """The responses to TEST by hand: each prompt alone, with the uniforms of its place in its batch."""
    model, tokenizer = ppo.load_pretrained(transformers.AutoModelForCausalLM, path)
    torch.manual_seed(args.seed)
    responses = []
    for start in range(0, len(TEST), B):
        prompts = TEST[start : start + B]
        for prompt, u in zip(prompts, torch.rand(T, len(prompts)).T):
            ids = torch.tensor([tokenizer(f"Q: {prompt}\nA:").input_ids])
            ends = torch.tensor(ENDS)
            out = ppo.rollout(model, ids, torch.ones_like(ids), u[:, None], args.temperature, ends, PAD)
            responses.append((ids[0].tolist(), out[0][0, : out[1][0]].tolist()))
    return responses


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    return folder, *run(folder)


def test_eval_by_hand(trained):
    """Beside every prompt, of more than --batch_size, stand the responses of the SFT model and of the saved
    one, sampled with the same random numbers, without special tokens, each with its normalized score."""
    folder, args, _ = trained
    judge = transformers.AutoModelForSequenceClassification.from_pretrained(args.reward_model_path)
    judge.config.pad_token_id = None
    mean, std = load_file(folder / "ppo/value_head.safetensors")["score_scale"].tolist()
    rows = read_jsonl(folder / "ppo/eval.jsonl")
    assert [row["prompt"] for row in rows] == TEST
    tokenizer = tiny_tokenizer()
    for name, path in (("sft", args.sft_model_path), ("ppo", args.output_dir)):
        for row, (prompt, response) in zip(rows, generate(path, args), strict=True):
            assert row[name] == tokenizer.decode(response, skip_special_tokens=True)
            with torch.no_grad():
                raw = judge(torch.tensor([prompt + response])).logits.item()
            assert row[f"{name}_score"] == pytest.approx((raw - mean) / std, abs=1e-4)
    assert rows[0].keys() == {"prompt", "sft", "sft_score", "ppo", "ppo_score"}
    assert sum(row["sft"] != row["ppo"] for row in rows) > 3, "nothing was trained: the test shows nothing"


def test_samples_by_hand(trained):
    """At the first, the last and every other update: four prompts, responses with ends, final scores, KL."""
    folder, args, seen = trained
    sampled = [(a, result) for name, a, result in seen if name == "sample"]
    rewarded = [a for name, a, _ in seen if name == "penalized_rewards"]
    expected = []
    for update in (1, 2, 4, 5):
        (_, _, rows, *_), batch = sampled[update - 1]
        scores, kl, mask, _ = rewarded[update - 1]
        for i in range(4):
            n = int(batch.response_lengths[i])
            response = tiny_tokenizer().decode(batch.responses[i, :n])
            figures = dict(score=scores[i].item(), kl=kl[i, :n].sum().item())
            figures = {name: pytest.approx(x, abs=1e-5) for name, x in figures.items()}
            expected.append({"update": update, "prompt": rows[i].shown, "response": response, **figures})
    assert read_jsonl(folder / "ppo/samples.jsonl") == expected


def test_what_is_saved(trained):
    """What stock `generate` needs to sample as in training: every end id, no top-k, no penalties; the chat
    template; the value head with the mean and unbiased deviation of the first scores."""
    folder, args, seen = trained
    config = transformers.GenerationConfig.from_pretrained(folder / "ppo")
    assert sorted(config.eos_token_id) == ENDS and config.pad_token_id == PAD and config.do_sample is True
    assert config.top_k == 0 and config.top_p == 1.0 and config.temperature == args.temperature
    assert config.repetition_penalty in (None, 1.0) and config.max_new_tokens == T
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "ppo")
    assert tokenizer.chat_template == tiny_tokenizer().chat_template
    head = load_file(folder / "ppo/value_head.safetensors")
    state = torch.load(folder / "ppo/checkpoint/state.pt", weights_only=True)["model"]
    assert head["weight"].any() and torch.equal(head["weight"], state["value_head.weight"])
    assert torch.equal(head["bias"], state["value_head.bias"])
    raw = next(result for name, _, result in seen if name == "score").double()
    assert head["score_scale"].tolist() == pytest.approx([raw.mean().item(), raw.std(correction=1).item()])


FORMS = {"tensor": lambda x: x, "list": lambda x: x.tolist(), "numpy": lambda x: x.double().numpy()}
WRONG = {"mean": torch.mean, "shape [1]": lambda x: x[:1], "column": lambda x: x[:, None]}


@pytest.mark.parametrize("form", [*FORMS, *WRONG])
def test_a_rule_that_looks_at_the_row(form, monkeypatch, refused):
    """Each response is judged by its own row; one number for all is refused, not spread over them."""

    def rule(reward_model, tokenizer, sequences, starts, lengths, rows):
        assert starts.tolist() == [row["length"] for row in rows]
        return (FORMS | WRONG)[form](torch.tensor([row["length"] + 0.5 for row in rows]))

    monkeypatch.setattr(ppo, "reward_fn", rule)
    prompts = [SimpleNamespace(ids=[5] * n, row={"length": n}) for n in (3, 1, 2, 5, 4)]
    batch = ppo.sample(tiny_model("gpt2"), tiny_tokenizer(), prompts, ppo.Args(max_new_tokens=2), [EOS])
    with refused("one number per response") if form in WRONG else contextlib.nullcontext():
        assert ppo.score(None, None, batch, prompts, 2).tolist() == [3.5, 1.5, 2.5, 5.5, 4.5]


@pytest.mark.parametrize("value, batch", [(0.1, 8), (0.3, 1)])
def test_scores_that_are_all_alike(value, batch, tmp_path, monkeypatch):
    """The scale is 1, not a rounding error, and figures are JSON, which has no NaN."""
    monkeypatch.setattr(ppo, "reward_fn", lambda *given: [value] * len(given[2]))
    flags = dict(total_episodes=2 * batch, batch_size=batch, num_mini_batches=1, missing_eos_penalty=0.0)
    run(tmp_path, reward_model_path="", **flags)
    head = load_file(tmp_path / "ppo/value_head.safetensors")
    assert head["score_scale"].tolist() == pytest.approx([value, 1.0])
    for row in read_jsonl(tmp_path / "ppo/metrics.jsonl"):
        assert row["objective/scores"] == pytest.approx(0, abs=1e-6) and all(map(math.isfinite, row.values()))


def test_beta_stays_positive(tmp_path, monkeypatch):
    """When it adapts, by a fifth at most, however large the batch."""
    monkeypatch.setattr(ppo, "reward_fn", lambda *given: given[4])
    flags = dict(total_episodes=5000, batch_size=5000, num_mini_batches=1, per_device_train_batch_size=5000)
    flags |= dict(num_ppo_epochs=1, rollout_batch_size=5000, max_new_tokens=2, adaptive_kl_target=6.0)
    run(tmp_path, reward_model_path="", **flags)
    progress = torch.load(tmp_path / "ppo/checkpoint/state.pt", weights_only=True)["progress"]
    assert progress[:2] == (1, pytest.approx(0.8 * 0.1))
