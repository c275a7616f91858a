"""One run of TRL 1.12.0's RLOOTrainer, GRPOTrainer or DPOTrainer from our folders, in TRL's own environment.

    python trl_method.py --method rloo --base_dir runs/shipped_task/seed1 --output_dir runs/trl_rloo

Writes a plain model folder, metrics.jsonl in TRL's names, and kept/*.pt, the policy's weights every
save_steps updates, as common.checkpoints reads them. methods.py starts it, and tells what is made equal.
An update is batch_size responses (RLOO, GRPO) or pairs (DPO), each in num_mini_batches optimizer steps.
"""

import argparse
import json
from pathlib import Path

import torch
import transformers
import trl
from datasets import Dataset
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

GENERATIONS = {"rloo": 4, "grpo": 8}  # responses to a prompt, as in forks/rloo.patch and forks/grpo.patch


def read_rows(path):
    """Rows with the prompt, and in pairs the responses too, as messages: the chat template writes them."""
    rows = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
    found = []
    for row in rows:
        chats = {key: [{"role": role, "content": row[key]}] for key, role in roles.items() if key in row}
        found.append(chats)
    return Dataset.from_list(found)


def make_reward(reward_model, tokenizer, missing_eos_penalty):
    """handoff.py's score_ids for a whole batch, normalized by the first one, which samples the SFT model, and
    with the penalty for a response that was cut off: ppo_rlhf.py's scores."""
    scale = []

    @torch.no_grad()
    def normalized_score(prompts, completion_ids, **columns):
        sequences = []
        for prompt, ids in zip(prompts, completion_ids):
            prompt_ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
            sequences.append(torch.tensor(prompt_ids + ids))
        inputs = pad_sequence(sequences, batch_first=True, padding_value=tokenizer.pad_token_id)  # [B, L]
        hidden = reward_model.base_model(inputs, use_cache=False).last_hidden_state  # [B, L, d]
        last = torch.tensor([len(sequence) - 1 for sequence in sequences])
        scores = reward_model.score(hidden[torch.arange(len(last)), last]).flatten()  # [B]
        if not scale:
            scale.extend([scores.mean(), scores.std()])
        ended = torch.tensor([ids[-1] == tokenizer.eos_token_id for ids in completion_ids])
        return ((scores - scale[0]) / scale[1] - missing_eos_penalty * ~ended).tolist()

    return normalized_score


class Notes(transformers.TrainerCallback):
    def __init__(self, args):
        self.args = args
        (args.output_dir / "kept").mkdir(parents=True, exist_ok=True)
        self.file = open(args.output_dir / "metrics.jsonl", "w", buffering=1)

    def on_log(self, _, state, control, logs, **named):
        self.file.write(json.dumps({"step": state.global_step, **logs}) + "\n")

    def on_step_end(self, _, state, control, model, **named):
        update, rest = divmod(state.global_step, self.args.steps_per_update)
        due = update % self.args.save_steps == 0 or state.global_step == state.max_steps
        if rest == 0 and due:
            torch.save(model.state_dict(), self.args.output_dir / f"kept/{update:06d}.pt")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--method", choices=["rloo", "grpo", "dpo"], required=True)
    add("--base_dir", type=Path, required=True, help="sft/ and reward_model/")
    add("--data_dir", type=Path, default="data", help="prompts/train.jsonl and preferences/train.jsonl")
    add("--output_dir", type=Path, required=True)
    add("--learning_rate", type=float, default=1.5e-4)
    add("--beta", type=float, default=0.1, help="RLOO: KL in the reward; GRPO: in the loss; DPO: its own")
    add("--seed", type=int, default=1)
    add("--total_episodes", type=int, default=3072, help="responses of RLOO and GRPO")
    add("--num_train_epochs", type=float, default=1, help="passes of DPO over the pairs")
    add("--batch_size", type=int, default=128, help="responses or pairs an update")
    add("--num_mini_batches", type=int, default=8)
    add("--num_ppo_epochs", type=int, default=2, help="passes over the responses of an update")
    add("--warmup_steps", type=int, default=2, help="updates")
    add("--missing_eos_penalty", type=float, default=1.0)
    add("--save_steps", type=int, default=4, help="updates")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    transformers.set_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(args.base_dir / "sft")
    policy = AutoModelForCausalLM.from_pretrained(args.base_dir / "sft", dtype=torch.float32)
    pairs = args.method == "dpo"
    dataset = read_rows(args.data_dir / ("preferences" if pairs else "prompts") / "train.jsonl")
    size = args.batch_size // args.num_mini_batches
    args.steps_per_update = args.num_mini_batches * (1 if pairs else args.num_ppo_epochs)
    episodes = int(args.num_train_epochs * len(dataset)) if pairs else args.total_episodes
    updates = episodes // args.batch_size

    # ppo_rlhf.py's optimizer and schedule; TRL counts its steps from 0
    options = {"lr": args.learning_rate, "eps": 1e-5, "weight_decay": 0.0, "fused": True}
    optimizer = torch.optim.AdamW(policy.parameters(), **options)
    update = lambda n: n // args.steps_per_update
    rate = lambda n: min((update(n) + 1) / (args.warmup_steps + 1), 1 - update(n) / updates)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)

    config = {
        "output_dir": str(args.output_dir),
        "beta": args.beta,
        "seed": args.seed,
        "learning_rate": args.learning_rate,
        "max_steps": updates * args.steps_per_update,
        "disable_tqdm": True,
    }
    config |= {"per_device_train_batch_size": size, "gradient_accumulation_steps": 1, "max_grad_norm": 1.0}
    config |= {"disable_dropout": True, "gradient_checkpointing": False, "bf16": False, "use_cpu": True}
    config |= {"logging_steps": args.steps_per_update, "report_to": "none", "save_strategy": "no"}
    named = {"model": policy, "processing_class": tokenizer, "train_dataset": dataset}
    named |= {"optimizers": (optimizer, schedule), "callbacks": [Notes(args)]}
    if not pairs:
        load = AutoModelForSequenceClassification.from_pretrained
        reward_model = load(args.base_dir / "reward_model", num_labels=1, dtype=torch.float32).eval()
        named["reward_funcs"] = make_reward(reward_model, tokenizer, args.missing_eos_penalty)
        config |= {"steps_per_generation": args.num_mini_batches, "num_iterations": args.num_ppo_epochs}
        config |= {"num_generations": GENERATIONS[args.method], "max_completion_length": 64}
        config |= {"temperature": 0.7, "epsilon": 0.2}
    if args.method == "grpo":  # the mean over a minibatch's tokens, and plain k3, as in forks/grpo.patch
        config |= {"loss_type": "bnpo", "scale_rewards": "group", "use_bias_correction_kl": False}
    name = args.method.upper()
    trainer = getattr(trl, f"{name}Trainer")(args=getattr(trl, f"{name}Config")(**config), **named)
    trainer.train()
    policy.save_pretrained(args.output_dir)
    tokenizer.save_pretrained(args.output_dir)


if __name__ == "__main__":
    main()
