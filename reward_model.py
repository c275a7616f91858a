"""Stage 2 of RLHF: the reward model. On the shipped task, after sft.py: python reward_model.py

It is easier to say which of two responses is better than to write a good one. The SFT model gets a head that
gives one number, the score of a response, and learns from pairs of responses of which people preferred one,
by the Bradley-Terry model: P(chosen is preferred) = sigmoid(score(chosen) - score(rejected)). Stage 3 trains
the policy to raise the score. The default adds two terms to this textbook loss: a language-model loss on the
chosen side (prompt and chosen response), which brought 1 to 2 points of held-out accuracy on the shipped
task, and a centering term. Pairs leave one constant per prompt undetermined, which would be noise in stage 3;
centering keeps scores near 0.

Sources: Christiano et al. 2017, section 2.2.3; Stiennon et al. 2020, section 3.4; Ouyang et al. 2022, 3.5;
the two terms: Cobbe et al. 2021, Eisenstein et al. 2023. Functions marked [shared] are the same in every
script that has them."""

import functools
import json
import math
import os
import re
import sys
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import datasets
import huggingface_hub
import torch
import torch.nn.functional as F
import transformers
import tyro
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers.utils import cached_file


@dataclass
class Args:
    # ---- input and output ----
    model_name_or_path: str = "runs/sft"  # the SFT model that the reward model starts from
    dataset_name: str = "data/preferences"  # folder with train.jsonl and test.jsonl, or a Hub name
    dataset_train_split: str = "train"  # pairs to train on
    dataset_test_split: str = "test"  # held-out pairs
    output_dir: str = "runs/reward_model"  # run folder
    max_length: int = 512  # tokens of prompt and response together; pairs in which one is longer are left out
    # ---- loss ----
    lm_coef: float = 1.0  # weight of the language-model loss on the chosen side (Cobbe et al. 2021)
    center_coef: float = 0.003  # weight of (score(chosen) + score(rejected))^2 (Eisenstein et al. 2023)
    # ---- optimization ----
    learning_rate: float = 0.0  # AdamW's peak rate; 0: 8e-4 below 10M parameters, else 1e-5
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
    eval_steps: int = 2000  # steps between evaluations on the held-out pairs, besides the one at the end
    save_steps: int = 100  # steps between checkpoints
    track: bool = False  # log to Weights & Biases
    resume: bool = False  # resume from the checkpoint in output_dir
    overwrite: bool = False  # replace what is in output_dir


def pair_scores(model, pairs, device):
    """Scores of (chosen ids, rejected ids) pairs, [B] and [B], and the hidden states that they were read
    from, chosen sides first, [2B, L, d]."""
    sides = [chosen for chosen, _ in pairs] + [rejected for _, rejected in pairs]
    ids = pad_sequence([torch.tensor(side) for side in sides], batch_first=True).to(device)  # [2B, L]
    ends = torch.tensor([len(side) - 1 for side in sides], device=device)  # [2B]
    hidden = hidden_states(model, ids)  # [2B, L, d]
    # At the last real token, by length. Transformers' classifier looks for the last id that is not a pad, one
    # token early if pad == EOS.
    scores = model.score(hidden[torch.arange(len(sides), device=device), ends]).flatten()  # [2B]
    chosen, rejected = scores.chunk(2)  # [B], [B]
    return chosen, rejected, hidden


def hidden_states(model, ids):  # [shared]
    """Right-padded ids [B, L] -> [B, L, d]. No attention mask: attention is causal and the padding on the
    right, so no real token sees it. The backbone computes in bf16 on CUDA. Weights stay fp32, as small
    updates would round to nothing in bf16; logits and losses are fp32 too."""
    with torch.autocast(ids.device.type, torch.bfloat16, enabled=ids.is_cuda):
        return model.base_model(ids, use_cache=False).last_hidden_state.float()


def shuffled_batches(lengths, size, count, seed):  # [shared]
    """A list of `count` batches of row numbers, epoch by epoch, each in another order. To keep padding small,
    pools of 16 batches are drawn at random, sorted by length and cut, so that rows of like length meet."""
    lengths = torch.tensor(lengths)
    batches = []
    epoch = 0
    while len(batches) < count:
        generator = torch.Generator().manual_seed(seed + epoch)
        epoch_batches = []
        for pool in torch.randperm(len(lengths), generator=generator).split(16 * size):
            epoch_batches += pool[lengths[pool].argsort(stable=True)].split(size)
        batches += [epoch_batches[i] for i in torch.randperm(len(epoch_batches), generator=generator)]
        epoch += 1
    return batches[:count]


def warmup_cosine(step, warmup_steps, total_steps):  # [shared]
    """Learning rate of step 1 ... total_steps as a share of its peak: linear, then half a cosine to zero."""
    if step <= warmup_steps:
        return step / warmup_steps
    progress = (step - warmup_steps) / (total_steps - warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * progress))


@torch.no_grad()
def evaluate(model, pairs, size, device):
    """Held-out loss, accuracy, mean margin and expected calibration error: the gap between the model's
    confidence and its accuracy, over ten bins of confidence, weighted by size."""
    model.eval()
    margins = []
    for i in range(0, len(pairs), size):
        chosen, rejected, _ = pair_scores(model, pairs[i : i + size], device)
        margins.append(chosen - rejected)
    margin = torch.cat(margins)  # [N]
    right = (margin > 0).float()  # [N]
    confidence = torch.sigmoid(margin.abs())  # [N] in 0.5 ... 1
    bins = ((confidence - 0.5) * 20).long().clamp(max=9)  # [N], 0 to 9
    gap = right - confidence  # [N]
    bin_gaps = [gap[bins == b].sum().abs() for b in range(10)]
    return {
        "eval/loss": -F.logsigmoid(margin).mean(),
        "eval/accuracy": right.mean(),
        "eval/margin": margin.mean(),
        "eval/ece": sum(bin_gaps) / len(margin),
    }


def main(args):
    check_numbers(args)
    state = load_checkpoint(args, [args.model_name_or_path])
    device = find_device()
    torch.manual_seed(args.seed)

    # 1. Model: the SFT model's backbone with a new scalar head. A model that can write a response has learned
    # most of what it takes to judge one (Stiennon et al. 2020, section 3.4).
    sft, tokenizer = load_pretrained(transformers.AutoModelForCausalLM, args.model_name_or_path)
    end_ids = find_end_ids(sft, tokenizer)
    if type(sft.config) not in transformers.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        fail(f"transformers has no sequence-classification class for model family {sft.config.model_type}")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        args.model_name_or_path,
        num_labels=1,
        problem_type="regression",  # stock pipelines then show the score, not its sigmoid
        dtype=torch.float32,
    )
    # Once more, strictly: from_pretrained leaves weights that it finds no values for random
    model.base_model.load_state_dict(sft.base_model.state_dict())
    # std 1/sqrt(d+1) keeps the first scores near unit size (lm-human-preferences, language/model.py:252);
    # large ones would saturate the sigmoid before the backbone has learned anything.
    torch.nn.init.normal_(model.score.weight, std=1 / math.sqrt(model.score.in_features + 1))

    # 2. Pairs: two responses to one prompt. Ids of both end with the token that ends a turn, where the score
    # is read: the first position that knows the response to be complete.
    train = load_pairs(tokenizer, end_ids, args, args.dataset_train_split)
    test = load_pairs(tokenizer, end_ids, args, args.dataset_test_split)
    sides = [side for pair in train + test for side in pair]
    data_hash = check_data(state, sides)
    check_model(sft, tokenizer, sides)
    torch.set_float32_matmul_precision("high")  # TF32 on CUDA
    lm_head = sft.get_output_embeddings().requires_grad_(False).to(device)  # for the language-model loss only
    # For users of the saved model: transformers' classifier skips pads to find the last token, so the pad
    # must not be an end. With None it takes one response at a time.
    model.config.pad_token_id = tokenizer.pad_token_id
    if tokenizer.pad_token_id in end_ids:
        model.config.pad_token_id = None
    model.to(device)
    if args.gradient_checkpointing:
        model.activation_checkpointing_enable()

    # 3. Optimizer and schedule, as in sft.py. One pass over the pairs is usual (Ouyang et al. 2022, C.2), as
    # a reward model soon overfits; the small model of the shipped task takes two.
    small = model.num_parameters() < 10e6
    learning_rate = args.learning_rate or (8e-4 if small else 1e-5)
    num_epochs = args.num_train_epochs or (2 if small else 1)
    batch_size = args.per_device_train_batch_size
    accumulation = args.gradient_accumulation_steps
    num_batches = num_epochs * math.ceil(len(train) / batch_size)
    total_steps = max(args.max_steps, 0) or math.ceil(num_batches / accumulation)
    lengths = [max(len(chosen), len(rejected)) for chosen, rejected in train]
    batches = shuffled_batches(lengths, batch_size, total_steps * accumulation, args.seed)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=args.weight_decay, fused=True)
    last_step = 0
    if state:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        last_step = state["progress"]
    run = start_tracking(args, state) if args.track else None
    logs = open_logs(args, state, "metrics.jsonl")
    print(f"Reward model on {device}: {model.num_parameters():,} parameters, learning rate {learning_rate}")
    for step in tqdm(range(last_step + 1, total_steps + 1), "reward model", disable=None):
        # 4. One optimizer step. Dropout is a function of seed and step, so --resume needs no random state.
        torch.manual_seed(args.seed * 2**20 + step)
        model.train()  # dropout on, if the model has any
        lr = learning_rate * warmup_cosine(step, args.warmup_steps, total_steps)
        optimizer.param_groups[0]["lr"] = lr
        step_batches = batches[(step - 1) * accumulation : step * accumulation]
        micro_batches = [[train[i] for i in batch] for batch in step_batches]
        num_pairs = sum(map(len, micro_batches))
        num_tokens = sum(len(chosen) - 1 for micro_batch in micro_batches for chosen, _ in micro_batch)
        step_loss = 0.0
        step_accuracy = 0.0
        for micro_batch in micro_batches:
            # [b], [b], [2b, L, d]
            chosen_scores, rejected_scores, hidden = pair_scores(model, micro_batch, device)
            # Bradley-Terry: the negative log-likelihood of the choices
            margin = chosen_scores - rejected_scores  # [b]
            loss = -F.logsigmoid(margin).sum() / num_pairs
            center_loss = ((chosen_scores + rejected_scores) ** 2).sum() / num_pairs
            total = loss + args.center_coef * center_loss
            # Next-token prediction on prompt and response of the chosen side keeps what the backbone knows of
            # language, through the SFT model's own output layer.
            if args.lm_coef > 0:
                labels = [torch.tensor(chosen_ids[1:]) for chosen_ids, _ in micro_batch]
                labels = pad_sequence(labels, batch_first=True, padding_value=-100).to(device)  # [b, l]
                real = labels >= 0  # [b, l]
                chosen_hidden = hidden[: len(labels), : labels.shape[1]]  # [b, l, d]: chosen sides come first
                logits = lm_head(chosen_hidden[real])  # [N, V] of N real tokens
                lm_loss = F.cross_entropy(logits, labels[real], reduction="sum")
                total = total + args.lm_coef * lm_loss / num_tokens
            total.backward()
            step_loss += loss.detach()
            step_accuracy += (margin > 0).sum() / num_pairs
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm or math.inf)
        if not grad_norm.isfinite():
            fail(f"step {step}: gradient not finite: check the data, or restart with a lower learning rate")
        optimizer.step()
        optimizer.zero_grad()

        # 5. Logging. Accuracy: the share of pairs in which the chosen response scores higher. On people's
        # labels 100% is out of reach: InstructGPT's labelers agreed 73% of the time (Ouyang et al. 2022,
        # 3.4).
        metrics = {
            "step": step,
            "train/loss": step_loss,  # of Bradley-Terry alone, as eval/loss
            "train/accuracy": step_accuracy,
            "grad_norm": grad_norm,
            "lr": lr,
        }
        if step % args.eval_steps == 0 or step == total_steps:
            metrics |= evaluate(model, test, batch_size, device)
            accuracy = metrics["eval/accuracy"]
            loss = metrics["eval/loss"]
            tqdm.write(f"step {step}: held-out accuracy {accuracy:.3f}, loss {loss:.3f}")
        write_row(logs[0], metrics)
        if run:
            run.log(metrics, step=step)
        if step % args.save_steps == 0 or step == total_steps:
            save_checkpoint(args, logs, model, optimizer, step, data_hash, run)

    model.save_pretrained(args.output_dir)
    tokenizer.save_pretrained(args.output_dir)
    paths = f"--sft_model_path {args.model_name_or_path} --reward_model_path {args.output_dir}"
    print(f"saved to {args.output_dir}. Next: python ppo_rlhf.py {paths}")


# ---- Plumbing ----
def fail(message):  # [shared]
    """Print one line and exit with status 2, rather than go wrong silently."""
    print("error:", " ".join(message.split()), file=sys.stderr)
    raise SystemExit(2)


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


def encode(tokenizer, end_ids, row, *columns, max_length=math.inf):  # [shared]
    """[prompt ids, response ids for each of `columns`]: the prompt as the policy will see it, and what the
    chat template adds for a response, to the end of its turn. ValueError says why a row is left out."""
    chats = [read_chat(row, column) for column in columns]
    prompt = chats[0][:-1]
    for *before, last in chats:
        if not before or before[-1]["role"] not in ("user", "tool") or last["role"] != "assistant":
            raise ValueError("that do not end with messages of user and assistant")
        if before != prompt or not (last.get("content") or last.get("tool_calls")):
            raise ValueError("with two prompts or an empty response")
    texts = [render(tokenizer, row, chat) for chat in chats]
    texts.append(render(tokenizer, row, prompt, add_generation_prompt=True))
    *sides, prompt_ids = tokenizer(texts, add_special_tokens=False).input_ids
    example = [prompt_ids]
    for ids in sides:
        if ids[: len(prompt_ids)] != prompt_ids:
            raise ValueError("whose chat does not begin with the prompt's tokens")
        response_ids = [*ids[len(prompt_ids) :], tokenizer.eos_token_id]  # in case the template writes no end
        end = next(i for i, token in enumerate(response_ids, 1) if token in end_ids)
        if len(prompt_ids) + end > max_length:
            raise ValueError("longer than --max_length")
        if response_ids[:end] in example[1:]:
            raise ValueError("with the same response twice")
        example.append(response_ids[:end])
    return example


def load_pairs(tokenizer, end_ids, args, split):
    """Pairs of a split, each (chosen ids, rejected ids), the prompt included in both. Rows have chosen and
    rejected, after a column prompt or as complete dialogues."""
    rows = load_rows(args.dataset_name, split)
    columns = [find_column(rows, "chosen"), find_column(rows, "rejected")]

    def encode_pair(row):
        prompt, chosen, rejected = encode(tokenizer, end_ids, row, *columns, max_length=args.max_length)
        return prompt + chosen, prompt + rejected

    return encode_rows(encode_pair, rows, split)


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
