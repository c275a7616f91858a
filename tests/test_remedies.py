"""The remedies of ppo_rlhf.py: adaptive beta, ensembles, length penalty, whitened rewards, PPO-ptx, a separate critic, and the
look at how many answers to one prompt differ. Each is off by default; on, it does what its source says, and nothing else."""

import pytest
import torch
import transformers
from conftest import read_jsonl, save, stop_and_resume, tiny_model, tiny_reward_model, tiny_tokenizer, write_jsonl
from test_ppo_step import TEST, TRAIN, T, trace_main

import ppo_rlhf as ppo


def random_mask(rows, columns):
    """Right-padded, each row with at least one real token."""
    return (torch.arange(columns) < torch.randint(1, columns + 1, (rows, 1))).float()


# ---------------------------------------------------------------------------------------------------------------
# Pure functions
# ---------------------------------------------------------------------------------------------------------------


def test_whitening_without_the_shift():
    """Standard deviation 1 over the real tokens, the mean as it was, 0 on padding. Catches a mean that is scaled too, or
    that is put back on padding."""
    mask = random_mask(7, 11)
    x = 3 * torch.randn(7, 11) + 5
    whitened = ppo.whiten(x, mask, shift_mean=False)
    real, before = whitened[mask == 1], x[mask == 1]
    assert real.std(correction=0).item() == pytest.approx(1, abs=1e-5)
    assert real.mean().item() == pytest.approx(before.mean().item(), abs=1e-5)
    assert (whitened[mask == 0] == 0).all()


def test_scores_of_an_ensemble():
    """By hand: two models of one mind, then two that disagree."""
    scores = torch.tensor([[1.0, 0.0, -2.0], [1.0, 4.0, 0.0]])  # [M, B]
    assert ppo.ensemble_scores(scores, "mean", 9.0).tolist() == [1.0, 2.0, -1.0]
    assert ppo.ensemble_scores(scores, "min", 9.0).tolist() == [1.0, 0.0, -2.0]
    assert ppo.ensemble_scores(scores, "mean-std", 0.5).tolist() == [1.0, 1.0, -1.5]
    for how in ("mean", "min", "mean-std"):  # one model is its own ensemble
        assert torch.equal(ppo.ensemble_scores(scores[:1], how, 0.5), scores[0])


def test_demonstrations_are_laid_out_like_a_rollout():
    """The same ids, lengths, labels and mask as the rollout's own path gives for the same answers."""
    examples = [([5, 6, 7], [8, 9, 1]), ([4], [3, 1]), ([2, 2, 2, 2], [1])]
    ids, starts, labels, mask = ppo.lay_out(examples, 0, "cpu")
    for (prompt, response), row, start, label, m in zip(examples, ids.tolist(), starts.tolist(), labels.tolist(), mask.tolist()):
        assert row == (prompt + response + [0] * 9)[: len(row)] and start == len(prompt)
        assert label == response + [0] * (3 - len(response)) and m == [1.0] * len(response) + [0.0] * (3 - len(response))


# ---------------------------------------------------------------------------------------------------------------
# In the loop
# ---------------------------------------------------------------------------------------------------------------


def test_adaptive_beta(tmp_path, monkeypatch):
    """beta moves after each update as Ziegler et al.'s controller says, and the rewards of the next one are made with it.
    Catches a controller with the wrong sign, without its clip, or that is only logged."""
    used, real = [], ppo.penalized_rewards
    monkeypatch.setattr(ppo, "penalized_rewards", lambda *a: used.append(a[4]) or real(*a))
    args = small_args(tmp_path, adaptive_kl_target=0.1, adaptive_kl_horizon=50, total_episodes=48, learning_rate=2e-2)
    ppo.main(ppo.Args(**args, output_dir=str(tmp_path / "ppo")))
    beta, errors = 0.1, []
    for m, beta_used in zip(read_jsonl(tmp_path / "ppo/metrics.jsonl"), used, strict=True):
        assert m["beta"] == beta_used == pytest.approx(beta)
        errors.append(m["objective/kl"] / 0.1 - 1)
        beta *= 1 + min(max(errors[-1], -0.2), 0.2) * 4 / 50
    assert errors[0] == pytest.approx(-1, abs=1e-3) and max(errors) > 0.2  # both sides of the clip were seen


def test_adaptive_beta_survives_a_stop(tmp_path):
    """beta is in the checkpoint: a run that goes on ends as one that was never stopped."""
    args = small_args(tmp_path, adaptive_kl_target=0.01, adaptive_kl_horizon=10, save_steps=1)
    ppo.main(ppo.Args(**args, output_dir=str(tmp_path / "whole")))
    stop_and_resume(ppo, {**args, "output_dir": str(tmp_path / "stopped")})
    whole, stopped = ([m["beta"] for m in read_jsonl(tmp_path / name / "metrics.jsonl")] for name in ("whole", "stopped"))
    assert whole == stopped and len(set(whole)) == 4
    assert (tmp_path / "whole/model.safetensors").read_bytes() == (tmp_path / "stopped/model.safetensors").read_bytes()


def small_args(folder, **overrides):
    """Flags of a small run on models and data that are written to `folder`."""
    tokenizer = tiny_tokenizer()
    write_jsonl(folder / "data/train.jsonl", [{"prompt": p, "completion": f"{p} yes"[:4]} for p in TRAIN])
    write_jsonl(folder / "data/test.jsonl", [{"prompt": p, "completion": "no"} for p in TEST])
    rms = []
    for i in (1, 2):
        model = tiny_reward_model("gpt2", seed=i)
        model.config.reward_mean, model.config.reward_std = 0.1 * i, 1.0 + i
        rms.append(save(model, tokenizer, folder / f"rm{i}"))
    return {**dict(
        sft_model_path=save(tiny_model("gpt2"), tokenizer, folder / "sft"), reward_model_path=(rms[0],), dataset_name=str(folder / "data"),
        prompt_template="{prompt}:", max_new_tokens=T, total_episodes=16, batch_size=4, num_mini_batches=2, num_ppo_epochs=1,
        per_device_train_batch_size=2, learning_rate=5e-3, eval_steps=2), **overrides}  # fmt: skip


def scores_of(folder, **overrides):
    """main(), with these flags -> the scores [updates, B] that the rewards were made of."""
    seen = []
    real = ppo.penalized_rewards
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ppo, "penalized_rewards", lambda *a: seen.append(a[0].clone()) or real(*a))
        ppo.main(ppo.Args(**small_args(folder, **overrides), output_dir=str(folder / "ppo"), overwrite=True))
    return torch.stack(seen)


def test_an_ensemble_scores_together(tmp_path):
    """The first update's scores (before any step: the same answers) by each model alone and by both: mean, minimum, mean less
    their spread, each model normalized by its own mean and deviation. In eval.jsonl too."""
    first, second, both = (str(tmp_path / "rm1"),), (str(tmp_path / "rm2"),), (str(tmp_path / "rm1"), str(tmp_path / "rm2"))

    def judged(**flags):
        """-> scores of the first rollout, of the SFT model's answers in eval.jsonl: with every flag here, the same answers."""
        scores = scores_of(tmp_path, missing_eos_penalty=0.0, **flags)[0]
        return torch.stack([*scores, *torch.tensor([row["sft_score"] for row in read_jsonl(tmp_path / "ppo/eval.jsonl")])])

    a, b = judged(reward_model_path=first), judged(reward_model_path=second)
    assert not torch.allclose(a, b, atol=0.1)
    spread = (a - b).abs() / 2
    for how, expected in (("mean", (a + b) / 2), ("min", torch.minimum(a, b)), ("mean-std", (a + b) / 2 - 2 * spread)):
        torch.testing.assert_close(judged(reward_model_path=both, ensemble=how, ensemble_coef=2.0), expected)


def test_the_same_model_twice_changes_nothing(tmp_path):
    """An ensemble of one model and itself is that model: the same weights to the bit."""
    for name, paths in (("once", ("rm1",)), ("twice", ("rm1", "rm1"))):
        flags = small_args(tmp_path, reward_model_path=tuple(str(tmp_path / path) for path in paths), ensemble="mean-std")
        ppo.main(ppo.Args(**flags, output_dir=str(tmp_path / name)))
    assert (tmp_path / "once/model.safetensors").read_bytes() == (tmp_path / "twice/model.safetensors").read_bytes()


def test_length_penalty(tmp_path, monkeypatch):
    """Each response token, EOS included, costs the same. Catches a penalty on prompt tokens, on padding, or with the wrong sign."""
    plain, _, _, _ = trace_main(tmp_path / "plain", monkeypatch)
    penalized, _, _, _ = trace_main(tmp_path / "penalized", monkeypatch, length_penalty=0.05)
    (before, _), (after, _) = plain["penalized_rewards"][0], penalized["penalized_rewards"][0]
    torch.testing.assert_close(before[0] - after[0], 0.05 * before[3].sum(1))


def test_whitened_rewards_reach_gae(tmp_path, monkeypatch):
    """GAE gets rewards of standard deviation 1 over real tokens whose mean is what it was."""
    trace, _, _, _ = trace_main(tmp_path, monkeypatch, whiten_rewards=True)
    for (_, rewards), (arguments, _) in zip(trace["penalized_rewards"], trace["gae"], strict=True):
        mask = arguments[2]
        torch.testing.assert_close(arguments[0], ppo.whiten(rewards, mask, shift_mean=False))
        assert arguments[0][mask == 1].std(correction=0).item() == pytest.approx(1, abs=1e-5)


def test_ptx_is_the_sft_loss(tmp_path, monkeypatch):
    """Where PPO has nothing to say (no KL price, every score 0: all advantages are 0), the gradient of a step is that of the
    stock model's loss on demonstrations, at temperature 1, times the coefficient. Catches demonstrations that are masked,
    shifted or scaled otherwise than in stage 1."""
    monkeypatch.setattr(ppo, "reward_fn", lambda model, tokenizer, ids, starts, lengths: torch.zeros(len(ids)))
    steps, drawn = [], []
    real, lay_out = torch.nn.utils.clip_grad_norm_, ppo.lay_out

    def listen(parameters, norm):
        steps.append([p.grad.clone() for p in parameters[:-2]])
        return real(parameters, norm)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", listen)
    monkeypatch.setattr(ppo, "lay_out", lambda examples, *rest: drawn.append(examples) or lay_out(examples, *rest))
    args = small_args(tmp_path, beta=0.0, missing_eos_penalty=0.0, ptx_coef=0.3, ptx_dataset_name=str(tmp_path / "data"),
                      per_device_train_batch_size=1)  # fmt: skip
    ppo.main(ppo.Args(**args, output_dir=str(tmp_path / "ppo")))

    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "sft")
    losses, count = 0.0, 0
    assert len(drawn[0]) == len(drawn[1]) == 1  # of two micro-batches
    for prompt, response in drawn[0] + drawn[1]:
        logits = model(input_ids=torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        losses = losses + torch.nn.functional.cross_entropy(logits, torch.tensor(response), reduction="sum")
        count += len(response)
    (0.3 * losses / count).backward()
    for ours, p in zip(steps[0], model.parameters(), strict=True):
        torch.testing.assert_close(ours, p.grad, atol=1e-6, rtol=1e-4)
    metrics = read_jsonl(tmp_path / "ppo/metrics.jsonl")
    assert metrics[-1]["loss/ptx_avg"] < metrics[0]["loss/ptx_avg"]


def first_gradients(folder, monkeypatch, **overrides):
    """Gradients of the first optimizer step, before clipping, in the order of ppo_rlhf.py's `parameters`; the value head starts
    at random, as one of zeros sends no gradient further down."""
    steps, real = [], torch.nn.utils.clip_grad_norm_
    torch.manual_seed(0)
    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.init, "zeros_", lambda tensor: tensor)
        patch.setattr(torch.nn.utils, "clip_grad_norm_", lambda ps, norm: steps.append([p.grad.clone() for p in ps]) or real(ps, norm))
        ppo.main(ppo.Args(**small_args(folder, **overrides), output_dir=str(folder / "ppo"), overwrite=True))
    return steps[0]


def test_a_separate_critic_leaves_the_policy_alone(tmp_path, monkeypatch):
    """The value loss moves the critic and the value head, and nothing of the policy; with the shared trunk it moves the
    policy's too. Catches values that still come from the policy's trunk, and a critic that is not trained."""
    number = len([*tiny_model("gpt2").parameters()])
    same = {}
    for separate in (True, False):
        flags = dict(separate_critic=separate, missing_eos_penalty=0.0, max_grad_norm=1e9)
        low, high = (first_gradients(tmp_path, monkeypatch, vf_coef=vf_coef, **flags) for vf_coef in (0.1, 10.0))
        same[separate] = [torch.equal(a, b) for a, b in zip(low, high, strict=True)]
    assert all(same[True][:number]) and not any(same[True][number:]) and len(same[True]) > number + 2
    assert not any(same[False]) and len(same[False]) == number + 2


def test_a_separate_critic_starts_as_the_reward_model(tmp_path):
    """At first it is the reward model's trunk, in a size of its own; then it is trained, and the reward model is not. A run
    that was stopped goes on with it to the same weights."""
    config = transformers.GPT2Config(vocab_size=258, n_positions=96, n_embd=16, n_layer=1, n_head=2, num_labels=1, pad_token_id=0)
    args = small_args(tmp_path, separate_critic=True, vf_coef=1.0, save_steps=1, gradient_checkpointing=True)
    save(transformers.GPT2ForSequenceClassification(config), tiny_tokenizer(), tmp_path / "rm1")
    seen, real = [], ppo.forward
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ppo, "forward", lambda *a, **k: seen.append(k.get("critic") or a[9]) or real(*a, **k))
        patch.setattr(torch.optim.AdamW, "step", lambda self: None)
        ppo.main(ppo.Args(**args, output_dir=str(tmp_path / "still")))
    judge = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm1").base_model.state_dict()
    assert all(torch.equal(value, judge[name]) for name, value in seen[-1].state_dict().items())

    ppo.main(ppo.Args(**args, output_dir=str(tmp_path / "whole")))
    (path,) = (tmp_path / "whole/checkpoint").glob("*.pt")
    critic = torch.load(path, weights_only=True)["critic"]
    assert not all(torch.equal(value, judge[name]) for name, value in critic.items())
    stop_and_resume(ppo, {**args, "output_dir": str(tmp_path / "stopped")})
    (other,) = (tmp_path / "stopped/checkpoint").glob("*.pt")
    assert all(torch.equal(value, critic[name]) for name, value in torch.load(other, weights_only=True)["critic"].items())
    assert (tmp_path / "whole/model.safetensors").read_bytes() == (tmp_path / "stopped/model.safetensors").read_bytes()


@pytest.mark.parametrize("temperature, share", [(1e-4, 1 / 16), (5.0, 1.0)])
def test_different_answers_to_one_prompt(temperature, share, tmp_path):
    """A policy that always says the same has 1 of 16, one that never does has 16 of 16; looked at where --eval_steps says."""
    ppo.main(ppo.Args(**small_args(tmp_path, temperature=temperature), output_dir=str(tmp_path / "ppo")))
    seen = {m["update"]: m["val/distinct_responses"] for m in read_jsonl(tmp_path / "ppo/metrics.jsonl") if "val/distinct_responses" in m}
    assert seen.keys() == {1, 2, 4} and all(value == pytest.approx(share, abs=0.07) for value in seen.values())


@pytest.mark.parametrize("flags, complaints", [
    (dict(adaptive_kl_target=3.0, beta=0.0), ["--adaptive_kl_target", "--beta"]),
    (dict(adaptive_kl_target=-1.0), ["--adaptive_kl_target"]),
    (dict(adaptive_kl_target=3.0, adaptive_kl_horizon=0), ["--adaptive_kl_horizon"]),
    (dict(reward_model_path=()), ["--reward_model_path"]),
    (dict(reward_model_path=("", )), ["--reward_model_path"]),
    (dict(ptx_coef=0.1, ptx_dataset_name="nowhere/at/all"), ["nowhere/at/all"]),
    (dict(ptx_coef=0.1, ptx_dataset_name="DATA", max_new_tokens=1), ["--ptx_dataset_name", "--max_new_tokens"]),
])  # fmt: skip
def test_refused(flags, complaints, tmp_path, capsys):
    args = small_args(tmp_path, **{k: str(tmp_path / "data") if v == "DATA" else v for k, v in flags.items()})
    with pytest.raises(SystemExit) as refusal:
        ppo.main(ppo.Args(**args, output_dir=str(tmp_path / "ppo")))
    error = capsys.readouterr().err
    assert refusal.value.code == 2 and len(error.splitlines()) == 1 and all(complaint in error for complaint in complaints)
    assert not (tmp_path / "ppo").exists()
