"""Every patch in benchmark/forks and benchmark/ablations applies to ppo_rlhf.py, trains a tiny model for two
updates, and does the one thing that it is about, by a formula of the test's own."""

import itertools
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import REPOSITORY, read_jsonl, save, tiny_model, tiny_reward_model, tiny_tokenizer, write_jsonl
from transformers import AutoModelForCausalLM

import ppo_rlhf
import sft

PATCHES = {path.stem: path for path in sorted(REPOSITORY.glob("benchmark/[af]*/*.patch"))}
FORKS = [name for name, path in PATCHES.items() if path.parent.name == "forks"]
GROUP = dict(num_generations=8, separate_critic=False, vf_coef=0.0)
FLAGS = {
    "rloo": GROUP,
    "grpo": dict(GROUP, beta=0.5),
    "kl_in_loss": dict(beta=0.5),
    "lora": dict(separate_critic=False),
    "ensemble": dict(reward_model_path=("reward_1", "reward_2"), ensemble_coef=0.5),
    "value_warmup": dict(value_warmup_updates=1),
    "critic_from_policy": dict(critic_warmup_updates=1),
    "decoupled_gae": dict(lam=0.5),
    "dual_clip": dict(dual_clip=1.5),
    **dict.fromkeys(["rule_reward", "sentiment"], dict(reward_model_path="")),
    # So that update 1's gradient is that of the original model, and ptx's alone, up to 1%
    "ptx": dict(num_mini_batches=1, num_ppo_epochs=1, ptx_coef=1e4, ptx_dataset_name="data"),
    "no_value_clipping": dict(value_learning_rate=0.1),
}
CASES = [(name, {}) for name in [*PATCHES, "lora rloo", "lora grpo"]]  # the README applies two together
CASES += [("ensemble", dict(ensemble_coef=float("inf")))]
# Steps so small that the critic is still what it started as
CASES += [("rule_reward critic_from_policy", dict(learning_rate=1e-6))]
# Pairs that do not apply together. GRPO has no rewards of tokens, and its KL is in the loss; GRPO and RLOO
# have no GAE; the reward would have two sources; two warm-ups; the last three change the same line: combine
# them by hand.
CONFLICTS = """decoupled_gae grpo, decoupled_gae rloo, grpo process_reward, grpo rloo, grpo whiten_rewards,
grpo kl_in_loss, ensemble rule_reward, rule_reward sentiment, critic_from_policy value_warmup,
kl_in_loss process_reward, kl_in_loss whiten_rewards, process_reward whiten_rewards"""
# In place of vaderSentiment, which benchmarks alone need
WORDS = SimpleNamespace(polarity_scores=lambda text: {"compound": sum(map(ord, text))})
VADER = SimpleNamespace(SentimentIntensityAnalyzer=lambda: WORDS)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    tokenizer = tiny_tokenizer()
    policy = tiny_model("gpt2")
    policy.generation_config.eos_token_id = [*range(120, 140)]  # many, so that responses have all lengths
    save(policy, tokenizer, folder / "sft")
    for seed in (1, 2):
        save(tiny_reward_model("gpt2", seed=seed), tokenizer, folder / f"reward_{seed}")
    words = "one to three a five sixth".split()
    rows = [{"prompt": word, "answer": word[4:], "completion": f"{word}!"} for word in words]
    for split in ("train", "test"):
        write_jsonl(folder / f"data/{split}.jsonl", rows)
    return folder


def apply(names, folder):
    (folder / "ppo_rlhf.py").write_bytes((REPOSITORY / "ppo_rlhf.py").read_bytes())
    command = ["git", "apply", *(PATCHES[name] for name in names)]
    return subprocess.run(command, cwd=folder, capture_output=True).returncode == 0


def run(names, inputs, folder, monkeypatch, **flags):
    """Two updates of the patched script -> what `main` knows at the end of each."""
    assert apply(names, folder)
    monkeypatch.chdir(inputs)
    monkeypatch.setitem(sys.modules, "vaderSentiment.vaderSentiment", VADER)
    script = {"__name__": "patched"}
    exec(compile((folder / "ppo_rlhf.py").read_text(), folder / "ppo_rlhf.py", "exec"), script)
    seen = []

    def write_row(file, row):
        if "objective/kl" in row:  # an update's row of metrics.jsonl
            seen.append(SimpleNamespace(**sys._getframe(1).f_locals))
        real_write_row(file, row)

    real_write_row = script["write_row"]
    script["write_row"] = write_row
    common = dict(sft_model_path="sft", reward_model_path="reward_1", dataset_name="data", batch_size=16)
    common |= dict(output_dir=str(folder / "run"), total_episodes=32, max_new_tokens=8, num_mini_batches=2)
    common |= dict(learning_rate=0.01, warmup_steps=0)
    for name in names:
        common |= FLAGS.get(name, {})
    script["main"](script["Args"](**common | flags))
    return seen


def close(actual, expected, rtol=1e-4):
    torch.testing.assert_close(actual.detach(), torch.as_tensor(expected).detach(), rtol=rtol, atol=1e-4)


@pytest.mark.parametrize("names, flags", CASES)
def test_patch(names, flags, inputs, tmp_path, monkeypatch):
    names = names.split()
    first, at = run(names, inputs, tmp_path, monkeypatch, **flags)  # after updates 1 and 2
    original = tiny_model("gpt2")
    scores, mask, batch, B, T = at.scores, at.mask, at.batch, at.B, at.T
    texts = at.tokenizer.batch_decode(batch.responses, skip_special_tokens=True)
    unended = 1.0 * ~batch.ended
    raw_score = lambda run, model: ppo_rlhf.score(model, run.tokenizer, run.batch, run.prompts, B)
    raw = (scores + unended) * at.score_std + at.score_mean if "ensemble" not in names else None
    at_end = F.one_hot(batch.response_lengths - 1, T)  # [B, T]
    rewards = scores[:, None] * at_end - at.beta * at.kl  # [B, T]
    gae, _ = ppo_rlhf.gae(rewards, at.values, mask, at.args.gamma, at.args.lam)  # [B, T]
    mb, *tensors = next(ppo_rlhf.micro_batches(first.batch, torch.arange(B), B))
    logprobs = lambda temperature: ppo_rlhf.forward(original, *tensors, temperature)[0]  # at the start
    # Of update 2's last minibatch
    advantages = at.advantages[at.mb]
    ratio = (at.new_logprobs - at.old_logprobs[at.mb]).exp()
    gap = at.ref_logprobs[at.mb] - at.new_logprobs
    k3 = gap.exp() - 1 - gap
    ppo_loss = lambda high: torch.max(-advantages * ratio, -advantages * ratio.clamp(0.8, high))
    loss = at.loss - at.args.vf_coef * at.vf_loss  # the policy's

    saved, info = AutoModelForCausalLM.from_pretrained(tmp_path / "run", output_loading_info=True)
    changed = [not torch.equal(a, b) for a, b in zip(saved.parameters(), original.parameters())]
    assert any(changed) and not info["missing_keys"] and not at.mask.all()
    if {"rloo", "grpo"} & {*names}:
        assert not at.values.any() and not at.value_head.weight.any()
    if {"grpo", "kl_in_loss"} & {*names}:
        assert k3.max() > 0.01 and at.gap.requires_grad
        close(loss, ppo_loss(1.2) + 0.5 * k3)
    if "rloo" in names:
        totals = rewards.sum(1).view(2, 8)
        others = (8 * totals.mean(1, keepdim=True) - totals) / 7
        close(at.advantages, (totals - others).view(B, 1) * mask)
        close(loss, ppo_loss(1.2))
    elif "grpo" in names:
        normalized = torch.cat([(group - group.mean()) / group.std() for group in scores.split(8)])
        close(at.advantages, normalized[:, None] * mask)
    elif "kl_in_loss" in names:
        close(at.rewards, scores[:, None] * at_end)
        close(at.estimates["k1"], -gap)
        close(at.estimates["k2"], gap**2 / 2)
    elif "whiten_rewards" in names:
        real = rewards[mask == 1]
        close(at.rewards[mask == 1], (real - real.mean()) / real.std(correction=0) + real.mean())
    elif "ensemble" in names:
        start, now = (torch.stack([raw_score(run, rm) for rm in at.reward_models]) for run in (first, at))
        a, b = (now - start.mean(1, keepdim=True)) / start.std(1, keepdim=True)
        coef = min(at.args.ensemble_coef, 1.0)  # of two models the minimum is mean - deviation
        close(scores, (a + b) / 2 - coef * (a - b).abs() / 2 - unended)
    elif "decoupled_gae" in names:
        close(at.returns, rewards.flip(1).cumsum(1).flip(1) * mask)
        close(at.advantages, ppo_rlhf.whiten(gae, mask))
    elif {"value_warmup", "critic_from_policy"} & {*names}:
        assert not at.kl.any() and at.values.any()
    elif "clip_higher" in names:
        assert ((ratio > 1.2) & (advantages > 0)).any()
        close(loss, ppo_loss(1.28))
    elif "dual_clip" in names:
        assert ((ratio > 1.5) & (advantages < 0)).any()
        bounded = torch.min(ppo_loss(1.2), -1.5 * advantages)
        close(loss, torch.where(advantages < 0, bounded, ppo_loss(1.2)))
    elif "process_reward" in names:
        ends = [torch.min(batch.starts + t, batch.lengths) for t in range(1, T + 1)]
        score_at = lambda end: ppo_rlhf.reward_fn(at.reward_model, None, batch.sequences, None, end, None)
        so_far = (torch.stack([score_at(end) for end in ends], 1) - at.score_mean) / at.score_std  # [B, T]
        gains = so_far - F.pad(so_far, (1, -1))
        close(at.rewards, gains - at.beta * at.kl + (scores[:, None] - so_far[:, -1:]) * at_end)
    elif "rule_reward" in names:
        right = [float(text.endswith(prompt.row["answer"])) for prompt, text in zip(at.prompts, texts)]
        assert {*right} == {0.0, 1.0}
        close(raw, right)
    elif "sentiment" in names:
        close(raw, [float(sum(map(ord, text))) for text in texts])
    elif "ptx" in names:
        encoded = [sft.encode(at.tokenizer, at.end_ids, prompt.row, "completion") for prompt in at.train]
        assert [[ids[:start], ids[start:]] for ids, start in at.demonstrations] == encoded
        examples = [(ids[:start], ids[start:]) for ids, start in first.drawn]
        expected = sft.completion_loss(original, examples, "cpu") / sum(len(ids) for _, ids in examples)
        expected.backward()
        close(sum(first.stats["loss/ptx_avg"]), expected)
        norm = torch.nn.utils.get_total_norm([p.grad for p in original.parameters()])
        close(first.stats["policy/grad_norm"][0], 1e4 * norm, rtol=0.01)
    elif "logprobs_without_temperature" in names:
        close(first.old_logprobs[mb], logprobs(1.0))
    elif "no_advantage_whitening" in names:
        close(at.advantages, gae)
    elif "no_score_normalization" in names:
        close(scores, raw_score(at, at.reward_model) - unended)
    elif "no_value_clipping" in names:
        assert ((at.new_values - at.values[at.mb]).abs() > 0.2).any()
        close(at.vf_loss, (at.new_values - at.returns[at.mb]) ** 2 / 2)
    elif "score_one_slot_late" in names:
        late = F.one_hot(batch.response_lengths.clamp(max=T - 1), T)
        close(at.rewards, scores[:, None] * late - at.beta * at.kl)
    elif "adam_eps" in names:
        assert at.optimizer.defaults["eps"] == 1e-8
    elif "random_value_head" in names:
        assert first.values.any()
    elif names[0] in ("dropout_on", "slot_positions"):  # the sampler runs another model
        assert first.sampler_gap > 1e-3
    else:
        assert names == ["lora"], "a patch without a check"
    if "critic_from_policy" in names and "rule_reward" in names:
        assert not {*at.critic.parameters()} & {*at.policy.parameters()}
        for ours, start in zip(at.critic.parameters(), original.base_model.parameters(), strict=True):
            close(ours, start)
    if "lora" in names:
        close(first.ref_logprobs[mb], logprobs(0.7))
        assert first.kl.abs().max() < 1e-4 < at.kl.abs().max()
        torch.manual_seed(at.args.seed)
        expected = ppo_rlhf.sample(original, at.tokenizer, at.test, at.args, at.end_ids)
        texts = at.tokenizer.batch_decode(expected.responses, skip_special_tokens=True)
        assert texts == [row["sft"] for row in read_jsonl(tmp_path / "run/eval.jsonl")]
        assert not all(changed)


@pytest.mark.parametrize("name", ["rloo", "grpo"])
def test_group_of_one(name, inputs, tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run([name], inputs, tmp_path, monkeypatch, num_generations=1)
    assert "gradient not finite" in capsys.readouterr().err


def test_conflicts(tmp_path):
    found = {pair for pair in itertools.combinations(FORKS, 2) if not apply(pair, tmp_path)}
    assert found == {tuple(sorted(pair.split())) for pair in CONFLICTS.split(",")}
