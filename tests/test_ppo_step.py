"""The whole of ppo_rlhf.main() against an oracle that has none of its machinery.

main() runs as it is on tiny models on disk; only its rollout is replaced, by one that returns chosen
responses, and its optimizer notes every step. The oracle computes the same from the papers' formulas: one
unpadded sequence at a time, in float64, token by token, with stock transformers classes."""

import copy
import math
from functools import partial
from types import SimpleNamespace

import conftest
import pytest
import torch
import transformers
from conftest import EOS, plain_logits, ppo_flags, read_jsonl, tiny_model, tiny_reward_model, tiny_tokenizer

import ppo_rlhf as ppo

T = 6
TRAIN = ["a", "bcd", "What?", "Say it", "ef", "g h i", "Why so long a prompt?", "j", "kl", "mnopq"]
STOP = 77  # a second id that ends a response, by the generation config

# The kinds of response, by length and end: at once, in the middle, in the last slot; by EOS, by STOP, cut off
KINDS = [(1, EOS), (T, None), (3, STOP), (T, EOS), (2, EOS), (5, STOP), (T, None), (4, EOS)]

SETTINGS = {
    # GPT-2: absolute positions, dropout in its config, a shared trunk, everything switched on at odd values
    "gpt2": dict(family="gpt2", temperature=0.8, gamma=0.97, lam=0.9, beta=0.15, entropy_coef=0.03)
    | dict(length_penalty=0.07, adaptive_kl_target=0.3, separate_critic=False),
    # Llama: RoPE, grouped queries, pad == eos, temperature above 1, a critic of another architecture,
    # activations recomputed, gradients not clipped
    "llama": dict(family="llama", pad_is_eos=True, separate_critic=True, temperature=1.3, beta=0.05)
    | dict(adaptive_kl_target=0.11, max_grad_norm=0.0, gradient_checkpointing=True),
}


def chosen_responses(call, model, prompts, pad_id, temperature, garbage):
    """What rollout returns in its given call: every kind of response, with the pad id among the real tokens,
    and the log-probs of plain forwards. With `garbage`, the slots after the end hold other things."""
    generator = torch.Generator().manual_seed(call)
    tokens = torch.randint(2, STOP, (len(prompts), T), generator=generator)
    junk = torch.randint(2, 258, (len(prompts), T), generator=generator)
    lengths, ended = torch.zeros(2, len(prompts), dtype=torch.long)
    logprobs = 100 * torch.randn(len(prompts), T, generator=generator) * garbage
    for i, prompt in enumerate(prompts):
        n, end = KINDS[(i + call) % len(KINDS)]
        lengths[i], ended[i] = n, end is not None
        if end is not None:
            tokens[i, n - 1] = end
        elif pad_id != EOS:
            tokens[i, 2] = pad_id
        tokens[i, n:] = junk[i, n:] if garbage else pad_id
        logits = plain_logits(model, prompt + tokens[i, :n].tolist())[len(prompt) - 1 : -1] / temperature
        logprobs[i, :n] = logits.log_softmax(-1)[range(n), tokens[i, :n]]
    return tokens, lengths, ended.bool(), logprobs


def copied(x):
    if isinstance(x, torch.Tensor):
        return x.detach().clone()
    return type(x)(map(copied, x)) if isinstance(x, (tuple, list)) else x


def trace_main(folder, patch, settings="gpt2", garbage=False, train=TRAIN, run=True, gap=0.0, **overrides):
    """Run ppo_rlhf.main(), but for its rollouts -> (trace, metrics, args). The trace has the calls of its
    functions, with copies of arguments and results, and the parameters and gradients of every step."""
    setting = dict(SETTINGS[settings])
    family = setting.pop("family")
    tokenizer = tiny_tokenizer(setting.pop("pad_is_eos", False))
    model = tiny_model(family, dropout=0.2)
    model.generation_config.eos_token_id = [EOS, STOP]
    width = 16 if setting.get("separate_critic") else 32
    reward_model = tiny_reward_model("gpt2", dropout=0.2, width=width)
    flags = ppo_flags(folder, model, reward_model, tokenizer, train)
    flags |= dict(max_new_tokens=T, total_episodes=16, batch_size=8, num_mini_batches=2, num_ppo_epochs=2)
    flags |= dict(per_device_train_batch_size=3, learning_rate=5e-3, value_learning_rate=8e-3, warmup_steps=2)
    flags |= dict(max_grad_norm=0.5, vf_coef=0.3, cliprange=0.1, cliprange_value=0.02)
    flags |= dict(missing_eos_penalty=0.7) | setting | overrides
    args = ppo.Args(**flags)
    trace = SimpleNamespace(calls={}, minibatches=[], rollouts=[], recomputed=[])

    def listen(real, calls, *args):
        calls.append((copied(args), real(*args)))
        return calls[-1][1]

    for name in ("penalized_rewards", "gae", "whiten"):
        calls = trace.calls.setdefault(name, [])
        patch.setattr(ppo, name, partial(listen, getattr(ppo, name), calls))
    real_micro_batches = ppo.micro_batches

    def micro_batches(batch, indices, size):
        if torch.is_grad_enabled():  # the update, not the scoring
            trace.minibatches.append(indices.tolist())
        return real_micro_batches(batch, indices, size)

    def rollout(model, prompts, prompt_mask, uniforms, temperature, end_ids, pad_id, cuda_graph):
        assert temperature == args.temperature and uniforms.shape == (T, len(prompts))
        assert end_ids.tolist() == [EOS, STOP] and pad_id == tokenizer.pad_token_id
        rows = [p[m.bool()].tolist() for p, m in zip(prompts, prompt_mask)]
        out = chosen_responses(len(trace.rollouts), model, rows, pad_id, temperature, garbage)
        trace.rollouts.append((rows, *copied(out), uniforms.clone()))
        return *out[:3], out[3] + gap

    real_checkpoint = ppo.checkpoint

    def checkpoint(*args, **kwargs):
        trace.recomputed.append(torch.is_grad_enabled())
        return real_checkpoint(*args, **kwargs)

    patch.setattr(ppo, "checkpoint", checkpoint)
    patch.setattr(ppo, "micro_batches", micro_batches)
    patch.setattr(ppo, "rollout", rollout)

    trace.steps = conftest.listen_to(patch, "Adam")
    if run:
        ppo.main(args)
    return trace, read_jsonl(folder / "ppo/metrics.jsonl") if run else None, args


# ---- The oracle ----


class Oracle:
    def __init__(self, args):
        def load(auto_class, path):
            return auto_class.from_pretrained(path, dtype=torch.float64).eval()

        self.args, self.beta = args, args.beta
        self.policy = load(transformers.AutoModelForCausalLM, args.sft_model_path)
        self.reference = load(transformers.AutoModelForCausalLM, args.sft_model_path)
        self.judge = load(transformers.AutoModelForSequenceClassification, args.reward_model_path)
        self.judge.config.pad_token_id = None  # then the stock forward reads the last token
        self.critic = self.policy
        self.parameters = [*self.policy.parameters()]
        if args.separate_critic:
            self.critic = copy.deepcopy(self.judge.base_model)
            self.parameters += self.critic.parameters()
        self.head = torch.nn.Linear(self.judge.config.hidden_size, 1).double()
        self.parameters += self.head.parameters()
        self.scale = None

    def walk(self, model, prompt, response):
        """For each response token: (its log-prob, the entropy there, the value before it), scalars."""
        ids = torch.tensor([prompt + response])
        logits = model(input_ids=ids).logits[0]
        states = self.critic(input_ids=ids, output_hidden_states=True).hidden_states[-1][0]
        tokens = []
        for t, token in enumerate(response):
            before = len(prompt) + t - 1
            log_p = (logits[before] / self.args.temperature).log_softmax(-1)
            tokens.append((log_p[token], -(log_p.exp() * log_p).sum(), self.head(states[before])[0]))
        return tokens

    @torch.no_grad()
    def episodes(self, prompts, responses, lengths, *_):
        """All of the episodes that is fixed before the update starts: lists with one number a token."""
        args, episodes = self.args, []
        texts = [(prompt, response[:n]) for prompt, response, n in zip(prompts, responses.tolist(), lengths)]
        raw = [self.judge(input_ids=torch.tensor([p + r])).logits[0, 0].item() for p, r in texts]
        if self.scale is None:  # of the first rollout, kept for the whole run
            average = sum(raw) / len(raw)
            self.scale = average, math.sqrt(sum((x - average) ** 2 for x in raw) / (len(raw) - 1))
        for (prompt, response), score in zip(texts, raw):
            n, ended = len(response), response[-1] in (EOS, STOP)
            score = (score - self.scale[0]) / self.scale[1]
            score -= (0 if ended else args.missing_eos_penalty) + args.length_penalty * n
            old, values = zip(*[(x.item(), v.item()) for x, _, v in self.walk(self.policy, prompt, response)])
            ref = [x.item() for x, _, _ in self.walk(self.reference, prompt, response)]
            kl = [a - b for a, b in zip(old, ref)]
            rewards = [-self.beta * x for x in kl]
            rewards[-1] += score
            after = [*values[1:], 0.0]
            deltas = [r + args.gamma * v1 - v0 for r, v1, v0 in zip(rewards, after, values)]
            decay = args.gamma * args.lam
            advantages = [sum(decay ** (s - t) * deltas[s] for s in range(t, n)) for t in range(n)]
            returns = [a + v for a, v in zip(advantages, values)]
            e = dict(prompt=prompt, response=response, n=n, ended=ended, score=score, logprobs=old, kl=kl)
            e |= dict(values=values, rewards=rewards, advantages=advantages, returns=returns)
            episodes.append(e)
        every = [a for e in episodes for a in e["advantages"]]
        average, std = sum(every) / len(every), math.sqrt(variance(every))
        for e in episodes:
            e["whitened"] = [(a - average) / std for a in e["advantages"]]
        return episodes

    def minibatch(self, episodes):
        """Clipped gradients and figures of one optimizer step at the current parameters."""
        args, seen, total = self.args, [], 0.0
        for e in episodes:
            for t, (log_p, entropy, value) in enumerate(self.walk(self.policy, e["prompt"], e["response"])):
                ratio = torch.exp(log_p - e["logprobs"][t])
                a = e["whitened"][t]
                policy_loss = -torch.min(ratio * a, ratio.clamp(1 - args.cliprange, 1 + args.cliprange) * a)
                moved = value - e["values"][t]
                clipped = e["values"][t] + moved.clamp(-args.cliprange_value, args.cliprange_value)
                errors = (value - e["returns"][t]) ** 2, (clipped - e["returns"][t]) ** 2
                value_loss = torch.max(*errors) / 2
                total = total + policy_loss + args.vf_coef * value_loss - args.entropy_coef * entropy
                figures = {
                    "loss/policy_avg": policy_loss.item(),
                    "loss/value_avg": value_loss.item(),
                    "policy/entropy_avg": entropy.item(),
                    "val/ratio": ratio.item(),
                    "policy/approxkl_avg": 0.5 * math.log(ratio.item()) ** 2,
                    "policy/clipfrac_avg": abs(ratio.item() - 1) > args.cliprange,
                    "val/clipfrac_avg": abs(moved.item()) > args.cliprange_value,
                }
                seen.append(figures)
        for parameter in self.parameters:
            parameter.grad = None
        (total / len(seen)).backward()
        norm = math.sqrt(sum((p.grad**2).sum().item() for p in self.parameters))
        stats = {name: sum(figures[name] for figures in seen) / len(seen) for name in seen[0]}
        scale = min(1.0, (args.max_grad_norm or math.inf) / norm)
        return [p.grad * scale for p in self.parameters], {**stats, "policy/grad_norm": norm}

    def metrics(self, episodes, stats):
        """The figures of metrics.jsonl: means over episodes, or over the tokens of a minibatch."""
        count = len(episodes)
        names = ("kl", "logprobs", "values", "returns")
        tokens = {name: [x for e in episodes for x in e[name]] for name in names}
        kl = sum(tokens["kl"]) / count
        score = sum(e["score"] for e in episodes) / count
        errors = [r - v for r, v in zip(tokens["returns"], tokens["values"])]
        return {
            "objective/scores": score,
            "objective/kl": kl,
            "objective/entropy": -sum(tokens["logprobs"]) / count,
            "objective/non_score_reward": -self.beta * kl,
            "objective/rlhf_reward": score - self.beta * kl,
            "val/explained_variance": 1 - variance(errors) / variance(tokens["returns"]),
            "val/eos_rate": sum(e["ended"] for e in episodes) / count,
            "val/sampler_logprob_gap": 0.0,
            "response_length": sum(e["n"] for e in episodes) / count,
            "beta": self.beta,
            **{name: sum(s[name] for s in stats) / len(stats) for name in stats[0]},
        }


def variance(xs):
    return torch.tensor(xs, dtype=torch.float64).var(correction=0).item()


@pytest.mark.parametrize("settings", SETTINGS)
def test_main_equals_a_loop_over_single_sequences(settings, tmp_path, monkeypatch):
    """Every score, log-prob, value, reward, advantage, return, gradient, step and figure of three updates,
    with other ids than pad after the end in one setting."""
    garbage = settings == "gpt2"
    trace, metrics, args = trace_main(tmp_path, monkeypatch, settings, garbage, total_episodes=24)
    oracle = Oracle(args)
    for ours, theirs in zip(trace.steps[0].before[:-2], oracle.parameters):
        assert torch.equal(ours.double(), theirs), "policy and critic start as SFT and reward model"
    adam = conftest.Adam(trace.steps[0].before, eps=1e-5)
    peaks = torch.full([len(adam.x)], args.learning_rate)
    peaks[-2:] = args.value_learning_rate  # of the value head
    per_update = args.num_ppo_epochs * args.num_mini_batches
    assert len(trace.steps) == 3 * per_update == len(trace.minibatches) and len(metrics) == 3
    moved = 0.0
    for u in range(3):
        steps = trace.steps[u * per_update : (u + 1) * per_update]

        # Phases 1 to 3: what every token of every episode was worth
        conftest.set_parameters(oracle.parameters, steps[0].before)
        episodes = oracle.episodes(*trace.rollouts[u])
        assert len({(e["n"], e["response"][-1] if e["ended"] else None) for e in episodes}) == len({*KINDS})
        (scores, kl, mask, beta), rewards = trace.calls["penalized_rewards"][u]
        (_, values, *_), (advantages, returns) = trace.calls["gae"][u]
        assert mask.tolist() == [[1.0] * e["n"] + [0.0] * (T - e["n"]) for e in episodes]
        assert scores.tolist() == pytest.approx([e["score"] for e in episodes], abs=1e-5)
        assert beta == pytest.approx(oracle.beta, rel=1e-6)
        ours = dict(kl=kl, values=values, rewards=rewards, advantages=advantages, returns=returns)
        ours["whitened"] = trace.calls["whiten"][u][1]
        for name, tensor in ours.items():
            for row, e in zip(tensor.tolist(), episodes, strict=True):
                assert row[: e["n"]] == pytest.approx(e[name], abs=1e-5, rel=1e-5), name
                assert name == "values" or not any(row[e["n"] :]), f"{name} on padding"
        assert u > 0 or values.eq(0).all(), "values start at 0, not as a random layer's noise"
        moved = max(moved, max(abs(x) for e in episodes for x in e["kl"]))

        # Phase 4: every gradient, every figure and the parameters after every step
        fraction = (1 / 3, 2 / 3, 1 / 3)[u]  # 2 updates of warm-up, linearly to 0 after the last
        stats = []
        for step, rows in zip(steps, trace.minibatches[u * per_update :]):
            conftest.set_parameters(oracle.parameters, step.before)
            gradients, stat = oracle.minibatch([episodes[i] for i in rows])
            stats.append(stat)
            for ours, theirs in zip(step.gradients, gradients, strict=True):
                torch.testing.assert_close(ours.double(), theirs, atol=1e-5, rtol=1e-4)
            for ours, theirs in zip(step.after, adam.step(step.gradients, peaks * fraction), strict=True):
                torch.testing.assert_close(ours.double(), theirs, atol=1e-5, rtol=1e-4)

        # Phase 5
        expected = oracle.metrics(episodes, stats)
        times = [metrics[u].pop(f"time/{name}") for name in ("rollout", "score", "update")]
        assert metrics[u].pop("eps") * sum(times) == pytest.approx(args.batch_size, rel=1e-3)
        expected |= {"update": u + 1, "episode": 8 * (u + 1), "lr": args.learning_rate * fraction}
        assert metrics[u].keys() == expected.keys()
        for name in expected:
            assert metrics[u][name] == pytest.approx(expected[name], abs=2e-5, rel=2e-5), name
        error = metrics[u]["objective/kl"] / args.adaptive_kl_target - 1  # Ziegler et al. 2019, section 2.2
        oracle.beta *= 1 + max(-0.2, min(0.2, error)) * args.batch_size / 1000

    saved = transformers.AutoModelForCausalLM.from_pretrained(args.output_dir)
    for ours, last in zip(saved.parameters(), trace.steps[-1].after):
        assert torch.equal(ours, last)
    # Two layers of policy and critic, for 2 micro-batches of every step
    assert trace.recomputed.count(True) == (2 * 2 * 2 * 12 if args.gradient_checkpointing else 0)
    # Mistakes could show in this run: policy and reference apart, values at work, both clips active
    assert moved > 0.05 and max(abs(v) for e in episodes for v in e["values"]) > 0.05
    assert metrics[1]["policy/clipfrac_avg"] > 0 and metrics[1]["val/clipfrac_avg"] > 0
    assert metrics[0]["policy/grad_norm"] > args.max_grad_norm


@pytest.mark.parametrize("epochs, minibatches, generations", [(1, 1, 1), (3, 4, 2)])
def test_steps_minibatches_and_prompts_are_permutations(
    epochs, minibatches, generations, tmp_path, monkeypatch
):
    """An epoch sees every episode once, in another order each time; prompts come in permutations of the whole
    set, also where an update crosses its end, each --num_generations times in a row."""
    flags = dict(total_episodes=24, num_ppo_epochs=epochs, num_mini_batches=minibatches)
    flags |= dict(num_generations=generations, train=TRAIN[:5])
    trace, metrics, _ = trace_main(tmp_path, monkeypatch, **flags)
    assert len(trace.steps) == len(trace.minibatches) == 3 * epochs * minibatches
    assert [m["episode"] for m in metrics] == [8, 16, 24] and [m["update"] for m in metrics] == [1, 2, 3]
    starts = range(0, len(trace.steps), minibatches)
    passes = [sum(trace.minibatches[i : i + minibatches], []) for i in starts]
    assert {len(rows) for rows in trace.minibatches} == {8 // minibatches}
    assert all(sorted(rows) == list(range(8)) for rows in passes)
    assert len({*map(tuple, passes)}) == len(passes), "two passes in the same order"
    every = [tiny_tokenizer().decode(ids) for prompts, *_ in trace.rollouts[:3] for ids in prompts]
    seen = every[::generations]
    assert len(every) == 24 and every == [prompt for prompt in seen for _ in range(generations)]
    epochs = [seen[i : i + 5] for i in range(0, len(seen) - 4, 5)]
    assert all(sorted(epoch) == sorted(f"Q: {prompt}\nA:" for prompt in TRAIN[:5]) for epoch in epochs)
    assert len({*map(tuple, epochs)}) > 1, "every epoch has the same order"


def test_prompts_and_noise_depend_on_the_seed(tmp_path, monkeypatch):
    """Another --seed: other prompts, minibatches and uniforms in every update; the same seed: the same."""
    seen = []
    for i, seed in enumerate((1, 2, 1)):
        with monkeypatch.context() as patch:
            trace, *_ = trace_main(tmp_path / str(i), patch, seed=seed)
        uniforms = [rollout[-1] for rollout in trace.rollouts]
        assert torch.equal(*uniforms[2:]), "the held-out responses of both models need the same numbers"
        assert not torch.equal(*uniforms[:2]) and all(0 <= u.min() and u.max() < 1 for u in uniforms)
        seen.append([[r[0] for r in trace.rollouts[:2]], trace.minibatches, [u.tolist() for u in uniforms]])
    assert seen[0] == seen[2]
    assert all(a != b for a, b in zip(*seen[:2]))


# ---- The run is refused or stops where it would go wrong in silence ----


@pytest.mark.parametrize("which, message", [("reference", "KL is not 0"), ("update", "ratio is not 1")])
def test_what_must_be_0_is_checked(which, message, tmp_path, monkeypatch):
    """A reference that is another model than the policy, or new log-probs that differ from the old ones."""
    _, _, args = trace_main(tmp_path, monkeypatch, run=False)
    real, calls = ppo.forward, []

    def forward(model, *rest, **kwargs):
        logprobs, *others = real(model, *rest, **kwargs)
        calls.append(model)
        wrong = model is not calls[0] if which == "reference" else torch.is_grad_enabled()
        return logprobs + 1e-3 * wrong, *others

    monkeypatch.setattr(ppo, "forward", forward)
    with pytest.raises(AssertionError, match=message):
        ppo.main(args)


@pytest.mark.parametrize("gap", [1e-3, -1e-3, math.nan])
def test_a_sampler_that_is_another_model_is_refused(gap, tmp_path, monkeypatch, refused):
    """Log-probs of the sampler that differ from those of the update's forward."""
    with refused("log-probs of sampler and forward differ"):
        trace_main(tmp_path, monkeypatch, gap=gap)


@pytest.mark.parametrize("size, rate", [(200_000, 1.5e-4), (320_000, 3e-6)])
def test_learning_rate_by_size(size, rate, tmp_path, monkeypatch):
    """Below 10M parameters of the policy, which its critic (6.4M here) does not count towards."""
    models = (tiny_model("gpt2", positions=size), tiny_reward_model("gpt2", positions=200_000))
    flags = ppo_flags(tmp_path, *models, tiny_tokenizer(), TRAIN)
    rates, adam = [], torch.optim.Adam

    def stop(groups, **options):
        rates.append([group["peak"] for group in adam(groups, **options).param_groups])
        raise KeyboardInterrupt

    monkeypatch.setattr(torch.optim, "Adam", stop)
    with pytest.raises(KeyboardInterrupt):
        ppo.main(ppo.Args(**flags))
    assert rates == [[rate, 1e-3]]
