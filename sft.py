"""Stage 1 of RLHF: supervised fine-tuning (SFT).

A base model knows language but does not answer. Here it learns from demonstrations, pairs of a prompt and
the completion that a human wrote, by plain next-token prediction on the completion's tokens. What comes out
answers, at the demonstrators' mixed quality: it is the policy's starting point and the KL anchor in stage 3.

    python sft.py                  # the shipped task, from scratch, no download
    python sft.py --model_name_or_path EleutherAI/pythia-410m \\
        --dataset_name my_demos/ --learning_rate 1e-5 --num_train_epochs 2

Reads   data/demonstrations/{train,test}.jsonl with the columns `prompt` and `completion`, or `messages`; or any Hub data set.
Writes  runs/sft: model and tokenizer as `save_pretrained` does, metrics.jsonl, args.json, README.md (a model card), checkpoint/.
Next    python reward_model.py

Sources: Ouyang et al. 2022 (InstructGPT), section 3.5; Stiennon et al. 2020.
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
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer


@dataclass
class Args:
    # ---- what goes in, what comes out ----
    model_name_or_path: str = "scratch"
    """base model: a Hub name, a local folder, or `scratch`: a small GPT-2 with a tokenizer of its own, both
    made from the data set, so that the first run needs no download"""
    dataset_name: str = "data/demonstrations"
    """a Hub name or a local folder with train.jsonl and test.jsonl; columns `prompt` and `completion`, or `messages`,
    whole chats whose last turn, the assistant's, is the completion"""
    dataset_train_split: str = "train"
    """the split to train on; slices as in `datasets` work, `train[:10%]`"""
    dataset_test_split: str = "test"
    """the held-out split; for a data set without one, `train[-500:]`, with `train[:-500]` to train on"""
    output_dir: str = "runs/sft"
    """where model, tokenizer and metrics.jsonl go"""
    prompt_template: str = "Prompt: {prompt}\nResponse:"
    """what a string prompt is put into, the same in all three stages; a prompt that is a list of chat messages
    goes through the tokenizer's own chat template instead"""
    max_length: int = 512
    """tokens of prompt and completion together; longer examples are left out, and counted"""

    # ---- the model made by `scratch` ----
    vocab_size: int = 1024
    """tokens in the byte-level BPE vocabulary of `scratch`: small enough that the output layer stays cheap on a CPU"""
    n_layer: int = 4
    """transformer blocks of `scratch`; 4 of width 128 is about 1M parameters, seconds to minutes on two CPU cores"""
    n_embd: int = 128
    """width of `scratch`; heads are 32 wide"""

    # ---- optimization ----
    learning_rate: float = 2e-3
    """peak of AdamW's learning rate; right for the small model from scratch. Fine-tuning a pre-trained model
    wants 1e-5 to 5e-5"""
    num_train_epochs: int = 12
    """passes over the demonstrations; a pre-trained model needs 1 to 3"""
    max_steps: int = 0
    """optimizer steps; overrides num_train_epochs if positive"""
    per_device_train_batch_size: int = 32
    """examples in one forward and backward pass (the micro-batch)"""
    gradient_accumulation_steps: int = 1
    """micro-batches summed into one optimizer step; the loss is the mean over all their tokens"""
    warmup_steps: int = 20
    """steps of linear warm-up; then a cosine decay to zero"""
    weight_decay: float = 0.01
    """AdamW's decoupled weight decay"""
    max_grad_norm: float = 1.0
    """the gradient is scaled down to this norm if it is longer; one bad batch then cannot wreck the model"""
    gradient_checkpointing: bool = False
    """recompute activations in the backward pass: about a third more time for a fraction of the memory"""
    seed: int = 1
    """seeds the new weights, the order of the data, dropout, and the sampled completions"""

    # ---- watching ----
    logging_steps: int = 10
    """optimizer steps between two lines in metrics.jsonl"""
    eval_steps: int = 250
    """optimizer steps between two evaluations: held-out loss and a few sampled completions"""
    temperature: float = 0.7
    """of those sampled completions; the later stages sample at 0.7 too"""
    max_new_tokens: int = 64
    """the longest of those sampled completions, in tokens"""
    track: bool = False
    """log to Weights & Biases too"""

    # ---- stopping and going on ----
    save_steps: int = 200
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


def model_from_scratch(args, texts):
    """A small GPT-2 and a byte-level BPE tokenizer trained on `texts`: no download, any text can be encoded."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()  # all 256 bytes: no text is out of vocabulary
    special = ["<pad>", "<eos>"]  # two tokens, not one: stock reward models find the last token by `id != pad`
    trainer = trainers.BpeTrainer(vocab_size=args.vocab_size, special_tokens=special, initial_alphabet=alphabet)
    bpe.train_from_iterator(texts, trainer)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>", eos_token="<eos>")
    config = transformers.GPT2Config(
        vocab_size=len(tokenizer), n_positions=args.max_length + args.max_new_tokens, n_embd=args.n_embd, n_layer=args.n_layer,
        n_head=args.n_embd // 32, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        activation_function="relu",  # a seventh less time on a CPU than GPT-2's GELU, and the same held-out loss
        bos_token_id=tokenizer.eos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config), tokenizer


def completion_loss(model, examples, pad_id, device):
    """Summed negative log-likelihood of the completions' tokens, EOS included.

    examples: (prompt ids, completion ids) pairs. Nothing is learnt from the prompt's tokens: the user writes them.
    """
    ids = pad([prompt + completion for prompt, completion in examples], pad_id, device)  # [B, L]
    starts = torch.tensor([len(prompt) for prompt, _ in examples], device=device)[:, None]  # [B, 1]
    ends = torch.tensor([len(prompt) + len(completion) for prompt, completion in examples], device=device)[:, None]
    positions = torch.arange(1, ids.shape[1], device=device)  # [L-1] of the token that is predicted
    targets = ((positions >= starts) & (positions < ends)).nonzero(as_tuple=True)  # before the forward: the host waits for N
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]  # [B, L-1, d]
    logits = model.get_output_embeddings()(hidden[targets])  # [N, V]: the N completion tokens only, never [B, L, V]
    return F.cross_entropy(logits.float(), ids[:, 1:][targets], reduction="sum")


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


def main(args):
    check_flags(args, ["max_length", "n_layer", "n_embd", "vocab_size", "learning_rate", "num_train_epochs", "max_grad_norm",
                       "temperature", "per_device_train_batch_size", "gradient_accumulation_steps", "logging_steps",
                       "eval_steps", "save_steps", "save_total_limit", "max_new_tokens"])  # fmt: skip
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # bf16 matrix products on CUDA with fp32 weights and optimizer: pure bf16 weights would round small steps away
    autocast = torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else contextlib.nullcontext()
    if device.type == "cuda":  # cuDNN's attention makes a plan, 30 ms and more, for every new shape, and every micro-batch has one
        torch.backends.cuda.enable_cudnn_sdp(False)
    torch.manual_seed(args.seed)

    # 1. Data and model
    state = load_checkpoint(args, ["output_dir", "logging_steps", "eval_steps", "track", "save_steps", "save_total_limit",
                                   "resume", "overwrite", "gradient_checkpointing"])  # fmt: skip
    splits = {"train": args.dataset_train_split, "test": args.dataset_test_split}
    rows = {split: load_rows(args.dataset_name, name, ["prompt", "completion"]) for split, name in splits.items()}
    if args.model_name_or_path == "scratch":
        size = args.n_embd * (12 * args.n_layer * args.n_embd + args.vocab_size + args.max_length + args.max_new_tokens)
        if args.n_embd % 32 or args.vocab_size < 258 or size > 1e9:
            fail(f"--n_embd {args.n_embd} must be a multiple of 32, the width of a head, --vocab_size {args.vocab_size} at least "
                 f"258, all bytes, pad and EOS, and the model, with {size / 1e9:.2g}B parameters, below 1B")  # fmt: skip
        # Cut for the vocabulary alone: the trainer did not come back in ten minutes from a megabyte without a space.
        texts = [args.prompt_template.replace("{prompt}", str(r["prompt"])) + f" {r['completion']}" for r in rows["train"]]
        model, tokenizer = model_from_scratch(args, [text[:4096] for text in texts])
    else:
        model, tokenizer = load_pretrained(AutoModelForCausalLM, args.model_name_or_path, "--model_name_or_path")
    model.to(device)
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable()

    data = {}
    for split, examples in rows.items():
        encoded = [encode(tokenizer, args.prompt_template, row["prompt"], row["completion"]) for row in examples]
        data[split] = [(prompt, answer) for prompt, answer in encoded if len(prompt) + len(answer) <= args.max_length]
        if len(data[split]) < len(encoded):
            print(f"{split}: left out {len(encoded) - len(data[split])} of {len(encoded)} examples, longer than --max_length")
        if not data[split]:
            fail(f"--max_length {args.max_length}: every example of `{split}` is longer; raise it")

    context = getattr(model.config, "max_position_embeddings", math.inf)
    longest = max(len(prompt) + len(answer) for examples in data.values() for prompt, answer in examples)
    if longest > context:
        fail(f"--max_length {args.max_length}: the longest example has {longest} tokens, the model's context {context}; lower it")
    longest = max(len(prompt) for prompt, _ in data["test"])
    if longest + args.max_new_tokens > context:
        fail(f"--max_new_tokens {args.max_new_tokens}: with a prompt of {longest} tokens, more than the context of {context}")

    ids = torch.tensor(data["train"][0][:1], device=device)  # [1, P]
    with torch.no_grad():
        stock = model(input_ids=ids).logits  # [1, P, V]
        ours = model.get_output_embeddings()(model.base_model(input_ids=ids).last_hidden_state)  # [1, P, V]
    if not torch.allclose(stock, ours, rtol=1e-3, atol=1e-2):  # Gemma 2, Cohere, Granite: another model would be trained
        fail(f"--model_name_or_path: the model family `{model.config.model_type}` is not supported: it scales its logits after "
             "the output layer; name another")  # fmt: skip

    # 2. Optimizer and schedule
    lengths = [len(prompt) + len(completion) for prompt, completion in data["train"]]
    batch_size = args.per_device_train_batch_size
    batches_per_epoch = math.ceil(len(lengths) / batch_size)
    total_steps = args.max_steps or math.ceil(args.num_train_epochs * batches_per_epoch / args.gradient_accumulation_steps)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=args.learning_rate, weight_decay=args.weight_decay, fused=True  # one kernel, not hundreds
    )
    first_step, seconds, tokens_seen, running_loss = 1, 0.0, 0, []
    inputs = fingerprint(data)
    if state:
        if state["inputs"] != inputs:
            fail("--resume: the data set or the tokenizer is not what this run began with; restore it, or --overwrite")
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first_step, seconds, tokens_seen = state["step"] + 1, state["seconds"], state["tokens_seen"]
        running_loss = list(state["running_loss"].to(device))
    output_dir, (metrics_file,) = Path(args.output_dir), open_logs(args, state, ["metrics.jsonl"])
    if args.track:
        import wandb

        wandb.init(project="ppo_rlhf", name=output_dir.name, config=asdict(args), save_code=True, resume="allow",
                   id=state["wandb"] if state else None)  # fmt: skip
    num_parameters = sum(p.numel() for p in model.parameters())
    print(f"SFT: {num_parameters / 1e6:.2f}M parameters on {device}, {len(lengths)} demonstrations, {total_steps} steps")

    # 3. Training
    model.train()
    start_time, batches, signals = time.time() - seconds, None, catch_signals()
    steps = range(first_step, total_steps + 1)
    progress = tqdm(steps, desc="sft", initial=first_step - 1, total=total_steps, disable=None)  # no bar without a terminal
    for step in progress:
        torch.manual_seed(args.seed * 2**20 + step)  # dropout too is a function of seed and step: --resume needs no more
        lr = args.learning_rate * warmup_cosine(step, args.warmup_steps, total_steps)
        optimizer.param_groups[0]["lr"] = lr

        micro_batches = []
        for k in range((step - 1) * args.gradient_accumulation_steps, step * args.gradient_accumulation_steps):
            epoch, i = divmod(k, batches_per_epoch)
            if i == 0 or batches is None:
                batches = epoch_batches(lengths, batch_size, args.seed + epoch)
            micro_batches.append([data["train"][j] for j in batches[i]])
        # Divide by the tokens of the whole step, not of each micro-batch: a token then weighs the same wherever
        # it falls, and gradient accumulation changes nothing but the memory.
        num_tokens = sum(len(completion) for micro_batch in micro_batches for _, completion in micro_batch)
        step_loss = 0.0
        for micro_batch in micro_batches:
            with autocast:
                loss = completion_loss(model, micro_batch, tokenizer.pad_token_id, device) / num_tokens
            loss.backward()
            step_loss += loss.detach()
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)
        stop_if_nonfinite(args, f"step {step}", {"loss": step_loss, "gradient norm": grad_norm}, {"examples": micro_batches})
        optimizer.step()
        optimizer.zero_grad()
        running_loss.append(step_loss)
        tokens_seen += num_tokens

        # 4. Watching
        metrics = {}
        if step % args.logging_steps == 0 or step == total_steps:
            metrics = {"step": step, "loss/train": torch.stack(running_loss).mean().item(), "lr": lr,
                       "grad_norm": grad_norm.item(), "time": time.time() - start_time,
                       "tokens_per_second": tokens_seen / (time.time() - start_time)}  # fmt: skip
            running_loss = []
        if step % args.eval_steps == 0 or step == total_steps:
            model.eval()
            with torch.no_grad(), autocast:
                losses = [completion_loss(model, data["test"][i : i + batch_size], tokenizer.pad_token_id, device)
                          for i in range(0, len(data["test"]), batch_size)]  # fmt: skip
            test_tokens = sum(len(completion) for _, completion in data["test"])
            metrics = {"step": step, **metrics, "loss/test": torch.stack(losses).sum().item() / test_tokens}
            shown = data["test"][:: math.ceil(len(data["test"]) / 3)]
            tqdm.write(f"step {step}: held-out loss {metrics['loss/test']:.3f} nats a token")
            prompts = [prompt for prompt, _ in shown]
            responses = sample(model, tokenizer, prompts, args.temperature, args.max_new_tokens, args.seed)
            samples = [[tokenizer.decode(prompt), tokenizer.decode(response)] for prompt, response in zip(prompts, responses)]
            for prompt, response in samples:
                tqdm.write(f"    {prompt!r} ->{response}")
            if args.track:
                wandb.log({"samples": wandb.Table(columns=["prompt", "response"], data=samples)}, step=step, commit=False)
            model.train()
        if metrics:
            metrics_file.write(json.dumps(metrics) + "\n")
            metrics_file.flush()
            progress.set_postfix(loss=f"{metrics.get('loss/train', metrics.get('loss/test')):.3f}")
            if args.track:
                wandb.log(metrics, step=step)
        stop = bool(signals)  # asked once: a signal may come between two lines
        if step % args.save_steps == 0 or step == total_steps or stop:
            save_checkpoint(args, step, [metrics_file], {
                "model": model.state_dict(), "optimizer": optimizer.state_dict(), "inputs": inputs, "tokens_seen": tokens_seen,
                "running_loss": torch.tensor(running_loss), "seconds": time.time() - start_time,
                "wandb": wandb.run.id if args.track else None,
            })  # fmt: skip
        if stop:
            print(f"stopped after step {step}: the same command with --resume goes on", file=sys.stderr)
            raise SystemExit(128 + signals[0])

    signal.signal(signal.SIGINT, signal.SIG_DFL), signal.signal(signal.SIGTERM, signal.SIG_DFL)  # from here on at once

    # 5. What the next stage loads, and any other library too
    model.config.eos_token_id = tokenizer.eos_token_id  # where its answers end, for stock `generate` too
    model.generation_config = plain_sampling(tokenizer, args.temperature, args.max_new_tokens)
    model.save_pretrained(output_dir)
    tokenizer.save_pretrained(output_dir)
    metrics_file.close()
    evaluations = [row for row in map(json.loads, open(output_dir / "metrics.jsonl")) if "loss/test" in row]
    held_out = " -> ".join(dict.fromkeys(f"{row['loss/test']:.3f}" for row in (evaluations[0], evaluations[-1]))) + " nats a token"
    write_card(args, "AutoModelForCausalLM", {"base model": args.model_name_or_path, "demonstrations": args.dataset_name,
                                              "optimizer steps": total_steps, "held-out loss": held_out})  # fmt: skip
    if args.track:
        wandb.finish()
    print(f"SFT took {time.time() - start_time:.0f} s, held-out loss {held_out}; saved to {output_dir}. Next: python reward_model.py"
          + f" --model_name_or_path {output_dir} ..." * (args.output_dir != Args.output_dir))  # fmt: skip


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
