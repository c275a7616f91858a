"""One run of TRL 1.12.0's PPOTrainer with ppo_rlhf.py's flags, in TRL's own environment.

    python trl_ppo.py FOLDER

Reads FOLDER/args.json: ppo_rlhf.py's flags, device, contender, score_mean and score_std, and does with TRL
what they say. Writes there metrics.jsonl, in TRL's names; times.jsonl, the seconds of each update's phases,
for speed.py; kept/*.pt, the policy's weights every save_steps updates, as common.checkpoints reads them, for
methods.py, which tells what is made equal to ours and what stays TRL's own.

Minibatches are what they are called only while gradient_accumulation_steps is 1 (with more, accelerate steps
once for all of them), so the micro-batch is the minibatch. Generation runs in pieces of 64, TRL's default.
"""

import json
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace

folder = Path(sys.argv[1])
args = SimpleNamespace(**json.loads((folder / "args.json").read_text()))
cuda = args.device == "cuda"
pure_bf16 = args.contender == "trl_bf16"  # weights, gradients and Adam: fastest, but rounds small steps away
if cuda and not pure_bf16:
    os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16"

import torch  # noqa: E402
import transformers  # noqa: E402
import trl  # noqa: E402
from datasets import Dataset  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback  # noqa: E402
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer  # noqa: E402

transformers.set_seed(args.seed)  # TRL draws its minibatches from NumPy's generator, and does not seed it
tokenizer = AutoTokenizer.from_pretrained(args.sft_model_path, padding_side="left")
assert tokenizer.pad_token_id != tokenizer.eos_token_id  # TRL tells padding by its id
trained = torch.bfloat16 if pure_bf16 else torch.float32
frozen = torch.bfloat16 if cuda else torch.float32  # as ours
policy = AutoModelForCausalLM.from_pretrained(args.sft_model_path, dtype=trained)
reference = AutoModelForCausalLM.from_pretrained(args.sft_model_path, dtype=frozen)


def scaled_reward_model(dtype):
    """The reward model with (score - mean) / std put into its head, which gets a bias for it. TRL calls
    `model.score` itself, for rewards and for values, so both come out in that unit."""
    load = transformers.AutoModelForSequenceClassification.from_pretrained
    model = load(args.reward_model_path, num_labels=1, dtype=dtype)
    head = torch.nn.Linear(model.score.in_features, 1, dtype=dtype)
    head.weight.data = model.score.weight.data / args.score_std
    head.bias.data.fill_(-args.score_mean / args.score_std)
    model.score = head
    return model


reward_model = scaled_reward_model(frozen)
value_model = scaled_reward_model(trained)
lines = (Path(args.dataset_name) / "train.jsonl").read_text(encoding="utf-8").splitlines()
chats = [[{"role": "user", "content": json.loads(line)["prompt"]}] for line in lines]
ids = [tokenizer.apply_chat_template(x, add_generation_prompt=True, return_dict=False) for x in chats]
dataset = Dataset.from_dict({"input_ids": ids})
assert len(dataset) >= args.batch_size  # or TRL waits for a full batch for ever

# ppo_rlhf.py's optimizer and schedule; TRL counts its updates from 0
updates = args.total_episodes // args.batch_size
parameters = [*policy.parameters(), *value_model.parameters()]
optimizer = torch.optim.AdamW(parameters, lr=args.learning_rate, eps=1e-5, weight_decay=0.0, fused=True)
rate = lambda n: min((n + 1) / (args.warmup_steps + 1), 1 - n / updates)
schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)

# An update: batch_generation, the scoring, one whitening (of the advantages), the optimization
marks = {"rollout": [], "rollout_end": [], "score_end": []}
lengths = []
generate, whiten = ppo_trainer.batch_generation, ppo_trainer.masked_whiten


def mark(name):
    if cuda:
        torch.cuda.synchronize()
    marks[name].append(time.perf_counter())


def timed_generation(*arguments, **named):
    mark("rollout")
    result = generate(*arguments, **named)
    mark("rollout_end")
    return result


def timed_whiten(values, mask, *arguments, **named):
    lengths.append(mask.sum(1).float().mean().item())  # real tokens of a response
    result = whiten(values, mask, *arguments, **named)
    mark("score_end")
    return result


class Notes(TrainerCallback):
    def on_step_end(self, _, state, control, **named):
        metrics = state.log_history[-1]
        update = state.global_step
        assert update > 1 or abs(metrics["objective/kl"]) < 0.1, "KL is not 0 at the start"
        with open(folder / "metrics.jsonl", "w" if update == 1 else "a") as file:
            file.write(json.dumps({"update": update, **metrics}) + "\n")
        if update % args.save_steps == 0 or update == updates:
            (folder / "kept").mkdir(exist_ok=True)
            torch.save(policy.state_dict(), folder / f"kept/{update:06d}.pt")

    def on_train_end(self, *arguments, **named):
        mark("rollout")  # where the next one would have started


ppo_trainer.batch_generation, ppo_trainer.masked_whiten = timed_generation, timed_whiten
same = ("num_mini_batches", "num_ppo_epochs", "temperature", "missing_eos_penalty", "gamma", "lam", "seed")
same += ("cliprange", "cliprange_value", "vf_coef", "total_episodes", "learning_rate")
config = {name: getattr(args, name) for name in same}
config |= {"per_device_train_batch_size": args.batch_size, "gradient_accumulation_steps": 1}
config |= {"response_length": args.max_new_tokens, "stop_token": "eos", "kl_coef": args.beta}
config |= {"kl_estimator": "k1", "whiten_rewards": False, "local_rollout_forward_batch_size": 64}
config |= {"use_cpu": not cuda, "bf16": cuda and not pure_bf16, "gradient_checkpointing": False}
config |= {"report_to": "none", "save_strategy": "no", "disable_tqdm": True, "num_sample_generations": 0}
trainer = PPOTrainer(
    args=PPOConfig(output_dir=str(folder), logging_steps=1, **config),
    processing_class=tokenizer,
    model=policy,
    ref_model=reference,
    reward_model=reward_model,
    value_model=value_model,
    train_dataset=dataset,
    eval_dataset=dataset.select(range(1)),
    optimizers=(optimizer, schedule),
    callbacks=[Notes()],
)
trainer.train()
starts, ends = marks["rollout"], marks["rollout_end"]
assert len(starts) == updates + 1 == len(lengths) + 1, "TRL's loop is not the one this was written for"
where = torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads"
versions = (
    f"trl {trl.__version__}, torch {torch.__version__}, transformers {transformers.__version__}, {where}"
)
peak = next(int(line.split()[1]) / 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
with open(folder / "times.jsonl", "w") as file:
    for i in range(updates):
        row = {"update": i + 1, "response_length": lengths[i], "versions": versions}
        row |= {"seconds": starts[i + 1] - starts[i], "rollout": ends[i] - starts[i]}
        row |= {"score": marks["score_end"][i] - ends[i], "optimize": starts[i + 1] - marks["score_end"][i]}
        row["peak_rss_mib"] = peak
        row["peak_cuda_mib"] = torch.cuda.max_memory_allocated() / 2**20 if cuda else None
        file.write(json.dumps(row) + "\n")
