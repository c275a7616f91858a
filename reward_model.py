"""Stage 2 of RLHF: the reward model.

People cannot write the perfect answer, but they can say which of two is better. The SFT model gets a head that
gives one number, the score of a whole answer, and learns from such pairs by the Bradley-Terry model of choice:
P(chosen is preferred) = sigmoid(score(chosen) - score(rejected)). Stage 3 trains the policy against that score.

    python reward_model.py                                            # the shipped task, on the model in runs/sft
    python reward_model.py --model_name_or_path my_sft/ --dataset_name Anthropic/hh-rlhf --learning_rate 1e-5

Reads   data/preferences/{train,test}.jsonl with the columns `prompt`, `chosen` and `rejected`, or whole dialogues
        in `chosen` and `rejected` alone.
Writes  runs/reward_model: an AutoModelForSequenceClassification with one label, its tokenizer, metrics.jsonl, args.json.
Next    python ppo_rlhf.py --beta 0.1

Sources: Christiano et al. 2017, section 2.2.3; Stiennon et al. 2020, section 3.4; Ouyang et al. 2022, section 3.5.
"""

import contextlib
import json
import math
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import datasets
import torch
import torch.nn.functional as F
import transformers
import tyro
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer


@dataclass
class Args:
    # ---- what goes in, what comes out ----
    model_name_or_path: str = "runs/sft"
    """the SFT model that the reward model starts from; its own samples set the scale of the scores"""
    dataset_name: str = "data/preferences"
    """a Hub name or a local folder with train.jsonl and test.jsonl; columns `prompt`, `chosen`, `rejected`"""
    output_dir: str = "runs/reward_model"
    """where the model, its tokenizer and metrics.jsonl go"""
    prompt_template: str = "Prompt: {prompt}\nResponse:"
    """what a string prompt is put into, the same in all three stages; a prompt that is a list of chat messages
    goes through the tokenizer's own chat template instead"""
    max_length: int = 512
    """tokens of prompt and answer together; pairs with a longer side are left out, and counted"""

    # ---- optimization ----
    learning_rate: float = 5e-4
    """peak of AdamW's learning rate; right for the small model of the shipped task. A pre-trained model wants 1e-5"""
    num_train_epochs: int = 2
    """passes over the pairs; more than one or two overfits (Stiennon et al. 2020, appendix B.1)"""
    max_steps: int = 0
    """optimizer steps; overrides num_train_epochs if positive"""
    per_device_train_batch_size: int = 64
    """pairs in one forward and backward pass (the micro-batch): twice as many sequences"""
    gradient_accumulation_steps: int = 1
    """micro-batches summed into one optimizer step; the loss is the mean over all their pairs"""
    warmup_steps: int = 20
    """steps of linear warm-up; then a cosine decay to zero"""
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
    eval_steps: int = 50
    """optimizer steps between two evaluations on the held-out pairs"""
    track: bool = False
    """log to Weights & Biases too"""


# ---------------------------------------------------------------------------------------------------------------
# Helpers. Those marked [shared] stand in the other scripts too, the same to the letter: each file stands alone.
# ---------------------------------------------------------------------------------------------------------------


def fail(message):  # [shared]
    """Bad input ends here: one line that says what, where and how to mend it; exit status 2, no traceback."""
    print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
    raise SystemExit(2)


def load_rows(name, split, columns):  # [shared]
    """One split of a Hub data set, or of a local folder with `{split}.jsonl`, as a list of dicts.

    Every row must have every one of `columns`, as a string that is not blank or a list of chat messages."""
    try:
        rows = datasets.load_dataset(name, split=split).to_list()
    except Exception as error:  # the library has a dozen types for this; the file and the line are what helps
        for path in sorted(Path(name).glob(f"{split}*.jsonl")):
            for number, line in enumerate(path.read_bytes().splitlines(), 1):
                try:
                    json.loads(line)
                except ValueError as malformed:
                    fail(f"{path}:{number}: this line is not JSON ({malformed}); mend or remove it")
        fail(f"--dataset_name {name}: no `{split}` split could be read ({str(error).splitlines()[0]}); give a folder "
             f"with {split}.jsonl or the name of a data set on the Hub")  # fmt: skip
    if not rows:
        fail(f"--dataset_name {name}: its `{split}` split is empty")
    for column in columns:
        if column not in rows[0]:
            fail(f"--dataset_name {name}: `{split}` has no column `{column}`, only {sorted(rows[0])}; rename one")
        for number, row in enumerate(rows, 1):
            value = row[column]
            if not (value.strip() if isinstance(value, str) else isinstance(value, list) and value):
                fail(f"{name}, {split} row {number}: `{column}` is {str(value)[:40]!r}; give it text or chat messages")
    return rows


def encode(tokenizer, template, prompt, completion=""):  # [shared]
    """(prompt ids, completion ids that end with EOS): tokenized apart and joined as ids, in every stage alike.

    Tokenizing the joined text would merge tokens across the border, and the policy, which always continues a
    prompt that was tokenized alone, would never see those tokens again."""
    if isinstance(prompt, str):
        prompt_ids = tokenizer(template.replace("{prompt}", prompt)).input_ids
        completion = completion if completion[:1].isspace() else " " + completion  # " Sure", as in running text
    else:
        text = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
        prompt_ids = tokenizer(text, add_special_tokens=False).input_ids
        completion = completion if isinstance(completion, str) else completion[-1]["content"]
    completion_ids = tokenizer(completion, add_special_tokens=False).input_ids + [tokenizer.eos_token_id]
    return prompt_ids, completion_ids


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
    return 0.5 * (1 + math.cos(math.pi * progress))  # 2) cosine decay, zero after the last step


@torch.no_grad()
def sample(model, tokenizer, prompts, temperature, max_new_tokens, seed):  # [shared]
    """Responses (lists of ids that end with EOS, or are cut at max_new_tokens) for lists of prompt ids: plain
    temperature sampling, with nothing of what the model's own generation config says (top-k, penalties, ...)."""
    model.generation_config = transformers.GenerationConfig(
        do_sample=True, temperature=temperature, top_k=0, top_p=1.0, max_new_tokens=max_new_tokens,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    width = max(map(len, prompts))
    ids = torch.tensor([[tokenizer.pad_token_id] * (width - len(p)) + p for p in prompts], device=model.device)  # [B, P]
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=model.device)  # [B, P]
    with torch.random.fork_rng():  # looking at samples must not change the training that follows
        torch.manual_seed(seed)
        responses = model.generate(input_ids=ids, attention_mask=mask)[:, width:].tolist()
    eos = tokenizer.eos_token_id
    return [row[: row.index(eos) + 1] if eos in row else row for row in responses]


def split_dialogue(dialogue):
    """(prompt, last reply) of a whole dialogue, for preference sets without a `prompt` column: chat messages, or
    text as in Anthropic's hh-rlhf ("\\n\\nHuman: ...\\n\\nAssistant: ..."), whose last reply is what is judged."""
    if isinstance(dialogue, list):
        return dialogue[:-1], dialogue[-1]["content"]
    before, turn, reply = dialogue.rpartition("\n\nAssistant:")
    return before + turn, reply


def score_sequences(reward_model, ids, lengths):  # [shared]
    """The raw score of each sequence, [B], read at its last real token, from right-padded ids [B, L].

    `lengths` [B] say where that is; looking for the first pad id instead (as the stock forward does) goes wrong
    as soon as pad == eos, since the EOS is then taken for padding and the score read one token early."""
    hidden = reward_model.base_model(input_ids=ids, use_cache=False).last_hidden_state  # [B, L, d]
    last = hidden[torch.arange(len(ids), device=ids.device), lengths - 1]  # [B, d]
    return reward_model.score(last).squeeze(-1).float()  # [B]


def score_pairs(model, pairs, pad_id, device):
    """Scores of (chosen ids, rejected ids) pairs -> two [B]. One forward for both: half the launches, and the two
    halves of a pair see the same dropout-free weights and the same kernels."""
    sequences = [chosen for chosen, _ in pairs] + [rejected for _, rejected in pairs]
    lengths = torch.tensor([len(sequence) for sequence in sequences], device=device)  # [2B]
    return score_sequences(model, pad(sequences, pad_id, device), lengths).chunk(2)


@torch.no_grad()
def evaluate(model, pairs, batch_size, pad_id, device, autocast):
    """Held-out loss, accuracy, mean margin, and calibration: the mean gap, over ten bins, between the confidence
    in the preferred side and how often it was right (0 is perfect; a confident, wrong model is easily hacked)."""
    model.eval()
    with autocast:
        batches = [score_pairs(model, pairs[i : i + batch_size], pad_id, device) for i in range(0, len(pairs), batch_size)]
    model.train()
    margin = torch.cat([chosen - rejected for chosen, rejected in batches]).cpu()  # [N]
    right, confidence = (margin > 0).float(), torch.sigmoid(margin.abs())  # [N], [N] in 0.5 ... 1
    bins = ((confidence - 0.5) * 20).long().clamp(max=9)  # [N]
    gaps = [(right[bins == b].sum() - confidence[bins == b].sum()).abs() for b in range(10)]
    return {"eval/loss": -F.logsigmoid(margin).mean().item(), "eval/accuracy": right.mean().item(),
            "eval/margin": margin.mean().item(), "eval/calibration_error": sum(gaps).item() / len(margin)}  # fmt: skip


def main(args):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # bf16 matrix products on CUDA with fp32 weights and optimizer: pure bf16 weights would round small steps away
    autocast = torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else contextlib.nullcontext()
    torch.manual_seed(args.seed)

    # 1. Model: the SFT model's trunk with a new scalar head
    if args.model_name_or_path == "runs/sft" and not Path("runs/sft/config.json").exists():
        fail("there is no SFT model in runs/sft yet: `python sft.py` makes it (or name one: --model_name_or_path)")
    try:
        tokenizer = AutoTokenizer.from_pretrained(args.model_name_or_path)
        model = AutoModelForSequenceClassification.from_pretrained(args.model_name_or_path, num_labels=1, dtype=torch.float32)
    except (OSError, ValueError) as error:
        fail(f"--model_name_or_path {args.model_name_or_path}: no model could be loaded ({str(error).splitlines()[0]})")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # harmless: every mask here comes from lengths, none from ids
    model.config.pad_token_id = tokenizer.pad_token_id
    # std 1/sqrt(d+1) keeps the first scores near unit size (lm-human-preferences, language/model.py:252); a head
    # that starts large saturates the sigmoid before the trunk has learnt anything.
    torch.nn.init.normal_(model.score.weight, std=1 / math.sqrt(model.score.in_features + 1))
    model.to(device)
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable()

    # 2. Pairs
    data, prompts = {}, {}
    for split in ("train", "test"):
        rows = load_rows(args.dataset_name, split, ["chosen", "rejected"])
        data[split] = []
        for row in rows:
            sides = [(row["prompt"], row[side]) if row.get("prompt") else split_dialogue(row[side]) for side in ("chosen", "rejected")]
            template = args.prompt_template if row.get("prompt") else "{prompt}"  # a dialogue brings its own turns
            (prompt, chosen), (rejected_prompt, rejected) = [encode(tokenizer, template, *side) for side in sides]
            if max(len(prompt + chosen), len(rejected_prompt + rejected)) <= args.max_length:
                data[split].append((prompt + chosen, rejected_prompt + rejected))
                prompts[tuple(prompt)] = split
        if len(data[split]) < len(rows):
            print(f"{split}: left out {len(rows) - len(data[split])} of {len(rows)} pairs, longer than --max_length")
        if not data[split]:
            fail(f"--max_length {args.max_length}: every pair of `{split}` has a longer side; raise it")

    # 3. Optimizer and schedule
    lengths = [max(len(chosen), len(rejected)) for chosen, rejected in data["train"]]
    batch_size = args.per_device_train_batch_size
    batches_per_epoch = math.ceil(len(lengths) / batch_size)
    total_steps = args.max_steps or math.ceil(args.num_train_epochs * batches_per_epoch / args.gradient_accumulation_steps)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=args.learning_rate, weight_decay=args.weight_decay, fused=True  # one kernel, not hundreds
    )
    output_dir = Path(args.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    (output_dir / "args.json").write_text(json.dumps(asdict(args), indent=2) + "\n")
    metrics_file = open(output_dir / "metrics.jsonl", "w")
    if args.track:
        import wandb

        wandb.init(project="ppo_rlhf", name=output_dir.name, config=asdict(args), save_code=True)
    print(f"Reward model: {sum(p.numel() for p in model.parameters()) / 1e6:.2f}M parameters on {device}, "
          f"{len(lengths)} pairs, {total_steps} steps")  # fmt: skip

    # 4. Training
    model.train()
    start_time, running_loss, running_accuracy = time.time(), [], []
    batches = None
    progress = tqdm(range(1, total_steps + 1), desc="reward model", disable=None)  # no bar when there is no terminal
    for step in progress:
        lr = args.learning_rate * warmup_cosine(step, args.warmup_steps, total_steps)
        optimizer.param_groups[0]["lr"] = lr

        micro_batches = []
        for k in range((step - 1) * args.gradient_accumulation_steps, step * args.gradient_accumulation_steps):
            epoch, i = divmod(k, batches_per_epoch)
            if i == 0 or batches is None:
                batches = epoch_batches(lengths, batch_size, args.seed + epoch)
            micro_batches.append([data["train"][j] for j in batches[i]])
        num_pairs = sum(map(len, micro_batches))
        for micro_batch in micro_batches:
            with autocast:
                chosen, rejected = score_pairs(model, micro_batch, tokenizer.pad_token_id, device)  # [b], [b]
            # Bradley-Terry: only differences of scores matter, so their zero and scale are set afterwards (6.)
            loss = -F.logsigmoid(chosen - rejected).sum() / num_pairs
            loss.backward()
            running_loss.append(loss.detach())
            running_accuracy.append((chosen > rejected).sum() / num_pairs)
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()

        # 5. Watching
        metrics = {}
        if step % args.logging_steps == 0 or step == total_steps:
            steps = len(running_loss) / args.gradient_accumulation_steps
            metrics = {"step": step, "loss/train": torch.stack(running_loss).sum().item() / steps,
                       "train/accuracy": torch.stack(running_accuracy).sum().item() / steps,
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

    # 6. Normalization: the SFT model's own samples get mean 0 and standard deviation 1. The loss leaves the zero and
    # the scale of the scores open, but in stage 3 beta is a price in score per nat, and the value head starts at
    # zero: without this, every new reward model would need a new beta (lm-human-preferences, train_reward.py:232).
    model.eval()
    sft = AutoModelForCausalLM.from_pretrained(args.model_name_or_path, dtype=torch.float32).to(device).eval()
    prompts = [list(prompt) for prompt, split in prompts.items() if split == "train"]
    prompts = [prompts[i % len(prompts)] for i in range(args.normalization_samples)]
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
    if args.track:
        wandb.finish()
    print(f"raw scores of {len(sampled)} SFT samples: mean {sampled.mean():.2f}, std {sampled.std():.2f}, normalized to 0 and 1")
    print(f"The reward model took {time.time() - start_time:.0f} s; saved to {output_dir}. Next: python ppo_rlhf.py --beta 0.1")


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    main(tyro.cli(Args, description=__doc__))
