"""The whole of ppo_rlhf.main() against an oracle that has none of its machinery.

main() runs as it is, on models of 32 x 2 saved to disk; only its rollout is replaced, by one that returns chosen
responses, and its optimizer notes the parameters and gradients of every step. The oracle computes the same from the
paper's formulas: one sequence at a time, unpadded, in float64, token by token in loops, with stock transformers
classes. Both must agree on every number to 1e-5.
"""

import math

import pytest
import torch
import transformers
from conftest import read_jsonl, save, tiny_model, tiny_reward_model, tiny_tokenizer, write_jsonl

import ppo_rlhf as ppo

T = 6
TRAIN = ["a", "bcd", "What?", "Say it", "ef", "g h i", "Why so long a prompt?", "j", "kl", "mnopq"]
TEST = ["x", "yz yz"]
REWARD_MEAN, REWARD_STD = 0.4, 1.7

# The kinds of response, by length and whether EOS ends it: EOS at once, in the middle, in the last slot; cut off.
KINDS = [(1, True), (T, False), (3, True), (T, True), (2, True), (5, True), (T, False), (4, True)]

SETTINGS = {
    # GPT-2 with absolute positions and dropout in its config, everything switched on at odd values
    "gpt2": dict(family="gpt2", pad_is_eos=False, temperature=0.8, gamma=0.97, lam=0.9, beta=0.15, entropy_coef=0.03),
    # Llama with RoPE and grouped queries, pad == eos, the other side of temperature 1
    "llama": dict(family="llama", pad_is_eos=True, temperature=1.3, gamma=1.0, lam=0.95, beta=0.05, entropy_coef=0.0),
}


def chosen_responses(call, prompts, eos_id, pad_id, garbage=False):
    """Responses [b, T] and lengths [b] for the given call of rollout: fixed, of every kind, with the pad id among the
    real tokens. With `garbage`, the slots after EOS hold other ids than pad."""
    generator = torch.Generator().manual_seed(call)
    tokens = torch.randint(2, 258, (len(prompts), T), generator=generator)
    junk = torch.randint(2, 258, (len(prompts), T), generator=generator)
    lengths = torch.zeros(len(prompts), dtype=torch.long)
    for i in range(len(prompts)):
        n, ended = KINDS[(i + call) % len(KINDS)]
        if ended:
            tokens[i, n - 1] = eos_id
        elif pad_id != eos_id:
            tokens[i, 2] = pad_id
        tokens[i, n:] = junk[i, n:] if garbage else pad_id
        lengths[i] = n
    return tokens, lengths


class Trace:
    """What main() did: the calls of its pure functions, in order, with copies of their arguments and results, and the
    parameters and (clipped) gradients of every optimizer step."""

    def __init__(self):
        self.calls, self.steps = {}, []

    def __getitem__(self, name):
        return self.calls.get(name, [])


def copied(x):
    if isinstance(x, torch.Tensor):
        return x.detach().clone()
    return type(x)(map(copied, x)) if isinstance(x, (tuple, list)) else x


def trace_main(folder, monkeypatch, garbage=False, settings="gpt2", train=TRAIN, **overrides):
    """Run ppo_rlhf.main() in `folder` -> (trace, metrics, args, tokenizer). Nothing of it is replaced but the rollouts
    of training and evaluation; the pure functions are only listened to."""
    setting = dict(SETTINGS[settings])
    family, pad_is_eos = setting.pop("family"), setting.pop("pad_is_eos")
    tokenizer = tiny_tokenizer(pad_is_eos)
    reward_model = tiny_reward_model(family, dropout=0.2)
    reward_model.config.reward_mean, reward_model.config.reward_std = REWARD_MEAN, REWARD_STD
    write_jsonl(folder / "data" / "train.jsonl", [{"prompt": p} for p in train])
    write_jsonl(folder / "data" / "test.jsonl", [{"prompt": p} for p in TEST])
    args = ppo.Args(**{**dict(
        sft_model_path=save(tiny_model(family, dropout=0.2), tokenizer, folder / "sft"),
        reward_model_path=(save(reward_model, tokenizer, folder / "rm"),),
        dataset_name=str(folder / "data"), output_dir=str(folder / "ppo"), prompt_template="Q: {prompt}\nA:",
        max_new_tokens=T, total_episodes=16, batch_size=8, num_mini_batches=2, num_ppo_epochs=2,
        per_device_train_batch_size=3, learning_rate=5e-3, value_learning_rate=8e-3, warmup_steps=1, max_grad_norm=0.5,
        vf_coef=0.3, cliprange=0.1, cliprange_value=0.02, missing_eos_penalty=0.7), **setting, **overrides})  # fmt: skip

    trace = Trace()

    def listen(name):
        real = getattr(ppo, name)

        def listener(*args, **kwargs):
            result = real(*args, **kwargs)
            trace.calls.setdefault(name, []).append((copied(args), copied(result)))
            return result

        monkeypatch.setattr(ppo, name, listener)

    for name in ("penalized_rewards", "gae", "whiten", "policy_loss", "value_loss", "micro_batches", "reward_fn"):
        listen(name)

    real_rollout = ppo.rollout

    def rollout(model, prompts, prompt_mask, uniforms, temperature, eos_id, pad_id):
        if eos_id == -1 or len(prompts) == 16:  # the check of the model before training, and the look at how answers differ
            return real_rollout(model, prompts, prompt_mask, uniforms, temperature, eos_id, pad_id)
        assert temperature == args.temperature and uniforms.shape == (T, len(prompts))
        rows = [p[m.bool()].tolist() for p, m in zip(prompts, prompt_mask)]
        responses, lengths = chosen_responses(len(trace["rollout"]), rows, eos_id, pad_id, garbage)
        trace.calls.setdefault("rollout", []).append((rows, responses.clone(), lengths.clone()))
        return responses, lengths

    monkeypatch.setattr(ppo, "rollout", rollout)

    class ListeningAdamW(torch.optim.AdamW):
        def step(self, *args, **kwargs):
            parameters = [p for group in self.param_groups for p in group["params"]]  # the policy's, then the head's
            before, gradients = ([x.detach().clone() for x in xs] for xs in (parameters, (p.grad for p in parameters)))
            super().step(*args, **kwargs)
            after = [p.detach().clone() for p in parameters]
            trace.steps.append(dict(before=before, gradients=gradients, after=after))

    monkeypatch.setattr(torch.optim, "AdamW", ListeningAdamW)
    ppo.main(args)
    metrics = read_jsonl(folder / "ppo" / "metrics.jsonl")
    return trace, metrics, args, tokenizer


# ---------------------------------------------------------------------------------------------------------------
# The oracle
# ---------------------------------------------------------------------------------------------------------------


class Oracle:
    def __init__(self, args, eos_id):
        self.args, self.eos_id = args, eos_id
        load = dict(dtype=torch.float64)
        self.policy = transformers.AutoModelForCausalLM.from_pretrained(args.sft_model_path, **load).eval()
        self.reference = transformers.AutoModelForCausalLM.from_pretrained(args.sft_model_path, **load).eval()
        self.reward_model = transformers.AutoModelForSequenceClassification.from_pretrained(args.reward_model_path[0], **load)
        self.reward_model.eval().config.pad_token_id = None  # then the stock forward reads the last token
        self.head = torch.nn.Linear(32, 1).double()
        self.parameters = [*self.policy.parameters(), *self.head.parameters()]

    def set_parameters(self, values):
        with torch.no_grad():
            for parameter, value in zip(self.parameters, values, strict=True):
                parameter.copy_(value)

    def walk(self, model, prompt, response):
        """For each response token: (its log-prob, the entropy it was drawn from, the value before it), scalars."""
        out = model(input_ids=torch.tensor([prompt + response]), output_hidden_states=True)
        tokens = []
        for t, token in enumerate(response):
            before = len(prompt) + t - 1
            log_p = (out.logits[0, before] / self.args.temperature).log_softmax(-1)
            value = self.head(out.hidden_states[-1][0, before])[0]
            tokens.append((log_p[token], -(log_p.exp() * log_p).sum(), value))
        return tokens

    @torch.no_grad()
    def episode(self, prompt, response):
        """Everything of an episode that is fixed before the update starts, as lists with one number a token."""
        args = self.args
        old = self.walk(self.policy, prompt, response)
        ref = self.walk(self.reference, prompt, response)
        score = self.reward_model(input_ids=torch.tensor([prompt + response])).logits[0, 0].item()
        score = (score - REWARD_MEAN) / REWARD_STD
        ended = response[-1] == self.eos_id
        if not ended:
            score -= args.missing_eos_penalty
        e = dict(prompt=prompt, response=response, n=len(response), ended=ended, score=score)
        e["logprobs"] = [log_p.item() for log_p, _, _ in old]
        e["ref_logprobs"] = [log_p.item() for log_p, _, _ in ref]
        e["values"] = [value.item() for _, _, value in old]
        e["kl"] = [a - b for a, b in zip(e["logprobs"], e["ref_logprobs"])]
        e["rewards"] = [-args.beta * kl for kl in e["kl"]]
        e["rewards"][-1] += score
        after = [*e["values"][1:], 0.0]
        deltas = [r + args.gamma * v1 - v0 for r, v1, v0 in zip(e["rewards"], after, e["values"])]
        decay = args.gamma * args.lam
        e["advantages"] = [sum(decay ** (s - t) * deltas[s] for s in range(t, e["n"])) for t in range(e["n"])]
        e["returns"] = [a + v for a, v in zip(e["advantages"], e["values"])]
        return e

    def episodes(self, prompts, responses, lengths):
        episodes = [self.episode(p, r[:n]) for p, r, n in zip(prompts, responses.tolist(), lengths.tolist())]
        every = torch.tensor([a for e in episodes for a in e["advantages"]], dtype=torch.float64)
        mean, std = every.mean().item(), every.std(correction=0).item()
        for e in episodes:
            e["whitened"] = [(a - mean) / std for a in e["advantages"]]
        return episodes

    def minibatch(self, episodes):
        """Gradients (clipped to max_grad_norm) and statistics of one optimizer step at the current parameters."""
        args, seen, total = self.args, [], 0.0
        for e in episodes:
            for t, (log_p, entropy, value) in enumerate(self.walk(self.policy, e["prompt"], e["response"])):
                ratio = torch.exp(log_p - e["logprobs"][t])
                a = e["whitened"][t]
                inside = ratio.clamp(1 - args.cliprange, 1 + args.cliprange)
                policy_loss = -torch.min(ratio * a, inside * a)
                moved = value - e["values"][t]
                clipped = e["values"][t] + moved.clamp(-args.cliprange_value, args.cliprange_value)
                errors = (value - e["returns"][t]) ** 2, (clipped - e["returns"][t]) ** 2
                value_loss = torch.max(*errors) / 2
                total = total + policy_loss + args.vf_coef * value_loss - args.entropy_coef * entropy
                log_ratio = log_p.item() - e["logprobs"][t]
                seen.append([policy_loss.item(), value_loss.item(), entropy.item(), ratio.item(), 0.5 * log_ratio**2,
                             abs(ratio.item() - 1) > args.cliprange, abs(moved.item()) > args.cliprange_value])  # fmt: skip
        for parameter in self.parameters:
            parameter.grad = None
        (total / len(seen)).backward()
        norm = math.sqrt(sum((p.grad**2).sum().item() for p in self.parameters))
        scale = min(1.0, args.max_grad_norm / norm)
        names = ["loss/policy_avg", "loss/value_avg", "policy/entropy_avg", "val/ratio", "policy/approxkl_avg",
                 "policy/clipfrac_avg", "val/clipfrac_avg"]  # fmt: skip
        stats = {name: sum(column) / len(seen) for name, column in zip(names, zip(*seen))}
        return [p.grad * scale for p in self.parameters], {**stats, "policy/grad_norm": norm}


def variance(xs):
    return torch.tensor(xs, dtype=torch.float64).var(correction=0).item()


def oracle_metrics(episodes, stats, args):
    """The figures of metrics.jsonl, from the oracle's lists: means over episodes, or over the tokens of a minibatch."""
    count = len(episodes)
    tokens = {name: [x for e in episodes for x in e[name]] for name in ("kl", "logprobs", "values", "returns")}
    kl = sum(tokens["kl"]) / count
    score = sum(e["score"] for e in episodes) / count
    errors = [r - v for r, v in zip(tokens["returns"], tokens["values"])]
    return {
        "objective/scores": score,
        "objective/kl": kl,
        "objective/entropy": -sum(tokens["logprobs"]) / count,
        "objective/non_score_reward": -args.beta * kl,
        "objective/rlhf_reward": score - args.beta * kl,
        "val/explained_variance": 1 - variance(errors) / variance(tokens["returns"]),
        "val/num_eos_tokens": sum(e["ended"] for e in episodes) / count,
        "response_length": sum(e["n"] for e in episodes) / count,
        **{name: sum(s[name] for s in stats) / len(stats) for name in stats[0]},
    }


def assert_rows_equal(tensor, episodes, name):
    """A [B, T] tensor of main() against the oracle's list for each episode; 0 after its last token."""
    for row, e in zip(tensor.tolist(), episodes, strict=True):
        assert row[: e["n"]] == pytest.approx(e[name], abs=1e-5, rel=1e-5), name
        assert all(x == 0 for x in row[e["n"] :]), f"{name} on padding"


@pytest.mark.parametrize("settings", SETTINGS)
def test_main_equals_a_loop_over_single_sequences(settings, tmp_path, monkeypatch):
    """Two updates of two epochs of two minibatches, in micro-batches that divide nothing. Catches, in the place where
    it counts: wrong positions, slots, masks; a missing temperature; a reference that moves; old log-probs that are
    not of the start of the update; KL, score, penalty, GAE, whitening and clipping gone wrong; losses weighted by
    the split into micro-batches; gradients that are not zeroed or not clipped; metrics that average padding."""
    trace, metrics, args, tokenizer = trace_main(tmp_path, monkeypatch, settings=settings)
    oracle = Oracle(args, tokenizer.eos_token_id)
    updates, B = 2, args.batch_size
    steps_per_update = args.num_ppo_epochs * args.num_mini_batches
    assert len(trace.steps) == updates * steps_per_update and len(metrics) == updates
    every_row = list(range(B))
    minibatches = [list(call[0][0]) for call in trace["micro_batches"] if sorted(call[0][0]) != every_row]
    assert len(minibatches) == len(trace.steps)
    moved = 0.0
    for u in range(updates):
        steps = trace.steps[u * steps_per_update : (u + 1) * steps_per_update]

        # Phases 1 to 3: what every token of every episode was worth
        oracle.set_parameters(steps[0]["before"])
        episodes = oracle.episodes(*trace["rollout"][u])
        assert {(e["n"], e["ended"]) for e in episodes} == set(KINDS)
        (scores, old_logprobs, ref_logprobs, mask, _), rewards = trace["penalized_rewards"][u]
        (_, values, *_), (advantages, returns) = trace["gae"][u]
        assert mask.tolist() == [[1.0] * e["n"] + [0.0] * (T - e["n"]) for e in episodes]
        assert scores.tolist() == pytest.approx([e["score"] for e in episodes], abs=1e-5)
        assert_rows_equal(old_logprobs, episodes, "logprobs")
        assert_rows_equal(ref_logprobs, episodes, "ref_logprobs")
        assert_rows_equal(values, episodes, "values")
        assert_rows_equal(rewards, episodes, "rewards")
        assert_rows_equal(advantages, episodes, "advantages")
        assert_rows_equal(returns, episodes, "returns")
        assert_rows_equal(trace["whiten"][u][1], episodes, "whitened")
        moved = max(moved, max(abs(kl) for e in episodes for kl in e["kl"]))

        # Phase 4: every gradient and every statistic of every step
        stats = []
        for k, step in enumerate(steps):
            oracle.set_parameters(step["before"])
            rows = minibatches[u * steps_per_update + k]
            gradients, stat = oracle.minibatch([episodes[i] for i in rows])
            stats.append(stat)
            for ours, theirs in zip(step["gradients"], gradients, strict=True):
                torch.testing.assert_close(ours.double(), theirs, atol=1e-5, rtol=1e-4)

        # Phase 5
        for name, expected in oracle_metrics(episodes, stats, args).items():
            assert metrics[u][name] == pytest.approx(expected, abs=2e-5, rel=2e-5), name

    # The run was one in which mistakes can show: policy and reference apart, values at work, both clips active.
    assert moved > 0.05 and metrics[1]["policy/clipfrac_avg"] > 0 and metrics[1]["val/clipfrac_avg"] > 0
    assert max(abs(v) for e in episodes for v in e["values"]) > 0.05
    assert metrics[0]["policy/grad_norm"] > args.max_grad_norm


def test_parameters_follow_adam(tmp_path, monkeypatch):
    """The recorded gradients, fed to a textbook Adam (betas 0.9 and 0.999, eps 1e-5, no weight decay) with the
    schedule of the docstring, lead along the same path, the value head at a rate of its own. Catches weight decay,
    another eps, a learning rate that warms up or decays otherwise or is not that of the flag, a parameter that the
    optimizer was not given."""
    trace, metrics, args, _ = trace_main(tmp_path, monkeypatch, total_episodes=32)
    per_update = args.num_ppo_epochs * args.num_mini_batches
    schedule = (1 / 2, 3 / 4, 2 / 4, 1 / 4)  # 1 update of warm-up, then linearly to 0 after the 4th
    assert [m["lr"] for m in metrics] == pytest.approx([args.learning_rate * f for f in schedule])
    x = [p.double() for p in trace.steps[0]["before"]]
    peaks = [args.learning_rate] * (len(x) - 2) + [args.value_learning_rate] * 2  # the last two: the head's weight and bias
    assert x[-2].shape == (1, 32) and args.value_learning_rate != args.learning_rate
    m, v = [torch.zeros_like(p) for p in x], [torch.zeros_like(p) for p in x]
    for n, step in enumerate(trace.steps, 1):
        fraction = schedule[(n - 1) // per_update]
        for i, g in enumerate(step["gradients"]):
            m[i] = 0.9 * m[i] + 0.1 * g.double()
            v[i] = 0.999 * v[i] + 0.001 * g.double() ** 2
            x[i] = x[i] - peaks[i] * fraction * (m[i] / (1 - 0.9**n)) / ((v[i] / (1 - 0.999**n)).sqrt() + 1e-5)
            torch.testing.assert_close(step["after"][i].double(), x[i], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("settings", SETTINGS)
def test_first_update_starts_on_policy(settings, tmp_path, monkeypatch):
    """With one minibatch and one epoch nothing has moved: KL, log-ratio and clipped fractions are 0, the ratio is 1,
    on models configured with dropout. Catches dropout, another temperature, other kernels or a cast between the old
    log-probs, the new ones and the reference's."""
    _, metrics, _, _ = trace_main(
        tmp_path, monkeypatch, settings=settings, total_episodes=8, num_ppo_epochs=1, num_mini_batches=1
    )
    (m,) = metrics
    assert m["objective/kl"] == pytest.approx(0, abs=1e-5)
    assert m["val/ratio"] == pytest.approx(1, abs=1e-6)
    assert m["policy/approxkl_avg"] == pytest.approx(0, abs=1e-10)
    assert m["policy/clipfrac_avg"] == 0 and m["val/clipfrac_avg"] == 0
    assert m["loss/policy_avg"] == pytest.approx(0, abs=1e-5)  # whitened advantages at ratio 1 sum to 0
    assert m["objective/rlhf_reward"] == pytest.approx(m["objective/scores"], abs=1e-5)


def test_values_start_at_zero(tmp_path, monkeypatch):
    """The value head is zero before the first step, so the first advantages are not a random head's noise."""
    trace, *_ = trace_main(tmp_path, monkeypatch, total_episodes=8)
    weight, bias = trace.steps[0]["before"][-2:]
    assert weight.shape == (1, 32) and weight.eq(0).all() and bias.eq(0).all()
    assert trace["gae"][0][0][1].eq(0).all()


def gradients_of(trace):
    return [torch.cat([g.flatten() for g in step["gradients"]]) for step in trace.steps]


@pytest.mark.parametrize("settings", SETTINGS)
def test_gradients_do_not_depend_on_the_micro_batch(settings, tmp_path, monkeypatch):
    """1, 3, 4 or all rows at a time, and activations recomputed (which runs the model in training mode, with dropout
    in its config): the same gradient at every step. Catches a loss averaged per micro-batch, a step per micro-batch,
    and dropout that checkpointing switches on again."""
    runs = [dict(per_device_train_batch_size=size) for size in (1, 3, 4, 100)]
    runs.append(dict(per_device_train_batch_size=3, gradient_checkpointing=True))
    paths = []
    for i, run in enumerate(runs):
        with monkeypatch.context() as patch:
            trace, *_ = trace_main(tmp_path / str(i), patch, settings=settings, learning_rate=1e-3,
                                    value_learning_rate=1e-3, **run)  # fmt: skip
        paths.append(gradients_of(trace))
    for path in paths[1:]:
        assert len(path) == len(paths[0]) == 8
        for ours, theirs in zip(path, paths[0]):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-3)
    assert all(g.norm() > 0.1 for g in paths[0])


@pytest.mark.parametrize("settings, tied", [("gpt2", True), ("llama", False)])
def test_tied_embeddings_add_no_gradient_of_their_own_size(settings, tied, tmp_path, monkeypatch):
    """Where input and output embeddings are one tensor, no second dense gradient of it is made; where they are two, the
    input's is dense, as the optimizer needs it. That the sum is right is what the oracle says above."""

    class DenseGradients(torch.utils._python_dispatch.TorchDispatchMode):
        rows = set()

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is torch.ops.aten.embedding_dense_backward.default:
                self.rows.add(args[2])
            return function(*args, **(kwargs or {}))

    with DenseGradients() as dense:
        trace, _, _, tokenizer = trace_main(tmp_path, monkeypatch, settings=settings, total_episodes=8)
    assert (len(tokenizer) in dense.rows) == (not tied)  # GPT-2 has embeddings of positions too: another number of rows
    assert all(not gradient.is_sparse for step in trace.steps for gradient in step["gradients"])


def test_garbage_after_eos_changes_no_gradient_and_no_metric(tmp_path, monkeypatch):
    """Other ids than pad after EOS, in every rollout. Catches a mask, a length or an EOS count taken from ids."""
    results = []
    for garbage in (False, True):
        with monkeypatch.context() as patch:
            trace, metrics, *_ = trace_main(tmp_path / str(garbage), patch, garbage=garbage)
        timing = ("eps", "tokens_per_second", "memory/peak_gb", "time/rollout", "time/score", "time/update")
        results.append((gradients_of(trace), [{k: v for k, v in m.items() if k not in timing} for m in metrics]))
    for clean, dirty in zip(*results[:2]):
        for a, b in zip(clean, dirty, strict=True):
            if isinstance(a, dict):
                assert a == pytest.approx(b, abs=1e-5)
            else:
                torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("epochs, minibatches", [(1, 1), (3, 4), (2, 8)])
def test_optimizer_steps_are_epochs_times_minibatches(epochs, minibatches, tmp_path, monkeypatch):
    """In every update, also in those that cross the end of the prompts (5 prompts, 8 episodes an update). Catches
    --num_mini_batches without effect, a step per micro-batch at the end of the data, episodes that an epoch leaves
    out or uses twice, and minibatches that are the same in every epoch."""
    trace, metrics, args, tokenizer = trace_main(
        tmp_path, monkeypatch, train=TRAIN[:5], total_episodes=31, num_ppo_epochs=epochs,
        num_mini_batches=minibatches, per_device_train_batch_size=1 if epochs == 1 else 2)  # fmt: skip
    updates = 3  # 31 // 8
    assert len(metrics) == updates and len(trace.steps) == updates * epochs * minibatches
    assert [m["episode"] for m in metrics] == [8, 16, 24]
    everything = list(range(8))
    rows = [list(call[0][0]) for call in trace["micro_batches"]]
    for u in range(updates):
        scoring, *update = rows[u * (1 + epochs * minibatches) : (u + 1) * (1 + epochs * minibatches)]
        assert scoring == everything
        for e in range(epochs):
            epoch = update[e * minibatches : (e + 1) * minibatches]
            assert {len(minibatch) for minibatch in epoch} == {8 // minibatches}
            assert sorted(row for minibatch in epoch for row in minibatch) == everything
        if epochs > 1:
            assert update[:minibatches] != update[minibatches : 2 * minibatches]
    # Prompts come in permutations of the whole set: 24 episodes are 5 + 5 + 5 + 5 + 4.
    seen = [tokenizer.decode(p) for prompts, _, _ in trace["rollout"][:updates] for p in prompts]
    assert len(seen) == 24
    for i in range(0, 20, 5):
        assert sorted(seen[i : i + 5]) == sorted(f"Q: {p}\nA:" for p in TRAIN[:5])
    assert len({tuple(seen[i : i + 5]) for i in range(0, 20, 5)}) > 1, "every epoch has the same order"


def test_reference_and_inputs_are_left_alone(tmp_path, monkeypatch):
    """The policy is trained and saved, the SFT and reward models on disk are not touched, and the SFT side of
    eval.jsonl is scored apart from the PPO side. (That the reference stays put in memory is part of the test against
    the oracle, whose reference is read from disk.)"""
    before = {}
    real = ppo.load_model

    def load_model(auto_class, path, flag):
        model, tokenizer = real(auto_class, path, flag)
        before[flag] = [p.detach().clone() for p in model.parameters()]
        return model, tokenizer

    monkeypatch.setattr(ppo, "load_model", load_model)
    trace, _, args, _ = trace_main(tmp_path, monkeypatch)
    after, _ = real(transformers.AutoModelForCausalLM, args.sft_model_path, "")
    assert all(torch.equal(a, b) for a, b in zip(before["--sft_model_path"], after.parameters()))
    after, _ = real(transformers.AutoModelForSequenceClassification, args.reward_model_path[0], "")
    assert all(torch.equal(a, b) for a, b in zip(before["--reward_model_path"], after.parameters()))
    saved, _ = real(transformers.AutoModelForCausalLM, args.output_dir, "")
    assert all(torch.equal(a, b) for a, b in zip(trace.steps[-1]["after"], saved.parameters()))
    assert not any(torch.equal(a, b) for a, b in zip(trace.steps[0]["before"], saved.parameters()))


def test_every_promised_metric_is_there(tmp_path, monkeypatch):
    """The names that people have dashboards for, in every line, all finite numbers. Catches a renamed or lost one."""
    _, metrics, args, _ = trace_main(tmp_path, monkeypatch)
    promised = """objective/scores objective/kl objective/entropy objective/non_score_reward objective/rlhf_reward
        policy/approxkl_avg policy/clipfrac_avg policy/entropy_avg loss/policy_avg loss/value_avg val/clipfrac_avg
        val/ratio val/explained_variance val/num_eos_tokens response_length lr beta episode eps time/rollout
        time/score time/update""".split()
    for m in metrics:
        assert set(promised) <= set(m)
        assert all(math.isfinite(m[name]) for name in m)
        assert m["beta"] == args.beta
