"""What the benchmarks on the shipped task share: a stage that is run once, and a policy judged on the held-out prompts."""

import json
import math
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmark/results"
sys.path[:0] = [str(ROOT), str(ROOT / "data")]

import ppo_rlhf  # noqa: E402
from judge import judge  # noqa: E402

ppo_rlhf.transformers.logging.set_verbosity_error(), ppo_rlhf.transformers.logging.disable_progress_bar()
BASELINES = ROOT / "runs/shipped_task"  # seed1/{sft,reward_model} and so on: where shipped_task.py leaves them
COLOURS = ["#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#CC79A7", "#000000"]  # Okabe and Ito's, without yellow


# Student's t for 95% intervals of a mean, by the number of values (seeds)
T_975 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}


def run_once(folder, command, threads=None):
    """Run a command whose output is `folder`, unless `folder` says that it is done. A stage that was stopped goes on."""
    folder = Path(folder)
    done = folder / "wall_seconds"
    if not done.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        env = {**os.environ, "OMP_NUM_THREADS": str(threads)} if threads else None
        start = time.time()
        with open(folder.parent / f"{folder.name}.log", "w") as log:
            if subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, env=env, stdout=log, stderr=log).returncode:
                raise SystemExit(f"{log.name}: {Path(log.name).read_text().strip().splitlines()[-1]}")
        done.write_text(str(time.time() - start))
    return float(done.read_text())


def run_all(jobs, parallel, name):
    """run_once for each (folder, command) of jobs, `parallel` at a time on an equal share of the cores, under a progress bar.

    Two single-threaded runs on two cores get about a third more done than one after the other with two threads each."""
    threads = max(1, (os.cpu_count() or 1) // parallel)
    with ThreadPoolExecutor(parallel) as pool:
        list(tqdm(pool.map(lambda job: run_once(*job, threads), jobs), desc=name, total=len(jobs)))


def baselines(folder, seeds, parallel):
    """SFT and reward model of each seed, made by default flags where they are not yet there."""
    for script, name in (("sft.py", "sft"), ("reward_model.py", "reward_model")):
        run_all([(folder / f"seed{seed}" / name, [script, "--seed", seed, "--output_dir", folder / f"seed{seed}" / name, "--resume",
                  *(["--model_name_or_path", folder / f"seed{seed}/sft"] if name == "reward_model" else [])])
                 for seed in seeds], parallel, name)  # fmt: skip


def ppo_job(folder, base, seed, *flags):
    """(folder, command) of a PPO run from the SFT and reward model in `base`."""
    return folder, ["ppo_rlhf.py", "--seed", seed, "--output_dir", folder, "--sft_model_path", base / "sft",
                    "--reward_model_path", base / "reward_model", "--resume", *flags]  # fmt: skip


def read_jsonl(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def write_jsonl(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def load(base):
    """(reference, reward model, tokenizer) of the folder with sft/ and reward_model/, as ppo_rlhf.py loads them."""
    reference, tokenizer = ppo_rlhf.load_model(AutoModelForCausalLM, str(base / "sft"), "sft")
    reward_model, _ = ppo_rlhf.load_model(AutoModelForSequenceClassification, str(base / "reward_model"), "reward_model")
    return reference.eval(), reward_model.eval(), tokenizer


def held_out(limit=None):
    """Texts of the held-out prompts."""
    return [row["prompt"] for row in read_jsonl(ROOT / "data/prompts/test.jsonl")][:limit]


@torch.no_grad()
def answers(policy, reference, reward_model, tokenizer, texts, seed, temperature=0.7, max_new_tokens=64):
    """One sampled answer to each of `texts`, judged -> rows with prompt, response, score (the reward model's, in standard
    deviations), kl (nats, against the reference), length (tokens, EOS included), ended and gold (the judge's, at most 4)."""
    policy.eval()
    generator, rows = torch.Generator().manual_seed(seed), []
    for start in range(0, len(texts), 128):
        chunk = texts[start : start + 128]
        ids = [ppo_rlhf.encode(tokenizer, ppo_rlhf.Args.prompt_template, text)[0] for text in chunk]
        prompts, prompt_mask, prompt_lengths = ppo_rlhf.left_pad(ids, tokenizer.pad_token_id, policy.device)
        uniforms = torch.rand(max_new_tokens, len(chunk), generator=generator)  # [T, b] the same luck for every policy
        responses, lengths = ppo_rlhf.rollout(policy, prompts, prompt_mask, uniforms, temperature, tokenizer.eos_token_id,
                                              tokenizer.pad_token_id)  # fmt: skip
        mask = (torch.arange(max_new_tokens) < lengths[:, None]).float()  # [b, T]
        sequences = ppo_rlhf.roll_left(prompts, responses, prompt_lengths)  # [b, P+T]
        logprobs = []
        for model in (policy, reference):
            states = ppo_rlhf.response_states(model, sequences, prompt_lengths, max_new_tokens)  # [b, T, d]
            logprobs.append(ppo_rlhf.logprobs(model.get_output_embeddings()(states) / temperature, responses) * mask)  # [b, T]
        kl = (logprobs[0] - logprobs[1]).sum(1).tolist()
        scores = ppo_rlhf.reward_fn(reward_model, tokenizer, sequences, prompt_lengths, prompt_lengths + lengths).tolist()
        for i, text in enumerate(chunk):
            response = tokenizer.decode(responses[i, : lengths[i]], skip_special_tokens=True).strip()
            rows.append({"prompt": text, "response": response, "score": scores[i], "kl": kl[i], "length": lengths[i].item(),
                         "ended": responses[i, lengths[i] - 1].item() == tokenizer.eos_token_id,
                         "gold": judge(text, response)["score"]})  # fmt: skip
    return rows


def checkpoints(run):
    """{update: policy's state_dict} of the checkpoints that a PPO run kept (--save_total_limit), in order."""
    paths = sorted(Path(run).glob("checkpoint/*.pt"), key=lambda path: int(path.stem.partition("-")[0]))
    for path in paths:
        yield int(path.stem.partition("-")[0]), torch.load(path, map_location="cpu", weights_only=True)["policy"]


def half_width(values):
    """Of the 95% interval of the values' mean, by Student's t; NaN where there is none in the table, as with one value."""
    n = len(values)
    return T_975[n] * statistics.stdev(values) / math.sqrt(n) if n in T_975 else math.nan


def mean(values):
    values = list(values)
    return sum(values) / len(values)
