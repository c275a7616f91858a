"""One run of TRL 1.12.0's PPO, RLOO, GRPO or DPO trainer, in TRL's own environment (requirements.txt).

    trl_env/bin/python benchmark/trl_run.py --method rloo --num_generations 4 --output_dir runs/trl_rloo

Flags are ppo_rlhf.py's and mean the same: --batch_size is responses an update (DPO: pairs). methods.py tells
what is made equal to ours and what stays TRL's own. Writes a plain model folder; metrics.jsonl in TRL's
names; kept/*.pt, the policy's weights every save_steps updates, as common.checkpoints reads them; stamp.json,
the versions. The device is chosen as ours is: CUDA if there is one, with weights in fp32 and bf16 autocast.

TRL's minibatches are what they are called only while gradient_accumulation_steps is 1, so the micro-batch is
the minibatch. TRL's PPO generates in pieces of 64, its default.
"""

import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import transformers
import trl
import tyro
from datasets import Dataset
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

import ppo_rlhf

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass
class Args(ppo_rlhf.Args):
    method: Literal["ppo", "rloo", "grpo", "dpo"] = "ppo"
    num_generations: int = 1  # RLOO and GRPO: responses to a prompt
    trl_loss: bool = False  # GRPO: TRL's default loss (dapo, corrected KL), not that of forks/grpo.patch
    preference_dir: str = "data/preferences"  # DPO: folder of the pairs
    num_train_epochs: float = 1.0  # DPO: passes over the pairs
    pure_bf16: bool = False  # PPO: weights, gradients and Adam in bf16, which rounds small steps away
    times: bool = False  # PPO: write times.jsonl, the seconds of each update's phases


def load(auto_class, path, dtype=torch.float32, **options):
    return auto_class.from_pretrained(path, dtype=dtype, **options).eval()


def load_reward_model(args, dtype=torch.float32):
    return load(AutoModelForSequenceClassification, args.reward_model_path, dtype, num_labels=1)


def read_rows(folder):
    """Rows with the prompt, and in pairs the responses too, as messages: the chat template writes them."""
    roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
    found = []
    for line in Path(folder, "train.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        found.append(
            {key: [{"role": roles[key], "content": text}] for key, text in row.items() if key in roles}
        )
    return found


def prompt_ids(tokenizer, prompt):
    return tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)


@torch.no_grad()
def raw_scores(reward_model, tokenizer, prompts, completion_ids):
    """handoff.py's score_ids for a whole batch -> [B]."""
    pairs = zip(prompts, completion_ids)
    sequences = [torch.tensor(prompt_ids(tokenizer, prompt) + ids) for prompt, ids in pairs]
    inputs = pad_sequence(sequences, batch_first=True, padding_value=tokenizer.pad_token_id)  # [B, L]
    hidden = ppo_rlhf.hidden_states(reward_model, inputs.to(DEVICE))  # [B, L, d]
    last = torch.tensor([len(sequence) - 1 for sequence in sequences], device=DEVICE)
    return reward_model.score(hidden[torch.arange(len(last), device=DEVICE), last]).flatten()


def make_reward(args, tokenizer):
    """ppo_rlhf.py's scores: normalized by the first batch, which samples the SFT model, and with the penalty
    for a response that was cut off."""
    reward_model = load_reward_model(args).to(DEVICE)
    scale = []

    def normalized_score(prompts, completion_ids, **columns):
        scores = raw_scores(reward_model, tokenizer, prompts, completion_ids)
        if not scale:
            scale.extend([scores.mean(), scores.std()])
        ended = [ids[-1] == tokenizer.eos_token_id for ids in completion_ids]
        ended = torch.tensor(ended, device=DEVICE)
        return ((scores - scale[0]) / scale[1] - args.missing_eos_penalty * ~ended).tolist()

    return normalized_score


@torch.no_grad()
def sft_scale(args, policy, tokenizer, prompts):
    """Mean and standard deviation of the scores of one response to each prompt."""
    policy.to(DEVICE)
    inputs = {"input_ids": [prompt_ids(tokenizer, prompt) for prompt in prompts]}
    inputs = tokenizer.pad(inputs, padding_side="left", return_tensors="pt").to(DEVICE)
    options = {"do_sample": True, "temperature": args.temperature, "top_k": 0, "top_p": 1.0}
    found = policy.generate(**inputs, **options, max_new_tokens=args.max_new_tokens)
    responses = found[:, inputs.input_ids.shape[1] :].tolist()
    completion_ids = [[i for i in ids if i != tokenizer.pad_token_id] for ids in responses]
    scores = raw_scores(load_reward_model(args).to(DEVICE), tokenizer, prompts, completion_ids)
    return scores.mean().item(), scores.std().item()


def scaled_reward_model(args, scale, dtype=torch.float32):
    """The reward model with (score - mean) / std put into its head, which gets a bias for it: TRL's PPO calls
    `model.score` itself, for rewards and for values, so both come out in that unit."""
    model = load_reward_model(args, dtype)
    head = torch.nn.Linear(model.score.in_features, 1, dtype=dtype)
    head.weight.data = model.score.weight.data / scale[1]
    head.bias.data.fill_(-scale[0] / scale[1])
    model.score = head
    return model


def autocast(module):
    """Weights in fp32 and bf16 autocast on CUDA, as in ours: TRL's PPO prepares what it trains alone."""
    module.forward = torch.autocast(DEVICE, torch.bfloat16, enabled=DEVICE == "cuda")(module.forward)


class Notes(transformers.TrainerCallback):
    """Metrics and checkpoints. TRL's PPO counts updates as its steps, the others optimizer steps."""

    def __init__(self, args, policy, steps_per_update):
        self.args = args
        self.policy = policy
        self.steps_per_update = steps_per_update
        self.folder = Path(args.output_dir)
        (self.folder / "kept").mkdir(parents=True, exist_ok=True)
        self.file = open(self.folder / "metrics.jsonl", "w", buffering=1)

    def on_log(self, _, state, control, logs, **named):
        first = state.global_step <= 1
        assert not first or abs(logs.get("objective/kl", 0)) < 0.1, "KL is not 0 at the start"
        self.file.write(json.dumps({"step": state.global_step, **logs}) + "\n")

    def on_step_end(self, _, state, control, **named):
        update, rest = divmod(state.global_step, self.steps_per_update)
        due = update % self.args.save_steps == 0 or state.global_step == state.max_steps
        if rest == 0 and due:
            torch.save(self.policy.state_dict(), self.folder / f"kept/{update:06d}.pt")


class Clock(transformers.TrainerCallback):
    """Times of the phases of TRL's PPO. An update is one batch_generation, the scoring, one masked_whiten (of
    the advantages), the optimization; both functions are wrapped."""

    def __init__(self):
        self.marks = {"rollout": [], "rollout_end": [], "score_end": []}
        self.lengths = []
        generate, whiten = ppo_trainer.batch_generation, ppo_trainer.masked_whiten

        def timed_generation(*arguments, **named):
            self.mark("rollout")
            result = generate(*arguments, **named)
            self.mark("rollout_end")
            return result

        def timed_whiten(values, mask, *arguments, **named):
            self.lengths.append(mask.sum(1).float().mean().item())  # real tokens of a response
            result = whiten(values, mask, *arguments, **named)
            self.mark("score_end")
            return result

        ppo_trainer.batch_generation, ppo_trainer.masked_whiten = timed_generation, timed_whiten

    def mark(self, name):
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        self.marks[name].append(time.perf_counter())

    def on_train_end(self, *arguments, **named):
        self.mark("rollout")  # where the next one would have started

    def write(self, path, versions):
        starts, ends, scored = self.marks.values()
        updates = len(self.lengths)
        assert len(starts) == updates + 1, "TRL's loop is not the one this was written for"
        lines = open("/proc/self/status")
        peak = next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))
        cuda_peak = torch.cuda.max_memory_allocated() / 2**20 if DEVICE == "cuda" else None
        with open(path, "w") as file:
            for i in range(updates):
                row = {"update": i + 1, "response_length": self.lengths[i], "versions": versions}
                row |= {"seconds": starts[i + 1] - starts[i], "rollout": ends[i] - starts[i]}
                row |= {"score": scored[i] - ends[i], "optimize": starts[i + 1] - scored[i]}
                file.write(json.dumps({**row, "peak_rss_mib": peak, "peak_cuda_mib": cuda_peak}) + "\n")


def ppo_trainer_of(args, config, named, policy, tokenizer):
    rows = read_rows(args.dataset_name)
    assert tokenizer.pad_token_id != tokenizer.eos_token_id  # TRL tells padding by its id
    assert len(rows) >= args.batch_size  # or TRL waits for a full batch for ever
    chats = [row["prompt"] for row in rows]
    scale = sft_scale(args, policy, tokenizer, chats[: args.batch_size])
    reference = load(AutoModelForCausalLM, args.sft_model_path)
    reward_model = scaled_reward_model(args, scale)
    autocast(reference)
    autocast(reward_model.base_model)
    dataset = Dataset.from_dict({"input_ids": [prompt_ids(tokenizer, chat) for chat in chats]})
    same = ("num_mini_batches", "num_ppo_epochs", "missing_eos_penalty", "gamma", "lam", "vf_coef")
    same += ("cliprange", "cliprange_value", "total_episodes")
    config |= {name: getattr(args, name) for name in same}
    config |= {"per_device_train_batch_size": args.batch_size, "local_rollout_forward_batch_size": 64}
    config |= {"response_length": args.max_new_tokens, "stop_token": "eos", "kl_coef": args.beta}
    config |= {"kl_estimator": "k1", "whiten_rewards": False, "num_sample_generations": 0}
    value_model = scaled_reward_model(args, scale, policy.dtype)
    named |= {"ref_model": reference, "reward_model": reward_model, "value_model": value_model}
    named |= {"train_dataset": dataset, "eval_dataset": dataset.select(range(1))}
    return PPOTrainer, PPOConfig, [*policy.parameters(), *value_model.parameters()]


def other_trainer_of(args, config, named, policy, tokenizer, updates, steps_per_update):
    pairs = args.method == "dpo"
    named["train_dataset"] = Dataset.from_list(read_rows(args.preference_dir if pairs else args.dataset_name))
    config |= {"beta": args.beta, "max_steps": updates * steps_per_update, "disable_dropout": True}
    config |= {"per_device_train_batch_size": args.batch_size // args.num_mini_batches}
    config |= {"max_grad_norm": args.max_grad_norm}
    if not pairs:
        named["reward_funcs"] = make_reward(args, tokenizer)
        config |= {"steps_per_generation": args.num_mini_batches, "num_iterations": args.num_ppo_epochs}
        config |= {"num_generations": args.num_generations, "max_completion_length": args.max_new_tokens}
        config |= {"epsilon": args.cliprange}
    if args.method == "grpo" and not args.trl_loss:
        # The mean over a minibatch's tokens, and plain k3, as in forks/grpo.patch
        config |= {"loss_type": "bnpo", "scale_rewards": "group", "use_bias_correction_kl": False}
    name = args.method.upper()
    return getattr(trl, f"{name}Trainer"), getattr(trl, f"{name}Config"), policy.parameters()


def main(args):
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_float32_matmul_precision("high")
    if DEVICE == "cuda" and not args.pure_bf16:
        os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16"
    transformers.set_seed(args.seed)  # TRL's PPO draws minibatches from NumPy's generator, without a seed
    tokenizer = AutoTokenizer.from_pretrained(args.sft_model_path, padding_side="left")
    trained = torch.bfloat16 if args.pure_bf16 else torch.float32
    policy = load(AutoModelForCausalLM, args.sft_model_path, trained)
    steps_per_update = {"ppo": 1, "dpo": args.num_mini_batches}.get(
        args.method, args.num_mini_batches * args.num_ppo_epochs
    )
    episodes = args.total_episodes
    if args.method == "dpo":
        episodes = int(args.num_train_epochs * len(read_rows(args.preference_dir)))
    updates = episodes // args.batch_size
    notes = Notes(args, policy, steps_per_update)
    named = {"processing_class": tokenizer, "model": policy, "callbacks": [notes]}
    config = {"output_dir": args.output_dir, "seed": args.seed, "learning_rate": args.learning_rate}
    config |= {"gradient_accumulation_steps": 1, "gradient_checkpointing": False, "disable_tqdm": True}
    config |= {"use_cpu": DEVICE == "cpu", "bf16": DEVICE == "cuda" and not args.pure_bf16}
    config |= {"logging_steps": steps_per_update, "report_to": "none", "save_strategy": "no"}
    if args.method != "dpo":
        config["temperature"] = args.temperature
    if args.method == "ppo":
        clock = Clock()
        named["callbacks"].append(clock)
        found = ppo_trainer_of(args, config, named, policy, tokenizer)
    else:
        found = other_trainer_of(args, config, named, policy, tokenizer, updates, steps_per_update)
    trainer_class, config_class, parameters = found

    # ppo_rlhf.py's optimizer and schedule; TRL counts its steps from 0
    options = {"lr": args.learning_rate, "eps": 1e-5, "weight_decay": 0.0, "fused": True}
    optimizer = torch.optim.AdamW(parameters, **options)
    update = lambda n: n // steps_per_update
    rate = lambda n: min((update(n) + 1) / (args.warmup_steps + 1), 1 - update(n) / updates)
    named["optimizers"] = optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, rate)

    trainer_class(args=config_class(**config), **named).train()
    where = torch.cuda.get_device_name() if DEVICE == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    versions = f"trl {trl.__version__}, {versions}, {where}"
    folder = Path(args.output_dir)
    (folder / "stamp.json").write_text(json.dumps({"versions": versions}))
    if args.times:
        clock.write(folder / "times.jsonl", versions)
    policy.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
