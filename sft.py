"""Stage 1 of RLHF: supervised fine-tuning (SFT). The shipped task, from scratch: python sft.py

A base model continues text. Trained to predict the completions of demonstrations, it responds to prompts."""

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
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig


@dataclass
class Args:
    model_name_or_path: str = "scratch"  # a folder, a Hub name, or scratch: data/scratch with random weights
    dataset_name: str = "data/demonstrations"  # folder with train.jsonl and test.jsonl, or a Hub name
    dataset_train_split: str = "train"  # demonstrations to train on
    dataset_test_split: str = "test"  # held-out demonstrations
    output_dir: str = "runs/sft"  # run folder
    prompt_template: str | None = None  # text with {prompt} in it, for a model without a chat template
    max_length: int = 512  # tokens of prompt and completion together; longer examples are left out
    learning_rate: float = 0.0  # peak of AdamW's; 0 chooses 3e-3 below 10M parameters, else 1e-5
    num_train_epochs: int = 0  # passes over the demonstrations; 0 chooses 6 below 10M parameters, else 2
    max_steps: int = 0  # optimizer steps; overrides num_train_epochs if positive
    per_device_train_batch_size: int = 16  # examples per forward and backward pass (micro-batch)
    gradient_accumulation_steps: int = 1  # micro-batches per optimizer step
    warmup_steps: int = 40  # steps of linear warm-up, then a cosine decay to zero
    weight_decay: float = 0.01  # AdamW's
    max_grad_norm: float = 1.0  # gradients are clipped to this norm; 0 for none
    gradient_checkpointing: bool = False  # recompute activations in the backward pass: slower, less memory
    seed: int = 1  # of new weights, the order of the data, dropout and samples
    eval_steps: int = 250  # steps between evaluations: held-out loss and a few samples
    temperature: float = 0.7  # of the samples, here and as the saved default
    max_new_tokens: int = 64  # longest sample in tokens
    save_steps: int = 200  # steps between checkpoints
    track: bool = False  # log to Weights & Biases
    resume: bool = False  # resume from the checkpoint in output_dir
    overwrite: bool = False  # replace what is in output_dir


def completion_loss(model, examples, device):
    """Summed negative log-likelihood of the completions' tokens, EOS included; the user writes prompts."""
    rows = [torch.tensor(prompt + completion) for prompt, completion in examples]
    labels = pad_sequence(rows, batch_first=True, padding_value=-100)  # [B, L]
    hidden = hidden_states(model, labels.clamp(min=0).to(device))  # [B, L, d]; any id does as padding
    for row, (prompt, _) in zip(labels, examples):
        row[: len(prompt)] = -100
    labels = labels[:, 1:].to(device)  # [B, L-1]: each position predicts the next token
    real = labels >= 0  # [B, L-1]
    logits = model.get_output_embeddings()(hidden[:, :-1][real])  # [N, V]: never [B, L, V]
    return F.cross_entropy(logits, labels[real], reduction="sum")


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


def chat_template(prompt_template, tokenizer):
    """A chat template from "Prompt: {prompt}\\nResponse:" or so; responses follow a space, then EOS."""
    text = prompt_template.replace("\\n", "\n")  # a shell passes \n as two characters
    before, after = text.split("{prompt}")
    bos = "{{ bos_token }}" if tokenizer("").input_ids[:1] == [tokenizer.bos_token_id] else ""
    return (
        f"{bos}{{% for m in messages %}}"
        "{% if m.role == 'assistant' %}{{ ' ' if m.content[:1] not in ' \\n' }}{{ m.content + eos_token }}"
        f"{{% elif m.role == 'user' %}}{{{{ {before!r} + m.content + {after!r} }}}}"
        "{% else %}{{ raise_exception('a --prompt_template has no place for role ' + m.role) }}"
        "{% endif %}{% endfor %}"
    )


def main(args):
    state = load_checkpoint(args, [args.model_name_or_path])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(args.seed)
    if args.model_name_or_path == "scratch":  # a Llama of 0.7M parameters
        tokenizer = AutoTokenizer.from_pretrained("data/scratch")
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained("data/scratch"))
    else:
        model, tokenizer = load_pretrained(AutoModelForCausalLM, args.model_name_or_path)
    if args.prompt_template or not tokenizer.chat_template:
        template = args.prompt_template or "Prompt: {prompt}\nResponse:"
        tokenizer.chat_template = chat_template(template, tokenizer)
    end_ids = find_end_ids(model, tokenizer)
    data = []
    for split in (args.dataset_train_split, args.dataset_test_split):
        rows = load_rows(args.dataset_name, split)
        pairs = [encode(tokenizer, end_ids, row, "completion") for row in rows]
        short = [pair for pair in pairs if len(pair[0] + pair[1]) <= args.max_length]
        data.append(short)
        print(f"{split}: {len(short)} of {len(rows)} examples are within --max_length")
    if not all(data):
        fail("no example of a split is within --max_length")
    train, test = data
    sequences = [prompt + completion for prompt, completion in train + test]
    sequences.append(test[0][0] + [0] * args.max_new_tokens)  # as long as the sample can be
    check_model(model, tokenizer, sequences)
    print(f"for example: {tokenizer.decode(train[0][0])!r} -> {tokenizer.decode(train[0][1])!r}")
    # For `generate`, here and later: the distribution that is trained, without top-k, top-p or penalties
    plain = {"do_sample": True, "temperature": args.temperature, "top_k": 0, "top_p": 1.0}
    ends = {"eos_token_id": end_ids, "pad_token_id": tokenizer.pad_token_id}
    model.generation_config = GenerationConfig(**plain, **ends, max_new_tokens=args.max_new_tokens)
    model.to(device)
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    small = model.num_parameters() < 10e6
    learning_rate = args.learning_rate or (3e-3 if small else 1e-5)
    epochs = args.num_train_epochs or (6 if small else 2)
    size = args.per_device_train_batch_size
    accumulation = args.gradient_accumulation_steps
    num_batches = epochs * math.ceil(len(train) / size)
    total_steps = max(args.max_steps, 0) or math.ceil(num_batches / accumulation)
    lengths = [len(prompt + completion) for prompt, completion in train]
    batches = shuffled_batches(lengths, size, total_steps * accumulation, args.seed)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=args.weight_decay, fused=True)
    done = 0  # steps
    if state:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        done = state["progress"]
    if args.track:
        import wandb

        wandb.init(project="ppo_rlhf", name=args.output_dir, config=asdict(args))
    logs = open_logs(args, state, "metrics.jsonl")
    print(f"SFT on {device}: {model.num_parameters():,} parameters, learning rate {learning_rate}")
    for step in tqdm(range(done + 1, total_steps + 1), "SFT", disable=None):
        torch.manual_seed(args.seed * 2**20 + step)  # for dropout: --resume needs no random state
        model.train()
        lr = learning_rate * warmup_cosine(step, args.warmup_steps, total_steps)
        optimizer.param_groups[0]["lr"] = lr
        micro_batches = batches[(step - 1) * accumulation : step * accumulation]
        # Divided by the tokens of the step, not of each micro-batch: every token weighs the same.
        num_tokens = sum(len(train[i][1]) for micro_batch in micro_batches for i in micro_batch)
        step_loss = 0.0
        for micro_batch in micro_batches:
            examples = [train[i] for i in micro_batch]
            loss = completion_loss(model, examples, device) / num_tokens
            loss.backward()
            step_loss += loss.detach()
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm or math.inf)
        if not grad_norm.isfinite():
            fail(f"step {step}: gradient not finite: check the data, or restart with a lower learning rate")
        optimizer.step()
        optimizer.zero_grad()
        metrics = {
            "step": step,
            "train/loss": step_loss,
            "grad_norm": grad_norm,
            "lr": lr,
        }
        if step % args.eval_steps == 0 or step == total_steps:
            model.eval()
            starts = range(0, len(test), size)
            with torch.no_grad():
                losses = [completion_loss(model, test[i : i + size], device) for i in starts]
            num_tokens = sum(len(completion) for _, completion in test)
            metrics["eval/loss"] = sum(losses) / num_tokens
            prompt_ids = torch.tensor([test[0][0]], device=device)  # [1, L]
            sample = model.generate(prompt_ids)
            tqdm.write(f"step {step}: held-out loss {metrics['eval/loss']:.3f} nats per token")
            tqdm.write(f"    {tokenizer.decode(sample[0])!r}")  # special tokens included
        line = json.dumps(metrics, default=float)
        logs[0].write(line + "\n")
        if args.track:
            wandb.log(metrics, step=step)
        if step % args.save_steps == 0 or step == total_steps:
            save_checkpoint(args, logs, model, optimizer, step)
    model.save_pretrained(args.output_dir)
    tokenizer.save_pretrained(args.output_dir)
    print(f"saved to {args.output_dir}. Next: python reward_model.py --model_name_or_path {args.output_dir}")


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
