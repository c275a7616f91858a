"""Stage 3 of RLHF: PPO. The SFT model learns to write responses that score highly: python ppo_rlhf.py

Four networks take part:

    policy        trained, starting from the SFT model: samples the responses
    reference     the SFT model, frozen: the KL penalty keeps the policy near it
    reward model  from stage 2, frozen: gives each response one score
    critic        trained, starting from the reward model with a new value head: gives each token a value, the
                  return expected from there on. With --no-separate_critic, or without a reward model, the
                  value head sits on the policy instead.

Each update: (1) the policy samples responses to a batch of prompts, (2) reward model, reference and critic
give their scores, log-probs and values, (3) rewards become advantages, (4) a few epochs of clipped
policy-gradient steps change policy and critic. The objective is the mean score minus beta * KL(policy ||
reference): the farther the policy drifts from the reference, the more it exploits the reward model's errors
(Gao et al. 2022).

How the tensors line up. A row holds a prompt and its response; B rows, P prompt slots, T response slots (in a
micro-batch b rows, L slots for the longest row, t for the longest response; d: hidden size, V: vocabulary):

    rollout   [ pad pad q1 q2 q3 | r1 r2 r3 EOS pad ]  left-padded: every row samples into the same slot
    training  [ q1 q2 q3 r1 r2 r3 EOS pad pad pad   ]  rolled left: causal attention needs no padding mask
                      |  |  |  |
    predicts          r1 r2 r3 EOS                     the position before a token predicts it
    value             V1 V2 V3 V4                      read at the same position, from the critic

    [B, T]            r1 r2 r3 EOS pad
    mask              1  1  1  1   0                   each sampled token, EOS too; from lengths, not ids
    KL penalty        x  x  x  x                       on every real token
    score                      x                       on the last real token, EOS or not; after it V = 0

Sources: Ziegler et al. 2019 (openai/lm-human-preferences), Stiennon et al. 2020, Ouyang et al. 2022, "The N
Implementation Details of RLHF with PPO" (Huang et al. 2023, vwxyzjn/lm-human-preference-details); PPO itself:
Schulman et al. 2017. Functions marked [shared] are the same in every script that has them.
"""

import copy
import functools
import inspect
import json
import os
import re
import sys
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from types import SimpleNamespace

import datasets
import huggingface_hub
import torch
import torch.nn.functional as F
import transformers
import tyro
from safetensors.torch import save_file
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import cached_file


@dataclass
class Args:
    # ---- input and output ----
    sft_model_path: str = "runs/sft"  # policy at the start and frozen reference: a folder or a Hub name
    reward_model_path: str = "runs/reward_model"  # a classifier with one label; empty for a rule in reward_fn
    dataset_name: str = "data/prompts"  # folder with train.jsonl and test.jsonl, or a Hub name
    dataset_train_split: str = "train"  # prompts to train on
    dataset_test_split: str = "test"  # held-out prompts
    output_dir: str = "runs/ppo"  # run folder
    max_prompt_length: int = 256  # in tokens; longer prompts are left out
    # ---- rollout ----
    total_episodes: int = 3072  # responses sampled over the run; updates = total_episodes / batch_size
    batch_size: int = 128  # episodes per update; an episode is a response to one prompt
    num_generations: int = 1  # responses to each prompt of a batch; more than 1 for forks such as RLOO
    rollout_batch_size: int = 128  # episodes sampled at a time; fewer need less memory for keys and values
    max_new_tokens: int = 64  # longest response in tokens; good ones of the shipped task take about 50
    temperature: float = 0.7  # of the sampler and of every log-prob (Ziegler et al. 2019)
    cuda_graph: bool = True  # on CUDA, record a decode step and replay it; --no-cuda_graph if it cannot be
    # ---- rewards and advantages ----
    beta: float = 0.1  # KL penalty coefficient; 0 invites reward hacking, 0.02 to 0.2 is usual
    missing_eos_penalty: float = 1.0  # subtracted from the normalized score of a response that is cut off
    length_penalty: float = 0.0  # subtracted from the normalized score, per response token
    adaptive_kl_target: float = 0.0  # if positive, beta adapts to keep the KL near it, in nats per response
    gamma: float = 1.0  # discount per token; 1, as a response is judged as a whole
    lam: float = 1.0  # GAE's lambda: 0 trusts the values, 1 the rewards; 0.95 is usual, but learned less here
    # ---- update ----
    learning_rate: float = 0.0  # peak of policy and critic; 0: 1.5e-4 below 10M parameters, else 3e-6
    value_learning_rate: float = 1e-3  # of the value head alone, which starts at zero and must catch up
    warmup_steps: int = 2  # updates of linear warm-up, as the first values are wrong; then linear decay
    num_ppo_epochs: int = 2  # passes over each batch of episodes
    num_mini_batches: int = 8  # optimizer steps per pass
    per_device_train_batch_size: int = 16  # a micro-batch: episodes per forward pass; changes no gradient
    cliprange: float = 0.2  # the ratio of new to old probability is clipped to 1 +- cliprange
    cliprange_value: float = 0.2  # a value that moved more than this towards its return gets no gradient
    vf_coef: float = 0.1  # weight of the value loss; with a critic, Adam cancels it but for clipping
    separate_critic: bool = True  # values from a copy of the reward model; else a value head on the policy
    entropy_coef: float = 0.0  # weight of an entropy bonus, against mode collapse
    max_grad_norm: float = 1.0  # gradients are clipped to this norm; 0 for none
    gradient_checkpointing: bool = False  # recompute activations in the backward pass: slower, less memory
    seed: int = 1  # of prompt order, sampler and minibatches
    # ---- logging and checkpoints ----
    eval_steps: int = 10  # updates between logged samples; held-out prompts are sampled at the end
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
    Padding is left out: its zeros would shrink the standard deviation and inflate the advantages."""
    return (x - masked_mean(x, mask)) * torch.rsqrt(masked_var(x, mask) + 1e-8) * mask


def penalized_rewards(scores, kl, mask, beta):
    """Reward of each token: -beta * KL, plus the score on the last real one: [B], [B, T], [B, T] -> [B, T].
    kl is log pi - log pi_ref of the sampled token, 0 on padding: a one-sample estimate of the KL divergence,
    so a single one may be negative. It is a constant of the rollout, like the score: no gradient flows
    through it. The rewards of a response add up to score - beta * (sum of kl). One slot later, the
    score would land on padding and teach nothing. Example, four tokens with score 1 and beta 0.5:

        mask        1     1     1     1     0
        kl          0.2   0.4   0.0   0.2   0.0
        rewards    -0.1  -0.2   0.0   0.9   0.0
    """
    last = mask.sum(1).long() - 1  # [B]
    return (-beta * kl).scatter_add(1, last[:, None], scores[:, None])


def gae(rewards, values, mask, gamma, lam):
    """Generalized advantage estimation (Schulman et al. 2015, eq. 16) -> advantages [B, T], returns [B, T].
    delta_t = r_t + gamma * V_{t+1} - V_t and A_t = delta_t + gamma * lam * A_{t+1}, from the last token back.
    Returns, A_t + V_t, are the targets of the value loss. V and A after the last real token are 0, as the
    episode is over: a value read on padding would leak into every advantage before it. With the rewards
    above, gamma 1 and lam 0.5:

        values      0.2   0.4   0.5   0.5   9.0    the last is padding's
        delta       0.1  -0.1   0.0   0.4
        advantages  0.1   0.0   0.2   0.4   0.0
        returns     0.3   0.4   0.7   0.9   0.0
    """
    values = values * mask  # [B, T]
    advantages = torch.zeros_like(values)  # [B, T]
    next_value = next_advantage = torch.zeros_like(values[:, 0])  # [B]
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]  # [B]
        next_advantage = (delta + gamma * lam * next_advantage) * mask[:, t]  # [B]
        next_value = values[:, t]
        advantages[:, t] = next_advantage
    return advantages, advantages + values


# ---- From prompts to responses, log-probs, values and scores; the sampler's own loop is below `main` ----
def roll_left(prompts, responses, starts):
    """[pad pad q q | r r] -> [q q r r pad pad]: prompts [B, P], responses [B, T] -> sequences [B, P+T].
    starts [B]: the lengths of the prompts, without padding."""
    joined = torch.cat([prompts, responses], 1)  # [B, P+T]
    padding = prompts.shape[1] - starts  # [B]
    slots = torch.arange(joined.shape[1], device=joined.device) + padding[:, None]  # [B, P+T]
    return joined.gather(1, slots % joined.shape[1])


def sample(model, tokenizer, prompts, args, end_ids):
    """Sample a response to each of `prompts` (see `load_prompts`) -> tensors, laid out for training."""
    padded = {"input_ids": [prompt.ids for prompt in prompts]}
    padded = tokenizer.pad(padded, padding_side="left", return_tensors="pt").to(model.device)
    # Drawn at once, so that --rollout_batch_size changes no response
    uniforms = torch.rand(args.max_new_tokens, len(prompts), device=model.device)  # [T, B]
    if model.device.type == "cuda":
        model = bf16_copy(model)
    ends = torch.tensor(end_ids, device=model.device)  # [E]
    settings = (args.temperature, ends, tokenizer.pad_token_id, args.cuda_graph)
    parts = []
    for rows in torch.arange(len(prompts)).split(args.rollout_batch_size):
        ids = padded.input_ids[rows]
        mask = padded.attention_mask[rows]
        parts.append(rollout(model, ids, mask, uniforms[:, rows], *settings))
    responses, response_lengths, ended, logprobs = map(torch.cat, zip(*parts))
    starts = padded.attention_mask.sum(1)  # [B] prompt lengths: where responses start once rolled left
    lengths = starts + response_lengths  # [B]
    slots = torch.arange(args.max_new_tokens, device=model.device)  # [T]
    return SimpleNamespace(
        sequences=roll_left(padded.input_ids, responses, starts),  # [B, P+T]
        starts=starts,  # [B]
        lengths=lengths,  # [B] of prompt and response
        responses=responses,  # [B, T]
        response_lengths=response_lengths,  # [B]
        mask=(slots < response_lengths[:, None]).float(),  # [B, T]
        ended=ended,  # [B]
        logprobs=logprobs,  # [B, T] as the sampler computed them
        cpu_lengths=lengths.cpu(),  # [B] for the bounds of slices, which are numbers on the CPU
        cpu_response_lengths=response_lengths.cpu(),  # [B]
    )


def micro_batches(batch, rows, size):
    """Rows `rows` of a batch, `size` at a time and sorted by length, so that little padding is left.
    Yields mb, an index that picks these rows and their first t slots from any [B, T] tensor; ids [b, L];
    response starts [b]; labels [b, t], the responses."""
    order = batch.cpu_lengths[rows].argsort(stable=True)
    for mb_rows in rows[order].split(size):
        L = batch.cpu_lengths[mb_rows].max()
        t = batch.cpu_response_lengths[mb_rows].max()
        mb_rows = mb_rows.to(batch.lengths.device)
        mb = (mb_rows, slice(t))
        yield mb, batch.sequences[mb_rows, :L], batch.starts[mb_rows], batch.responses[mb]


def hidden_states(model, ids):  # [shared]
    """Right-padded ids [B, L] -> [B, L, d]. No attention mask: attention is causal and the padding on the
    right, so no real token sees it. The backbone computes in bf16 on CUDA. Weights stay fp32, as small
    updates would round to nothing in bf16; logits and losses are fp32 too."""
    with torch.autocast(ids.device.type, torch.bfloat16, enabled=ids.is_cuda):
        return model.base_model(ids, use_cache=False).last_hidden_state.float()


def response_states(model, ids, starts, t):
    """Hidden states that predict response tokens 1 ... t: [b, L], [b] -> [b, t, d]."""
    hidden = hidden_states(model, ids[:, :-1])  # [b, L-1, d]: the last token predicts nothing
    slots = starts[:, None] - 1 + torch.arange(t, device=ids.device)  # [b, t]: before each token
    slots = slots.clamp(max=hidden.shape[1] - 1)  # shorter rows would run past the end; masked later
    return torch.take_along_dim(hidden, slots[..., None], dim=1)


def forward(model, ids, starts, labels, temperature, entropy_coef=0.0, critic=None):
    """Log-probs and entropies of response tokens, [b, t] each, and the states [b, t, d] that the value head
    reads: the critic's, or without one the model's own. Old, new and reference log-probs all come from here.
    No logits of whole sequences: [b, L, V] would be the largest tensor of the run. The temperature is in all
    log-probs: the distribution that is sampled is the one that is trained."""
    t = labels.shape[1]
    value_states = hidden = response_states(model, ids, starts, t)  # [b, t, d]
    logits = model.get_output_embeddings()(hidden) / temperature  # [b, t, V]
    all_logprobs = logits.log_softmax(-1)  # [b, t, V]
    # Without a bonus the entropy is only logged: no gradient, less memory
    entropy_terms = all_logprobs if entropy_coef else all_logprobs.detach()  # [b, t, V]
    entropy = -(entropy_terms.exp() * entropy_terms).sum(-1)  # [b, t]
    if critic is not None:
        value_states = response_states(critic, ids, starts, t)  # [b, t, d]
    return all_logprobs.gather(-1, labels[..., None]).squeeze(-1), entropy, value_states


def reward_fn(reward_model, tokenizer, sequences, starts, lengths, rows):
    """YOUR REWARD GOES HERE: one number per response -> [b], on any scale: it is normalized by the first
    rollout's mean and standard deviation.
    sequences [b, L]: prompt and response, right-padded; starts, lengths [b]: where the response starts and
    ends; rows: the data rows, for a rule that compares with a column. A rule, with --reward_model_path "":

        spans = zip(sequences, starts, lengths)
        texts = [tokenizer.decode(ids[start:end], skip_special_tokens=True) for ids, start, end in spans]
        return torch.tensor([float(text.endswith(row["answer"])) for row, text in zip(rows, texts)])
    """
    if sequences.max() >= reward_model.get_input_embeddings().num_embeddings:
        fail(f"the policy sampled id {sequences.max()}, for which the reward model has no embedding")
    hidden = hidden_states(reward_model, sequences)  # [b, L, d]
    # At the last real token, by length. Stock classifiers look for the last id that is not a pad, which is
    # one token early if pad == EOS.
    last_hidden = torch.take_along_dim(hidden, lengths[:, None, None] - 1, dim=1)  # [b, 1, d]
    return reward_model.score(last_hidden).flatten()


@torch.no_grad()
def score(reward_model, tokenizer, batch, prompts, size):
    """`reward_fn`, `size` responses at a time -> scores [B]."""
    scores = torch.zeros(len(prompts), device=batch.lengths.device)  # [B]
    for (mb_rows, _), ids, starts, _ in micro_batches(batch, torch.arange(len(prompts)), size):
        data_rows = [prompts[i].row for i in mb_rows.tolist()]
        mb_scores = reward_fn(reward_model, tokenizer, ids, starts, batch.lengths[mb_rows], data_rows)
        mb_scores = torch.as_tensor(mb_scores, dtype=torch.float32, device=scores.device)  # [b]
        if mb_scores.shape != mb_rows.shape:  # one number would be spread over all, and teach nothing
            fail(f"reward_fn must return one number per response, [{len(ids)}]: {list(mb_scores.shape)}")
        scores[mb_rows] = mb_scores
    return scores


def main(args):
    check_flags(args)
    # Flags that --resume may change, as they do not change the run
    changeable = ("gradient_checkpointing", "per_device_train_batch_size", "rollout_batch_size", "cuda_graph")
    state = load_checkpoint(args, (args.sft_model_path, args.reward_model_path), changeable)
    device = find_device()
    B = args.batch_size
    T = args.max_new_tokens
    micro_batch_size = args.per_device_train_batch_size
    temperature = args.temperature

    # ---- models and prompts ----
    policy, tokenizer = load_pretrained(transformers.AutoModelForCausalLM, args.sft_model_path)
    end_ids = find_end_ids(policy, tokenizer)
    train = load_prompts(tokenizer, args, args.dataset_train_split)
    test = load_prompts(tokenizer, args, args.dataset_test_split)
    prompt_ids = [prompt.ids for prompt in train + test]
    data_hash = check_data(state, prompt_ids)
    check_model(policy, tokenizer, prompt_ids, T)
    if not can_be_sampled(policy):
        fail(f"model family {policy.config.model_type} keeps no keys and values that the sampler could use")
    reward_model = None
    if args.reward_model_path:
        reward_model = load_reward_model(args.reward_model_path, tokenizer).to(device)
        check_context(reward_model.config, max(map(len, prompt_ids)) + T)
    torch.set_float32_matmul_precision("high")  # on CUDA, the fp32 output layer in TF32

    # ---- what is trained, and the frozen reference ----
    trained = torch.nn.ModuleDict({"policy": policy})
    critic = None
    value_width = policy.get_output_embeddings().in_features
    if args.separate_critic and reward_model:  # it knows already what scores well (Ouyang et al. 2022, C.4)
        critic = copy.deepcopy(reward_model.base_model)
        trained["critic"] = critic
        value_width = reward_model.score.in_features
    # Zero: the first values are the mean of the normalized scores, not a random layer's noise
    # (lm-human-preferences, language/model.py:368)
    value_head = torch.nn.Linear(value_width, 1)
    torch.nn.init.zeros_(value_head.weight)
    torch.nn.init.zeros_(value_head.bias)
    learning_rate = args.learning_rate or (1.5e-4 if policy.num_parameters() < 10e6 else 3e-6)
    groups = [
        # A list, as a generator would find value_head too, which joins below
        {"params": list(trained.parameters()), "peak": learning_rate},
        {"params": value_head.parameters(), "peak": args.value_learning_rate},
    ]
    trained["value_head"] = value_head
    trained.to(device).eval()  # for good: dropout would change log-probs between rollout and update
    if args.gradient_checkpointing:
        enable_checkpointing(trained)
    # Copied before a checkpoint is loaded, so always the SFT model; a fork that updates it has to save it
    reference = copy.deepcopy(policy).requires_grad_(False)
    # eps as in lm-human-preferences (utils/core.py:627)
    optimizer = torch.optim.Adam(groups, eps=1e-5, fused=True)
    last_update = 0
    beta = args.beta
    if state:
        trained.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        last_update, beta, score_mean, score_std = state["progress"]
    run = start_tracking(args, state) if args.track else None
    output_dir = Path(args.output_dir)
    metrics_file, samples_file = logs = open_logs(args, state, "metrics.jsonl", "samples.jsonl")
    num_updates = args.total_episodes // B
    generator = torch.Generator().manual_seed(args.seed)
    passes = range(0, args.total_episodes, len(train))  # each a new permutation of the prompts
    order = torch.cat([torch.randperm(len(train), generator=generator) for _ in passes])
    # The largest mean differences that rounding explains, in nats per token: in bf16 on CUDA, in fp32 on a
    # CPU (a fork that samples there in bf16, or with another engine, needs 0.1 too).
    tolerance = (0.1 if device == "cuda" else 1e-4) / temperature
    print(f"PPO on {device}: {policy.num_parameters():,} parameters, learning rate {learning_rate}")
    for update in tqdm(range(last_update + 1, num_updates + 1), "PPO", disable=None):
        # All of an update's random numbers are a function of seed and update: resuming needs no random state.
        torch.manual_seed(args.seed * 2**20 + update)
        schedule = min(update / (args.warmup_steps + 1), 1 - (update - 1) / num_updates)
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * schedule

        # ======== Phase 1, rollout: sample responses to a batch of prompts ========
        clock = [time.time()]
        picked = order.split(B // args.num_generations)[update - 1]
        prompts = [train[i] for i in picked.repeat_interleave(args.num_generations)]
        batch = sample(policy, tokenizer, prompts, args, end_ids)
        mask = batch.mask  # [B, T]
        clock.append(time.time())

        # ======== Phase 2, scoring: the reward model's scores, old and reference log-probs, values ========
        scores = score(reward_model, tokenizer, batch, prompts, micro_batch_size)  # [B]
        # Old log-probs are computed again, by the forward that is trained: the sampler rounds differently.
        old_logprobs = torch.zeros_like(mask)  # [B, T]
        ref_logprobs = torch.zeros_like(mask)  # [B, T]
        values = torch.zeros_like(mask)  # [B, T]
        with torch.no_grad():
            for mb, ids, starts, labels in micro_batches(batch, torch.arange(B), micro_batch_size):
                old_logprobs[mb], _, value_states = forward(
                    policy, ids, starts, labels, temperature, critic=critic
                )
                ref_logprobs[mb], _, _ = forward(reference, ids, starts, labels, temperature)
                values[mb] = value_head(value_states).squeeze(-1)
        kl = (old_logprobs - ref_logprobs) * mask  # [B, T]
        sampler_gap = masked_mean((batch.logprobs - old_logprobs).abs(), mask)
        eos_rate = batch.ended.float().mean()
        if update == 1:  # checks, while policy and reference are still the same model
            # Not 0 if dropout is on or the weights differ. A wrong position, wrong in both, shows next.
            assert masked_mean(kl.abs(), mask) < tolerance, "KL is not 0 at the start"
            # Not 0 if `forward` reads wrong positions, or the sampler's cache or window ignores the mask
            if not sampler_gap < tolerance:
                fail(f"{args.sft_model_path}: log-probs of sampler and forward differ by {sampler_gap:.2g}")
            if eos_rate < 0.5:
                ends = tokenizer.convert_ids_to_tokens(end_ids)
                print(f"only {eos_rate:.0%} of the responses end with {ends} within --max_new_tokens {T}")
        if update == 1:  # normalization: the first rollout samples the SFT model
            # The scale of a reward is arbitrary. On the SFT model's samples scores get mean 0 and standard
            # deviation 1, so that one beta fits all (lm-human-preferences, train_reward.py:252).
            score_mean = scores.mean().item()
            score_std = scores.std().item()
            if not score_std > 1e-6 * (1 + abs(score_mean)):  # all scores are alike
                score_std = 1.0
        scores = (scores - score_mean) / score_std  # [B] normalized
        # From here on with the penalties. Without the first the policy could learn to ramble, never to end.
        scores -= args.missing_eos_penalty * ~batch.ended
        scores -= args.length_penalty * batch.response_lengths
        clock.append(time.time())

        # ======== Phase 3, advantages ========
        rewards = penalized_rewards(scores, kl, mask, beta)  # [B, T]
        # Advantages: how much better it went than expected; returns: the targets of the value loss
        advantages, returns = gae(rewards, values, mask, args.gamma, args.lam)  # [B, T], [B, T]
        # Whitened, so that the step size does not depend on the scale of the rewards; over the whole batch,
        # so that a minibatch of good responses is not told that half of them are bad.
        advantages = whiten(advantages, mask)  # [B, T]

        # ======== Phase 4, update: clipped policy and value losses over shuffled minibatches ========
        stats = defaultdict(list)
        # B is a multiple of the minibatch's size, so none spans two epochs
        shuffled = torch.cat([torch.randperm(B) for _ in range(args.num_ppo_epochs)])
        for minibatch in shuffled.split(B // args.num_mini_batches):
            num_tokens = batch.cpu_response_lengths[minibatch].sum().item()
            for mb, ids, starts, labels in micro_batches(batch, minibatch, micro_batch_size):
                new_logprobs, entropy, value_states = forward(
                    policy, ids, starts, labels, temperature, args.entropy_coef, critic
                )
                new_values = value_head(value_states).squeeze(-1)  # [b, t]
                # Policy loss (Schulman et al. 2017, eq. 7; a max, as these are losses). The pessimistic
                # choice: no gain from moving a ratio past the clip, but it is pulled back if it went wrong.
                log_ratio = new_logprobs - old_logprobs[mb]  # [b, t]
                ratio = log_ratio.exp()  # [b, t]: new probability / old
                clipped_ratio = ratio.clamp(1 - args.cliprange, 1 + args.cliprange)  # [b, t]
                pg_loss = torch.max(-advantages[mb] * ratio, -advantages[mb] * clipped_ratio)  # [b, t]
                # Value loss, clipped around the rollout's values (lm-human-preferences, train_policy.py:344).
                # Not values + (new_values - values).clamp(): its rounding would count in val/clipfrac_avg.
                low = values[mb] - args.cliprange_value  # [b, t]
                high = values[mb] + args.cliprange_value  # [b, t]
                clipped_values = new_values.clamp(low, high)  # [b, t]
                vf_loss = 0.5 * torch.max(
                    (new_values - returns[mb]) ** 2, (clipped_values - returns[mb]) ** 2
                )
                loss = pg_loss + args.vf_coef * vf_loss - args.entropy_coef * entropy  # [b, t]
                # Divided by the minibatch's tokens: each weighs the same, whatever the micro-batch
                ((loss * mask[mb]).sum() / num_tokens).backward()
                terms = {
                    "loss/policy_avg": pg_loss,
                    "loss/value_avg": vf_loss,
                    "policy/entropy_avg": entropy,
                    "policy/approxkl_avg": 0.5 * log_ratio**2,  # from the policy that sampled
                    "policy/clipfrac_avg": ratio != clipped_ratio,
                    "val/clipfrac_avg": new_values != clipped_values,
                    "val/ratio": ratio,
                }
                for name, term in terms.items():  # summed over micro-batches: the mean over real tokens
                    stats[name].append((term.detach() * mask[mb]).sum() / num_tokens)
                if not stats["policy/grad_norm"]:  # no step yet: still the policy that sampled
                    gap = masked_mean(log_ratio.abs(), mask[mb])
                    assert gap < tolerance, f"ratio is not 1 on the first minibatch: mean |log ratio| {gap}"
            # One norm over policy, critic and value head: a spike of one loss shrinks the steps of all
            grad_norm = torch.nn.utils.clip_grad_norm_(trained.parameters(), args.max_grad_norm or torch.inf)
            if not grad_norm.isfinite():
                fail(f"update {update}: gradient not finite: check the rewards, or lower --learning_rate")
            stats["policy/grad_norm"].append(grad_norm)
            optimizer.step()
            optimizer.zero_grad()
        clock.append(time.time())

        # ======== Phase 5, logging: means over real tokens (_avg), or over episodes ========
        num_steps = len(stats["policy/grad_norm"])
        episode_kl = kl.sum(1)  # [B] nats per response
        mean_kl = episode_kl.mean()
        returns_var = masked_var(returns, mask).clamp(min=1e-8)  # not 0, if all scores are alike
        metrics = {
            "update": update,
            "episode": update * B,
            "objective/scores": scores.mean(),  # normalized, with penalties; those in eval.jsonl are without
            "objective/kl": mean_kl,
            "objective/entropy": -(old_logprobs * mask).sum(1).mean(),  # nats per response
            "objective/non_score_reward": -beta * mean_kl,
            "objective/rlhf_reward": (scores - beta * episode_kl).mean(),
            **{name: sum(parts) / num_steps for name, parts in stats.items()},  # mean over the steps
            "val/explained_variance": 1 - masked_var(returns - values, mask) / returns_var,
            "val/sampler_logprob_gap": sampler_gap,
            "val/eos_rate": eos_rate,
            "response_length": batch.response_lengths.float().mean(),
            "lr": learning_rate * schedule,
            "beta": beta,
            "eps": B / (clock[3] - clock[0]),  # episodes per second
            "time/rollout": clock[1] - clock[0],
            "time/score": clock[2] - clock[1],
            "time/update": clock[3] - clock[2],
        }
        write_row(metrics_file, metrics)
        if run:
            run.log(metrics, step=update)
        if args.adaptive_kl_target > 0:
            # Ziegler et al. 2019, section 2.2: up to 20% more or less per horizon, here of 1000 episodes
            # (their code: 10,000). A batch counts as one horizon at most, so that beta stays positive.
            error = mean_kl.item() / args.adaptive_kl_target - 1
            beta *= 1 + min(max(error, -0.2), 0.2) * min(B / 1000, 1)
        if update % args.eval_steps == 0 or update in (1, num_updates):
            examples = []
            for i in range(min(4, B)):
                response = batch.responses[i][mask[i] == 1]
                example = {
                    "update": update,
                    "prompt": prompts[i].shown,
                    "response": tokenizer.decode(response),  # with its special tokens
                    "score": scores[i].item(),
                    "kl": episode_kl[i].item(),
                }
                write_row(samples_file, example)
                examples.append(example)
            summary = f"score {scores.mean():.2f}, KL {mean_kl:.2f}, {eos_rate:.0%} ended"
            tqdm.write(f"update {update}/{num_updates}: {summary}")
            tqdm.write(f"    {example['prompt']} -> {example['response']}")
            if run:
                track_samples(run, examples, update)
        if update % args.save_steps == 0 or update == num_updates:
            progress = (update, beta, score_mean, score_std)
            save_checkpoint(args, logs, trained, optimizer, progress, data_hash, run)

    # ======== The end: save, then sample responses of both models to the held-out prompts ========
    # For stock `generate`: the distribution that was trained, without top-k, top-p or penalties
    policy.generation_config = transformers.GenerationConfig(
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
    results = [{"prompt": prompt.shown} for prompt in test]
    # Scores are normalized, without penalties. "sft" is the reference: a fork that updates it needs a copy
    for name, model in (("sft", reference), ("ppo", policy)):
        torch.manual_seed(args.seed)  # the same random numbers for both
        for start in range(0, len(test), B):
            prompts = test[start : start + B]
            batch = sample(model, tokenizer, prompts, args, end_ids)
            texts = tokenizer.batch_decode(batch.responses, skip_special_tokens=True)
            scores = score(reward_model, tokenizer, batch, prompts, micro_batch_size)  # [b]
            scores = ((scores - score_mean) / score_std).tolist()
            for i in range(len(prompts)):
                results[start + i] |= {name: texts[i], f"{name}_score": scores[i]}
    with open(output_dir / "eval.jsonl", "w") as file:
        for result in results:
            write_row(file, result)
    sft_score = mean(result["sft_score"] for result in results)
    ppo_score = mean(result["ppo_score"] for result in results)
    print(f"held-out score: SFT {sft_score:.2f}, PPO {ppo_score:.2f}")
    print(f"saved to {output_dir}")


# ---- The sampler ----
@torch.no_grad()
def rollout(model, prompts, prompt_mask, uniforms, temperature, end_ids, pad_id, cuda_graph=True):
    """Sample responses -> responses [B, T], lengths [B] with EOS, whether they ended [B], log-probs [B, T].
    prompts, prompt_mask [B, P], left-padded; uniforms [T, B] in [0, 1), all the randomness; end_ids [E].
    Shapes are fixed and tensors changed in place throughout: on CUDA a step is recorded once and replayed."""
    B, P = prompts.shape
    T = len(uniforms)
    # 0 on left padding alone, as causality hides what is not sampled yet
    attention_mask = F.pad(prompt_mask, (0, T), value=1)  # [B, P+T]
    # Positions count real tokens, not slots, as in training; slots would make a response depend on its batch
    positions = (prompt_mask.cumsum(1) - 1).clamp(min=0)  # [B, P]
    position = positions[:, -1:] + 1  # [B, 1] of the newest token
    cache = transformers.StaticCache(model.config, max_cache_len=P + T)
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
        lengths.add_(~ended)  # before `ended` changes: EOS counts
        ended.logical_or_((token == end_ids).any(1))
        step.add_(1)

    def decode_step():
        output = model.base_model(token, attention_mask=attention_mask, position_ids=position, cache=cache)
        position.add_(1)
        sample_next(output.last_hidden_state[:, -1])

    # Recurrent layers, as in Qwen3.5, read the last P entries of a mask, so they need the prompts' own.
    # `cache` is what older versions of transformers call past_key_values.
    prefill_mask = prompt_mask if model._is_stateful else attention_mask
    output = model.base_model(prompts, attention_mask=prefill_mask, position_ids=positions, cache=cache)
    sample_next(output.last_hidden_state[:, -1])
    run_step = decode_step
    first = 1
    if prompts.is_cuda and cuda_graph and T > 3 and not any(cache.is_sliding) and not model._is_stateful:
        # A CUDA graph: launching the step's many small kernels takes longer than running them. Sliding
        # windows are counted in Python, which a replay would not see; recurrent states are untried.
        stream = side_stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # two real steps first: libraries allocate, which recording forbids
            decode_step()
            decode_step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=stream):  # records the step, runs nothing
                decode_step()
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            fail(f"a decode step of this model cannot be recorded ({reason}): give --no-cuda_graph")
        run_step = graph.replay
        first = 3
    for t in range(first, T):
        run_step()
        if t % 8 == 0 and ended.all():  # not each time: asking waits for the GPU
            break
    return responses, lengths, ended, logprobs


@functools.cache
def side_stream():
    """One for all rollouts, as memory is not shared between streams."""
    return torch.cuda.Stream()


def bf16_copy(model):
    """A copy to sample from: half the bytes to read per token. Buffers stay fp32 (RoPE would be 0.3 radians
    off after 300 tokens), and so does the output layer (bf16 rounds logits near 60, GPT-2's, to quarters)."""
    model = copy.deepcopy(model)
    head = model.get_output_embeddings()
    head.weight = torch.nn.Parameter(head.weight.clone())  # tied to the input embeddings no longer
    for parameter in model.base_model.parameters():
        parameter.data = parameter.data.bfloat16()
    return model


# ---- Plumbing ----
def fail(message):  # [shared]
    """Print one line and exit with status 2, rather than go wrong silently."""
    print("error:", " ".join(message.split()), file=sys.stderr)
    raise SystemExit(2)


def check_flags(args):
    """Refuse settings that would train nothing, or train wrongly, without an error."""
    check_numbers(args)
    if not args.temperature or (args.adaptive_kl_target and not args.beta):
        fail("--temperature must be above 0, and --beta too with --adaptive_kl_target")
    if args.gamma > 1 or args.lam > 1:
        fail("--gamma and --lam must be at most 1")
    if args.batch_size % args.num_mini_batches or args.batch_size % args.num_generations:
        fail("--batch_size must be a multiple of --num_mini_batches and of --num_generations")
    if args.total_episodes % args.batch_size:
        fail("--total_episodes must be a multiple of --batch_size")
    if not args.reward_model_path and "num_embeddings" in reward_fn.__code__.co_names:  # still as shipped
        fail("--reward_model_path is empty, so the score is a rule of yours: write it into reward_fn")


def check_numbers(args):  # [shared]
    """Refuse numbers that would train nothing, or train wrongly, without an error. Counts must be at least 1,
    unless their default is 0, which stands for "none" or "choose"; all else must be at least 0, but for
    max_steps (0 or less: none) and penalties (below 0: a bonus)."""
    for name, value in vars(args).items():
        if type(value) in (int, float) and name not in ("max_steps", "missing_eos_penalty", "length_penalty"):
            is_count = isinstance(value, int) and getattr(Args, name) and name not in ("warmup_steps", "seed")
            if value < (1 if is_count else 0):
                fail(f"--{name} {value} is too small")


def find_device():  # [shared]
    """cuda, if this torch finds a GPU."""
    if torch.cuda.is_available():
        return "cuda"
    if torch.version.cuda:
        print("no GPU is used: this torch is built for CUDA but finds none, or the driver is too old for it")
    return "cpu"


def check_name(name, kind):  # [shared]
    """Refuse a name that is neither a folder nor on the Hub. Libraries would try the Hub for a minute, or,
    without a network, take a data set that another project left in the cache under that name."""
    try:
        if not Path(name).is_dir():
            huggingface_hub.snapshot_download(name, repo_type=kind, allow_patterns=["*.json", "*.md"])
    except Exception as error:
        fail(f"{name} is neither a folder here nor the name of a {kind} on the Hub; give either ({error})")


def load_rows(name, split):  # [shared]
    """Rows of a data set: those of {name}/{split}.jsonl exactly as they stand, a null or a date too, so that
    a rule can rely on them; or of a data set on the Hub or in another format, as `datasets` reads it."""
    check_name(name, "dataset")
    path = Path(name, f"{split}.jsonl")
    rows = []
    try:
        if path.exists():
            for line in open(path, encoding="utf-8"):
                if line.strip():
                    rows.append(dict(json.loads(line)))
        else:
            table = datasets.load_dataset(name, split=split)
            # Out goes what is None within messages and tools; a column that is None stays
            text = json.dumps(table.to_list(), default=str)
            rows = json.loads(text, object_hook=without_none)
            rows = [dict.fromkeys(table.column_names) | row for row in rows]
    except Exception as error:
        fail(f"{name}, {split}: row {len(rows) + 1} cannot be read: {error} {error.__cause__ or ''}")
    if not rows:
        fail(f"{name}, {split}: there are no rows")
    return rows


def without_none(entry):  # [shared]
    """Arrow gives every message and tool the keys of all others, and templates would print their None."""
    return {key: value for key, value in entry.items() if value is not None}


def find_column(rows, *names):  # [shared]
    """The first of `names` that is a column of row 1."""
    for name in names:
        if name in rows[0]:
            return name
    fail(f"there is no column {' or '.join(names)}: row 1 has {list(rows[0])}")


def encode_rows(encode_row, rows, split):  # [shared]
    """encode_row of every row, in two threads, as the tokenizer releases Python's lock. Rows for which it
    raises ValueError are left out, since in real data a few are always odd; one line says how many, why (in
    the error's words), and which is the first. If most are left out, the data set is refused."""
    kept = []
    left_out = defaultdict(list)  # why: row numbers

    def attempt(row):
        try:
            return encode_row(row), None
        except ValueError as why:
            return None, str(why)

    with ThreadPoolExecutor(2) as pool:
        results = tqdm(pool.map(attempt, rows), f"{split} rows", len(rows), disable=None, leave=False)
        for number, (example, why) in enumerate(results, 1):
            if why:
                left_out[why].append(number)
            else:
                kept.append(example)
    reasons = [f"; {len(numbers):,} {why} (first: row {numbers[0]})" for why, numbers in left_out.items()]
    line = f"{split}: {len(kept):,} of {len(rows):,} rows{''.join(reasons)}"
    if len(kept) < len(rows) / 2:
        fail(line)
    print(line)
    return kept


def read_chat(row, column):  # [shared]
    """The chat of a row: the messages of `column`; if they are a response alone, those of the column `prompt`
    come first. No other column is taken in its place. ValueError says why a row is left out."""
    chat = row.get(column)
    if not chat or not isinstance(chat, str | list):
        raise ValueError(f"with no text or messages in {column}")
    if isinstance(chat, str):
        if column != "prompt" and "prompt" not in row:
            # A dialogue, as in Anthropic/hh-rlhf: all before the last reply, marks included, is the prompt
            before, marker, reply = chat.rpartition("\n\nAssistant:")
            row = {"prompt": before and before + marker}
            chat = reply.strip()
        chat = [{"role": "user" if column == "prompt" else "assistant", "content": chat}]
    for message in chat:
        if not isinstance(message, dict) or "role" not in message:
            raise ValueError(f"with a message in {column} that has no role")
        content = message.get("content")
        if not isinstance(content, str) and (content is not None or not message.get("tool_calls")):
            raise ValueError(f"with a message in {column} that has no content (text)")
    if column not in ("prompt", "messages") and "prompt" in row and chat[0]["role"] == "assistant":
        chat = read_chat(row, "prompt") + chat
    return chat


def render(tokenizer, row, chat, **options):  # [shared]
    """Text of a chat, as the tokenizer's own chat template writes it: the form that the model was trained on,
    or will be. ValueError says why a row is left out."""
    tools = row.get("tools") or None
    if isinstance(tools, str):
        tools = json.loads(tools)
    text = f"{chat} {tools}"  # all strings of the row at once
    for token in control_tokens(tokenizer):
        if token in text:
            raise ValueError(f"with {token} in the text")
    try:
        return tokenizer.apply_chat_template(chat, tools=tools, tokenize=False, **options)
    except Exception as error:  # some templates require alternating roles, or reject a system message
        raise ValueError(f"refused by the chat template ({error})") from error


@functools.cache
def control_tokens(tokenizer):  # [shared]
    """Tokens such as <|im_end|>, which in a text would be read as the end of its turn, or as another turn."""
    return [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]


def load_prompts(tokenizer, args, split):
    """Prompts of a split: each with its token ids, what to show of it, and the data row it comes from."""
    rows = load_rows(args.dataset_name, split)
    column = find_column(rows, "prompt", "messages", "chosen")

    def encode_prompt(row):
        chat = read_chat(row, column)
        if column != "prompt" and chat[-1]["role"] == "assistant":
            chat = chat[:-1]
        if not chat or chat[-1]["role"] not in ("user", "tool"):
            raise ValueError("whose prompt does not end with a message of user or tool")
        text = render(tokenizer, row, chat, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False).input_ids
        if len(ids) > args.max_prompt_length:
            raise ValueError("longer than --max_prompt_length")
        return SimpleNamespace(ids=ids, shown=row.get("prompt", chat), row=row)

    return encode_rows(encode_prompt, rows, split)


def find_end_ids(model, tokenizer):  # [shared]
    """Ids that end a response: the generation config's, the tokenizer's EOS, and the chat template's."""
    configured = model.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, *(configured if isinstance(configured, list) else [configured])}
    # What the template writes after a response: its first added token ends the turn
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]
    _, content, after = tokenizer.apply_chat_template(chat, tokenize=False).rpartition("Hello!")
    if not content:
        fail("the chat template does not write what messages say")
    ids = tokenizer(after.strip(), add_special_tokens=False).input_ids
    ends.update([i for i in ids if i in tokenizer.added_tokens_decoder][:1])
    return sorted(ends - {None})


def load_pretrained(auto_class, path):  # [shared]
    """(model in fp32, tokenizer). Refuses a file that does not hold exactly the weights of such a model."""
    check_name(path, "model")
    if Path(path).is_dir() and not Path(path, "config.json").exists():
        fail(f"there is no model in {path} yet: run the earlier stage first")
    # trust_remote_code=False: code that comes with a model is not run, and no question asks whether to run it
    tokenizer = transformers.AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    if cached_file(path, "tokenizer.json", _raise_exceptions_for_missing_entries=False):
        # The file as it stands: Transformers 5 (checked: 5.24) rebuilds GPT2Tokenizer, Qwen2Tokenizer and
        # others by their class, without the file's pre-tokenizer: other ids than the model was trained on.
        tokenizer_class = transformers.PreTrainedTokenizerFast
        tokenizer = tokenizer_class.from_pretrained(path, eos_token=tokenizer.eos_token)
    options = {"dtype": torch.float32, "output_loading_info": True, "trust_remote_code": False}
    model, info = auto_class.from_pretrained(path, **options)
    # A missing weight would silently be random. What is left over is a fault too, but for buffers that older
    # versions saved.
    buffers = r"(masked_bias|attention\.bias|inv_freq|causal_mask|embed_positions)$"
    left_over = {name for name in info["unexpected_keys"] if not re.search(buffers, name)}
    wrong = sorted(info["missing_keys"] | left_over)
    if wrong:
        fail(f"{path} is not a {type(model).__name__}: weights missing or left over: {wrong[:4]}")
    if tokenizer.eos_token_id is None:
        fail(f"the tokenizer of {path} has no EOS token, so no response could end; set its eos_token")
    pad_id = tokenizer.pad_token_id
    if pad_id is None or pad_id >= model.get_input_embeddings().num_embeddings:
        tokenizer.pad_token = tokenizer.eos_token  # harmless: here padding is found by length, not by id
    return model, tokenizer


def load_reward_model(path, tokenizer):
    """A classifier with one label, whose tokenizer and chat template write what the policy's do."""
    model, reward_tokenizer = load_pretrained(transformers.AutoModelForSequenceClassification, path)
    if model.num_labels != 1 or not hasattr(model, "score"):
        fail(f"{path} is not a reward model: a classifier with one label, read by its layer `score`")
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]
    texts = [each.apply_chat_template(chat, tokenize=False) for each in (tokenizer, reward_tokenizer)]
    if texts[0] != texts[1] or not tokenizer.get_vocab().items() <= reward_tokenizer.get_vocab().items():
        fail(f"{path}: the reward model has a different tokenizer or chat template")
    return model


@torch.no_grad()
def check_model(model, tokenizer, rows, extra=0):  # [shared]
    """Refuse a context that is too short, and a family whose logits are not output_layer(backbone), such as
    Gemma 2, or change with padding on the right."""
    config = model.config.get_text_config()
    check_context(config, max(map(len, rows)) + extra)
    if getattr(config, "output_router_logits", False):
        print("note: the config asks for a router loss (output_router_logits), which is not trained here")
    pair = [min(rows, key=len)[:16], max(rows, key=len)[:32]]  # of two lengths, so that one is padded
    pair = tokenizer.pad({"input_ids": pair}, padding_side="right", return_tensors="pt")
    if model.base_model is not model:
        ours = model.get_output_embeddings()(hidden_states(model, pair.input_ids))  # [2, L, V]
        difference = (model(**pair, use_cache=False).logits - ours)[pair.attention_mask == 1]  # [N, V]
        if difference.abs().max() < 1e-2:
            return
    fail(f"model family {config.model_type} is not supported: no backbone, or logits changed afterwards")


def check_context(config, length):  # [shared]
    """Refuse rows that a model has no positions for, or whose length changes RoPE's frequencies (longrope):
    then a row's log-probs would depend on the longest row of its batch."""
    rope = getattr(config, "rope_parameters", None) or {}
    limit = getattr(config, "max_position_embeddings", None) or length
    if rope.get("rope_type") == "longrope":
        limit = rope["original_max_position_embeddings"]
    if length > limit:
        kind = f"{config.model_type}, RoPE {rope.get('rope_type')}"
        fail(f"sequences of {length} tokens exceed the context of {limit} ({kind}); lower the length limits")


def can_be_sampled(model):  # [shared]
    """Whether a family keeps its keys, values and states in the sampler's cache."""
    arguments = inspect.signature(model.base_model.forward).parameters
    return "cache" in arguments and model._supports_default_dynamic_cache()


def enable_checkpointing(model):
    """Recompute each layer's activations in the backward pass. Transformers' own switch works in train mode
    alone, which would also switch on dropout and router noise."""
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            options = {"use_reentrant": False, "preserve_rng_state": False}
            module.forward = functools.partial(checkpoint, module.forward, **options)


def load_checkpoint(args, inputs, changeable=()):  # [shared]
    """The state to resume from, None at the start. Refuses an output_dir in use; writes nothing."""
    folder = Path(args.output_dir)
    path = folder / "checkpoint/state.pt"
    if folder.resolve() in map(Path.resolve, map(Path, inputs)):
        fail(f"--output_dir {folder} is the folder of an input model; name another")
    if not args.resume and not args.overwrite and any(folder.glob("*")):
        fail(f"--output_dir {folder} is not empty; --resume its run, --overwrite it, or name another")
    if args.resume and not path.exists() and (folder / "config.json").exists():
        fail(f"{folder} holds a model but no checkpoint to resume from; name another")
    if not args.resume or not path.exists():
        return None
    state = torch.load(path, map_location="cpu", weights_only=True)
    changeable += ("output_dir", "resume", "overwrite", "track", "eval_steps", "save_steps")
    for name, old in state["args"].items():
        new = getattr(args, name, "no flag of this stage")
        if name not in changeable and new != old:
            fail(f"--{name} {new}: it was {old} in {folder}; give that, or another folder")
    return state


def open_logs(args, state, *names):  # [shared]
    """Make output_dir and open its logs, cut back to their length at the checkpoint."""
    folder = Path(args.output_dir)
    (folder / "checkpoint").mkdir(parents=True, exist_ok=True)
    (folder / "args.json").write_text(json.dumps(asdict(args), indent=2))
    logs = [open(folder / name, "a", buffering=1) for name in names]
    sizes = state["log_sizes"] if state else [0] * len(names)
    for log, size in zip(logs, sizes):
        log.truncate(size)
    if not state:  # an older model or checkpoint must not be taken for this run's
        for name in ("config.json", "eval.jsonl", "checkpoint/state.pt"):
            (folder / name).unlink(missing_ok=True)
    return logs


def check_data(state, sequences):  # [shared]
    """A hash of the data's ids. Refuses to resume on other data, since the batches would differ."""
    data_hash = hash(tuple(hash(tuple(ids)) for ids in sequences))  # of integers: the same in every process
    if state and state["data_hash"] != data_hash:
        fail("the data have changed since the checkpoint; name another --output_dir")
    return data_hash


def start_tracking(args, state):  # [shared]
    """A Weights & Biases run; a run that is resumed continues its own."""
    import wandb

    project = os.environ.get("WANDB_PROJECT", "ppo_rlhf")
    run_id = state and state["run_id"]
    return wandb.init(project=project, name=args.output_dir, config=asdict(args), id=run_id, resume="allow")


def track_samples(run, examples, update):
    """The latest samples as a table in Weights & Biases."""
    import wandb

    cells = [[str(value) for value in example.values()] for example in examples]
    run.log({"samples": wandb.Table(list(examples[0]), cells)}, step=update)


def write_row(file, row):  # [shared]
    """One line of JSON; tensors become numbers."""
    file.write(json.dumps(row, default=float) + "\n")


def save_checkpoint(args, logs, model, optimizer, progress, data_hash, run):  # [shared]
    """Write a new file, then rename it: a run that is killed at any moment has a valid checkpoint."""
    state = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "progress": progress,
        "data_hash": data_hash,
        "run_id": run and run.id,
        "args": asdict(args),
        "log_sizes": [os.path.getsize(log.name) for log in logs],
    }
    path = Path(args.output_dir, "checkpoint/state.pt")
    torch.save(state, f"{path}.new")
    os.replace(f"{path}.new", path)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # a terminal that is not UTF-8 must not end a run
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # threads within a row only slow down those of encode_rows
    datasets.disable_progress_bars()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        main(tyro.cli(Args, description=__doc__))
    except KeyboardInterrupt:
        fail("stopped; the same command with --resume continues from the newest checkpoint")
