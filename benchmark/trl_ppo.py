"""TRL 1.12.0's PPOTrainer on a workload of speed.py, timed from inside. Run by speed.py, in TRL's own environment.

    python trl_ppo.py spec.json

Made equal: the checkpoints, prompts, episodes an update, response length, temperature, epochs, minibatches, beta, learning
rate, gamma, lambda, clip ranges and the stop at EOS. Minibatches are what they are called only while
gradient_accumulation_steps is 1 (with more, accelerate steps once for all of them), so the micro-batch is the minibatch.
Cannot be made equal, as TRL offers no choice: a separate critic network (speed.py's ours_separate_critic is for that);
gradient clipping (max_grad_norm is ignored); and the reward model's score, which TRL takes raw. None of them costs or
saves TRL time worth speaking of except the critic. Turned off: sample generations, checkpoints, reporting.
The reward model's trunk is the critic's start. Generation runs in pieces of 64 prompts, TRL's default.
"""

import json
import os
import sys
import time
from pathlib import Path

spec = json.loads(Path(sys.argv[1]).read_text())
cuda = spec["device"] == "cuda"
pure_bf16 = spec["contender"] == "trl_bf16"  # weights, gradients and Adam in bf16: fastest, but rounds small steps away
if cuda and not pure_bf16:
    os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16"

import torch  # noqa: E402
import transformers  # noqa: E402
import trl  # noqa: E402
from datasets import Dataset  # noqa: E402
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback  # noqa: E402
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer  # noqa: E402

if cuda and spec["memory_cap"]:
    torch.cuda.set_per_process_memory_fraction(spec["memory_cap"] * 2**30 / torch.cuda.get_device_properties(0).total_memory)

tokenizer = AutoTokenizer.from_pretrained(spec["policy"], padding_side="left")
assert tokenizer.pad_token_id != tokenizer.eos_token_id  # TRL tells padding by its id
trained = torch.bfloat16 if pure_bf16 else torch.float32
frozen = torch.bfloat16 if cuda or pure_bf16 else torch.float32  # as ours
policy = AutoModelForCausalLM.from_pretrained(spec["policy"], dtype=trained)
reference = AutoModelForCausalLM.from_pretrained(spec["policy"], dtype=frozen)
value_model = AutoModelForSequenceClassification.from_pretrained(spec["reward"], num_labels=1, dtype=trained)
reward_model = AutoModelForSequenceClassification.from_pretrained(spec["reward"], num_labels=1, dtype=frozen)

prompts = [json.loads(line)["prompt"] for line in open(f"{spec['prompts']}/train.jsonl")]
ids = [tokenizer(spec["template"].replace("{prompt}", prompt)).input_ids for prompt in prompts]
dataset = Dataset.from_dict({"input_ids": ids})
assert len(dataset) >= spec["episodes"]  # or TRL waits for a full batch for ever

# An update: batch_generation, the scoring, one whitening (of the advantages), the optimization.
marks, lengths = {"rollout": [], "rollout_end": [], "score_end": []}, []
generate, whiten = ppo_trainer.batch_generation, ppo_trainer.masked_whiten


def mark(name):
    if cuda:
        torch.cuda.synchronize()
    marks[name].append(time.perf_counter())


def timed_generation(*args, **kwargs):
    mark("rollout")
    result = generate(*args, **kwargs)
    mark("rollout_end")
    return result


def timed_whiten(values, mask, *args, **kwargs):
    lengths.append(mask.sum(1).float().mean().item())  # real tokens of an answer
    result = whiten(values, mask, *args, **kwargs)
    mark("score_end")
    return result


class End(TrainerCallback):
    def on_train_end(self, *args, **kwargs):
        mark("rollout")  # where the next one would have started


ppo_trainer.batch_generation, ppo_trainer.masked_whiten = timed_generation, timed_whiten
trainer = PPOTrainer(
    args=PPOConfig(
        output_dir=f"{spec['scratch']}/trl", report_to="none", save_strategy="no", disable_tqdm=True, num_sample_generations=0,
        logging_steps=1, use_cpu=not cuda, bf16=cuda and not pure_bf16, gradient_checkpointing=False, seed=1,
        total_episodes=spec["episodes"] * (1 + spec["updates"]), per_device_train_batch_size=spec["episodes"],
        gradient_accumulation_steps=1, num_mini_batches=spec["minibatches"], num_ppo_epochs=spec["epochs"],
        local_rollout_forward_batch_size=min(64, spec["episodes"]), response_length=spec["response_length"],
        temperature=spec["temperature"], stop_token="eos", missing_eos_penalty=spec["missing_eos_penalty"],
        learning_rate=spec["learning_rate"], kl_coef=spec["beta"], whiten_rewards=False,
        gamma=1.0, lam=0.95, cliprange=0.2, cliprange_value=0.2, vf_coef=0.1,
    ),
    processing_class=tokenizer, model=policy, ref_model=reference, reward_model=reward_model, value_model=value_model,
    train_dataset=dataset, eval_dataset=dataset.select(range(1)), callbacks=[End()],
)  # fmt: skip
trainer.train()

peak = next(int(line.split()[1]) / 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
starts = marks["rollout"]
assert len(starts) == spec["updates"] + 2 == len(lengths) + 1, "TRL's loop is not the one this file was written for"
with open(spec["out"], "w") as file:
    for i in range(len(starts) - 1):
        row = {"update": i + 1, "seconds": starts[i + 1] - starts[i], "rollout": marks["rollout_end"][i] - starts[i],
               "score": marks["score_end"][i] - marks["rollout_end"][i], "optimize": starts[i + 1] - marks["score_end"][i],
               "response_length": lengths[i], "peak_rss_mib": peak,
               "peak_cuda_mib": torch.cuda.max_memory_allocated() / 2**20 if cuda else None, "memory_cap_gib": spec["memory_cap"],
               "versions": f"trl {trl.__version__}, torch {torch.__version__}, transformers {transformers.__version__}, "
                           f"{torch.get_num_threads()} threads, {torch.cuda.get_device_name() if cuda else 'CPU'}"}  # fmt: skip
        file.write(json.dumps(row) + "\n")
