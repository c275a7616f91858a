"""Do the tests notice mistakes? Put each of these into a copy of ppo_rlhf.py and see that a test fails.

    python tests/mutations.py [WORD ...]        # all, or only those whose name holds one of the words

Every mutant is one of the mistakes that RLHF code in use has had, as a replacement in the source text that must occur
exactly once. The fast test files run against a folder with the copy (RLHF_SCRIPTS names it) until the first failure.
Prints a table; exit status 1 if a mutant survives or its text is no longer found, 2 if the tests fail without any.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TESTS = Path(__file__).resolve().parent
SCRIPTS = TESTS.parent
FAST = ["test_math.py", "test_ppo_step.py", "test_forward.py", "test_rollout.py", "test_remedies.py",
        "test_cuda.py"]  # the quickest to find something first

# name: (text in ppo_rlhf.py, what stands there instead)
MUTANTS = {
    # ---- rewards and advantages ----
    "score one slot late": ("last = mask.sum(1).long() - 1", "last = mask.sum(1).long().clamp(max=mask.shape[1] - 1)"),
    "KL sign flipped": ("rewards = -beta * (logprobs", "rewards = beta * (logprobs"),
    "KL penalty left out on the last token": (
        "rewards.scatter_add(1, last[:, None], scores[:, None].to(rewards.dtype))",
        "rewards.scatter(1, last[:, None], scores[:, None].to(rewards.dtype))",
    ),
    "value not masked after EOS": ("    values = values * mask  # [B, T]\n", ""),
    "advantage not masked after EOS": ("next_advantage) * mask[:, t]", "next_advantage)"),
    "gamma left out of the bootstrap": ("rewards[:, t] + gamma * next_value", "rewards[:, t] + next_value"),
    "lambda left out": ("delta + gamma * lam * next_advantage", "delta + gamma * next_advantage"),
    "value of the token, not of the state before it": (
        "delta = rewards[:, t] + gamma * next_value - values[:, t]",
        "delta = rewards[:, t] + gamma * next_value - next_value",
    ),
    "advantages not whitened": ("advantages = whiten(advantages, mask)", "advantages = whiten(advantages, mask) * 0 + advantages"),
    "whitened over padding": ("masked_var(x, mask) + 1e-8", "x.var() + 1e-8"),
    "whitened without the shift": ("whitened = (x - mean) * torch.rsqrt", "whitened = x * torch.rsqrt"),
    "missing-EOS penalty dropped": ("args.missing_eos_penalty * ~ended", "args.missing_eos_penalty * 0"),
    "missing-EOS penalty for EOS in the last slot": (
        "ended = responses.gather(1, response_lengths[:, None] - 1)[:, 0] == eos_id",
        "ended = response_lengths < T",
    ),
    # ---- losses ----
    "policy clip on the wrong side": ("torch.max(-advantages * ratio", "torch.min(-advantages * ratio"),
    "value clip on the wrong side": ("torch.max((new_values - returns)", "torch.min((new_values - returns)"),
    "values clipped around the returns": ("clipped = old_values + (new_values - old_values)", "clipped = returns + (new_values - returns)"),
    "entropy bonus without a gradient": ("all_logprobs if entropy_grad else all_logprobs.detach()", "all_logprobs.detach()"),
    "entropy bonus with the wrong sign": ("- args.entropy_coef * entropy", "+ args.entropy_coef * entropy"),
    "loss divided per micro-batch": ("((loss * m).sum() / num_tokens).backward()", "((loss * m).sum() / m.sum()).backward()"),
    "loss averaged over padding": ("((loss * m).sum() / num_tokens).backward()", "loss.mean().backward()"),
    "tied embeddings with a dense gradient too": ("        embeddings.sparse = True\n", "        pass\n"),
    "sparse gradient of untied embeddings": ("is embeddings.weight:", "is not None:"),
    "gradients not zeroed": ("            optimizer.zero_grad()\n", ""),
    "gradients not clipped": ("clip_grad_norm_(parameters, args.max_grad_norm)", "clip_grad_norm_(parameters, 1e9)"),
    "weight decay": ("weight_decay=0.0", "weight_decay=0.01"),
    "learning rate does not decay": ("1 - (update - 1) / num_updates)", "1.0)"),
    "value head not trained": ('"peak": args.value_learning_rate}', '"peak": 0.0}'),
    "value head's learning rate ignored": ('"peak": args.value_learning_rate}', '"peak": args.learning_rate}'),
    "value head left out of the clipping": (
        "parameters = [p for model in (*trained, value_head) for p in model.parameters()]",
        "parameters = [p for model in trained for p in model.parameters()]",
    ),
    "value head starts at random": ("torch.nn.init.zeros_(value_head.weight), ", ""),
    # ---- log-probs, masks, slots ----
    "temperature left out of the policy's log-probs": ("(hidden.float()).div_(temperature)", "(hidden.float())"),
    "temperature left out of the reference's": ("(ref_hidden).div_(args.temperature)", "(ref_hidden)"),
    "temperature left out of the sampler": ("(hidden.float()) / temperature)", "(hidden.float()))"),
    "mask off by one (EOS left out)": (
        "mask = (torch.arange(T, device=device) < response_lengths[:, None])",
        "mask = (torch.arange(T, device=device) < (response_lengths[:, None] - 1).clamp(min=1))",
    ),
    "mask off by one (a pad too many)": (
        "mask = (torch.arange(T, device=device) < response_lengths[:, None])",
        "mask = (torch.arange(T, device=device) <= response_lengths[:, None])",
    ),
    "mask from ids": (
        "mask = (torch.arange(T, device=device) < response_lengths[:, None]).float()",
        "mask = (responses != pad_id).float()",
    ),
    "output layer on the wrong slot": (
        "slots = prompt_lengths[:, None] - 1 + torch.arange(T",
        "slots = prompt_lengths[:, None] + torch.arange(T",
    ),
    "sequences rolled by one too few": ("(prompts.shape[1] - prompt_lengths)[:, None]", "(prompts.shape[1] - prompt_lengths - 1)[:, None]"),
    "micro-batch cut to the wrong length": ("max(lengths[i] for i in chunk)", "lengths[chunk[0]]"),
    "reference not frozen": (
        "reference = copy.deepcopy(policy).eval().requires_grad_(False)",
        "reference = policy",
    ),
    "dropout on": ("setattr(config, name, 0.0)", "pass"),
    "old log-probs of the current policy": ("old, a, v, r = old_logprobs[rows, :t]", "old, a, v, r = new_logprobs.detach()"),
    # ---- scores ----
    "score read at a pad": ("last = hidden[torch.arange(len(hidden), device=hidden.device), lengths - 1]", "last = hidden[:, -1]"),
    "score read one token early": ("device=hidden.device), lengths - 1]", "device=hidden.device), lengths - 2]"),
    "score not normalized": (" - config.reward_mean) / config.reward_std", ")"),
    # ---- sampler ----
    "positions not corrected in the prefill": (
        "position_ids=(prompt_mask.cumsum(1) - 1).clamp(min=0)",
        "position_ids=torch.arange(P, device=device).expand(B, P)",
    ),
    "positions not corrected in the decode steps": (
        "position = prompt_mask.sum(1, keepdim=True)",
        "position = torch.full((B, 1), P, device=device)",
    ),
    "left pads are read": ("mask = torch.where(real, 0.0, -math.inf)", "mask = torch.where(slots < P, 0.0, -math.inf).expand(B, 1, 1, S)"),
    "newest token is not read": ("mask.index_fill_(3, P - 1 + step, 0.0)", "mask.index_fill_(3, P - 2 + step, 0.0)"),
    "a slot too many is read": ("mask.index_fill_(3, P - 1 + step, 0.0)", "mask.index_fill_(3, P + step, 0.0)"),
    "parts of the cdf not added up": ("parts[:, :-1, -1].cumsum(-1)", "parts[:, :-1, -1]"),
    "tokens beyond the vocabulary": (".clamp(max=p.shape[1] - 1)", ""),
    "done rows go on sampling": ("        token.masked_fill_(done[:, None], pad_id)\n", ""),
    "length without EOS": (
        "        lengths.add_(~done)\n        done.logical_or_(token[:, 0] == eos_id)\n",
        "        done.logical_or_(token[:, 0] == eos_id)\n        lengths.add_(~done)\n",
    ),
    "stops when any row is done": ("if t % 8 == 0 and done.all()", "if done.any()"),
    "impossible tokens at u = 0": ("searchsorted(cdf, u, right=True)", "searchsorted(cdf, u)"),
    # ---- the CUDA graph's step ----
    "step counted by the host": ("uniforms.index_select(0, step).T", "uniforms[int(step)][:, None]"),
    "position replaced, not changed": ("        position.add_(1)\n", "        position.data = position + 1\n"),
    "done replaced, not changed": (
        "        done.logical_or_(token[:, 0] == eos_id)\n",
        "        done.data = done | (token[:, 0] == eos_id)\n",
    ),
    "capture taken for a step": ("run_step, first = graph.replay, 3", "run_step, first = graph.replay, 4"),
    # ---- bookkeeping ----
    "KL metric averaged over slots": ("episode_kl = kl.sum(1)", "episode_kl = kl.mean(1)"),
    "entropy metric includes padding": ("-(old_logprobs * mask).sum(1).mean()", "-(old_logprobs * mask + (mask - 1)).sum(1).mean()"),
    "explained variance over padding": ("masked_var(returns - values, mask) / masked_var(returns, mask)", "(returns - values).var() / returns.var()"),
    "one minibatch whatever --num_mini_batches says": ("torch.randperm(B).split(B // args.num_mini_batches)", "torch.randperm(B).split(B)"),
    "every epoch shuffled alike": ("for _ in range(args.num_ppo_epochs)]\n        minibatches", "for _ in range(1)] * args.num_ppo_epochs\n        minibatches"),
    # ---- what only CUDA runs ----
    "sampler never refreshed": ("sampler.load_state_dict(policy.state_dict())", "pass"),
    "sampler refreshed with the policy's graph": (
        "sampler.load_state_dict(policy.state_dict())",
        "torch._foreach_copy_(list(sampler.parameters()), list(policy.parameters()))",
    ),
    "sampler forgotten on resume": ('        sampler.load_state_dict(state["policy"])\n', ""),
    "uniforms made on the host": ("uniforms = torch.rand(T, B, device=device)", "uniforms = torch.rand(T, B)"),
    "statistics left on the host": ("stats = torch.zeros(len(minibatches), 10, device=device)", "stats = torch.zeros(len(minibatches), 10)"),
    "slots made on the host": ("slots = torch.arange(S, device=device)", "slots = torch.arange(S)"),
    "old log-probs by the sampler": (
        "policy, value_head, ids, starts, labels, m, args.temperature, autocast, critic=critic",
        "sampler, value_head, ids, starts, labels, m, args.temperature, autocast, critic=critic",
    ),
    "a critic in bf16": ("copy.deepcopy(reward_models[0].base_model).to(device)", "copy.deepcopy(reward_models[0].base_model).to(device, torch.bfloat16)"),
    "frequencies in bf16": ("    for parameter in model.base_model.parameters():\n        parameter.data = parameter.data.bfloat16()\n", "    model.base_model.bfloat16()\n"),
    "logits in bf16": (
        "    all_logprobs = policy.get_output_embeddings()(hidden.float())",
        "    with autocast:\n        logits = policy.get_output_embeddings()(hidden)\n    all_logprobs = logits.float()",
    ),
    "sampler's logits in bf16": ("    if head is not None:\n", "    if head is not None and head.bfloat16() is None:\n"),
    "a stream for every rollout": ("@functools.cache\ndef side_stream", "def side_stream"),
    "slices of other luck": ("uniforms.split(size, dim=1)", "[uniforms[:, :size]] * len(prompts)"),
    "done asked in every step": ("        sample_next(hidden[:, 0])\n", "        sample_next(hidden[:, 0]), done.all().item()\n"),
    # ---- remedies ----
    "beta adapted the wrong way": ("beta *= 1 + min(max(error", "beta *= 1 - min(max(error"),
    "beta adapted without the clip": ("min(max(error, -0.2), 0.2)", "error"),
    "beta adapted, but not used": ("old_logprobs, ref_logprobs, mask, beta)", "old_logprobs, ref_logprobs, mask, args.beta)"),
    "adapted beta forgotten on resume": ('state["seconds"], state["beta"]', 'state["seconds"], args.beta'),
    "the worst score of an ensemble is the best": ("scores.amin(0)", "scores.amax(0)"),
    "an ensemble's spread rewarded": ("scores.mean(0) - (coef", "scores.mean(0) + (coef"),
    "length rewarded": ("- args.length_penalty * response_lengths", "+ args.length_penalty * response_lengths"),
    "whitened rewards lose their mean": ("whiten(rewards, mask, shift_mean=False)", "whiten(rewards, mask)"),
    "demonstrations at the sampler's temperature": ("(hidden.float()), labels)", "(hidden.float()) / args.temperature, labels)"),
    "a separate critic that is not asked": ("response_states(critic, ids,", "response_states(policy, ids,"),
    "a separate critic forgotten on resume": ('critic.load_state_dict(state["critic"])', "pass"),
    "demonstrations unweighted": ("(args.ptx_coef * ptx_loss).backward()", "ptx_loss.backward()"),
}  # fmt: skip


def run_tests(folder):
    """(seconds, the first failing test or None) of the fast tests against the scripts in `folder`."""
    start = time.time()
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "-q", "--no-header", "-p", "no:cacheprovider", *FAST],
        cwd=TESTS, env=dict(os.environ, RLHF_SCRIPTS=str(folder)), capture_output=True, text=True,
    )  # fmt: skip
    failed = re.search(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
    if done.returncode not in (0, 1):
        return time.time() - start, f"(does not run: pytest exit status {done.returncode})"
    return time.time() - start, failed[1] if failed else None


def main():
    words = sys.argv[1:]
    chosen = {name: edit for name, edit in MUTANTS.items() if not words or any(word in name for word in words)}
    source = (SCRIPTS / "ppo_rlhf.py").read_text(encoding="utf-8")
    stale = [name for name, (old, _) in chosen.items() if source.count(old) != 1]
    for name in stale:
        print(f"{name}: its text occurs {source.count(chosen[name][0])} times in ppo_rlhf.py, not once: {chosen[name][0]!r}")
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        for script in SCRIPTS.glob("*.py"):
            shutil.copy(script, folder)
        _, failed = run_tests(folder)
        if failed:
            print(f"the tests fail without any mutation: {failed}")
            sys.exit(2)
        survivors = []
        width = max(map(len, chosen))
        for name, (old, new) in chosen.items():
            if name in stale:
                continue
            (folder / "ppo_rlhf.py").write_text(source.replace(old, new), encoding="utf-8")
            seconds, failed = run_tests(folder)
            print(f"{name:{width}}  {'caught by ' + failed if failed else 'SURVIVES'}  ({seconds:.0f} s)", flush=True)
            if not failed or failed.startswith("(does not run"):
                survivors.append(name)
    print(f"{len(chosen) - len(stale) - len(survivors)} of {len(chosen)} mistakes caught")
    sys.exit(1 if survivors or stale else 0)


if __name__ == "__main__":
    main()
