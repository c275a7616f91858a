"""Stage 3 of RLHF: PPO. The SFT model learns to write what scores highly.

Each update: (1) the policy answers a batch of prompts, (2) the frozen reference (the SFT model) and the reward model
judge the answers, (3) rewards become advantages, (4) a few epochs of clipped policy-gradient steps. The reward is

    score(prompt, response) - beta * KL(policy || reference)

where the KL is the leash: without it the policy drifts to whatever the reward model, which is only a model, mistakes
for quality (Gao et al. 2022), and forgets how to write.

    python ppo_rlhf.py --beta 0.1  # the shipped task, after stages 1 and 2
    python ppo_rlhf.py --sft_model_path my_sft/ --reward_model_path my_rm/ \\
        --dataset_name my_prompts/ --learning_rate 3e-6

Reads   runs/sft, runs/reward_model and data/prompts/{train,test}.jsonl with the column `prompt`.
Writes  runs/ppo: the policy and its tokenizer, value_head.safetensors, metrics.jsonl, samples.jsonl, args.json, README.md
        (a model card), checkpoint/, and eval.jsonl: SFT and PPO side by side on the held-out prompts.
Next    python data/judge.py runs/ppo/eval.jsonl

How the tensors line up. A row holds a prompt and its response; B rows, P prompt slots, T response slots:

    rollout   [ pad pad q1 q2 q3 | r1 r2 r3 EOS pad ]    prompts left-padded: every row samples into the same slot
    training  [ q1 q2 q3 r1 r2 r3 EOS pad pad pad   ]    rolled to the left: causal attention needs no mask at all
                      |  |  |  |
    predicts          r1 r2 r3 EOS                       the position before a token predicts it: its logits give the
    value             V1 V2 V3 V4                        log-prob, its hidden state gives V, the value before the token

    [B, T]            r1 r2 r3 EOS pad
    mask              1  1  1  1   0                     every sampled token, EOS included; from lengths, never from ids
    KL                x  x  x  x                         on every real token
    score                      x                         on the last real token; after it there is nothing: V = 0

Sources: Ziegler et al. 2019 (openai/lm-human-preferences), Stiennon et al. 2020, Ouyang et al. 2022, and "The N
Implementation Details of RLHF with PPO" (Huang et al. 2023, vwxyzjn/lm-human-preference-details).
"""

import contextlib
import copy
import ctypes
import functools
import hashlib
import inspect
import json
import math
import os
import platform
import re
import shlex
import signal
import subprocess
import sys
import time
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
import transformers
import tyro
from safetensors import SafetensorError
from safetensors.torch import save_file
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, StaticCache


@dataclass
class Args:
    # ---- what goes in, what comes out ----
    sft_model_path: str = "runs/sft"
    """the policy's start and the frozen reference: a local folder or a Hub name"""
    reward_model_path: tuple[str, ...] = ("runs/reward_model",)
    """a sequence-classification model with one label and the same tokenizer: a local folder or a Hub name; several, one after
    the other, are an ensemble"""
    dataset_name: str = "data/prompts"
    """a Hub name or a local folder with train.jsonl and test.jsonl; column `prompt`, or `messages`, whole chats of which
    a last turn of the assistant is dropped"""
    dataset_train_split: str = "train"
    """the split to train on; slices as in `datasets` work, `train[:10%]`"""
    dataset_test_split: str = "test"
    """the held-out split; for a data set without one, `train[-500:]`, with `train[:-500]` to train on"""
    output_dir: str = "runs/ppo"
    """where the policy, metrics.jsonl and eval.jsonl go"""
    prompt_template: str = "Prompt: {prompt}\nResponse:"
    """what a string prompt is put into, the same in all three stages; a prompt that is a list of chat messages
    goes through the tokenizer's own chat template instead"""
    max_prompt_length: int = 256
    """tokens; longer prompts are left out, and counted"""

    # ---- rollout ----
    total_episodes: int = 5120
    """responses sampled over the whole run; updates = total_episodes / batch_size"""
    batch_size: int = 128
    """episodes an update"""
    rollout_batch_size: int = 128
    """episodes sampled at a time: more are faster, and their keys and values take more memory (131 kB a token for Pythia-1B,
    12 kB for Qwen2.5-0.5B)"""
    max_new_tokens: int = 64
    """the longest response, in tokens; the shipped task's longest good answers take about 50"""
    temperature: float = 0.7
    """of the sampler and of every log-prob. 0.7 as in Ziegler et al. 2019: a small model is much better there than
    at 1.0, and what is sampled, scored, anchored by the KL and judged at the end is one and the same policy"""

    # ---- reward ----
    beta: float = 0.1
    """price of one nat of KL from the reference, in standard deviations of the SFT model's scores. 0 lets the policy
    hack the reward model, 1 hardly lets it move; 0.02 to 0.2 is usual"""
    missing_eos_penalty: float = 1.0
    """subtracted from the score of a response that was cut off at max_new_tokens: half an answer is no answer"""
    adaptive_kl_target: float = 0.0
    """more than 0: beta follows the KL, so that it settles at this many nats an answer (6 in Ziegler et al. 2019)"""
    adaptive_kl_horizon: int = 1000
    """episodes in which a KL that is 20% off, or more, moves beta by 20%. Ziegler et al. had 10,000, of a much longer run"""
    ensemble: Literal["mean", "min", "mean-std"] = "mean"
    """what several reward models' scores become: their mean, or less where they disagree, as they do on what none of them
    has seen: the minimum, or mean - ensemble_coef * standard deviation (Coste et al. 2024, who take the variance)"""
    ensemble_coef: float = 1.0
    """standard deviations taken off by `mean-std`"""
    length_penalty: float = 0.0
    """subtracted from the score for each token of the response: against verbosity that the reward model takes for quality"""
    whiten_rewards: bool = False
    """divide each batch's rewards by their standard deviation over tokens, as lm-human-preferences did: the scale of the
    score and of beta then changes from update to update"""

    # ---- advantages ----
    gamma: float = 1.0
    """discount per token; 1: an answer is judged as a whole, its early tokens matter as much as its last"""
    lam: float = 0.95
    """GAE's lambda: 1 is the noisy, unbiased return, 0 trusts the value head alone (Schulman et al. 2015). (1 ended 0.3 higher
    in gold score on the shipped task, and 1.6 nats further away)"""

    # ---- update ----
    learning_rate: float = 1e-4
    """peak of Adam's learning rate; linear decay to zero. Right for the shipped task's 1M parameters; a 1B model wants
    1e-6 to 3e-6"""
    value_learning_rate: float = 1e-3
    """peak for the value head alone: it starts at zero and must be right within a few updates, or GAE with lambda below 1
    loses the early tokens' share of the score (0.95^30 is 0.2)"""
    warmup_steps: int = 2
    """updates of linear warm-up: Adam's first steps have full length whatever the gradient, and the values they
    would rest on are not learnt yet"""
    num_ppo_epochs: int = 2
    """passes over each batch of episodes. The classic 4 (Ziegler et al. 2019) took half as long again on the shipped task
    and ended no better"""
    num_mini_batches: int = 8
    """optimizer steps in one pass"""
    per_device_train_batch_size: int = 16
    """episodes in one forward and backward pass (the micro-batch): changes memory and speed, never the gradient"""
    cliprange: float = 0.2
    """the probability ratio stops paying outside of [1 - cliprange, 1 + cliprange] (Schulman et al. 2017)"""
    cliprange_value: float = 0.2
    """how far a value may move from the rollout's before its loss stops improving; in score units"""
    vf_coef: float = 0.1
    """weight of the value loss: policy and values share one trunk, and the policy must not drown in it. (0.5, with a
    value_learning_rate of 3e-3, ended 0.15 higher in gold score on the shipped task, and half a nat further away)"""
    separate_critic: bool = False
    """values from a network of their own, which starts as the (first) reward model, as in Ouyang et al. 2022, and so knows what
    scores: better advantages (gold score 3.7 instead of 3.35 on the shipped task), for updates 1.6 times as long and up to 1.5
    times the memory. It is kept in the checkpoint alone"""
    entropy_coef: float = 0.0
    """weight of an entropy bonus: more than 0 keeps the policy from collapsing onto one answer"""
    ptx_coef: float = 0.0
    """weight of the SFT loss on demonstrations, one for each episode of a minibatch: against forgetting (PPO-ptx, Ouyang et
    al. 2022)"""
    ptx_dataset_name: str = "data/demonstrations"
    """with ptx_coef: a Hub name or a local folder; columns `prompt` and `completion`, split dataset_train_split"""
    max_grad_norm: float = 1.0
    """the gradient is scaled down to this norm if it is longer"""
    gradient_checkpointing: bool = False
    """recompute activations in the backward pass: about a third more time for a fraction of the memory"""
    seed: int = 1
    """seeds the order of the prompts, the sampler and the minibatches"""

    # ---- watching ----
    logging_steps: int = 1
    """updates between two lines in metrics.jsonl"""
    eval_steps: int = 10
    """updates between two looks at a prompt with its response, score and KL; a few more go to samples.jsonl"""
    track: bool = False
    """log to Weights & Biases too"""

    # ---- stopping and going on ----
    save_steps: int = 10
    """updates between two checkpoints, of 12 bytes a parameter: what a crash can cost"""
    save_total_limit: int = 1
    """checkpoints that are kept"""
    resume: bool = False
    """go on with the run in output_dir from its newest checkpoint: on a CPU it then ends the same to the bit"""
    overwrite: bool = False
    """begin anew in an output_dir that is not empty; with --resume, only if there is no checkpoint"""


# ---------------------------------------------------------------------------------------------------------------
# The mathematics. Everything is [B, T] with a mask of the same shape: 1 on real response tokens, 0 on padding.
# ---------------------------------------------------------------------------------------------------------------


def masked_mean(x, mask):
    """Mean of x over the real tokens -> scalar."""
    return (x * mask).sum() / mask.sum()


def masked_var(x, mask):
    """Variance of x over the real tokens -> scalar."""
    return masked_mean((x - masked_mean(x, mask)) ** 2, mask)


def whiten(x, mask, shift_mean=True):
    """x with mean 0 and standard deviation 1 over the real tokens, and 0 on padding: [B, T] -> [B, T].

    Statistics over padding would shrink with the share of padding in a batch, and with them the step size. With
    shift_mean=False the mean stays what it was (lm-human-preferences, core.py, `whiten`)."""
    mean = masked_mean(x, mask)
    whitened = (x - mean) * torch.rsqrt(masked_var(x, mask) + 1e-8)  # [B, T]
    return (whitened if shift_mean else whitened + mean) * mask


def logprobs(logits, labels):
    """Log-probability of each label: [..., V], [...] -> [...]."""
    return logits.log_softmax(-1).gather(-1, labels[..., None]).squeeze(-1)


def entropies(all_logprobs):
    """Exact entropy of each token's distribution, in nats, from the log-probs of the whole vocabulary: [..., V] -> [...]."""
    return -(all_logprobs.exp() * all_logprobs).sum(-1)


def penalized_rewards(scores, logprobs, ref_logprobs, mask, beta):
    """Reward of each token: -beta * (log pi - log ref) on every real one, plus the score on the last real one.

    scores [B]; logprobs, ref_logprobs, mask [B, T] -> [B, T]. log pi - log ref of the sampled token is the k1
    estimate of the KL: unbiased, and summed over the tokens it makes the return score - beta * KL. One slot later,
    the score would fall on padding for every answer that ends early, and half the batch would learn from nothing."""
    rewards = -beta * (logprobs - ref_logprobs) * mask  # [B, T]
    last = mask.sum(1).long() - 1  # [B]
    return rewards.scatter_add(1, last[:, None], scores[:, None].to(rewards.dtype))  # [B, T]


def ensemble_scores(scores, how, coef):
    """One score from those of M reward models: [M, B] -> [B] by "mean", "min" or "mean-std" (after Coste et al. 2024)."""
    if how == "min":
        return scores.amin(0)
    return scores.mean(0) - (coef * scores.std(0, correction=0) if how == "mean-std" else 0)


def gae(rewards, values, mask, gamma, lam):
    """Generalized advantage estimation (Schulman et al. 2015, eq. 16) -> advantages [B, T], returns [B, T].

    delta_t = r_t + gamma * V_{t+1} - V_t and A_t = delta_t + gamma * lam * A_{t+1}, from the last token backwards.
    V and A after the last real token are 0: the episode is over. (A value read there, on padding that was never
    trained on, would leak into every advantage of the answer.)"""
    values = values * mask  # [B, T]
    advantages = torch.zeros_like(values)  # [B, T]
    next_value = next_advantage = torch.zeros_like(values[:, 0])  # [B]
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]  # [B]
        advantages[:, t] = next_advantage = (delta + gamma * lam * next_advantage) * mask[:, t]  # [B]
        next_value = values[:, t]
    return advantages, advantages + values


def policy_loss(new_logprobs, old_logprobs, advantages, cliprange):
    """PPO's clipped surrogate, per token (Schulman et al. 2017, eq. 7): [B, T] -> [B, T], to be minimized.

    The max of two losses is the pessimistic one: a token gains nothing from moving its ratio past the clip in the
    direction of its advantage, but is always pulled back if it went the wrong way."""
    ratio = torch.exp(new_logprobs - old_logprobs)  # [B, T]
    return torch.max(-advantages * ratio, -advantages * ratio.clamp(1 - cliprange, 1 + cliprange))


def value_loss(new_values, old_values, returns, cliprange_value):
    """Clipped squared error, per token: [B, T] -> [B, T] (lm-human-preferences, train_policy.py:344)."""
    clipped = old_values + (new_values - old_values).clamp(-cliprange_value, cliprange_value)  # [B, T]
    return 0.5 * torch.max((new_values - returns) ** 2, (clipped - returns) ** 2)


# ---------------------------------------------------------------------------------------------------------------
# The models' side: sampling, hidden states of responses, scores; then what a model must be like to be trained here.
# ---------------------------------------------------------------------------------------------------------------


@functools.cache
def side_stream():
    """The one CUDA stream on which graphs are warmed up and captured: cuBLAS keeps a workspace, 32 MiB on an H100, for every
    stream that it has seen, so a new one for each rollout would eat the memory up."""
    return torch.cuda.Stream()


@torch.no_grad()
def rollout(model, prompts, prompt_mask, uniforms, temperature, eos_id, pad_id):
    """Sample a response to every prompt -> responses [B, T] (padded after EOS), lengths [B] (EOS included).

    prompts, prompt_mask [B, P], left-padded; uniforms [T, B] in [0, 1): all the randomness there is.

    A decode step is thousands of tiny kernels, and launching them from Python takes longer than running them. On
    CUDA the step is therefore captured once as a CUDA graph and replayed, one launch a token. A graph replays
    the same kernels on the same addresses, so a step must have fixed shapes (a cache of the full length, every row
    decoded until the last one is done), keep its state in tensors that it changes in place, and never ask the
    host anything. On a CPU the same step simply runs."""
    (B, P), T, device = prompts.shape, len(uniforms), prompts.device
    S = math.ceil((P + T) / 8) * 8  # slots; a kernel would copy a mask whose rows do not begin at multiples of 8, in each layer
    cache = StaticCache(config=model.config, max_cache_len=S)  # keys and values, [B, heads, S, d_head] a layer
    slots = torch.arange(S, device=device)  # [S]
    real = F.pad(prompt_mask.bool(), (0, S - P))[:, None, None]  # [B, 1, 1, S]: the prompts' tokens
    # Added to attention scores: 0 on slots that are read. (A boolean mask would be turned into this in each layer; GPT-J adds it.)
    mask = torch.where(real, 0.0, -math.inf).to(model.base_model.dtype)  # [B, 1, 1, S]
    responses = torch.full((B, T), pad_id, device=device)  # [B, T]
    lengths = torch.zeros(B, dtype=torch.long, device=device)  # [B]
    done = torch.zeros(B, dtype=torch.bool, device=device)  # [B]
    token = torch.empty(B, 1, dtype=torch.long, device=device)  # [B, 1] the newest
    position = prompt_mask.sum(1, keepdim=True)  # [B, 1] of the newest: real tokens before it, not slots
    step = torch.zeros(1, dtype=torch.long, device=device)  # [1] response tokens so far; a tensor, so a graph can count

    def sample_next(hidden):  # [B, d]
        # Plain sampling by inverse CDF: the first token whose cumulative probability exceeds u. No top-k, no top-p, no
        # penalties: the log-probs in the loss are of this distribution and no other, or the ratio is meaningless.
        p = (model.get_output_embeddings()(hidden.float()) / temperature).softmax(-1)  # [B, V]
        # CUDA sums a row up in one block, however long it is: give it many short rows, then add what stands before each.
        parts = F.pad(p, (0, -p.shape[1] % 256)).unflatten(1, (-1, 256)).cumsum(-1)  # [B, V/256, 256]
        cdf = (parts + F.pad(parts[:, :-1, -1].cumsum(-1), (1, 0))[..., None]).flatten(1)  # [B, V rounded up]
        u = uniforms.index_select(0, step).T * cdf[:, -1:]  # [B, 1]; the last entry is 1 up to rounding
        token.copy_(torch.searchsorted(cdf, u, right=True).clamp(max=p.shape[1] - 1))
        token.masked_fill_(done[:, None], pad_id)
        responses.index_copy_(1, step, token)
        lengths.add_(~done)
        done.logical_or_(token[:, 0] == eos_id)
        step.add_(1)

    def decode_step():
        mask.index_fill_(3, P - 1 + step, 0.0)  # the slot that the newest token is written into
        hidden = model.base_model(input_ids=token, attention_mask=mask, position_ids=position, past_key_values=cache,
                                  use_cache=True).last_hidden_state  # [B, 1, d]  # fmt: skip
        position.add_(1)
        sample_next(hidden[:, 0])

    # Prefill: all prompt tokens in one forward. Positions count real tokens only (left pads would shift them, and
    # the same prompt would get another answer in another batch); pads attend to themselves, as a softmax over
    # nothing is NaN.
    read = (real & (slots <= slots[:P, None])) | (slots == slots[:P, None])  # [B, 1, P, S]
    hidden = model.base_model(input_ids=prompts, attention_mask=torch.where(read, 0.0, -math.inf).to(mask.dtype),
                              position_ids=(prompt_mask.cumsum(1) - 1).clamp(min=0), past_key_values=cache,
                              use_cache=True).last_hidden_state  # [B, P, d]  # fmt: skip
    sample_next(hidden[:, -1])

    run_step, first = decode_step, 1
    if device.type == "cuda" and T > 3:
        side = side_stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # two real steps first: libraries allocate their workspaces now, not in the graph
            decode_step(), decode_step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=side):  # records the step, runs nothing
            decode_step()
        run_step, first = graph.replay, 3
    for t in bar(range(first, T), "rollout"):
        run_step()
        if t % 8 == 0 and done.all():  # asking costs a wait for the device, so ask rarely
            break
    return responses, lengths


def rollout_in_slices(model, prompts, prompt_mask, uniforms, temperature, eos_id, pad_id, size):
    """The same, `size` rows at a time: the cache of keys and values, which may outweigh the model, is that of one slice."""
    slices = zip(prompts.split(size), prompt_mask.split(size), uniforms.split(size, dim=1))
    responses, lengths = zip(*[rollout(model, *tensors, temperature, eos_id, pad_id) for tensors in slices])
    return torch.cat(responses), torch.cat(lengths)  # [B, T], [B]


def response_states(model, ids, prompt_lengths, T, autocast=contextlib.nullcontext()):
    """Hidden states that predict response tokens 1 ... T: right-padded ids [b, L], prompt_lengths [b] -> [b, T, d].

    The output layer is then applied to these alone. Logits of whole sequences, [b, L, V], would be by far the
    largest tensor of the run (5.5 GB for 16 x 565 tokens and a vocabulary of 152k, and as much for log-probs and gradient)."""
    with autocast:
        hidden = model.base_model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state  # [b, L-1, d]: the last predicts none
    slots = prompt_lengths[:, None] - 1 + torch.arange(T, device=ids.device)  # [b, T]: the position before each token
    slots = slots.clamp(max=hidden.shape[1] - 1)[..., None].expand(-1, -1, hidden.shape[-1])  # [b, T, d]
    return hidden.gather(1, slots)


def micro_batches(rows, lengths, response_lengths, size, device):
    """Split row numbers into micro-batches of similar length -> [(rows [b], longest sequence L, longest response t)].

    Cut to L and t, a micro-batch has few pads; the order of rows within a minibatch means nothing to its gradient."""
    rows = sorted(rows, key=lambda row: lengths[row])
    chunks = [rows[i : i + size] for i in range(0, len(rows), size)]
    return [(torch.tensor(chunk, device=device), max(lengths[i] for i in chunk), max(response_lengths[i] for i in chunk))
            for chunk in chunks]  # fmt: skip


def read_scores(reward_model, hidden, lengths):  # [shared]
    """The raw score of each sequence, [B], from the hidden states [B, L, d] of right-padded ids, at the last real token.

    `lengths` [B] say where that is; looking for the last id that is no pad (as the stock forward does) goes wrong
    as soon as pad == eos, since the EOS is then taken for padding and the score read one token early."""
    last = hidden[torch.arange(len(hidden), device=hidden.device), lengths - 1]  # [B, d]
    with torch.autocast(hidden.device.type, enabled=False):  # bf16 has 3 digits, differences of scores need more
        return reward_model.score(last.float()).squeeze(-1)  # [B]


def score_sequences(reward_model, ids, lengths):  # [shared]
    """The raw score of each sequence: right-padded ids [B, L], lengths [B] -> [B]."""
    return read_scores(reward_model, reward_model.base_model(input_ids=ids, use_cache=False).last_hidden_state, lengths)


@torch.no_grad()
def reward_fn(reward_model, tokenizer, sequences, prompt_lengths, lengths):
    """YOUR REWARD GOES HERE. One float for each answer, [b]; PPO asks for nothing else.

    sequences [b, L]: ids of prompt and response, right-padded; prompt_lengths, lengths [b]: where the response starts
    and ends. Here: the reward model, normalized so that SFT samples have mean 0 and standard deviation 1. A rule
    or a remote judge wants texts; "shorter is better", say, is

        answers = [tokenizer.decode(row[p:n], skip_special_tokens=True)
                   for row, p, n in zip(sequences, prompt_lengths, lengths)]
        return torch.tensor([-len(answer.split()) / 10 for answer in answers], device=sequences.device)
    """
    config = reward_model.config
    return (score_sequences(reward_model, sequences, lengths) - config.reward_mean) / config.reward_std


def forward(policy, value_head, ids, prompt_lengths, labels, mask, temperature, autocast, entropy_grad=False, critic=None):
    """What policy and value head say of response tokens: log-probs, entropies, values, each [b, T], 0 on padding.

    ids [b, L], prompt_lengths [b], labels and mask [b, T]. Without a critic of its own, one forward of one trunk serves both
    heads. The same function gives the old log-probs and the new ones: then the ratio of an unchanged policy is 1,
    whatever the sampler's kernels round differently."""
    T = labels.shape[1]
    hidden = response_states(policy, ids, prompt_lengths, T, autocast)  # [b, T, d]
    value_hidden = hidden if critic is None else response_states(critic, ids, prompt_lengths, T, autocast)  # [b, T, d]
    # Both heads outside autocast: bf16 has 3 digits, returns need more, and a ratio lives on the third digit of a logit. The
    # distribution that was sampled is the one that is scored. Few tensors of this size, the largest of the run: divided in
    # place, and one log-softmax for both figures.
    all_logprobs = policy.get_output_embeddings()(hidden.float()).div_(temperature).log_softmax(-1)  # [b, T, V]
    new_logprobs = all_logprobs.gather(-1, labels[..., None]).squeeze(-1)  # [b, T]
    new_values = value_head(value_hidden.float()).squeeze(-1)  # [b, T]
    new_entropies = entropies(all_logprobs if entropy_grad else all_logprobs.detach())  # a backward pass only if asked for
    return [x.masked_fill(mask == 0, 0.0) for x in (new_logprobs, new_entropies, new_values)]


def left_pad(prompts, pad_id, device):
    """Lists of ids -> prompts [B, P], mask [B, P] (1 on real tokens), lengths [B]."""
    width = max(map(len, prompts))
    ids = torch.tensor([[pad_id] * (width - len(prompt)) + prompt for prompt in prompts], device=device)  # [B, P]
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)  # [B]
    return ids, (torch.arange(width, device=device) >= width - lengths[:, None]).long(), lengths


def roll_left(prompts, responses, prompt_lengths):
    """[pad pad q q | r r] -> [q q r r pad pad]: prompts [B, P], responses [B, T] -> sequences [B, P+T].

    With the padding on the right, causal attention needs no mask and positions are 0, 1, ...: the fast kernels apply."""
    joined = torch.cat([prompts, responses], 1)  # [B, P+T]
    slots = torch.arange(joined.shape[1], device=joined.device) + (prompts.shape[1] - prompt_lengths)[:, None]
    return joined.gather(1, slots % joined.shape[1])  # [B, P+T]


def lay_out(examples, pad_id, device):
    """(prompt ids, response ids) of given answers, laid out as a rollout's -> ids [b, L], prompt_lengths [b], labels [b, t],
    mask [b, t]."""
    prompts, _, prompt_lengths = left_pad([prompt for prompt, _ in examples], pad_id, device)  # [b, P], [b]
    flipped, mask, _ = left_pad([response[::-1] for _, response in examples], pad_id, device)  # [b, t] each
    labels = flipped.flip(1)  # padded on the right
    return roll_left(prompts, labels, prompt_lengths), prompt_lengths, labels, mask.flip(1).float()


def load_model(auto_class, path, flag):
    """(model, tokenizer) without dropout: it would change the log-probs between rollout and update."""

    def edit_config(config):
        for name, value in config.to_dict().items():
            if "drop" in name and isinstance(value, float):
                setattr(config, name, 0.0)
        if getattr(config, "activation_function", None) == "gelu_new":
            config.activation_function = "gelu_pytorch_tanh"  # the same function in one kernel: 40% less memory for GPT-2

    model, tokenizer = load_pretrained(auto_class, path, flag, edit_config)
    head = getattr(model, "score", None)
    if auto_class is AutoModelForSequenceClassification and getattr(head, "out_features", 0) != 1:
        fail(f"{flag} {path}: is no reward model: its head is {head}, not a linear layer `score` with one output")
    model.config.pad_token_id = None  # or GPT-2's forward looks for pads in every batch: a wait for the device
    return model, tokenizer


def to_bf16(model):
    """A model that only runs forward, in bf16: half the memory, several times the speed. Two things stay fp32: buffers, as
    RoPE's frequencies in bf16 are 0.3 radians off after 300 tokens, which is another model; and the output layer, as bf16
    rounds logits near 60, where GPT-2's lie, to quarters (MiniMax-M1 2025: without that, sampler and training disagree)."""
    head = model.get_output_embeddings()  # None of a reward model, whose last layer is `score`
    if head is not None:
        head.weight = torch.nn.Parameter(head.weight.detach().clone(), requires_grad=False)  # if tied, now of its own
    for parameter in model.base_model.parameters():
        parameter.data = parameter.data.bfloat16()


@torch.no_grad()
def check_model(model, prompts, T, pad_id, flag):
    """Compare sampler and scorer with the model's own forward on single rows; the run ends here if they differ.

    Some families scale their logits after the output layer (Gemma 2, Cohere, Granite), some do not obey the mask of a cache
    of full length (GPT-Neo, sliding windows). Nothing would crash: another policy would learn."""
    device, family = prompts[0].device, f"{flag}: the model family `{model.config.model_type}` is not supported"
    ids, mask, lengths = left_pad([prompt.tolist() for prompt in prompts], pad_id, device)  # [B, P], [B, P], [B]
    uniforms, worst = torch.rand(T, len(prompts), device=device), 0.0
    try:
        responses, _ = rollout(model, ids, mask, uniforms, 1.0, -1, pad_id)  # [B, T] no EOS: all T tokens
        for prompt, response, u, length in zip(prompts, responses, uniforms.T, lengths):
            row = torch.cat([prompt, response])[None]  # [1, p+T] unpadded
            stock = model(input_ids=row, use_cache=False).logits[0, len(prompt) - 1 : -1]  # [T, V]
            ours = model.get_output_embeddings()(response_states(model, row, length[None], T))[0]  # [T, V]
            p = stock.softmax(-1)  # [T, V]
            above = p.cumsum(-1).gather(1, response[:, None])[:, 0]  # [T] the CDF at the sampled token, then before it
            below = above - p.gather(1, response[:, None])[:, 0]  # [T]; u lies between the two, up to rounding
            errors = (p - ours.softmax(-1)).abs().max(), (below - u).max(), (u - above).max()
            worst = max(worst, *(math.inf if error.isnan() else error.item() for error in errors))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        fail(f"{family} ({(str(error) or type(error).__name__).splitlines()[0]})")
    if worst > 1e-3:
        fail(f"{family}: probabilities of sampler and scorer differ from its own forward's by {worst:.2g}")


def main(args):
    check_flags(args, ["batch_size", "rollout_batch_size", "total_episodes", "max_prompt_length", "max_new_tokens", "temperature",
                       "learning_rate", "value_learning_rate", "cliprange", "cliprange_value", "num_ppo_epochs", "num_mini_batches",
                       "per_device_train_batch_size", "max_grad_norm", "adaptive_kl_horizon", "logging_steps", "eval_steps",
                       "save_steps", "save_total_limit"])  # fmt: skip
    if args.batch_size % args.num_mini_batches:
        fail(f"--batch_size {args.batch_size} does not divide into --num_mini_batches {args.num_mini_batches}")
    if args.total_episodes < args.batch_size:
        fail(f"--total_episodes {args.total_episodes} is less than one --batch_size {args.batch_size}")
    if args.adaptive_kl_target > 0 and args.beta == 0:
        fail("--adaptive_kl_target: a --beta of 0 cannot be adapted; give the beta to begin with")
    if not args.reward_model_path:
        fail("--reward_model_path is empty: name at least one")
    if max(args.gamma, args.lam) > 1:
        fail(f"--gamma {args.gamma} --lam {args.lam}: neither may be above 1")
    # What may change on --resume: it changes no result, or (the last three) only the rounding of sums.
    state = load_checkpoint(args, ["output_dir", "logging_steps", "eval_steps", "track", "save_steps", "save_total_limit", "resume",
                                   "overwrite", "gradient_checkpointing", "per_device_train_batch_size",
                                   "rollout_batch_size"])  # fmt: skip
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # bf16 matrix products on CUDA with fp32 weights and optimizer: pure bf16 weights would round small steps away
    autocast = torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else contextlib.nullcontext()
    if device.type == "cuda":  # cuDNN's attention makes a plan, 30 ms and more, for every new shape, and every micro-batch has one
        torch.backends.cuda.enable_cudnn_sdp(False)
    # Nats a token, for what must be 0: bf16 rounds, fp32 hardly; and logits are divided by the temperature.
    tolerance = (0.1 if device.type == "cuda" else 1e-4) / min(args.temperature, 1)
    if device.type == "cpu" and platform.libc_ver()[0] == "glibc":
        # glibc gives the memory of large tensors back at once, and the kernel hands it out again page by page, zeroed: at
        # GPT-2's size a fifth of an update. So M_MMAP_MAX (-4) is 0, and nothing is trimmed (M_TRIM_THRESHOLD, -1): freed is kept.
        ctypes.CDLL(None).mallopt(-4, 0), ctypes.CDLL(None).mallopt(-1, -1)
    B, T = args.batch_size, args.max_new_tokens

    # ============================================================================================================
    # Models: policy and reference start as the same SFT model; the value head is one linear layer on the policy's trunk
    # ============================================================================================================
    for path in (args.sft_model_path, *args.reward_model_path):
        if path in ("runs/sft", "runs/reward_model") and not (Path(path) / "config.json").exists():
            fail(f"there is no model in {path} yet: `python {Path(path).name}.py` makes it (or name one: --sft_model_path, "
                 "--reward_model_path)")  # fmt: skip
    policy, tokenizer = load_model(AutoModelForCausalLM, args.sft_model_path, "--sft_model_path")
    eos_id, pad_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    reward_models = []
    for path in args.reward_model_path:
        reward_model, reward_tokenizer = load_model(AutoModelForSequenceClassification, path, "--reward_model_path")
        # The same ids, the same end, and the same BOS, if any, before a text; no other special token is read.
        known = [(t.get_vocab(), t.eos_token_id, t("").input_ids) for t in (tokenizer, reward_tokenizer)]
        if known[0] != known[1]:
            fail(f"{path} has another tokenizer than {args.sft_model_path}: the reward model would read other words than were "
                 "written; train it from this SFT model, or re-tokenize in reward_fn")  # fmt: skip
        if not hasattr(reward_model.config, "reward_std"):
            print(f"{path} was saved without reward_mean and reward_std: its raw scores are used")
            reward_model.config.reward_mean, reward_model.config.reward_std = 0.0, 1.0
        reward_models.append(reward_model)
    # A critic of its own must be fp32 and trained: copied before the reward models are frozen.
    critic = copy.deepcopy(reward_models[0].base_model).to(device) if args.separate_critic else None
    reward_models = [model.to(device).eval().requires_grad_(False) for model in reward_models]
    trained = [policy.to(device), critic] if critic else [policy.to(device)]
    for model in trained if args.gradient_checkpointing else []:
        model.gradient_checkpointing_enable()
    embeddings = policy.get_input_embeddings()
    if policy.get_output_embeddings().weight is embeddings.weight:
        # Tied weights get two gradients as large as the vocabulary, and autograd adds them up in a third. The input's is 0 but
        # for the ids that were read, so it is made sparse: 0.15 GB less for GPT-2. (Untied it would stay so: AdamW refuses that.)
        embeddings.sparse = True
    reference = copy.deepcopy(policy).eval().requires_grad_(False)
    # The sampler needs no master weights: a bf16 copy on CUDA, refreshed after each update, halves what a step reads.
    sampler = copy.deepcopy(reference) if device.type == "cuda" else policy
    for model in (reference, sampler, *reward_models) if device.type == "cuda" else []:
        to_bf16(model)
    value_head = torch.nn.Linear(trained[-1].config.hidden_size, 1).to(device)
    # Zero: the first values are the mean of normalized scores, and the first advantages are not noise of a random head.
    torch.nn.init.zeros_(value_head.weight), torch.nn.init.zeros_(value_head.bias)
    parameters = [p for model in (*trained, value_head) for p in model.parameters()]
    # eps 1e-5 as in lm-human-preferences: larger than torch's 1e-8, it damps the first, ill-estimated steps
    optimizer = torch.optim.AdamW(
        [{"params": [p for model in trained for p in model.parameters()], "peak": args.learning_rate},
         {"params": [*value_head.parameters()], "peak": args.value_learning_rate}],
        lr=args.learning_rate, eps=1e-5, weight_decay=0.0, fused=True,
    )  # fmt: skip

    # ============================================================================================================
    # Prompts
    # ============================================================================================================
    splits = {"train": args.dataset_train_split, "test": args.dataset_test_split}
    rows = {split: load_rows(args.dataset_name, name, ["prompt"]) for split, name in splits.items()}
    data = {}
    for split, examples in rows.items():
        encoded = [(row["prompt"], encode(tokenizer, args.prompt_template, row["prompt"])[0]) for row in examples]
        data[split] = [(prompt, ids) for prompt, ids in encoded if len(ids) <= args.max_prompt_length]
        if len(data[split]) < len(encoded):
            print(f"{split}: left out {len(encoded) - len(data[split])} of {len(encoded)} prompts, longer than --max_prompt_length")
        if not data[split]:
            fail(f"--max_prompt_length {args.max_prompt_length}: every prompt of `{split}` is longer; raise it")
    demonstrations = []  # (prompt ids, response ids)
    if args.ptx_coef > 0:
        rows = load_rows(args.ptx_dataset_name, args.dataset_train_split, ["prompt", "completion"], flag="--ptx_dataset_name")
        demonstrations = [encode(tokenizer, args.prompt_template, row["prompt"], row["completion"]) for row in rows]
        demonstrations = [demo for demo in demonstrations if len(demo[0]) <= args.max_prompt_length and len(demo[1]) <= T]
        if not demonstrations:
            fail(f"--ptx_dataset_name {args.ptx_dataset_name}: every demonstration is longer than --max_prompt_length or "
                 "--max_new_tokens; raise them")  # fmt: skip
    longest = max(len(ids) for ids in [ids for _, ids in data["train"] + data["test"]] + [prompt for prompt, _ in demonstrations])
    if longest + T > getattr(policy.config, "max_position_embeddings", math.inf):
        fail(f"--max_new_tokens {T}: with a prompt of {longest} tokens that is more than the model's context of "
             f"{policy.config.max_position_embeddings}; lower it or --max_prompt_length")  # fmt: skip

    by_length = sorted((ids for _, ids in data["train"]), key=len)
    extremes = [torch.tensor(by_length[i], device=device) for i in (0, -1)]  # ragged: padding is what goes wrong
    check_model(policy.eval(), extremes, T, pad_id, f"--sft_model_path {args.sft_model_path}")
    # The output layer's products are fp32. By TF32 they take twice bf16's time, not ten times: three digits go in, seven come out.
    # Older versions of transformers make RoPE's angles by such a product too, and would read long texts wrongly.
    if device.type == "cuda" and tuple(map(int, transformers.__version__.split(".")[:2])) >= (5, 23):
        torch.set_float32_matmul_precision("high")

    first_update, seconds, beta = 1, 0.0, args.beta
    scales = [(model.config.reward_mean, model.config.reward_std) for model in reward_models]
    inputs = fingerprint((data, demonstrations, scales), reference, *reward_models)
    if state:
        if state["inputs"] != inputs:
            fail("--resume: prompts, SFT model or reward model are not what this run began with, or it began on another kind of "
                 "device; restore them, or --overwrite")  # fmt: skip
        policy.load_state_dict(state["policy"])
        sampler.load_state_dict(state["policy"])
        value_head.load_state_dict(state["value_head"])
        if critic:
            critic.load_state_dict(state["critic"])
        optimizer.load_state_dict(state["optimizer"])
        first_update, seconds, beta = state["step"] + 1, state["seconds"], state["beta"]
    output_dir, (metrics_file, samples_file) = Path(args.output_dir), open_logs(args, state, ["metrics.jsonl", "samples.jsonl"])
    if args.track:
        import wandb

        wandb.init(project="ppo_rlhf", name=output_dir.name, config=asdict(args), save_code=True, resume="allow",
                   id=state["wandb"] if state else None)  # fmt: skip

    num_updates, sampling = args.total_episodes // B, (args.temperature, eos_id, pad_id, args.rollout_batch_size)
    peak_flops = matmul_flops(device) if device.type == "cuda" else math.nan
    head_size = policy.get_output_embeddings().weight.numel()
    trunk_size = sum(p.numel() for model in trained for p in model.base_model.parameters())
    trunk_size -= sum(model.get_input_embeddings().weight.numel() for model in trained)  # a look-up, no product
    # Every epoch is a new permutation of the prompts; made whole, so that an update's prompts depend on nothing else.
    generator = torch.Generator().manual_seed(args.seed)
    epochs = math.ceil(args.total_episodes / len(data["train"]))
    order = torch.cat([torch.randperm(len(data["train"]), generator=generator) for _ in range(epochs)]).tolist()
    print(f"PPO: {sum(p.numel() for p in parameters) / 1e6:.2f}M parameters on {device}, {len(data['train'])} prompts, "
          f"{num_updates} updates of {B} episodes")  # fmt: skip

    start_time, signals = time.time() - seconds, catch_signals()
    updates = range(first_update, num_updates + 1)
    progress = tqdm(updates, desc="ppo", initial=first_update - 1, total=num_updates, disable=None)  # no bar without a terminal
    for update in progress:
        # All of an update's randomness is a function of seed and update: --resume needs no random state.
        torch.manual_seed(args.seed * 2**20 + update)
        schedule = min(update / (args.warmup_steps + 1), 1 - (update - 1) / num_updates)  # warm-up, then linear to zero
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * schedule

        # ========================================================================================================
        # Phase 1, rollout: the policy answers a batch of prompts
        # ========================================================================================================
        clock = [now(device)]
        policy.eval()
        batch = [data["train"][i] for i in order[(update - 1) * B : update * B]]
        prompts, prompt_mask, prompt_lengths = left_pad([ids for _, ids in batch], pad_id, device)
        uniforms = torch.rand(T, B, device=device)  # [T, B]
        responses, response_lengths = rollout_in_slices(sampler, prompts, prompt_mask, uniforms, *sampling)  # [B, T], [B]
        mask = (torch.arange(T, device=device) < response_lengths[:, None]).float()  # [B, T] the one mask
        ended = responses.gather(1, response_lengths[:, None] - 1)[:, 0] == eos_id  # [B]
        sequences = roll_left(prompts, responses, prompt_lengths)  # [B, P+T]
        lengths = prompt_lengths + response_lengths  # [B]
        # The host learns the lengths once, to cut micro-batches to their longest row. In a micro-batch nothing of ours asks the
        # device again. (transformers does, in each forward without a mask: whether several texts are packed into a row.)
        host_lengths = (lengths.tolist(), response_lengths.tolist())
        micro_size = args.per_device_train_batch_size
        clock.append(now(device))

        # ========================================================================================================
        # Phase 2, scoring: old log-probs and values, the reference's log-probs, the reward model's scores
        # ========================================================================================================
        old_logprobs, ref_logprobs, values = torch.zeros(3, B, T, device=device)  # [B, T] each
        scores = torch.zeros(B, device=device)  # [B]
        with torch.no_grad():
            for rows, L, t in bar(micro_batches(range(B), *host_lengths, micro_size, device), "scoring"):
                ids, starts, labels, m = sequences[rows, :L], prompt_lengths[rows], responses[rows, :t], mask[rows, :t]
                old_logprobs[rows, :t], _, values[rows, :t] = forward(
                    policy, value_head, ids, starts, labels, m, args.temperature, autocast, critic=critic
                )
                ref_hidden = response_states(reference, ids, starts, t).float()  # [b, t, d]
                # No name for the logits, [b, t, V]: it would keep the largest ones through phase 4.
                ref_logprobs[rows, :t] = logprobs(reference.get_output_embeddings()(ref_hidden).div_(args.temperature), labels) * m
                each = torch.stack([reward_fn(model, tokenizer, ids, starts, lengths[rows]) for model in reward_models])  # [M, b]
                scores[rows] = ensemble_scores(each.float(), args.ensemble, args.ensemble_coef)
        # An answer that was cut off pays: else the policy learns to ramble past the end, where no EOS can lower its score.
        scores = scores - args.missing_eos_penalty * ~ended - args.length_penalty * response_lengths  # [B]
        judged = {"logprobs": old_logprobs, "ref_logprobs": ref_logprobs, "values": values, "scores": scores}
        stop_if_nonfinite(args, f"update {update}, scoring", judged, {"sequences": sequences, "lengths": lengths})
        kl = (old_logprobs - ref_logprobs) * mask  # [B, T]
        if update == 1:  # policy and reference are the same model: almost every bug in RLHF breaks this
            assert masked_mean(kl.abs(), mask) < tolerance, f"KL is not 0 at the start: {masked_mean(kl.abs(), mask)}"
        clock.append(now(device))

        # ========================================================================================================
        # Phase 3, advantages
        # ========================================================================================================
        rewards = penalized_rewards(scores, old_logprobs, ref_logprobs, mask, beta)  # [B, T]
        if args.whiten_rewards:
            rewards = whiten(rewards, mask, shift_mean=False)  # [B, T]
        advantages, returns = gae(rewards, values, mask, args.gamma, args.lam)  # [B, T], [B, T]
        # Whitened advantages make the step size independent of the scale of the rewards; over the whole batch, so that
        # a minibatch of good answers is not told that half of them are bad.
        advantages = whiten(advantages, mask)  # [B, T]

        # ========================================================================================================
        # Phase 4, update: clipped policy and value losses over shuffled minibatches
        # ========================================================================================================
        for model in trained:
            model.train(args.gradient_checkpointing)  # there is no dropout; train() only switches the checkpointing
        shuffles = [torch.randperm(B).split(B // args.num_mini_batches) for _ in range(args.num_ppo_epochs)]
        minibatches = [minibatch.tolist() for shuffle in shuffles for minibatch in shuffle]
        stats = torch.zeros(len(minibatches), 10, device=device)
        for k, minibatch in enumerate(bar(minibatches, "update")):
            num_tokens = mask[minibatch].sum()
            for rows, L, t in micro_batches(minibatch, *host_lengths, micro_size, device):
                ids, starts, labels, m = sequences[rows, :L], prompt_lengths[rows], responses[rows, :t], mask[rows, :t]
                new_logprobs, entropy, new_values = forward(
                    policy, value_head, ids, starts, labels, m, args.temperature, autocast, args.entropy_coef > 0, critic
                )  # [b, t] each
                old, a, v, r = old_logprobs[rows, :t], advantages[rows, :t], values[rows, :t], returns[rows, :t]
                pg_loss = policy_loss(new_logprobs, old, a, args.cliprange)  # [b, t]
                vf_loss = value_loss(new_values, v, r, args.cliprange_value)  # [b, t]
                loss = pg_loss + args.vf_coef * vf_loss - args.entropy_coef * entropy  # [b, t]
                # Sum over real tokens, divided by those of the whole minibatch: every token weighs the same, and
                # neither padding nor the size of the micro-batch changes the gradient.
                ((loss * m).sum() / num_tokens).backward()

                log_ratio = (new_logprobs - old).detach()  # [b, t]
                ratio = log_ratio.exp()
                seen = torch.stack([pg_loss, vf_loss, entropy, ratio, log_ratio.abs(), 0.5 * log_ratio**2,
                                    (ratio - 1).abs() > args.cliprange, (new_values - v).abs() > args.cliprange_value])  # fmt: skip
                stats[k, :8] += (seen.detach() * m).sum((1, 2)) / num_tokens
            # PPO-ptx (Ouyang et al. 2022, eq. 2): a demonstration for each episode, at temperature 1 as in SFT
            if args.ptx_coef > 0:
                picked = [demonstrations[i] for i in torch.randint(len(demonstrations), (len(minibatch),)).tolist()]
                num_tokens = sum(len(response) for _, response in picked)
                for i in range(0, len(picked), micro_size):
                    ids, starts, labels, m = lay_out(picked[i : i + micro_size], pad_id, device)
                    hidden = response_states(policy, ids, starts, labels.shape[1], autocast)  # [b, t, d]
                    new_logprobs = logprobs(policy.get_output_embeddings()(hidden.float()), labels)  # [b, t]
                    ptx_loss = -(new_logprobs * m).sum() / num_tokens
                    (args.ptx_coef * ptx_loss).backward()
                    stats[k, 8] += ptx_loss.detach()
            stats[k, 9] = torch.nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)
            stop_if_nonfinite(args, f"update {update}, minibatch {k + 1}", {"loss": stats[k, :9], "gradient norm": stats[k, 9]},
                              {"sequences": sequences, "lengths": lengths, "minibatch": minibatch, **judged})  # fmt: skip
            optimizer.step()
            optimizer.zero_grad()
        if sampler is not policy:
            sampler.load_state_dict(policy.state_dict())
        first_log_ratio = stats[0, 4].item()  # before any step, so the two policies are one
        assert first_log_ratio < tolerance, f"ratio is not 1 on the first minibatch: mean |log ratio| {first_log_ratio}"
        clock.append(now(device))

        # ========================================================================================================
        # Phase 5, logging: every figure a mean over real tokens or over episodes; then the next update's beta
        # ========================================================================================================
        pg, vf, ent, ratio, _, approxkl, clipfrac, vf_clipfrac, ptx, grad_norm = stats.mean(0).tolist()
        episode_kl = kl.sum(1)  # [B] nats an answer
        metrics = {
            "update": update,
            "episode": update * B,
            "objective/scores": scores.mean().item(),
            "objective/kl": episode_kl.mean().item(),
            "objective/entropy": -(old_logprobs * mask).sum(1).mean().item(),
            "objective/non_score_reward": -beta * episode_kl.mean().item(),
            "objective/rlhf_reward": (scores - beta * episode_kl).mean().item(),
            "policy/approxkl_avg": approxkl,
            "policy/clipfrac_avg": clipfrac,
            "policy/entropy_avg": ent,
            "policy/grad_norm": grad_norm,
            "loss/policy_avg": pg,
            "loss/value_avg": vf,
            "val/clipfrac_avg": vf_clipfrac,
            "val/ratio": ratio,
            "val/explained_variance": (1 - masked_var(returns - values, mask) / masked_var(returns, mask)).item(),
            "val/num_eos_tokens": ended.float().mean().item(),  # an episode
            "response_length": mask.sum(1).mean().item(),
            "lr": args.learning_rate * schedule,
            "beta": beta,
            "eps": B / (clock[3] - clock[0]),
            "tokens_per_second": sum(host_lengths[1]) / (clock[3] - clock[0]),  # of responses, over all phases
            "memory/peak_gb": peak_memory(device),
            "time/rollout": clock[1] - clock[0],
            "time/score": clock[2] - clock[1],
            "time/update": clock[3] - clock[2],
        }
        if device.type == "cuda":  # 6 FLOPs a weight and token, forward and backward; the output layer sees responses only
            flops = 6 * (trunk_size * sum(host_lengths[0]) + head_size * sum(host_lengths[1])) * args.num_ppo_epochs
            metrics["mfu"] = flops / metrics["time/update"] / peak_flops
        if args.ptx_coef > 0:
            metrics["loss/ptx_avg"] = ptx
        look = update % args.eval_steps == 0 or update in (1, num_updates)
        if look:  # mode collapse shows when a prompt is answered again and again: the share of different ones among 16 answers
            policy.eval()
            again = [ids for _, ids in batch[: max(1, B // 16)] for _ in range(16)]
            prompts, prompt_mask, _ = left_pad(again, pad_id, device)
            uniforms = torch.rand(T, len(again), device=device)  # [T, b]
            repeats, _ = rollout_in_slices(sampler, prompts, prompt_mask, uniforms, *sampling)  # [b, T]
            metrics["val/distinct_responses"] = sum(len(group.unique(dim=0)) for group in repeats.split(16)) / len(again)
        # Ziegler et al. 2019, section 2.2: a proportional controller in log space, whose error is clipped
        if args.adaptive_kl_target > 0:
            error = metrics["objective/kl"] / args.adaptive_kl_target - 1
            beta *= 1 + min(max(error, -0.2), 0.2) * B / args.adaptive_kl_horizon
        progress.set_postfix(score=f"{metrics['objective/scores']:.2f}", kl=f"{metrics['objective/kl']:.2f}")
        if update % args.logging_steps == 0 or update in (1, num_updates):
            metrics_file.write(json.dumps(metrics) + "\n")
            metrics_file.flush()
            if args.track:
                wandb.log(metrics, step=update)
        if look:
            samples = []
            for i in range(min(4, B)):
                text = tokenizer.decode(responses[i, : host_lengths[1][i]], skip_special_tokens=True).strip()
                samples.append({"update": update, "prompt": batch[i][0], "response": text,
                                "score": scores[i].item(), "kl": episode_kl[i].item()})  # fmt: skip
            samples_file.writelines(json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples)
            samples_file.flush()
            if args.track:
                table = wandb.Table(columns=list(samples[0]), data=[[str(x) for x in sample.values()] for sample in samples])
                wandb.log({"samples": table}, step=update)
            tqdm.write(f"update {update}/{num_updates}: score {metrics['objective/scores']:.2f}, KL {metrics['objective/kl']:.2f} "
                       f"nats, length {metrics['response_length']:.1f}\n    {batch[i][0]} -> {text} "
                       f"(score {scores[i]:.2f}, KL {episode_kl[i]:.2f})")  # fmt: skip
        stop = bool(signals)  # asked once: a signal may come between two lines
        if update % args.save_steps == 0 or update == num_updates or stop:
            save_checkpoint(args, update, [metrics_file, samples_file], {
                "policy": policy.state_dict(), "value_head": value_head.state_dict(), "optimizer": optimizer.state_dict(),
                "critic": critic.state_dict() if critic else None, "beta": beta, "inputs": inputs,
                "seconds": time.time() - start_time, "wandb": wandb.run.id if args.track else None,
            })  # fmt: skip
        if stop:
            print(f"stopped after update {update}: the same command with --resume goes on", file=sys.stderr)
            raise SystemExit(128 + signals[0])
    signal.signal(signal.SIGINT, signal.SIG_DFL), signal.signal(signal.SIGTERM, signal.SIG_DFL)  # from here on at once
    metrics_file.close(), samples_file.close()

    # ============================================================================================================
    # The end: save, then answer the held-out prompts with the SFT model and with the policy
    # ============================================================================================================
    policy.config.pad_token_id, policy.config.eos_token_id = pad_id, eos_id  # where its answers end, for stock `generate` too
    policy.generation_config = plain_sampling(tokenizer, args.temperature, args.max_new_tokens)
    policy.save_pretrained(output_dir)
    tokenizer.save_pretrained(output_dir)
    save_file(value_head.state_dict(), output_dir / "value_head.safetensors")

    torch.manual_seed(args.seed)
    policy.eval()
    results = [{"prompt": prompt} for prompt, _ in data["test"]]
    for start in range(0, len(results), B):
        chunk = data["test"][start : start + B]
        prompts, prompt_mask, prompt_lengths = left_pad([ids for _, ids in chunk], pad_id, device)
        uniforms = torch.rand(T, len(chunk), device=device)  # [T, b] the same luck for both
        for name, author in (("sft", reference), ("ppo", sampler)):
            responses, response_lengths = rollout_in_slices(author, prompts, prompt_mask, uniforms, *sampling)  # [b, T], [b]
            answers = roll_left(prompts, responses, prompt_lengths), prompt_lengths, prompt_lengths + response_lengths
            answer_scores = []
            for piece in zip(*(x.split(args.per_device_train_batch_size) for x in answers)):  # [b, P+T], [b], [b]
                each = torch.stack([reward_fn(model, tokenizer, *piece) for model in reward_models])  # [M, b]
                answer_scores += ensemble_scores(each.float(), args.ensemble, args.ensemble_coef).tolist()
            for i in range(len(chunk)):
                text = tokenizer.decode(responses[i, : response_lengths[i]], skip_special_tokens=True).strip()
                results[start + i].update({name: text, f"{name}_score": answer_scores[i]})
    with open(output_dir / "eval.jsonl", "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in results)
    for row in results[:4]:
        print(f"\n{row['prompt']}\n  SFT ({row['sft_score']:+.2f}) {row['sft']}\n  PPO ({row['ppo_score']:+.2f}) {row['ppo']}")
    wins = sum((row["ppo_score"] > row["sft_score"]) + 0.5 * (row["ppo_score"] == row["sft_score"]) for row in results)
    history = [json.loads(line) for line in open(output_dir / "metrics.jsonl", encoding="utf-8")]
    facts = {name: f"{history[0][name]:.2f} -> {history[-1][name]:.2f}"
             for name in ("objective/scores", "objective/kl", "response_length")}  # fmt: skip
    facts["held-out win rate against SFT, by the score"] = f"{wins / len(results):.0%} of {len(results)} prompts"
    print("", *(f"{name:52} {value}" for name, value in facts.items()), sep="\n")
    write_card(args, "AutoModelForCausalLM", {"SFT model": args.sft_model_path, "reward model": ", ".join(args.reward_model_path),
                                              "prompts": args.dataset_name, "beta": args.beta, **facts})  # fmt: skip
    print(f"PPO took {time.time() - start_time:.0f} s; saved to {output_dir}."
          + f" Next: python data/judge.py {output_dir}/eval.jsonl" * (args.dataset_name == Args.dataset_name))  # fmt: skip
    if args.track:
        wandb.finish()


# ---------------------------------------------------------------------------------------------------------------
# Plumbing: flags, data, checkpoints, files. What is learnt, and how, stands above. Functions marked [shared], here and above,
# stand in the other scripts too, the same to the letter: each file stands alone.
# ---------------------------------------------------------------------------------------------------------------


def fail(message, status=2):  # [shared]
    """Bad input ends here: one line that says what, where and how to mend it; exit status 2, no traceback."""
    print(f"{Path(sys.argv[0]).name}: error: {' '.join(message.splitlines())}", file=sys.stderr)
    raise SystemExit(status)


def parse_flags(args_class, doc):  # [shared]
    """The command line as an `args_class`; its --help begins with the first line and the examples of `doc`, and names each
    group of flags at its first."""
    from docstring_parser import parse_from_object  # as tyro, which would break a flag's text where this file does

    groups = {flag: f"---- {group} ----\n" for group, flag in re.findall(r"# -+ (.*) -+\n +(\w+):", inspect.getsource(args_class))}
    for flag in parse_from_object(args_class).params:
        text = groups.get(flag.arg_name, "") + " ".join(flag.description.split())
        args_class.__dataclass_fields__[flag.arg_name].metadata = {"help": text}
    top = doc.partition("\n")[0] + "\n\nExamples:\n" + re.search(r"^    python .*?(?=\n\n)", doc, re.DOTALL | re.MULTILINE)[0]
    return tyro.cli(args_class, description=top, use_underscores=True, config=[tyro.conf.FlagCreatePairsOff])


def no_text(string):  # [shared]
    """A match if the string is blank, or holds NUL or half of a surrogate pair, which no tokenizer takes, else None."""
    return re.search(r"\A\s*\Z|[\0\ud800-\udfff]", string)


def check_flags(args, positive):  # [shared]
    """Every number below 2**31 and not negative, those named in `positive` above 0; every string text, the template with
    its slot."""
    flags = [(name, value) for name, v in vars(args).items() for value in (v if isinstance(v, tuple) else [v])]
    for name, value in flags:
        if isinstance(value, str) and no_text(value):
            fail(f"--{name} {value!r}: is blank, or no text; give it text")
        if isinstance(value, (int, float)) and not (0 < value < 2**31 if name in positive else 0 <= value < 2**31):
            fail(f"--{name} {value}: must be a number {'above' if name in positive else 'of at least'} 0, and below 2**31")
    if "{prompt}" not in args.prompt_template:
        fail(f"--prompt_template {args.prompt_template!r}: has no {{prompt}} in it")


def read_jsonl(path):  # [shared]
    """{where it stands: what it holds} for a file with one JSON value a line, as it is: `datasets` makes dates of some texts,
    counts no lines, and crashes at a line `null`."""
    rows = {}
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            if line.strip():
                rows[f"{path}:{number}"] = json.loads(line.decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            fail(f"{path}:{number}: this line is not JSON ({error}); mend or remove it")
    return rows


def load_rows(name, split, columns, optional=(), flag="--dataset_name"):  # [shared]
    """One split of a local folder with `{split}.jsonl`, or of whatever else `datasets` can load, as a list of dicts.

    In every row, every one of `columns`, and of `optional` if it is there, is text or a list of chat messages. Where there
    is a whole chat in `messages`, its last answer becomes the `completion`, and all before it the `prompt`."""
    path = Path(name) / f"{split.partition('[')[0]}.jsonl"
    try:
        rows = read_jsonl(path) if path.is_file() else {}
        if "[" in split or not path.is_file():
            import datasets  # not at the top: its second of start-up is spent only where it is needed

            datasets.logging.set_verbosity_error(), datasets.disable_progress_bars()
        if not path.is_file():
            examples = datasets.load_dataset(name, split=split).to_list()
            rows = {f"{name}, {split} row {number}": row for number, row in enumerate(examples, 1)}
        elif "[" in split:
            (part,) = datasets.ReadInstruction.from_spec(split).to_absolute({path.stem: len(rows)})
            rows = dict(list(rows.items())[part.from_ : part.to])
    except Exception as error:  # the library has a dozen types for this
        reason = (str(error.__cause__ or error) or type(error).__name__)[:200]
        fail(f"{flag} {name}: no `{split}` split could be read ({reason}); give a folder "
             f"with {path.name}, one JSON object a line, or the name of a data set on the Hub")  # fmt: skip
    if not rows:
        fail(f"{flag} {name}: its `{split}` split is empty")
    for where, row in rows.items():
        if "prompt" in columns and isinstance(row, dict) and "messages" in row:
            chat = row["messages"]
            try:
                end = len(chat) - (chat[-1]["role"] == "assistant")
                row.update(prompt=chat[:end], completion=chat[end:])
            except (TypeError, LookupError):
                row.update(prompt=[])
            if not row["prompt"] or "completion" in columns and not row["completion"]:
                fail(f"{where}: `messages` is {chat!r:.60}; give it a list of messages: a prompt, then the assistant's answer")
        for column in columns:
            if not isinstance(row, dict) or column not in row:
                found = sorted(row) if isinstance(row, dict) else row
                fail(f"{where}: no column `{column}`, only {found!r:.200}; rename one")
        for column in [*columns, *(column for column in optional if column in row)]:
            value = row[column]
            try:
                texts = [value] if isinstance(value, str) else [message[key] for message in value for key in ("role", "content")]
                wrong = no_text(texts[-1]) or no_text("".join(texts))
            except (TypeError, LookupError):
                fail(f"{where}: `{column}` is {value!r:.60}; give it text, or chat messages, each with a `role` and a `content`")
            if wrong:
                fail(f"{where}: `{column}` holds {wrong[0]!r:.60}, which is no text; mend or remove it")
            if column != "prompt" and isinstance(value, list) and value[-1]["role"] != "assistant":
                fail(f"{where}: `{column}` ends with a message by {value[-1]['role']!r:.40}, not by 'assistant'; mend or remove it")
    return list(rows.values())


def checksum(path):  # [shared]
    """The first 16 digits of a file's SHA-256: a cut file and a flipped bit show."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def load_checkpoint(args, changeable):  # [shared]
    """State of the newest whole checkpoint in --output_dir, None if the run starts at the beginning. Writes nothing.

    A folder that holds something is touched only with --resume or --overwrite. A run goes on only with the flags that it
    began with, but for those in `changeable`: with others it would end neither as the one run nor as the other."""
    folder = Path(args.output_dir)
    if folder.exists() and not (args.resume or args.overwrite) and (folder.is_file() or any(folder.iterdir())):
        fail(f"--output_dir {folder} is not empty: go on with its run by --resume, replace it by --overwrite, or name another")
    paths = sorted(folder.glob("checkpoint/*.pt")) if args.resume else []
    whole = [path for path in paths if path.stem.endswith(checksum(path))]
    if not whole:
        if args.resume and not args.overwrite and (paths or (folder / "config.json").exists()):
            fail(f"--resume: of {len(paths)} checkpoints in {folder} none is whole; start anew with --overwrite")
        return None
    state = torch.load(whole[-1], map_location="cpu", weights_only=True)
    changed = [f"--{name} {value} (was {state['args'][name]})" for name, value in vars(args).items()
               if name not in changeable and value != state["args"].get(name, value)]  # fmt: skip
    if changed:
        fail(f"--resume: the run in {folder} began with other flags: {', '.join(changed)}; give the old ones, or another --output_dir")
    print(f"goes on after step {state['step']} of {folder}" + f", as {paths[-1].name} is damaged" * (whole[-1] != paths[-1]))
    return state


def open_logs(args, state, names):  # [shared]
    """Make --output_dir and open its jsonl files as they were at the checkpoint, so that no step stands twice in them."""
    folder = Path(args.output_dir)
    (folder / "checkpoint").mkdir(parents=True, exist_ok=True)
    for path in [] if state else [*folder.glob("checkpoint/*"), *folder.glob("config.json")]:  # --overwrite
        path.unlink()  # without its config, an old model is not taken for this run's, should that stop early
    (folder / "args.json").write_text(json.dumps(asdict(args), indent=2) + "\n")
    for name in names:
        (folder / name).write_text(state["logs"][name] if state else "", encoding="utf-8")
    return [open(folder / name, "a", encoding="utf-8") for name in names]


def save_checkpoint(args, step, logs, state):  # [shared]
    """Write `state` to checkpoint/STEP-CHECKSUM.pt. There is one whole checkpoint at every instant: a new file, on the disk
    before it gets its name, which is one step of the file system; only then the oldest ones go."""
    folder = Path(args.output_dir) / "checkpoint"
    logs = {Path(log.name).name: Path(log.name).read_text(encoding="utf-8") for log in logs}
    try:
        with open(folder / "unfinished", "wb") as file:
            torch.save({**state, "step": step, "args": asdict(args), "logs": logs}, file)
            file.flush()
            os.fsync(file.fileno())
        (folder / "unfinished").replace(folder / f"{step:08}-{checksum(folder / 'unfinished')}.pt")
    except (OSError, RuntimeError) as error:
        while error.__context__:  # torch hides the reason of a failed write in the context of its own error, or deeper
            error = error.__context__
        fail(f"step {step}: no checkpoint could be written to {folder} ({error}); earlier ones are whole: "
             "make room, then --resume", status=1)  # fmt: skip
    for path in sorted(folder.glob("*.pt"), key=os.path.getmtime)[: -args.save_total_limit]:  # a later step may be damaged
        path.unlink()


def catch_signals():  # [shared]
    """-> a list that gets the number of the first SIGINT or SIGTERM, upon which the run ends after the running step, with a
    checkpoint; a second one ends it at once."""
    caught = []

    def catch(number, frame):
        caught.append(number)
        signal.signal(signal.SIGINT, signal.SIG_DFL), signal.signal(signal.SIGTERM, signal.SIG_DFL)

    signal.signal(signal.SIGINT, catch), signal.signal(signal.SIGTERM, catch)
    return caught


def stop_if_nonfinite(args, where, tensors, batch):  # [shared]
    """End the run if one of the named `tensors` holds inf or NaN, before that reaches a weight or a checkpoint."""
    bad = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    if bad:
        path = Path(args.output_dir) / "nonfinite.pt"
        torch.save({**tensors, **batch}, path)
        fail(f"{where}: {' and '.join(bad)} not finite. Nothing of it was applied, earlier checkpoints are whole; the batch is in "
             f"{path}, for torch.load", status=1)  # fmt: skip


def fingerprint(data, *models):  # [shared]
    """A number that changes with the data and with every weight: a run goes on only with what it began with."""
    crc = zlib.crc32(repr(data).encode())
    for tensor in [tensor for model in models for tensor in model.state_dict().values()]:
        crc = zlib.crc32(tensor.cpu().flatten().view(torch.uint8).numpy(), crc)
    return crc


def write_card(args, auto_class, facts):  # [shared]
    """README.md beside the weights: how they were made, from what, what came out, how to load them."""
    commit = subprocess.getoutput(f"git -C {shlex.quote(str(Path(__file__).parent.resolve()))} rev-parse HEAD 2>/dev/null")
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}"
    (Path(args.output_dir) / "README.md").write_text(
        f"---\nlibrary_name: transformers\ntags: [rlhf]\n---\n\n# {Path(args.output_dir).resolve().name}\n\nMade by\n\n"
        f"```\n{shlex.join(['python', *sys.argv])}\n```\n\nwith {versions}; code at commit {commit or 'unknown'}; all flags are in "
        "args.json.\n\n" + "".join(f"- {name}: {value}\n" for name, value in facts.items()) + "\nA text prompt goes in as "
        f"`{args.prompt_template!r}`, chat messages by the tokenizer's chat template; the answer ends with EOS.\n\n```python\n"
        f"from transformers import {auto_class}, AutoTokenizer\n\nmodel = {auto_class}.from_pretrained({args.output_dir!r})\n"
        f"tokenizer = AutoTokenizer.from_pretrained({args.output_dir!r})\n```\n", encoding="utf-8")  # fmt: skip


def encode(tokenizer, template, prompt, completion=""):  # [shared]
    """(prompt ids, completion ids that end with EOS): tokenized apart and joined as ids, in every stage alike.

    Tokenizing the joined text would merge tokens across the border, and the policy, which always continues a
    prompt that was tokenized alone, would never see those tokens again."""
    if isinstance(prompt, list) and isinstance(completion, list):
        prompt = prompt + completion[:-1]  # of several messages only the last is the answer
    completion = completion if isinstance(completion, str) else completion[-1]["content"]
    try:
        if isinstance(prompt, str):
            prompt_ids = tokenizer(template.replace("{prompt}", prompt)).input_ids
            completion = completion if completion[:1].isspace() else " " + completion  # " Sure", as in running text
        else:
            text = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
            prompt_ids = tokenizer(text, add_special_tokens=False).input_ids
        completion_ids = tokenizer(completion, add_special_tokens=False).input_ids + [tokenizer.eos_token_id]
        if not prompt_ids:
            raise ValueError("no token comes out: are the tokenizer's files complete?")
        if max(prompt_ids + completion_ids) >= getattr(tokenizer, "num_embeddings", math.inf):
            raise ValueError(f"id {max(prompt_ids + completion_ids)}, but the model has {tokenizer.num_embeddings} embeddings")
    except Exception as error:  # no chat template, or one that refuses these roles; a character that no token has
        fail(f"the tokenizer of {tokenizer.name_or_path} cannot encode the prompt {prompt!r:.80} ({str(error)[:200]}); mend it "
             "there, or give prompts as text: chat messages need a chat template that takes them")  # fmt: skip
    return prompt_ids, completion_ids


def load_pretrained(auto_class, path, flag, edit_config=lambda config: None, new_weights=()):  # [shared]
    """(model, tokenizer) in float32, from a folder or the Hub: whole but for `new_weights`, and made for each other."""
    try:
        config = AutoConfig.from_pretrained(path)
        edit_config(config)
        tokenizer = AutoTokenizer.from_pretrained(path)
        model, info = auto_class.from_pretrained(path, config=config, dtype=torch.float32, use_safetensors=True,
                                                 ignore_mismatched_sizes=True, output_loading_info=True)  # fmt: skip
        tokenizer.num_embeddings = model.get_input_embeddings().num_embeddings  # for encode()
    except Exception as error:  # the libraries have dozens of types for this
        fail(f"{flag} {path}: no model could be loaded ({(str(error) or type(error).__name__)[:200]}); give a folder that "
             "save_pretrained wrote, with weights as safetensors, or a name on the Hub")  # fmt: skip
    unexpected = {"score.weight"} & info["unexpected_keys"]  # of a classifier, which is no language model
    wrong = info["missing_keys"] - {*new_weights} | {name for name, *_ in info["mismatched_keys"]} | unexpected
    if wrong:
        fail(f"{flag} {path}: is no {auto_class.__name__[len('AutoModelFor'):]}: missing, unexpected or of another shape are "
             f"{sorted(wrong)[:4]}; name another")  # fmt: skip
    if tokenizer.eos_token_id is None:
        fail(f"{flag} {path}: its tokenizer has no EOS token, so no answer could end; set its eos_token")
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id >= tokenizer.num_embeddings:
        tokenizer.pad_token = tokenizer.eos_token  # harmless: every mask here comes from lengths, none from ids
    return model, tokenizer


def plain_sampling(tokenizer, temperature, max_new_tokens):  # [shared]
    """What stock `generate` needs to sample from the model's own distribution: no top-k, no top-p, no penalties."""
    return transformers.GenerationConfig(
        do_sample=True, temperature=temperature, top_k=0, top_p=1.0, max_new_tokens=max_new_tokens,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip


def bar(things, name):
    """A progress bar for one phase of an update, which may take minutes; gone when it is done, absent without a terminal."""
    return tqdm(things, desc=name, leave=False, disable=None)


def now(device):
    """Seconds, after all that was launched is done: CUDA runs behind the host."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def matmul_flops(device, n=8192):
    """FLOP/s of a large bf16 matrix product, measured: the peak that model FLOPs utilization (MFU) is a share of."""
    a = torch.randn(n, n, dtype=torch.bfloat16, device=device)  # of ones it would take less power, and run faster
    times = []
    for _ in range(10):
        start = now(device)
        a @ a
        times.append(now(device) - start)
    return 2 * n**3 / min(times)


def peak_memory(device):
    """The most memory used so far, in GB: torch's own on CUDA, the whole process's otherwise (NaN on Windows)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    if os.name != "posix":
        return math.nan
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e9 if sys.platform == "darwin" else 1e6)


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        main(parse_flags(Args, __doc__))
    except torch.OutOfMemoryError as error:
        fail("out of GPU memory: --resume with --gradient_checkpointing, a smaller --per_device_train_batch_size or, if it was in "
             "the rollout, a smaller --rollout_batch_size goes on; a smaller --max_new_tokens makes another run: --overwrite "
             f"({str(error).splitlines()[0]})", status=1)  # fmt: skip
    except (OSError, SafetensorError) as error:  # a full disk, a folder that may not be written
        fail(f"{error}; earlier checkpoints are whole: mend it, then --resume", status=1)
