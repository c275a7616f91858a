"""Stage 2 of RLHF: the reward model. The shipped task, on the model in runs/sft: python reward_model.py

People cannot write the perfect response, but they can say which of two is better. The SFT model gets a head
that gives one number, the score of a response, and learns from such pairs by the Bradley-Terry model:
P(chosen is preferred) = sigmoid(score(chosen) - score(rejected)). Stage 3 trains the policy against it.
The default adds two terms to this textbook loss: a language-model loss on the chosen side, which brought 1 to
2 points of held-out accuracy, and a centering term against an offset per prompt, which is noise in stage 3.

Sources: Christiano et al. 2017, section 2.2.3; Stiennon et al. 2020, section 3.4; Ouyang et al. 2022, 3.5.
"""

import json
import math
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import datasets
import torch
import torch.nn.functional as F
import transformers
import tyro
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer


@dataclass
class Args:
    # ---- input and output ----
    model_name_or_path: str = "runs/sft"  # the SFT model that the reward model starts from
    dataset_name: str = "data/preferences"  # folder with train.jsonl and test.jsonl, or a Hub name
    dataset_train_split: str = "train"  # pairs to train on
    dataset_test_split: str = "test"  # held-out pairs
    output_dir: str = "runs/reward_model"  # run folder
    max_length: int = 512  # tokens of prompt and response together; pairs with a longer side are left out
    # ---- loss ----
    lm_coef: float = 1.0  # weight of the language-model loss on the chosen side (Cobbe et al. 2021)
    center_coef: float = 0.003  # weight of (score(chosen) + score(rejected))^2 (Eisenstein et al. 2023)
    # ---- optimization ----
    learning_rate: float = 0.0  # peak of AdamW's; 0 chooses 8e-4 below 10M parameters, else 1e-5
    num_train_epochs: int = 0  # passes over the pairs; 0 chooses 2 below 10M parameters, else 1
    max_steps: int = 0  # optimizer steps; overrides num_train_epochs if positive
    per_device_train_batch_size: int = 16  # pairs per forward and backward pass (micro-batch)
    gradient_accumulation_steps: int = 1  # micro-batches per optimizer step
    warmup_steps: int = 50  # steps of linear warm-up, while the head is random; then a cosine decay to zero
    weight_decay: float = 0.01  # AdamW's
    max_grad_norm: float = 1.0  # gradients are clipped to this norm; 0 for none
    gradient_checkpointing: bool = False  # recompute activations in the backward pass: slower, less memory
    seed: int = 1  # of the new head, the order of the pairs and dropout
    # ---- logging and checkpoints ----
    eval_steps: int = 500  # steps between evaluations on the held-out pairs
    save_steps: int = 100  # steps between checkpoints
    track: bool = False  # log to Weights & Biases
    resume: bool = False  # resume from the checkpoint in output_dir
    overwrite: bool = False  # replace what is in output_dir


def pair_scores(model, pairs, device):
    """Scores of (chosen ids, rejected ids) pairs, [B] and [B], and what they were read from: ids of both
    sides, chosen first, [2B, L], and their hidden states [2B, L, d]."""
    sides = [chosen for chosen, _ in pairs] + [rejected for _, rejected in pairs]
    ids = pad_sequence([torch.tensor(side) for side in sides], batch_first=True).to(device)  # [2B, L]
    lengths = torch.tensor([len(side) for side in sides], device=device)  # [2B]
    hidden = hidden_states(model, ids)  # [2B, L, d]
    # At the last real token, by length: the last id that is not a pad is one token early if pad == EOS
    last_hidden = torch.take_along_dim(hidden, lengths[:, None, None] - 1, dim=1)  # [2B, 1, d]
    scores = model.score(last_hidden).flatten()  # [2B]
    chosen, rejected = scores.chunk(2)  # [B], [B]
    return chosen, rejected, ids, hidden


def hidden_states(model, ids):  # [shared]
    """Right-padded ids [B, L] -> [B, L, d]. bf16 on CUDA; weights stay fp32, or small steps would be lost."""
    with torch.autocast(ids.device.type, torch.bfloat16, enabled=ids.is_cuda):
        return model.base_model(ids, use_cache=False).last_hidden_state.float()


def shuffled_batches(lengths, size, count, seed):  # [shared]
    """`count` batches of row numbers, epoch by epoch; in each, rows of similar length, for little padding."""
    lengths = torch.tensor(lengths)
    batches = []
    for epoch in range(math.ceil(count / math.ceil(len(lengths) / size))):
        generator = torch.Generator().manual_seed(seed + epoch)
        pools = torch.randperm(len(lengths), generator=generator).split(16 * size)
        pools = [pool[lengths[pool].argsort(stable=True)].split(size) for pool in pools]
        cut = [batch for pool in pools for batch in pool]
        batches += [cut[i] for i in torch.randperm(len(cut), generator=generator)]
    return batches[:count]


def warmup_cosine(step, warmup_steps, total_steps):  # [shared]
    """Learning rate of step 1 ... total_steps as a share of its peak: linear, then half a cosine to zero."""
    if step <= warmup_steps:
        return step / warmup_steps
    progress = (step - warmup_steps) / max(total_steps - warmup_steps, 1)
    return 0.5 * (1 + math.cos(math.pi * progress))


@torch.no_grad()
def evaluate(model, pairs, size, device):
    """Held-out loss, accuracy, mean margin and expected calibration error: the mean gap, over ten bins,
    between the confidence in the preferred side and how often it was right."""
    model.eval()
    margins = []
    for i in range(0, len(pairs), size):
        chosen, rejected, _, _ = pair_scores(model, pairs[i : i + size], device)
        margins.append(chosen - rejected)
    margin = torch.cat(margins)  # [N]
    right = (margin > 0).float()  # [N]
    confidence = torch.sigmoid(margin.abs())  # [N] in 0.5 ... 1
    bins = ((confidence - 0.5) * 20).long().clamp(max=9)  # [N]
    gaps = right - confidence  # [N]
    gaps = [gaps[bins == b].sum().abs() for b in range(10)]
    return {
        "eval/loss": -F.logsigmoid(margin).mean(),
        "eval/accuracy": right.mean(),
        "eval/margin": margin.mean(),
        "eval/ece": sum(gaps) / len(margin),
    }


def main(args):
    state = load_checkpoint(args, [args.model_name_or_path])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(args.seed)
    # 1. Model: the SFT model's backbone with a new scalar head
    sft, tokenizer = load_pretrained(AutoModelForCausalLM, args.model_name_or_path)
    end_ids = find_end_ids(sft, tokenizer)
    of_head = {name for name, _ in sft.named_parameters() if not name.startswith(sft.base_model_prefix)}
    new = {
        "score.weight",
        "lm_head.weight",
        *of_head,
    }
    auto_class = AutoModelForSequenceClassification
    # Of a regression model, stock pipelines show the score itself, not its sigmoid
    options = {"num_labels": 1, "problem_type": "regression"}
    model, _ = load_pretrained(auto_class, args.model_name_or_path, new, **options)
    # std 1/sqrt(d+1) keeps the first scores near unit size (lm-human-preferences, language/model.py:252);
    # large ones would saturate the sigmoid before the backbone has learned anything.
    width = model.score.in_features
    torch.nn.init.normal_(model.score.weight, std=1 / math.sqrt(width + 1))

    # 2. Pairs
    data = []
    for name in (args.dataset_train_split, args.dataset_test_split):
        rows = load_rows(args.dataset_name, name)
        pairs = []
        for row in rows:
            prompt, response = encode(tokenizer, end_ids, row, "chosen")
            other_prompt, other_response = encode(tokenizer, end_ids, row, "rejected")
            chosen = prompt + response
            rejected = prompt + other_response
            comparable = prompt == other_prompt and response != other_response
            if comparable and max(len(chosen), len(rejected)) <= args.max_length:
                pairs.append((chosen, rejected))
        print(f"{name}: {len(pairs)} of {len(rows)} pairs are within --max_length, with one prompt")
        data.append(pairs)
    if not all(data):
        fail("a split has no pairs within --max_length, with one prompt")
    train, test = data
    check_model(sft, tokenizer, [side for pair in train + test for side in pair])
    lm_head = sft.get_output_embeddings().requires_grad_(False).to(device)  # frozen
    # The stock class reads the score at the last token that is not a pad, so the pad must not be an end
    model.config.pad_token_id = tokenizer.pad_token_id
    if tokenizer.pad_token_id in end_ids:
        model.config.pad_token_id = None
    model.to(device)
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable()

    # 3. Optimizer and schedule
    small = model.num_parameters() < 10e6
    learning_rate = args.learning_rate or (8e-4 if small else 1e-5)
    num_epochs = args.num_train_epochs or (2 if small else 1)
    size = args.per_device_train_batch_size
    accumulation = args.gradient_accumulation_steps
    num_batches = num_epochs * math.ceil(len(train) / size)
    total_steps = max(args.max_steps, 0) or math.ceil(num_batches / accumulation)
    lengths = [max(len(chosen), len(rejected)) for chosen, rejected in train]
    batches = shuffled_batches(lengths, size, total_steps * accumulation, args.seed)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=args.weight_decay, fused=True)
    done = 0  # steps
    if state:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        done = state["progress"]
    if args.track:
        import wandb

        wandb.init(
            project="ppo_rlhf",
            name=args.output_dir,
            config=asdict(args),
        )
    logs = open_logs(args, state, "metrics.jsonl")
    print(f"Reward model on {device}: {model.num_parameters():,} parameters, learning rate {learning_rate}")
    for step in tqdm(range(done + 1, total_steps + 1), "reward model", disable=None):
        # 4. One optimizer step. Dropout is a function of seed and step, so --resume needs no random state.
        torch.manual_seed(args.seed * 2**20 + step)
        model.train()
        lr = learning_rate * warmup_cosine(step, args.warmup_steps, total_steps)
        optimizer.param_groups[0]["lr"] = lr
        step_batches = batches[(step - 1) * accumulation : step * accumulation]
        micro_batches = [[train[i] for i in batch] for batch in step_batches]
        num_pairs = sum(map(len, micro_batches))
        num_tokens = sum(len(chosen) - 1 for micro_batch in micro_batches for chosen, _ in micro_batch)
        step_loss = 0.0
        step_accuracy = 0.0
        for micro_batch in micro_batches:
            # [b], [b], [2b, L], [2b, L, d]
            chosen, rejected, ids, hidden = pair_scores(model, micro_batch, device)
            # Bradley-Terry: only differences of scores matter. ppo_rlhf.py normalizes what is left open.
            margin = chosen - rejected  # [b]
            loss = -F.logsigmoid(margin).sum() / num_pairs
            center_loss = ((chosen + rejected) ** 2).sum() / num_pairs
            total = loss + args.center_coef * center_loss
            if args.lm_coef > 0:  # next-token prediction on prompt and response of the chosen side
                b = len(micro_batch)
                ends = torch.tensor([len(side) for side, _ in micro_batch], device=device)  # [b]
                positions = torch.arange(1, ids.shape[1], device=device)  # [L-1]
                real = positions < ends[:, None]  # [b, L-1]
                predicting = hidden[:b, :-1][real]  # [N, d]
                logits = lm_head(predicting)  # [N, V]
                lm_loss = F.cross_entropy(logits, ids[:b, 1:][real], reduction="sum")
                total = total + args.lm_coef * lm_loss / num_tokens
            total.backward()
            step_loss += loss.detach()
            step_accuracy += (margin > 0).sum() / num_pairs
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm or math.inf)
        if not grad_norm.isfinite():
            fail(f"step {step}: gradient not finite: check the data, or restart with a lower learning rate")
        optimizer.step()
        optimizer.zero_grad()

        # 5. Logging
        metrics = {
            "step": step,
            "train/loss": step_loss,
            "train/accuracy": step_accuracy,
            "grad_norm": grad_norm,
            "lr": lr,
        }
        if step % args.eval_steps == 0 or step == total_steps:
            metrics |= evaluate(model, test, size, device)
            accuracy = metrics["eval/accuracy"]
            loss = metrics["eval/loss"]
            tqdm.write(f"step {step}: held-out accuracy {accuracy:.3f}, loss {loss:.3f}")
        line = json.dumps(metrics, default=float)
        logs[0].write(line + "\n")
        if args.track:
            wandb.log(metrics, step=step)
        if step % args.save_steps == 0 or step == total_steps:
            save_checkpoint(args, logs, model, optimizer, step)

    model.save_pretrained(args.output_dir)
    tokenizer.save_pretrained(args.output_dir)
    print(f"saved to {args.output_dir}. Next: python ppo_rlhf.py --reward_model_path {args.output_dir}")


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


def encode(tokenizer, end_ids, row, column):  # [shared]
    """Ids of the prompt as the policy will see it, and those that the chat template adds for the response."""
    chat = read_chat(row, column)
    roles = [message["role"] for message in chat[-2:]]
    if roles not in (["user", "assistant"], ["tool", "assistant"]):
        fail(f"{row['where']}: it must end with messages of user and assistant, not {roles}: {list(row)}")
    prompt_ids = render(tokenizer, row, chat[:-1], add_generation_prompt=True)
    ids = render(tokenizer, row, chat)
    same = len(os.path.commonprefix([prompt_ids, ids]))
    if same < len(prompt_ids):
        alone = tokenizer.decode(prompt_ids[same:])
        fail(f"{row['where']}: the prompt's end {alone!r} becomes {tokenizer.decode(ids[same:])!r} in a chat")
    response_ids = [*ids[same:], tokenizer.eos_token_id]  # in case the template writes no end
    end = next(i for i, token in enumerate(response_ids, 1) if token in end_ids)
    return prompt_ids, response_ids[:end]


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
