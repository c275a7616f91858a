"""Stage 3 of RLHF: PPO. The SFT model learns to write what scores highly: python ppo_rlhf.py --beta 0.1

Each update: (1) the policy samples responses to a batch of prompts, (2) the reward model scores them, policy
and frozen reference (the SFT model) give log-probs, a critic values, (3) rewards become advantages, (4) a few
epochs of clipped policy-gradient steps maximize score(prompt, response) - beta * KL(policy || reference).
Without a KL penalty the policy exploits the reward model's errors (Gao et al. 2022) and forgets how to write.

How the tensors line up. A row holds a prompt and its response; B rows, P prompt slots, T response slots:

    rollout   [ pad pad q1 q2 q3 | r1 r2 r3 EOS pad ]  left-padded: every row samples into the same slot
    training  [ q1 q2 q3 r1 r2 r3 EOS pad pad pad   ]  rolled left: causal attention needs no mask at all
                      |  |  |  |
    predicts          r1 r2 r3 EOS                     the position before a token predicts it: its logits
    value             V1 V2 V3 V4                      give the log-prob, the critic's state the value

    [B, T]            r1 r2 r3 EOS pad
    mask              1  1  1  1   0                   every sampled token, EOS too; from lengths, not ids
    KL penalty        x  x  x  x                       on every real token
    score                      x                       on the last real token; after it V = 0

Sources: Ziegler et al. 2019 (openai/lm-human-preferences), Stiennon et al. 2020, Ouyang et al. 2022, "The N
Implementation Details of RLHF with PPO" (Huang et al. 2023, vwxyzjn/lm-human-preference-details).
"""

import copy
import inspect
import json
import os
import sys
import time
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from types import SimpleNamespace

import datasets
import torch
import torch.nn.functional as F
import transformers
import tyro
from safetensors.torch import save_file
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    StaticCache,
)


@dataclass
class Args:
    # ---- input and output ----
    sft_model_path: str = "runs/sft"  # policy at the start and frozen reference: a folder or a Hub name
    reward_model_path: str = "runs/reward_model"  # one label, same tokenizer; empty for a rule in reward_fn
    dataset_name: str = "data/prompts"  # folder with train.jsonl and test.jsonl, or a Hub name
    dataset_train_split: str = "train"  # prompts to train on
    dataset_test_split: str = "test"  # held-out prompts
    output_dir: str = "runs/ppo"  # run folder
    max_prompt_length: int = 256  # in tokens; longer prompts are left out
    # ---- rollout ----
    total_episodes: int = 3072  # responses sampled over the run; updates = total_episodes / batch_size
    batch_size: int = 128  # episodes per update
    rollout_batch_size: int = 128  # episodes sampled at a time; fewer need less memory for keys and values
    max_new_tokens: int = 64  # longest response in tokens; good ones of the shipped task take about 50
    temperature: float = 0.7  # of the sampler and of every log-prob (Ziegler et al. 2019)
    # ---- rewards and advantages ----
    beta: float = 0.1  # KL penalty coefficient; 0 invites reward hacking, 0.02 to 0.2 is usual
    missing_eos_penalty: float = 1.0  # subtracted from the score of a response cut off at max_new_tokens
    length_penalty: float = 0.0  # subtracted from the score per response token
    adaptive_kl_target: float = 0.0  # if positive, beta follows the KL to this many nats per response
    gamma: float = 1.0  # discount per token; 1 as a response is judged as one
    lam: float = 1.0  # GAE's lambda: 0 trusts the values, 1 the returns; 0.95 learns less from long responses
    # ---- update ----
    learning_rate: float = 0.0  # peak, policy and critic; 0 chooses 1.5e-4 for policies below 10M, else 3e-6
    value_learning_rate: float = 1e-3  # of the value head alone, which starts at zero and must catch up
    warmup_steps: int = 2  # updates of linear warm-up, as the first values are wrong; then linear decay
    num_ppo_epochs: int = 2  # passes over each batch of episodes
    num_mini_batches: int = 8  # optimizer steps per pass
    per_device_train_batch_size: int = 16  # episodes per forward pass; the gradient changes by rounding alone
    cliprange: float = 0.2  # a probability ratio gains nothing outside 1 - cliprange ... 1 + cliprange
    cliprange_value: float = 0.2  # the same for values: how far each may move from the rollout's
    vf_coef: float = 0.1  # weight of the value loss; small, as policy and values may share a backbone
    separate_critic: bool = True  # values from a trained copy of the reward model, if any; else the policy's
    entropy_coef: float = 0.0  # weight of an entropy bonus, against mode collapse
    max_grad_norm: float = 1.0  # gradients are clipped to this norm; 0 for none
    gradient_checkpointing: bool = False  # recompute activations in the backward pass: slower, less memory
    seed: int = 1  # of prompt order, sampler and minibatches
    # ---- logging and checkpoints ----
    eval_steps: int = 10  # log sample responses every this many updates
    save_steps: int = 10  # updates between checkpoints
    track: bool = False  # log to Weights & Biases
    resume: bool = False  # resume from the checkpoint in output_dir
    overwrite: bool = False  # replace what is in output_dir


# ---- The mathematics: [B, T] tensors, with a mask that is 1 on real response tokens and 0 on padding ----
def masked_mean(x, mask):
    """Mean of x over the real tokens -> scalar."""
    return (x * mask).sum() / mask.sum()


def masked_var(x, mask):
    """Variance of x over the real tokens -> scalar."""
    return masked_mean((x - masked_mean(x, mask)) ** 2, mask)


def whiten(x, mask):
    """x with mean 0 and standard deviation 1 over the real tokens, 0 on padding: [B, T] -> [B, T].
    Were padding counted, the deviation would shrink with its share, and the advantages grow by as much."""
    return (x - masked_mean(x, mask)) * torch.rsqrt(masked_var(x, mask) + 1e-8) * mask


def gather_logprobs(all_logprobs, labels):
    """Log-prob of each label, from those of the vocabulary: [B, T, V], [B, T] -> [B, T]."""
    return all_logprobs.gather(-1, labels[..., None]).squeeze(-1)


def penalized_rewards(scores, kl, mask, beta):
    """Reward of each token: -beta * KL, plus the score on the last real one: [B], [B, T], [B, T] -> [B, T].
    kl is log pi - log pi_ref of the sampled token, 0 on padding (the k1 estimate): unbiased, and summed over
    tokens it makes the return score - beta * KL. One slot later, most scores would fall on padding."""
    last = mask.sum(1).long() - 1  # [B]
    return (-beta * kl).scatter_add(1, last[:, None], scores[:, None])


def gae(rewards, values, mask, gamma, lam):
    """Generalized advantage estimation (Schulman et al. 2015, eq. 16) -> advantages [B, T], returns [B, T].
    delta_t = r_t + gamma * V_{t+1} - V_t and A_t = delta_t + gamma * lam * A_{t+1}, from the last token back.
    V and A after the last real token are 0: the episode is over; a pad's value would leak into them all."""
    values = values * mask  # [B, T]
    advantages = torch.zeros_like(values)  # [B, T]
    next_value = torch.zeros_like(values[:, 0])  # [B]
    next_advantage = torch.zeros_like(values[:, 0])  # [B]
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]  # [B]
        next_advantage = (delta + gamma * lam * next_advantage) * mask[:, t]  # [B]
        next_value = values[:, t]
        advantages[:, t] = next_advantage
    return advantages, advantages + values


# ---- What is sampled, its log-probs, values and scores; the sampler itself is below `main` ----
def roll_left(prompts, responses, starts):
    """[pad pad q q | r r] -> [q q r r pad pad]: prompts [B, P], responses [B, T] -> sequences [B, P+T]."""
    joined = torch.cat([prompts, responses], 1)  # [B, P+T]
    padding = prompts.shape[1] - starts  # [B]
    slots = torch.arange(joined.shape[1], device=joined.device) + padding[:, None]  # [B, P+T]
    return joined.gather(1, slots % joined.shape[1])


def sample(model, tokenizer, rows, args, end_ids):
    """Sample a response to the prompt of each data row -> a namespace of tensors, laid out for training."""
    prompts = {"input_ids": [row["prompt_ids"] for row in rows]}
    prompts = tokenizer.pad(prompts, padding_side="left", return_tensors="pt").to(model.device)
    uniforms = torch.rand(args.max_new_tokens, len(rows), device=model.device)  # [T, B]
    if model.device.type == "cuda":
        model = bf16_copy(model)
    ends = torch.tensor(end_ids, device=model.device)  # [E]
    parts = []
    for indices in torch.arange(len(rows)).split(args.rollout_batch_size):
        ids = prompts.input_ids[indices]
        mask = prompts.attention_mask[indices]
        u = uniforms[:, indices]
        parts.append(rollout(model, ids, mask, u, args.temperature, ends, tokenizer.pad_token_id))
    responses, response_lengths, ended, logprobs = map(torch.cat, zip(*parts))
    starts = prompts.attention_mask.sum(1)
    slots = torch.arange(args.max_new_tokens, device=model.device)  # [T]
    return SimpleNamespace(
        sequences=roll_left(prompts.input_ids, responses, starts),  # [B, P+T]
        starts=starts,  # [B]
        lengths=starts + response_lengths,  # [B]
        responses=responses,  # [B, T]
        response_lengths=response_lengths,  # [B]
        mask=(slots < response_lengths[:, None]).float(),  # [B, T]
        ended=ended,  # [B]
        logprobs=logprobs,  # [B, T] as the sampler computed them
    )


def micro_batches(batch, indices, size):
    """Rows `indices` of a batch, `size` at a time and sorted by length, so that little padding is left.
    Yields indices [b], ids [b, L], response starts [b], labels [b, T], and T, the longest response."""
    order = batch.lengths[indices].argsort(stable=True).cpu()
    for idx in indices[order].split(size):
        L = batch.lengths[idx].max()
        T = batch.response_lengths[idx].max()
        ids = batch.sequences[idx, :L]
        labels = batch.responses[idx, :T]
        yield idx, ids, batch.starts[idx], labels, T


def hidden_states(model, ids):  # [shared]
    """Right-padded ids [B, L] -> [B, L, d]. bf16 on CUDA; weights stay fp32, or small steps would be lost."""
    with torch.autocast(ids.device.type, torch.bfloat16, enabled=ids.is_cuda):
        return model.base_model(ids, use_cache=False).last_hidden_state.float()


def response_states(model, ids, starts, T):
    """Hidden states that predict response tokens 1 ... T: [b, L], [b] -> [b, T, d]."""
    hidden = hidden_states(model, ids[:, :-1])  # [b, L-1, d]: the last token predicts nothing
    slots = starts[:, None] - 1 + torch.arange(T, device=ids.device)  # [b, T]: before each token
    slots = slots.clamp(max=hidden.shape[1] - 1)  # in rows that end earlier
    return torch.take_along_dim(hidden, slots[..., None], dim=1)


def forward(model, ids, starts, labels, temperature, entropy_coef=0.0, critic=None):
    """Log-probs and entropies of response tokens, [b, T] each, and hidden states [b, T, d] for the values.
    No logits of whole sequences: [b, L, V] would be the largest tensor of the run. The temperature is in all
    log-probs: what is sampled is what is scored. Old, new and reference log-probs all come from here."""
    T = labels.shape[1]
    hidden = response_states(model, ids, starts, T)  # [b, T, d]
    logits = model.get_output_embeddings()(hidden) / temperature  # [b, T, V]
    all_logprobs = logits.log_softmax(-1)  # [b, T, V]
    logprobs = all_logprobs if entropy_coef else all_logprobs.detach()  # no bonus: no gradient, less memory
    entropy = -(logprobs.exp() * logprobs).sum(-1)  # [b, T]
    if critic is not None:
        hidden = response_states(critic, ids, starts, T)  # [b, T, d]
    return gather_logprobs(all_logprobs, labels), entropy, hidden


def reward_fn(reward_model, tokenizer, sequences, starts, lengths, rows):
    """YOUR REWARD GOES HERE: one float per response, on any scale -> [b].
    sequences [b, L]: prompt and response, right-padded; starts, lengths [b]: where the response starts and
    ends; rows: the data rows, for a rule that compares with a column. A rule, with --reward_model_path "":

        spans = zip(sequences, starts, lengths)
        texts = [tokenizer.decode(ids[start:end], skip_special_tokens=True) for ids, start, end in spans]
        return torch.tensor([float(row["answer"] in text) for row, text in zip(rows, texts)])
    """
    if sequences.max() >= reward_model.get_input_embeddings().num_embeddings:
        fail(f"the policy sampled id {sequences.max()}, for which the reward model has no embedding")
    hidden = hidden_states(reward_model, sequences)  # [b, L, d]
    # At the last real token, by length: the last id that is not a pad is one token early if pad == EOS
    last_hidden = torch.take_along_dim(hidden, lengths[:, None, None] - 1, dim=1)  # [b, 1, d]
    return reward_model.score(last_hidden).flatten()


@torch.no_grad()
def score(reward_model, tokenizer, batch, rows, size):
    """`reward_fn`, `size` responses at a time -> scores [B]."""
    scores = torch.zeros(len(rows), device=batch.lengths.device)  # [B]
    for idx, ids, starts, _, _ in micro_batches(batch, torch.arange(len(rows)), size):
        mb_rows = [rows[i] for i in idx]
        mb_scores = reward_fn(reward_model, tokenizer, ids, starts, batch.lengths[idx], mb_rows)  # [b]
        scores[idx] = mb_scores.to(scores)
    return scores


def main(args):
    if args.temperature <= 0 or args.beta < 0 or (args.adaptive_kl_target and not args.beta):
        fail("--temperature must be above 0, --beta at least 0, and above with --adaptive_kl_target")
    if args.batch_size % args.num_mini_batches or args.total_episodes % args.batch_size:
        fail("--total_episodes must be a multiple of --batch_size, and that of --num_mini_batches")
    changeable = ("gradient_checkpointing", "per_device_train_batch_size", "rollout_batch_size")
    state = load_checkpoint(args, (args.sft_model_path, args.reward_model_path), changeable)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    B = args.batch_size
    T = args.max_new_tokens
    size = args.per_device_train_batch_size
    temperature = args.temperature
    # ---- models and prompts ----
    policy, tokenizer = load_pretrained(AutoModelForCausalLM, args.sft_model_path)
    end_ids = find_end_ids(policy, tokenizer)
    reward_model = None
    reward_tokenizer = tokenizer
    if args.reward_model_path:
        auto_class = AutoModelForSequenceClassification
        reward_model, reward_tokenizer = load_pretrained(auto_class, args.reward_model_path)
        reward_model.to(device)
    data = []
    for split in (args.dataset_train_split, args.dataset_test_split):
        rows = load_rows(args.dataset_name, split)
        for row in rows:
            prompt = read_chat(row, "prompt")
            if "prompt" not in row and prompt[-1]["role"] == "assistant":
                prompt = prompt[:-1]
            if not prompt or prompt[-1]["role"] not in ("user", "tool"):
                fail(f"{row['where']}: the prompt must end with a user or tool message")
            row.setdefault("prompt", prompt)
            row["prompt_ids"] = render(tokenizer, row, prompt, add_generation_prompt=True)
            chat = [*prompt, {"role": "assistant", "content": "Hello!"}]
            if render(reward_tokenizer, row, chat) != render(tokenizer, row, chat):
                fail(f"{row['where']}: the reward model has a different tokenizer or chat template")
        data.append([row for row in rows if len(row["prompt_ids"]) <= args.max_prompt_length])
        print(f"{split}: {len(data[-1])} of {len(rows)} prompts are within --max_prompt_length")
    if not all(data):
        fail("no prompt of a split is within --max_prompt_length")
    train, test = data
    check_model(policy, tokenizer, [row["prompt_ids"] for row in train + test], T)
    # ---- what is trained, and the frozen reference ----
    trained = torch.nn.ModuleDict({"policy": policy})
    critic = None
    value_width = policy.get_output_embeddings().in_features
    if args.separate_critic and reward_model:  # which knows what scores (Ouyang et al. 2022, C.4)
        critic = copy.deepcopy(reward_model.base_model)
        trained["critic"] = critic
        value_width = reward_model.score.in_features
    learning_rate = args.learning_rate or (1.5e-4 if policy.num_parameters() < 10e6 else 3e-6)
    # Zero: the first values are the mean of normalized scores, not a random layer's noise
    value_head = torch.nn.Linear(value_width, 1)
    for parameter in value_head.parameters():
        parameter.data.zero_()
    groups = [
        {"params": list(trained.parameters()), "peak": learning_rate},
        {"params": value_head.parameters(), "peak": args.value_learning_rate},
    ]
    trained["value_head"] = value_head
    trained.to(device).eval()  # dropout is always off: it would change log-probs between rollout and update
    if args.gradient_checkpointing:  # works in train() alone, which must not switch dropout on
        for module in trained.modules():
            for name in vars(module):
                if name == "p" or "dropout" in name:  # a torch.nn.Dropout's, or a plain number
                    setattr(module, name, 0.0)
            if module in (policy, critic):
                module.gradient_checkpointing_enable()
    reference = copy.deepcopy(policy).requires_grad_(False)
    # eps 1e-5 as in lm-human-preferences: more than torch's 1e-8, it damps the first, badly estimated steps
    optimizer = torch.optim.Adam(groups, eps=1e-5, fused=True)
    done = 0  # updates
    beta = args.beta
    if state:
        trained.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        done, beta, score_mean, score_std = state["progress"]
    if args.track:
        import wandb

        wandb.init(project="ppo_rlhf", name=args.output_dir, config=asdict(args))
    output_dir = Path(args.output_dir)
    logs = open_logs(args, state, "metrics.jsonl", "samples.jsonl")
    metrics_file, samples_file = logs
    num_updates = args.total_episodes // B
    generator = torch.Generator().manual_seed(args.seed)
    epochs = range(0, args.total_episodes, len(train))  # each a new permutation of the prompts
    order = torch.cat([torch.randperm(len(train), generator=generator) for _ in epochs])
    # Rounding allowed where 0 is expected, in nats per token; it grows as logits / temperature does
    tolerance = (0.1 if device == "cuda" else 1e-4) / temperature
    print(f"PPO on {device}: {policy.num_parameters():,} parameters, learning rate {learning_rate}")
    for update in tqdm(range(done + 1, num_updates + 1), "PPO", disable=None):
        # All of an update's random numbers are a function of seed and update: resuming needs no random state.
        torch.manual_seed(args.seed * 2**20 + update)
        schedule = min(update / (args.warmup_steps + 1), 1 - (update - 1) / num_updates)
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * schedule

        # ======== Phase 1, rollout: sample a response to each of a batch of prompts ========
        clock = [time.time()]
        rows = [train[i] for i in order.split(B)[update - 1]]
        batch = sample(policy, tokenizer, rows, args, end_ids)
        mask = batch.mask  # [B, T]
        clock.append(time.time())

        # ======== Phase 2, scoring: the reward model's scores, old and reference log-probs, values ========
        scores = score(reward_model, tokenizer, batch, rows, size)  # [B]
        # Old log-probs are computed again, by the forward that is trained: the sampler rounds differently.
        old_logprobs = torch.zeros_like(mask)  # [B, T]
        ref_logprobs = torch.zeros_like(mask)  # [B, T]
        values = torch.zeros_like(mask)  # [B, T]
        with torch.no_grad():
            for idx, *inputs, t in micro_batches(batch, torch.arange(B), size):
                old_logprobs[idx, :t], _, hidden = forward(policy, *inputs, temperature, critic=critic)
                ref_logprobs[idx, :t], _, _ = forward(reference, *inputs, temperature)
                values[idx, :t] = value_head(hidden).squeeze(-1)
        kl = (old_logprobs - ref_logprobs) * mask  # [B, T]
        sampler_gap = masked_mean((batch.logprobs - old_logprobs).abs(), mask)
        eos_rate = batch.ended.float().mean()
        if update == 1:
            # Policy and reference are still the same model: a shift, a mask or dropout gone wrong shows here.
            assert masked_mean(kl.abs(), mask) < tolerance, "KL is not 0 at the start"
            # If a family's cache or window ignores the mask, the sampler runs a different model.
            if not sampler_gap < tolerance:
                fail(f"{args.sft_model_path}: log-probs of sampler and forward differ by {sampler_gap:.2g}")
            if eos_rate < 0.5:
                ends = tokenizer.convert_ids_to_tokens(end_ids)
                print(f"only {eos_rate:.0%} of the responses end with {ends} within --max_new_tokens {T}")
            # The scale of a reward is arbitrary. This rollout samples the SFT model: there, scores get mean 0
            # and standard deviation 1, so that one beta fits all (lm-human-preferences, train_reward.py:252).
            score_mean = scores.mean().item()
            score_std = scores.std().item()
            if not score_std > 1e-6 * (1 + abs(score_mean)):  # all scores are alike
                score_std = 1.0
        scores = (scores - score_mean) / score_std  # [B]
        # Without this penalty the policy could learn to ramble on rather than write EOS.
        scores -= args.missing_eos_penalty * ~batch.ended
        scores -= args.length_penalty * batch.response_lengths
        clock.append(time.time())

        # ======== Phase 3, advantages ========
        rewards = penalized_rewards(scores, kl, mask, beta)  # [B, T]
        advantages, returns = gae(rewards, values, mask, args.gamma, args.lam)  # [B, T], [B, T]
        # Whitened, so that the step size does not depend on the scale of the rewards; over the whole batch,
        # so that a minibatch of good responses is not told that half of them are bad.
        advantages = whiten(advantages, mask)  # [B, T]

        # ======== Phase 4, update: clipped policy and value losses over shuffled minibatches ========
        trained.train(args.gradient_checkpointing)
        stats = defaultdict(list)
        shuffled = torch.cat([torch.randperm(B) for _ in range(args.num_ppo_epochs)])
        for minibatch_inds in shuffled.split(B // args.num_mini_batches):
            num_tokens = mask[minibatch_inds].sum()
            for idx, *inputs, t in micro_batches(batch, minibatch_inds, size):
                mb_mask = mask[idx, :t]  # [b, t]
                mb_advantages = advantages[idx, :t]  # [b, t]
                mb_returns = returns[idx, :t]  # [b, t]
                mb_values = values[idx, :t]  # [b, t]
                new_logprobs, entropy, hidden = forward(
                    policy, *inputs, temperature, args.entropy_coef, critic
                )
                new_values = value_head(hidden).squeeze(-1)  # [b, t]
                # Policy loss (Schulman et al. 2017, eq. 7). The max is the pessimistic choice: a token gains
                # nothing by moving its ratio past the clip, but is pulled back if it went the wrong way.
                log_ratio = new_logprobs - old_logprobs[idx, :t]  # [b, t]
                ratio = log_ratio.exp()  # [b, t]
                clipped_ratio = ratio.clamp(1 - args.cliprange, 1 + args.cliprange)  # [b, t]
                pg_loss = torch.max(-mb_advantages * ratio, -mb_advantages * clipped_ratio)  # [b, t]
                # Value loss, clipped around the rollout's values (lm-human-preferences, train_policy.py:344)
                low = mb_values - args.cliprange_value
                high = mb_values + args.cliprange_value
                clipped_values = new_values.clamp(low, high)  # [b, t]
                vf_loss = 0.5 * torch.max((new_values - mb_returns) ** 2, (clipped_values - mb_returns) ** 2)
                loss = pg_loss + args.vf_coef * vf_loss - args.entropy_coef * entropy  # [b, t]
                # Divided by the minibatch's tokens: each weighs the same, whatever the micro-batch
                ((loss * mb_mask).sum() / num_tokens).backward()
                figures = {
                    "loss/policy_avg": pg_loss,
                    "loss/value_avg": vf_loss,
                    "policy/entropy_avg": entropy,
                    "policy/approxkl_avg": 0.5 * log_ratio**2,
                    "policy/clipfrac_avg": ratio != clipped_ratio,
                    "val/clipfrac_avg": new_values != clipped_values,
                    "val/ratio": ratio,
                }
                for name, figure in figures.items():  # summed over micro-batches: the mean over real tokens
                    stats[name].append((figure.detach() * mb_mask).sum() / num_tokens)
                if "policy/grad_norm" not in stats:  # no step yet: the policy is the one that sampled
                    gap = masked_mean(log_ratio.abs(), mb_mask)
                    assert gap < tolerance, f"ratio is not 1 on the first minibatch: mean |log ratio| {gap}"
            grad_norm = torch.nn.utils.clip_grad_norm_(trained.parameters(), args.max_grad_norm or torch.inf)
            if not grad_norm.isfinite():
                fail(f"update {update}: gradient not finite: check the rewards, or restart with a lower rate")
            stats["policy/grad_norm"].append(grad_norm)
            optimizer.step()
            optimizer.zero_grad()
        trained.eval()
        clock.append(time.time())

        # ======== Phase 5, logging: means over real tokens, or over episodes of sums ========
        num_steps = len(stats["policy/grad_norm"])
        episode_kl = kl.sum(1)  # [B] nats per response
        mean_kl = episode_kl.mean()
        metrics = {
            "update": update,
            "episode": update * B,
            "objective/scores": scores.mean(),
            "objective/kl": mean_kl,
            "objective/entropy": -(old_logprobs * mask).sum(1).mean(),
            "objective/non_score_reward": -beta * mean_kl,
            "objective/rlhf_reward": (scores - beta * episode_kl).mean(),
            **{name: sum(parts) / num_steps for name, parts in stats.items()},
            "val/explained_variance": 1 - masked_var(returns - values, mask) / masked_var(returns, mask),
            "val/sampler_logprob_gap": sampler_gap,
            "val/eos_rate": eos_rate,
            "val/num_eos_tokens": eos_rate,  # TRL's name
            "response_length": batch.response_lengths.float().mean(),
            "lr": learning_rate * schedule,
            "beta": beta,
            "eps": B / (clock[3] - clock[0]),
            "time/rollout": clock[1] - clock[0],
            "time/score": clock[2] - clock[1],
            "time/update": clock[3] - clock[2],
        }
        write_row(metrics_file, metrics)
        if args.track:
            wandb.log(metrics, step=update)
        if args.adaptive_kl_target > 0:
            # Ziegler et al. 2019, section 2.2, but with a horizon of 1000 episodes, not 10,000
            error = mean_kl.item() / args.adaptive_kl_target - 1
            beta *= 1 + min(max(error, -0.2), 0.2) * B / 1000
        if update % args.eval_steps == 0 or update in (1, num_updates):
            for i in range(min(4, B)):
                response = batch.responses[i][mask[i] == 1]
                shown = {
                    "update": update,
                    "prompt": rows[i]["prompt"],
                    "response": tokenizer.decode(response),  # with its special tokens
                    "score": scores[i],
                    "kl": episode_kl[i],
                }
                write_row(samples_file, shown)
            summary = f"score {scores.mean():.2f}, KL {mean_kl:.2f}, {eos_rate:.0%} ended"
            tqdm.write(f"update {update}/{num_updates}: {summary}; {shown['prompt']} -> {shown['response']}")
        if update % args.save_steps == 0 or update == num_updates:
            progress = (update, beta, score_mean, score_std)
            save_checkpoint(args, logs, trained, optimizer, progress)

    # ======== The end: save, then sample responses of both models to the held-out prompts ========
    # For stock `generate`: the distribution that was trained, without top-k, top-p or penalties
    policy.generation_config = GenerationConfig(
        do_sample=True,
        temperature=temperature,
        top_k=0,
        top_p=1.0,
        max_new_tokens=T,
        eos_token_id=end_ids,
        pad_token_id=tokenizer.pad_token_id,
    )
    policy.save_pretrained(output_dir)
    tokenizer.save_pretrained(output_dir)
    scale = torch.tensor([score_mean, score_std])  # of scores and values; the critic is in checkpoint/
    save_file({**value_head.state_dict(), "score_scale": scale}, output_dir / "value_head.safetensors")
    results = defaultdict(list, prompt=[row["prompt"] for row in test])
    for name, model in (("sft", reference), ("ppo", policy)):
        torch.manual_seed(args.seed)  # the same random numbers for both
        for start in range(0, len(test), B):
            rows = test[start : start + B]
            batch = sample(model, tokenizer, rows, args, end_ids)
            results[name] += tokenizer.batch_decode(batch.responses, skip_special_tokens=True)
            scores = score(reward_model, tokenizer, batch, rows, size)  # [b]
            results[f"{name}_score"] += ((scores - score_mean) / score_std).tolist()
    with open(output_dir / "eval.jsonl", "w") as file:
        for values in zip(*results.values()):
            write_row(file, dict(zip(results, values)))
    print(f"held-out score: SFT {mean(results['sft_score']):.2f}, PPO {mean(results['ppo_score']):.2f}")
    print(f"saved to {output_dir}")


# ---- The sampler ----
@torch.no_grad()
def rollout(model, prompts, prompt_mask, uniforms, temperature, end_ids, pad_id):
    """Sample responses -> responses [B, T], lengths [B] with EOS, whether they ended [B], log-probs [B, T].
    prompts, prompt_mask [B, P], left-padded; uniforms [T, B] in [0, 1), all the randomness; end_ids [E]."""
    B, P = prompts.shape
    T = len(uniforms)
    # 0 on left padding alone, as causality hides what is not sampled yet
    attention_mask = F.pad(prompt_mask, (0, T), value=1)  # [B, P+T]
    # Positions count real tokens, not slots: else a prompt would get another response in another batch
    positions = (prompt_mask.cumsum(1) - 1).clamp(min=0)  # [B, P]
    position = positions[:, -1:] + 1  # [B, 1] of the newest token
    renamed = "cache" in inspect.signature(model.base_model.forward).parameters  # as of transformers 5.24
    static = StaticCache(model.config, max_cache_len=P + T)
    cache = {"cache" if renamed else "past_key_values": static}
    responses = prompts.new_full((B, T), pad_id)  # [B, T]
    logprobs = torch.zeros_like(uniforms.T)  # [B, T]
    lengths = prompts.new_zeros(B)  # [B]
    ended = prompts.new_zeros(B, dtype=torch.bool)  # [B]
    token = prompts.new_zeros(B, 1)  # [B, 1] the newest
    step = prompts.new_zeros(1)  # [1] response tokens so far

    def sample_next(hidden):  # [B, d]
        # Inverse CDF: the first token whose cumulative probability exceeds u. No top-k, top-p or penalties
        logits = model.get_output_embeddings()(hidden.float()) / temperature  # [B, V]
        probs = logits.softmax(-1)  # [B, V]
        cdf = probs.cumsum(-1)  # [B, V]
        u = uniforms[step].T * cdf[:, -1:]  # [B, 1]; the last entry is 1 up to rounding
        newest = torch.searchsorted(cdf, u, right=True)  # [B, 1]
        token.copy_(newest.clamp(max=cdf.shape[1] - 1))
        logprobs.index_copy_(1, step, probs.gather(1, token).log())
        token.masked_fill_(ended[:, None], pad_id)
        responses.index_copy_(1, step, token)
        lengths.add_(~ended)
        ended.logical_or_((token == end_ids).any(1))
        step.add_(1)

    def decode_step():
        output = model.base_model(token, attention_mask=attention_mask, position_ids=position, **cache)
        position.add_(1)
        sample_next(output.last_hidden_state[:, -1])

    output = model.base_model(prompts, attention_mask=attention_mask, position_ids=positions, **cache)
    sample_next(output.last_hidden_state[:, -1])
    run_step = decode_step
    first = 1
    if prompts.is_cuda and T > 3 and not any(static.is_sliding):
        # A CUDA graph records the step once and replays it: launching its many small kernels takes longer
        # than running them. Hence fixed shapes, changes in place, no sliding windows (counted in Python).
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # two real steps first: libraries set up
            decode_step()
            decode_step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):  # records the step, runs nothing
            decode_step()
        run_step = graph.replay
        first = 3
    for t in range(first, T):
        run_step()
        if t % 8 == 0 and ended.all():
            break
    return responses, lengths, ended, logprobs


def bf16_copy(model):
    """A copy to sample from: half the bytes to read per token. Buffers stay fp32 (RoPE would be 0.3 radians
    off after 300 tokens), and so does the output layer (bf16 rounds logits near 60, GPT-2's, to quarters)."""
    model = copy.deepcopy(model)
    head = model.get_output_embeddings()
    head.weight = torch.nn.Parameter(head.weight.clone())  # tied to the input embeddings no longer
    for parameter in model.base_model.parameters():
        parameter.data = parameter.data.bfloat16()
    return model


# ---- Plumbing. Functions marked [shared], here and above, are the same in the other scripts ----
def fail(message):  # [shared]
    """Print one line and exit with status 2, rather than go wrong silently."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def load_rows(name, split):  # [shared]
    """Rows of a data set: a Hub name or a folder with {split}.jsonl; row["where"] is for error messages."""
    try:
        rows = datasets.load_dataset(name, split=split).to_list()
    except Exception as error:
        reason = " ".join(f"{error} {error.__cause__ or ''}".split())
        fail(f"{name} has no readable split {split} ({reason}); see --dataset_name and its splits")
    rows = json.loads(
        json.dumps(rows, default=str),
        # Arrow gives every message and tool the keys of all others, and templates would print the None
        object_hook=lambda entry: {key: value for key, value in entry.items() if value is not None},
    )
    return [{**row, "where": f"{name}, {split}, row {number}"} for number, row in enumerate(rows, 1)]


def read_chat(row, column):  # [shared]
    """Messages of a row: `column` after `prompt`, or a dialogue in it, `messages` or hh-rlhf's `chosen`."""
    name = next((name for name in (column, "messages", "chosen") if name in row), column)
    chat = row.get(name)
    if isinstance(chat, str) and chat:
        *before, reply = [chat] if "prompt" in row else chat.rsplit("\n\nAssistant:", 1)
        chat = [{"role": "user", "content": text + "\n\nAssistant:"} for text in before]
        role = "user" if name == "prompt" else "assistant"
        chat.append({"role": role, "content": reply.strip() if before else reply})
    if not (isinstance(chat, list) and chat and all(isinstance(turn.get("content"), str) for turn in chat)):
        fail(f"{row['where']}: {name} must be text, or messages of role and content (text): {list(row)}")
    if name != "prompt" and "prompt" in row and chat[0]["role"] == "assistant":
        chat = read_chat(row, "prompt") + chat
    return chat


def render(tokenizer, row, messages, **options):  # [shared]
    """Ids of a chat, as the tokenizer's own chat template writes it (BOS too, where there is one)."""
    return tokenizer.apply_chat_template(messages, tools=row.get("tools"), return_dict=False, **options)


def find_end_ids(model, tokenizer):  # [shared]
    """Ids that end a response: the generation config's, the tokenizer's EOS, and the chat template's."""
    configured = model.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, *(configured if isinstance(configured, list) else [configured])}
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]
    _, content, after = tokenizer.apply_chat_template(chat, tokenize=False).rpartition("Hello!")
    if not content:
        fail("the chat template does not write what messages say")
    ids = tokenizer(after.strip(), add_special_tokens=False).input_ids
    ends.update([i for i in ids if i in tokenizer.added_tokens_decoder][:1])
    return sorted(ends - {None})


def load_pretrained(auto_class, path, new_weights=(), **options):  # [shared]
    """(model in fp32, tokenizer). A weight missing from the file would silently be random."""
    if path.startswith("runs/") and not Path(path, "config.json").exists():
        fail(f"there is no model in {path} yet: run the earlier stage first")
    tokenizer = AutoTokenizer.from_pretrained(path)
    model, info = auto_class.from_pretrained(path, dtype=torch.float32, output_loading_info=True, **options)
    wrong = (info["missing_keys"] | info["unexpected_keys"]) - {*new_weights}
    if wrong:
        fail(f"{path} is not a {type(model).__name__}: weights missing or left over: {sorted(wrong)[:4]}")
    if tokenizer.eos_token_id is None:
        fail(f"the tokenizer of {path} has no EOS token, so no response could end; set its eos_token")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token  # harmless: masks come from lengths
    return model, tokenizer


@torch.no_grad()
def check_model(model, tokenizer, rows, extra=0):  # [shared]
    """Refuse too short a context, or a family whose logits are not output_layer(backbone), like Gemma 2."""
    pair = {"input_ids": [min(rows, key=len), max(rows, key=len)]}  # ragged
    pair = tokenizer.pad(pair, padding_side="right", return_tensors="pt")
    length = pair.input_ids.shape[1] + extra
    if length > getattr(model.config.get_text_config(), "max_position_embeddings", length):
        fail(f"sequences of {length} tokens exceed the model's context; lower the length limits")
    ours = model.get_output_embeddings()(hidden_states(model, pair.input_ids))  # [2, L, V]
    difference = (model(**pair).logits - ours)[pair.attention_mask == 1]  # [N, V]
    if difference.abs().max() > 1e-2:
        fail(f"model family {model.config.model_type} is not supported: it changes its logits afterwards")


def load_checkpoint(args, inputs, changeable=()):  # [shared]
    """The state to resume from, None at the start. Refuses an output_dir in use; writes nothing."""
    folder = Path(args.output_dir)
    path = folder / "checkpoint/state.pt"
    if folder.resolve() in map(Path.resolve, map(Path, inputs)):
        fail(f"--output_dir {folder} is the folder of an input model; name another")
    if not args.resume and not args.overwrite and any(folder.glob("*")):
        fail(f"--output_dir {folder} is not empty; --resume its run, --overwrite it, or name another")
    if not args.resume or not path.exists():
        return None
    state = torch.load(path, map_location="cpu", weights_only=True)
    changeable += ("output_dir", "resume", "overwrite", "track", "eval_steps", "save_steps")
    for name, old in state["args"].items():
        if name not in changeable and getattr(args, name) != old:
            fail(f"--{name} {getattr(args, name)}: it was {old} in {folder}; give that, or another folder")
    return state


def open_logs(args, state, *names):  # [shared]
    """Make output_dir and open its logs, cut back to their length at the checkpoint."""
    folder = Path(args.output_dir)
    (folder / "checkpoint").mkdir(parents=True, exist_ok=True)
    (folder / "args.json").write_text(json.dumps(asdict(args), indent=2))
    logs = [open(folder / name, "a", buffering=1) for name in names]
    sizes = state["log_sizes"] if state else [0, 0]
    for log, size in zip(logs, sizes):
        log.truncate(size)
    if not state:  # an older model or checkpoint must not be taken for this run's
        for name in ("config.json", "eval.jsonl", "checkpoint/state.pt"):
            (folder / name).unlink(missing_ok=True)
    return logs


def write_row(file, row):
    """One line of JSON; tensors become numbers."""
    file.write(json.dumps(row, default=float) + "\n")


def save_checkpoint(args, logs, model, optimizer, progress):  # [shared]
    """Write a new file, then rename it: a run that is killed at any moment has a valid checkpoint."""
    state = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "progress": progress,
        "args": asdict(args),
        "log_sizes": [os.path.getsize(log.name) for log in logs],
    }
    path = Path(args.output_dir, "checkpoint/state.pt")
    torch.save(state, f"{path}.new")
    os.replace(f"{path}.new", path)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # a terminal that is not UTF-8 must not end a run
    datasets.disable_progress_bars()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    main(tyro.cli(Args, description=__doc__))
