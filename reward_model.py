"""Stage 2 of RLHF: the reward model.

People cannot write the perfect answer, but they can say which of two is better. The SFT model gets a head that
gives one number, the score of a whole answer, and learns from such pairs by the Bradley-Terry model of choice:
P(chosen is preferred) = sigmoid(score(chosen) - score(rejected)). Stage 3 trains the policy against that score.

    python reward_model.py         # the shipped task, on the model in runs/sft
    python reward_model.py --model_name_or_path my_sft/ \\
        --dataset_name Anthropic/hh-rlhf --learning_rate 1e-5 \\
        --num_train_epochs 1 --prompt_template "{prompt}"

Reads   data/preferences/{train,test}.jsonl with the columns `prompt`, `chosen` and `rejected`, or whole dialogues
        in `chosen` and `rejected` alone, as chat messages or as text.
Writes  runs/reward_model: an AutoModelForSequenceClassification with one label, its tokenizer, metrics.jsonl, args.json,
        README.md (a model card), checkpoint/.
Next    python ppo_rlhf.py --beta 0.1

Sources: Christiano et al. 2017, section 2.2.3; Stiennon et al. 2020, section 3.4; Ouyang et al. 2022, section 3.5.
"""

import contextlib
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

import torch
import torch.nn.functional as F
import transformers
import tyro
from safetensors import SafetensorError
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer


@dataclass
class Args:
    # ---- what goes in, what comes out ----
    model_name_or_path: str = "runs/sft"
    """the SFT model that the reward model starts from; its own samples set the scale of the scores"""
    dataset_name: str = "data/preferences"
    """a Hub name or a local folder with train.jsonl and test.jsonl; columns `prompt`, `chosen`, `rejected`, or whole
    dialogues in `chosen` and `rejected`; pairs whose two prompts differ are left out, and counted"""
    dataset_train_split: str = "train"
    """the split to train on; slices as in `datasets` work, `train[:10%]`"""
    dataset_test_split: str = "test"
    """the held-out split; for a data set without one, `train[-500:]`, with `train[:-500]` to train on"""
    output_dir: str = "runs/reward_model"
    """where the model, its tokenizer and metrics.jsonl go"""
    prompt_template: str = "Prompt: {prompt}\nResponse:"
    """what a string prompt is put into, the same in all three stages; a prompt that is a list of chat messages
    goes through the tokenizer's own chat template instead, and a whole dialogue in text as it is, for which the other
    stages need `{prompt}`"""
    max_length: int = 512
    """tokens of prompt and answer together; pairs with a longer side are left out, and counted"""

    # ---- optimization ----
    learning_rate: float = 8e-4
    """peak of AdamW's learning rate; right for the small model of the shipped task. A pre-trained model wants 1e-5"""
    num_train_epochs: int = 2
    """passes over the pairs; a third one learnt the noise of the labels by heart"""
    max_steps: int = 0
    """optimizer steps; overrides num_train_epochs if positive"""
    per_device_train_batch_size: int = 32
    """pairs in one forward and backward pass (the micro-batch): twice as many sequences"""
    gradient_accumulation_steps: int = 1
    """micro-batches summed into one optimizer step; the loss is the mean over all their pairs"""
    warmup_steps: int = 50
    """steps of linear warm-up; then a cosine decay to zero. Longer than in stage 1: the first gradients come through a
    random head and would wash out what the trunk knows"""
    lm_coef: float = 1.0
    """weight of the language-model loss on the chosen side, prompt and answer. One bit a pair is little to hold on to: with
    it the trunk keeps its language, and the held-out accuracy gained 1 to 2 points (as in Cobbe et al. 2021)"""
    center_coef: float = 0.003
    """weight of (score(chosen) + score(rejected))^2. The pairwise loss leaves every prompt an offset of its own, which
    in stage 3 is noise on top of every advantage (Eisenstein et al. 2023). Three times as much costs accuracy: it shrinks
    the margins too"""
    weight_decay: float = 0.01
    """AdamW's decoupled weight decay"""
    max_grad_norm: float = 1.0
    """the gradient is scaled down to this norm if it is longer"""
    gradient_checkpointing: bool = False
    """recompute activations in the backward pass: about a third more time for a fraction of the memory"""
    seed: int = 1
    """seeds the new head, the order of the pairs, dropout, and the samples that set the scale"""

    # ---- the scale of the scores ----
    normalization_samples: int = 512
    """SFT samples whose scores are brought to mean 0 and standard deviation 1"""
    temperature: float = 0.7
    """at which they are sampled: the same as in ppo_rlhf.py, or the scale is that of another policy"""
    max_new_tokens: int = 64
    """the longest of those samples, in tokens: the same as in ppo_rlhf.py"""

    # ---- watching ----
    logging_steps: int = 10
    """optimizer steps between two lines in metrics.jsonl"""
    eval_steps: int = 200
    """optimizer steps between two evaluations on the held-out pairs"""
    track: bool = False
    """log to Weights & Biases too"""

    # ---- stopping and going on ----
    save_steps: int = 100
    """optimizer steps between two checkpoints, of 12 bytes a parameter: what a crash can cost"""
    save_total_limit: int = 1
    """checkpoints that are kept"""
    resume: bool = False
    """go on with the run in output_dir from its newest checkpoint: on a CPU it then ends the same to the bit"""
    overwrite: bool = False
    """begin anew in an output_dir that is not empty; with --resume, only if there is no checkpoint"""


# ---------------------------------------------------------------------------------------------------------------
# The mathematics, and what a step is made of.
# ---------------------------------------------------------------------------------------------------------------


def pad(rows, value, device):  # [shared]
    """Right-pad lists of ids to the longest: [B, L]. Under causal attention nothing real can see what stands to
    its right, so right-padded batches need no attention mask and default positions (0, 1, ...) are exact."""
    width = max(map(len, rows))
    return torch.tensor([row + [value] * (width - len(row)) for row in rows], device=device)  # [B, L]


def epoch_batches(lengths, batch_size, seed):  # [shared]
    """Lists of indices, shuffled, each of similar lengths so that little is padded, a function of `seed` only:
    shuffle all, sort by length within pools of 16 batches, cut into batches, shuffle the batches."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(lengths), generator=generator).tolist()
    pools = [order[i : i + 16 * batch_size] for i in range(0, len(order), 16 * batch_size)]
    pools = [sorted(pool, key=lengths.__getitem__) for pool in pools]
    batches = [pool[i : i + batch_size] for pool in pools for i in range(0, len(pool), batch_size)]
    return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]


def warmup_cosine(step, warmup_steps, total_steps):  # [shared]
    """Learning rate of optimizer step 1, 2, ..., total_steps as a fraction of its peak."""
    if step <= warmup_steps:  # 1) linear warm-up
        return step / warmup_steps
    progress = (step - warmup_steps) / max(total_steps - warmup_steps, 1)
    return 0.5 * (1 + math.cos(math.pi * progress))  # 2) cosine decay, zero at the last step


@torch.no_grad()
def sample(model, tokenizer, prompts, temperature, max_new_tokens, seed):  # [shared]
    """Responses (lists of ids that end with EOS, or are cut at max_new_tokens) for lists of prompt ids: plain
    temperature sampling, with nothing of what the model's own generation config says (top-k, penalties, ...)."""
    kept_config, width = model.generation_config, max(map(len, prompts))
    ids = torch.tensor([[tokenizer.pad_token_id] * (width - len(p)) + p for p in prompts], device=model.device)  # [B, P]
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=model.device)  # [B, P]
    with torch.random.fork_rng():  # looking at samples must not change the training that follows
        torch.manual_seed(seed)
        model.generation_config = plain_sampling(tokenizer, temperature, max_new_tokens)
        responses = model.generate(input_ids=ids, attention_mask=mask)[:, width:].tolist()
        model.generation_config = kept_config
    eos = tokenizer.eos_token_id
    return [row[: row.index(eos) + 1] if eos in row else row for row in responses]


def split_dialogue(dialogue):
    """(prompt, last reply) of a whole dialogue, for preference sets without a `prompt` column: chat messages, or
    text as in Anthropic's hh-rlhf ("\\n\\nHuman: ...\\n\\nAssistant: ..."), whose last reply is what is judged."""
    if isinstance(dialogue, list):
        return dialogue[:-1], dialogue[-1]["content"]
    before, turn, reply = dialogue.rpartition("\n\nAssistant:")
    return before + turn, reply


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


def pair_batch(pairs, pad_id, device):
    """(chosen ids, rejected ids) pairs -> ids [2B, L], lengths [2B], chosen first: one forward serves both sides."""
    sequences = [chosen for chosen, _ in pairs] + [rejected for _, rejected in pairs]
    return pad(sequences, pad_id, device), torch.tensor([len(sequence) for sequence in sequences], device=device)


@torch.no_grad()
def evaluate(model, pairs, batch_size, pad_id, device, autocast):
    """Held-out loss, accuracy, mean margin, and calibration: the mean gap, over ten bins, between the confidence
    in the preferred side and how often it was right (0 is perfect; a confident, wrong model is easily hacked)."""
    model.eval()
    with autocast:
        batches = [pair_batch(pairs[i : i + batch_size], pad_id, device) for i in range(0, len(pairs), batch_size)]
        scores = [score_sequences(model, ids, lengths).chunk(2) for ids, lengths in batches]
    model.train()
    margin = torch.cat([chosen - rejected for chosen, rejected in scores]).cpu()  # [N]
    right, confidence = (margin > 0).float(), torch.sigmoid(margin.abs())  # [N], [N] in 0.5 ... 1
    bins = ((confidence - 0.5) * 20).long().clamp(max=9)  # [N]
    gaps = [(right[bins == b].sum() - confidence[bins == b].sum()).abs() for b in range(10)]
    return {"eval/loss": -F.logsigmoid(margin).mean().item(), "eval/accuracy": right.mean().item(),
            "eval/margin": margin.mean().item(), "eval/calibration_error": sum(gaps).item() / len(margin)}  # fmt: skip


def main(args):
    check_flags(args, ["max_length", "learning_rate", "num_train_epochs", "max_grad_norm", "temperature", "max_new_tokens",
                       "per_device_train_batch_size", "gradient_accumulation_steps", "logging_steps", "eval_steps", "save_steps",
                       "save_total_limit"])  # fmt: skip
    if args.normalization_samples < 2:
        fail(f"--normalization_samples {args.normalization_samples}: a standard deviation needs at least 2")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # bf16 matrix products on CUDA with fp32 weights and optimizer: pure bf16 weights would round small steps away
    autocast = torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else contextlib.nullcontext()
    if device.type == "cuda":  # cuDNN's attention makes a plan, 30 ms and more, for every new shape, and every micro-batch has one
        torch.backends.cuda.enable_cudnn_sdp(False)
    torch.manual_seed(args.seed)

    state = load_checkpoint(args, ["output_dir", "logging_steps", "eval_steps", "track", "save_steps", "save_total_limit",
                                   "resume", "overwrite", "gradient_checkpointing"])  # fmt: skip

    # 1. Model: the SFT model's trunk with a new scalar head
    if args.model_name_or_path == "runs/sft" and not Path("runs/sft/config.json").exists():
        fail("there is no SFT model in runs/sft yet: `python sft.py` makes it (or name one: --model_name_or_path)")
    path, flag = args.model_name_or_path, "--model_name_or_path"
    sft, tokenizer = load_pretrained(AutoModelForCausalLM, path, flag)
    sft.eval()  # on the host until it samples (6.): while the reward model is trained, only its output layer is used
    model, _ = load_pretrained(AutoModelForSequenceClassification, path, flag, lambda config: setattr(config, "num_labels", 1),
                               new_weights=["score.weight"])  # fmt: skip
    # Stock classes read the score at the last token that is no pad. If pad is EOS they would read one token early, in silence;
    # without a pad they read the last token, and refuse batches.
    model.config.pad_token_id = tokenizer.pad_token_id if tokenizer.pad_token_id != tokenizer.eos_token_id else None
    # std 1/sqrt(d+1) keeps the first scores near unit size (lm-human-preferences, language/model.py:252); a head
    # that starts large saturates the sigmoid before the trunk has learnt anything.
    torch.nn.init.normal_(model.score.weight, std=1 / math.sqrt(model.score.in_features + 1))
    model.to(device)
    lm_head = sft.get_output_embeddings().requires_grad_(False).to(device)  # the SFT model's own, as it is
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable()

    # 2. Pairs
    data, prompts = {}, {}  # prompts: those of the pairs, each once, in order
    for split, name in (("train", args.dataset_train_split), ("test", args.dataset_test_split)):
        rows = load_rows(args.dataset_name, name, ["chosen", "rejected"], optional=["prompt"])
        data[split], prompts[split], left_out = [], {}, []
        for row in rows:
            # Dialogues bring their own prompt: beside chats of several turns, a text `prompt` (as in ultrafeedback_binarized)
            # is only the first of them, and a list of messages that they begin with would be read twice.
            chats, prompt = isinstance(row["chosen"], list) and len(row["chosen"]) > 1, row.get("prompt")
            whole = prompt is None or chats and (isinstance(prompt, str) or row["chosen"][: len(prompt)] == prompt)
            sides = [split_dialogue(side) if whole else (prompt, side) for side in (row["chosen"], row["rejected"])]
            template = "{prompt}" if whole else args.prompt_template
            if not sides[0][0] or not sides[1][0]:
                fail(f"{args.dataset_name}, {split}: without a `prompt` column, every dialogue needs a prompt before its last "
                     f"reply, in text one that ends with '\\n\\nAssistant:'; this one has none: {row['chosen']!r:.60}")  # fmt: skip
            (prompt, chosen), (rejected_prompt, rejected) = [encode(tokenizer, template, *side) for side in sides]
            pair = prompt + chosen, prompt + rejected
            wrong = {
                "with two different prompts": prompt != rejected_prompt,
                "with two equal sides": pair[0] == pair[1],
                "with an empty answer": any(isinstance(answer, str) and not answer.strip() for _, answer in sides),
                "longer than --max_length": max(map(len, pair)) > args.max_length,
            }
            if any(wrong.values()):
                left_out.append(next(reason for reason, holds in wrong.items() if holds))
                continue
            data[split].append(pair)
            prompts[split][tuple(prompt)] = None
        reasons = ", ".join(f"{left_out.count(reason)} {reason}" for reason in sorted({*left_out}))
        if left_out:
            print(f"{split}: left out {len(left_out)} of {len(rows)} pairs: {reasons}")
        if not data[split]:
            fail(f"--max_length {args.max_length}: no pair of `{split}` is left of {len(rows)}: {reasons}; raise it or mend them")

    context = getattr(model.config, "max_position_embeddings", math.inf)
    longest = max(len(side) for pairs in data.values() for pair in pairs for side in pair)
    if longest > context:
        fail(f"--max_length {args.max_length}: the longest pair has {longest} tokens, the model's context {context}; lower it")
    longest = max(map(len, prompts["train"]))
    if longest + args.max_new_tokens > context:
        fail(f"--max_new_tokens {args.max_new_tokens}: with a prompt of {longest} tokens, more than the context of {context}")

    # 3. Optimizer and schedule
    pair_lengths = [max(len(chosen), len(rejected)) for chosen, rejected in data["train"]]
    batch_size = args.per_device_train_batch_size
    batches_per_epoch = math.ceil(len(pair_lengths) / batch_size)
    total_steps = args.max_steps or math.ceil(args.num_train_epochs * batches_per_epoch / args.gradient_accumulation_steps)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=args.learning_rate, weight_decay=args.weight_decay, fused=True  # one kernel, not hundreds
    )
    first_step, seconds, running_loss, running_accuracy = 1, 0.0, [], []
    inputs = fingerprint(data, sft)
    if state:
        if state["inputs"] != inputs:
            fail("--resume: the pairs or the SFT model are not what this run began with; restore them, or --overwrite")
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first_step, seconds = state["step"] + 1, state["seconds"]
        running_loss, running_accuracy = (list(values.to(device)) for values in state["running"])
    output_dir, (metrics_file,) = Path(args.output_dir), open_logs(args, state, ["metrics.jsonl"])
    if args.track:
        import wandb

        wandb.init(project="ppo_rlhf", name=output_dir.name, config=asdict(args), save_code=True, resume="allow",
                   id=state["wandb"] if state else None)  # fmt: skip
    print(f"Reward model: {sum(p.numel() for p in model.parameters()) / 1e6:.2f}M parameters on {device}, "
          f"{len(pair_lengths)} pairs, {total_steps} steps")  # fmt: skip

    # 4. Training
    model.train()
    start_time, batches, signals = time.time() - seconds, None, catch_signals()
    steps = range(first_step, total_steps + 1)
    progress = tqdm(steps, desc="reward model", initial=first_step - 1, total=total_steps, disable=None)  # not without a terminal
    for step in progress:
        torch.manual_seed(args.seed * 2**20 + step)  # dropout too is a function of seed and step: --resume needs no more
        lr = args.learning_rate * warmup_cosine(step, args.warmup_steps, total_steps)
        optimizer.param_groups[0]["lr"] = lr

        micro_batches = []
        for k in range((step - 1) * args.gradient_accumulation_steps, step * args.gradient_accumulation_steps):
            epoch, i = divmod(k, batches_per_epoch)
            if i == 0 or batches is None:
                batches = epoch_batches(pair_lengths, batch_size, args.seed + epoch)
            micro_batches.append([data["train"][j] for j in batches[i]])
        num_pairs = sum(map(len, micro_batches))
        num_tokens = sum(len(chosen) - 1 for micro_batch in micro_batches for chosen, _ in micro_batch)  # of the whole step
        for micro_batch in micro_batches:
            b = len(micro_batch)
            ids, lengths = pair_batch(micro_batch, tokenizer.pad_token_id, device)  # [2b, L], [2b]
            is_target = torch.arange(1, ids.shape[1], device=device) < lengths[:b, None]  # [b, L-1] chosen side only
            targets = is_target.nonzero(as_tuple=True)  # before the forward: the host waits for their number
            with autocast:
                hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state  # [2b, L, d]
                chosen, rejected = read_scores(model, hidden, lengths).chunk(2)  # [b], [b]
            # Bradley-Terry: only differences of scores matter. What is added to all of them is left open, and set afterwards (6.)
            loss = -F.logsigmoid(chosen - rejected).mean()
            center_loss = ((chosen + rejected) ** 2).mean()
            total = (loss + args.center_coef * center_loss) * b / num_pairs
            if args.lm_coef > 0:
                with autocast:
                    logits = lm_head(hidden[:b, :-1][targets])  # [N, V]
                lm_loss = F.cross_entropy(logits.float(), ids[:b, 1:][targets], reduction="sum") / num_tokens
                total = total + args.lm_coef * lm_loss
            total.backward()
            running_loss.append(loss.detach() * b / num_pairs)
            running_accuracy.append((chosen > rejected).sum() / num_pairs)
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)
        stop_if_nonfinite(args, f"step {step}", {"loss": torch.stack(running_loss[-len(micro_batches) :]), "gradient norm": grad_norm},
                          {"pairs": micro_batches})  # fmt: skip
        optimizer.step()
        optimizer.zero_grad()

        # 5. Watching
        metrics = {}
        if step % args.logging_steps == 0 or step == total_steps:
            num_steps = len(running_loss) / args.gradient_accumulation_steps
            metrics = {"step": step, "loss/train": torch.stack(running_loss).sum().item() / num_steps,
                       "train/accuracy": torch.stack(running_accuracy).sum().item() / num_steps,
                       "lr": lr, "grad_norm": grad_norm.item(), "time": time.time() - start_time}  # fmt: skip
            running_loss, running_accuracy = [], []
        if step % args.eval_steps == 0 or step == total_steps:
            metrics = {"step": step, **metrics, **evaluate(model, data["test"], batch_size, tokenizer.pad_token_id, device, autocast)}
            tqdm.write(f"step {step}: held-out accuracy {metrics['eval/accuracy']:.3f}, loss {metrics['eval/loss']:.3f}, "
                       f"margin {metrics['eval/margin']:.2f}, calibration error {metrics['eval/calibration_error']:.3f}")  # fmt: skip
        if metrics:
            metrics_file.write(json.dumps(metrics) + "\n")
            metrics_file.flush()
            progress.set_postfix(loss=f"{metrics.get('loss/train', metrics.get('eval/loss')):.3f}")
            if args.track:
                wandb.log(metrics, step=step)
        stop = bool(signals)  # asked once: a signal may come between two lines
        if step % args.save_steps == 0 or step == total_steps or stop:
            save_checkpoint(args, step, [metrics_file], {
                "model": model.state_dict(), "optimizer": optimizer.state_dict(), "inputs": inputs,
                "running": [torch.tensor(running_loss), torch.tensor(running_accuracy)], "seconds": time.time() - start_time,
                "wandb": wandb.run.id if args.track else None,
            })  # fmt: skip
        if stop:
            print(f"stopped after step {step}: the same command with --resume goes on", file=sys.stderr)
            raise SystemExit(128 + signals[0])

    signal.signal(signal.SIGINT, signal.SIG_DFL), signal.signal(signal.SIGTERM, signal.SIG_DFL)  # from here on at once

    # 6. Normalization: the SFT model's own samples get mean 0 and standard deviation 1. The loss leaves the zero of the scores
    # open, and their scale grows with the clarity of the labels and the length of the training; but in stage 3 beta is a price
    # in score per nat, and the value head starts at zero: without this, every new reward model would need a new beta
    # (lm-human-preferences, train_reward.py:232).
    model.eval(), sft.to(device)
    prompts = [list(prompt) for prompt in prompts["train"]]
    n = args.normalization_samples
    prompts = [prompts[i * max(len(prompts), n) // n % len(prompts)] for i in range(n)]  # from all over: data sets come in parts
    sampled = []
    for i in range(0, len(prompts), 2 * batch_size):
        chunk = prompts[i : i + 2 * batch_size]
        responses = sample(sft, tokenizer, chunk, args.temperature, args.max_new_tokens, args.seed + i)
        sequences = [prompt + response for prompt, response in zip(chunk, responses)]
        with torch.no_grad(), autocast:
            lengths = torch.tensor([len(sequence) for sequence in sequences], device=device)  # [B]
            sampled.append(score_sequences(model, pad(sequences, tokenizer.pad_token_id, device), lengths))
    sampled = torch.cat(sampled)  # [normalization_samples]
    # Beside the weights, not in them: stock `from_pretrained` then ranks identically, and ppo_rlhf.py reads these two.
    model.config.reward_mean, model.config.reward_std = sampled.mean().item(), sampled.std().item()

    model.save_pretrained(output_dir)
    tokenizer.save_pretrained(output_dir)
    metrics_file.close()
    evaluations = [row for row in map(json.loads, open(output_dir / "metrics.jsonl")) if "eval/accuracy" in row]
    accuracy = " -> ".join(dict.fromkeys(f"{row['eval/accuracy']:.3f}" for row in (evaluations[0], evaluations[-1])))
    write_card(args, "AutoModelForSequenceClassification", {
        "SFT model": args.model_name_or_path, "pairs": args.dataset_name, "optimizer steps": total_steps,
        "held-out accuracy": accuracy, "calibration error": f"{evaluations[-1]['eval/calibration_error']:.3f}",
        "normalized score": "(raw score - config.reward_mean) / config.reward_std",
    })  # fmt: skip
    if args.track:
        wandb.finish()
    print(f"raw scores of {len(sampled)} SFT samples: mean {sampled.mean():.2f}, std {sampled.std():.2f}, normalized to 0 and 1")
    print(f"The reward model took {time.time() - start_time:.0f} s, held-out accuracy {accuracy}; saved to {output_dir}. "
          "Next: python ppo_rlhf.py --beta 0.1"
          + f" --reward_model_path {output_dir} ..." * (args.output_dir != Args.output_dir))  # fmt: skip


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


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        main(parse_flags(Args, __doc__))
    except torch.OutOfMemoryError as error:
        fail("out of GPU memory: --resume with --gradient_checkpointing goes on; a smaller --per_device_train_batch_size with more "
             "--gradient_accumulation_steps or a smaller --max_length makes another run: --overwrite "
             f"({str(error).splitlines()[0]})", status=1)  # fmt: skip
    except (OSError, SafetensorError) as error:  # a full disk, a folder that may not be written
        fail(f"{error}; earlier checkpoints are whole: mend it, then --resume", status=1)
