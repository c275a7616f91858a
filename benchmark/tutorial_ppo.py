"""PPO as in a blog tutorial, on a workload of speed.py: right enough to learn from, and slow. Run by speed.py.

    python tutorial_ppo.py spec.json

One prompt at a time; no KV cache, so a new token costs a forward of the whole sequence; a value head on the policy's
trunk; one optimizer step per sequence and epoch, so more steps than the others take (64 x 4 an update instead of
4 x 4 in cpu-tiny). On CUDA fp32 weights with bf16 autocast, as ours. Everything else is as in the other contenders.
"""

import contextlib
import json
import random
import sys
import time
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

spec = json.loads(Path(sys.argv[1]).read_text())
device = torch.device(spec["device"])
cuda = device.type == "cuda"
gamma, lam, cliprange, cliprange_value, vf_coef = 1.0, 0.95, 0.2, 0.2, 0.1
autocast = torch.autocast("cuda", torch.bfloat16) if cuda else contextlib.nullcontext()
if cuda and spec["memory_cap"]:
    torch.cuda.set_per_process_memory_fraction(spec["memory_cap"] * 2**30 / torch.cuda.get_device_properties(0).total_memory)

torch.manual_seed(1)
tokenizer = AutoTokenizer.from_pretrained(spec["policy"])
policy = AutoModelForCausalLM.from_pretrained(spec["policy"], dtype=torch.float32).to(device).eval()  # eval: no dropout
reference = AutoModelForCausalLM.from_pretrained(spec["policy"], dtype=torch.float32).to(device).eval().requires_grad_(False)
reward_model = AutoModelForSequenceClassification.from_pretrained(spec["reward"], num_labels=1, dtype=torch.float32)
reward_model.to(device).eval().requires_grad_(False)
reward_model.config.pad_token_id = tokenizer.pad_token_id
value_head = torch.nn.Linear(policy.config.hidden_size, 1).to(device)
optimizer = torch.optim.AdamW([*policy.parameters(), *value_head.parameters()], lr=spec["learning_rate"])


def now():
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter()


def evaluate(model, ids, prompt_length):
    """Log-probs and values of the response tokens: [T], [T]."""
    with autocast:
        output = model(ids[None], output_hidden_states=True, use_cache=False)
    logits = output.logits[0, prompt_length - 1 : -1].float() / spec["temperature"]  # [T, V]
    logprobs = logits.log_softmax(-1).gather(1, ids[prompt_length:, None])[:, 0]
    return logprobs, value_head(output.hidden_states[-1][0, prompt_length - 1 : -1].float())[:, 0]


prompts = [json.loads(line)["prompt"] for line in open(f"{spec['prompts']}/train.jsonl")]
prompts = [tokenizer(spec["template"].replace("{prompt}", prompt)).input_ids for prompt in prompts]
rng, rows = random.Random(1), []
for update in range(1 + spec["updates"]):
    clock = [now()]
    sequences = []
    with torch.no_grad(), autocast:
        for prompt in rng.sample(prompts, spec["episodes"]):
            ids = torch.tensor(prompt, device=device)
            for _ in range(spec["response_length"]):
                logits = policy(ids[None], use_cache=False).logits[0, -1].float() / spec["temperature"]
                token = torch.multinomial(logits.softmax(-1), 1)
                ids = torch.cat([ids, token])
                if token.item() == tokenizer.eos_token_id:
                    break
            sequences.append((ids, len(prompt)))
    clock.append(now())

    experience = []
    with torch.no_grad():
        for ids, prompt_length in sequences:
            logprobs, values = evaluate(policy, ids, prompt_length)
            ref_logprobs, _ = evaluate(reference, ids, prompt_length)
            with autocast:
                score = reward_model(ids[None]).logits[0, 0].float()
            if ids[-1].item() != tokenizer.eos_token_id:
                score = score - spec["missing_eos_penalty"]
            rewards = -spec["beta"] * (logprobs - ref_logprobs)
            rewards[-1] += score
            advantages, next_advantage, next_value = torch.zeros_like(values), 0.0, 0.0
            for t in reversed(range(len(values))):
                delta = rewards[t] + gamma * next_value - values[t]
                advantages[t] = next_advantage = delta + gamma * lam * next_advantage
                next_value = values[t]
            returns = advantages + values
            advantages = (advantages - advantages.mean()) / (advantages.std(unbiased=False) + 1e-8)
            experience.append((ids, prompt_length, logprobs, values, advantages, returns))
    clock.append(now())

    for _ in range(spec["epochs"]):
        for ids, prompt_length, old_logprobs, old_values, advantages, returns in experience:
            logprobs, values = evaluate(policy, ids, prompt_length)
            ratio = (logprobs - old_logprobs).exp()
            pg_loss = torch.max(-advantages * ratio, -advantages * ratio.clamp(1 - cliprange, 1 + cliprange)).mean()
            clipped = old_values + (values - old_values).clamp(-cliprange_value, cliprange_value)
            vf_loss = 0.5 * torch.max((values - returns) ** 2, (clipped - returns) ** 2).mean()
            optimizer.zero_grad()
            (pg_loss + vf_coef * vf_loss).backward()
            optimizer.step()
    clock.append(now())
    tokens = sum(len(ids) - prompt_length for ids, prompt_length in sequences)
    rows.append({"update": update + 1, "seconds": clock[3] - clock[0], "rollout": clock[1] - clock[0], "score": clock[2] - clock[1],
                 "optimize": clock[3] - clock[2], "response_length": tokens / len(sequences)})  # fmt: skip

peak = next(int(line.split()[1]) / 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
with open(spec["out"], "w") as file:
    for row in rows:
        row.update(peak_rss_mib=peak, peak_cuda_mib=torch.cuda.max_memory_allocated() / 2**20 if cuda else None,
                   versions=f"torch {torch.__version__}, transformers {transformers.__version__}, {torch.get_num_threads()} threads, "
                            + (torch.cuda.get_device_name() if cuda else "CPU"))  # fmt: skip
        file.write(json.dumps(row) + "\n")
