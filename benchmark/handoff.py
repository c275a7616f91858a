"""The way to larger engines: TRL trains from the folders of runs/ as they are, and gives the same scores.

    trl_env/bin/accelerate launch --multi_gpu --num_processes 2 benchmark/handoff.py [--base_dir runs]

Runs in TRL's environment (benchmark/requirements.txt) and needs nothing of ours but {sft,reward_model,ppo}
in base_dir. The responses of ppo/eval.jsonl, whose scores are known, go through the code with which TRL's
PPO, GRPO and RLOO compute rewards, in each process; then each trains for three steps, all processes
together. Exit status 1 if a score differs by more than 1e-4. On a CPU the processes talk through gloo, and
`--multi_gpu` is needed all the same: with `--cpu`, accelerate starts a single process.

Our reward model reads its score at the EOS, which TRL's GRPO and RLOO take off before they score. So three
forms are compared: prompts in text, without the EOS; prompts as messages, where the reward model's chat
template writes it again; and `score_ids`, a reward function that sees the ids that were sampled. The second
is enough if the template ends with the EOS, the pad is another token, and the response was not cut off.

    pip download --no-deps openrlhf==0.11.2 && unzip openrlhf-*.whl
    trl_env/bin/python benchmark/handoff.py --openrlhf openrlhf-0.11.2.data/purelib      # needs peft as well

compares with OpenRLHF's own loader of reward models instead, stubs in place of what it needs besides. It
loads in bf16 or fp16 alone; scores must agree in fp32, which is put in.
"""

import argparse
import importlib.machinery
import json
import math
import os
import sys
import tempfile
from pathlib import Path
from unittest.mock import MagicMock

import torch
import transformers
from datasets import Dataset
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

RANK = int(os.environ.get("RANK", 0))
PROCESSES = int(os.environ.get("WORLD_SIZE", 1))
CUDA = torch.cuda.is_available()
COMMON = {
    "bf16": False,
    "disable_tqdm": True,
    "gradient_checkpointing": False,
    "learning_rate": 1e-5,
    "logging_steps": 1,
    "report_to": "none",
    "save_strategy": "no",
    "temperature": 0.7,
    "use_cpu": not CUDA,
}


def make_score_ids(reward_model, tokenizer):
    """A reward function for TRL's trainers -> ppo_rlhf.py's raw scores, whatever the template and the pad."""

    @torch.no_grad()
    def score_ids(prompts, completion_ids, **columns):
        scores = []
        for prompt, ids in zip(prompts, completion_ids):  # one at a time: no padding
            prompt_ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
            sequence = torch.tensor([prompt_ids + ids], device=reward_model.device)
            scores.append(reward_model(sequence).logits.item())
        return scores

    return score_ids


def read_responses(base, tokenizer):
    """The held-out responses of the SFT model and of PPO, and the raw scores that ppo_rlhf.py gave them.
    Left out are those that were cut off, as the file does not tell what their last token was."""
    mean, std = load_file(base / "ppo/value_head.safetensors")["score_scale"].tolist()
    limit = json.loads((base / "ppo/args.json").read_text())["max_new_tokens"]
    rows = []
    for line in (base / "ppo/eval.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        prompt = row["prompt"]
        if isinstance(prompt, str):
            prompt = [{"role": "user", "content": prompt}]
        prompt_ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
        for policy in ("sft", "ppo"):
            completion = [{"role": "assistant", "content": row[policy]}]
            text = tokenizer.apply_chat_template(prompt + completion, tokenize=False).rstrip()
            ids = tokenizer(text, add_special_tokens=False).input_ids[len(prompt_ids) :]
            columns = {"policy": policy, "prompt": prompt, "completion": completion}
            columns |= {"prompt_ids": prompt_ids, "completion_ids": ids}
            if len(ids) <= limit:
                rows.append({**columns, "score": row[f"{policy}_score"] * std + mean})
    return rows


def show(text):
    if RANK == 0:
        print(text, flush=True)


def compare(form, scores, rows, must_agree=True):
    """Print how far TRL's scores [..., N] are from ours; if they must agree, fail above 1e-4."""
    scores = scores.cpu().view(-1, len(rows))
    ours = torch.tensor([row["score"] for row in rows])
    worst = (scores - ours).abs().max()
    show(f"{form}: {len(rows)} scores, at most {worst:.1e} apart")
    for policy in ("sft", "ppo"):
        chosen = torch.tensor([row["policy"] == policy for row in rows])
        pair = torch.stack([ours[chosen], scores[0, chosen]])
        apart = (pair[1] - pair[0]).abs().mean() / pair[0].std()
        correlation = pair.argsort(1).argsort(1).double().corrcoef()[0, 1]
        show(f"    {policy}: mean {apart:.1e} standard deviations apart, rank correlation {correlation:.4f}")
    assert not must_agree or worst < 1e-4, f"{form}: other scores for the same responses"


def check_get_reward(reward_model, tokenizer, rows):
    """PPO's reward path."""
    from trl.experimental.utils import get_reward

    width = max(len(row["prompt_ids"]) for row in rows)
    prompts = tokenizer.pad({"input_ids": [row["prompt_ids"] for row in rows]}, padding_side="left")
    completions = tokenizer.pad({"input_ids": [row["completion_ids"] for row in rows]}, padding_side="right")
    sequences = torch.tensor([a + b for a, b in zip(prompts.input_ids, completions.input_ids)])
    sequences = sequences.to(reward_model.device)
    with torch.no_grad():
        _, scores, _ = get_reward(reward_model, sequences, tokenizer.pad_token_id, width)
    compare("PPO", scores, rows)


def check_calculate_rewards(name, trainer, tokenizer, rows):
    """GRPO's and RLOO's reward path: the scores of all processes and both reward functions."""
    chats = [row["prompt"] for row in rows]
    replies = [row["completion"] for row in rows]
    ids = [row["completion_ids"] for row in rows]
    columns = [{}] * len(rows)
    shape = (PROCESSES, len(rows), 2)
    texts = [tokenizer.apply_chat_template(x, add_generation_prompt=True, tokenize=False) for x in chats]
    reply_texts = tokenizer.batch_decode(ids, skip_special_tokens=True)  # as TRL decodes what it samples
    score_ids = trainer.reward_funcs[1]
    trainer.reward_funcs[1] = lambda prompts, **columns: [0.0] * len(prompts)  # score_ids wants messages
    scores = trainer._calculate_rewards(columns, texts, reply_texts, ids).view(shape)
    compare(f"{name}, prompts in text", scores[..., 0], rows, must_agree=False)
    trainer.reward_funcs[1] = score_ids
    scores = trainer._calculate_rewards(columns, chats, replies, ids).view(shape)
    written = tokenizer.apply_chat_template(chats[0] + replies[0], tokenize=False)
    enough = written.endswith(tokenizer.eos_token) and tokenizer.pad_token != tokenizer.eos_token
    compare(f"{name}, prompts as messages", scores[..., 0], rows, must_agree=enough)
    compare(f"{name}, score_ids", scores[..., 1], rows)


def check_openrlhf(source, base, tokenizer, rows):
    """OpenRLHF's reward model, on left-padded ids as its trainer has them."""
    import peft  # noqa: F401  before the stubs, which it would take for the real packages
    import transformers.integrations.deepspeed  # noqa: F401

    sys.path.insert(0, str(source))
    stubs = (
        "deepspeed",
        "flash_attn",
        "flash_attn.bert_padding",
        "flash_attn.utils.distributed",
        "pylatexenc",
    )
    for name in stubs:
        sys.modules[name] = stub = MagicMock()
        stub.__spec__ = importlib.machinery.ModuleSpec(name, None)
    from openrlhf.models import get_llm_for_sequence_regression
    from openrlhf.utils import utils

    ids = [row["prompt_ids"] + row["completion_ids"] for row in rows]
    batch = tokenizer.pad({"input_ids": ids}, padding_side="left", return_tensors="pt")
    for name, must_agree in (("bf16", False), ("fp32", True)):
        if must_agree:
            utils.convert_to_torch_dtype = lambda name: torch.float32
        options = {"attn_implementation": "sdpa"}  # the default wants flash_attn
        model = get_llm_for_sequence_regression(str(base / "reward_model"), "reward", **options).eval()
        with torch.no_grad():
            scores = model(batch.input_ids, batch.attention_mask).float()
        compare(f"OpenRLHF, {name}", scores, rows, must_agree)


def train(name, trainer, *keys):
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    state = trainer.accelerator.state
    where = f"{state.num_processes} processes ({state.backend})"
    for key in keys:
        values = [row[key] for row in trainer.state.log_history if key in row]
        assert values and all(map(math.isfinite, values)), f"{name}: no finite {key}"
        numbers = ", ".join(f"{x:.4f}" for x in values)
        show(f"{name}: {len(values)} steps in {where}, {key} {numbers}")


def main():
    as_it_is = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_it_is)
    parser.add_argument("--base_dir", type=Path, default=Path(__file__).resolve().parent.parent / "runs")
    parser.add_argument("--openrlhf", type=Path, help="compare with its loader alone, in this folder")
    args = parser.parse_args()
    base = args.base_dir.resolve()
    if args.openrlhf:
        tokenizer = AutoTokenizer.from_pretrained(base / "sft")
        return check_openrlhf(args.openrlhf, base, tokenizer, read_responses(base, tokenizer))
    import trl  # only here, as make_score_ids works without it
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()

    def load_reward_model():
        return AutoModelForSequenceClassification.from_pretrained(base / "reward_model", num_labels=1).eval()

    tokenizer = AutoTokenizer.from_pretrained(base / "sft", padding_side="left")
    reward_model = load_reward_model()
    if CUDA:
        reward_model.to(f"cuda:{os.environ.get('LOCAL_RANK', 0)}")
    rows = read_responses(base, tokenizer)
    output_dir = tempfile.mkdtemp()
    show(f"trl {trl.__version__}, torch {torch.__version__}, transformers {transformers.__version__}")

    if tokenizer.pad_token == tokenizer.eos_token:
        show("PPO left out: TRL's tells padding by its id, so the pad must not be the EOS")
    else:
        check_get_reward(reward_model, tokenizer, rows)
        ids = Dataset.from_dict({"input_ids": [row["prompt_ids"] for row in rows]})
        config = {"per_device_train_batch_size": 32, "total_episodes": 3 * 32 * PROCESSES}
        config |= {"num_mini_batches": 2, "response_length": 64, "stop_token": "eos", "kl_coef": 0.1}
        config |= {"missing_eos_penalty": 1.0, "num_sample_generations": 0}
        trainer = PPOTrainer(
            args=PPOConfig(output_dir=output_dir, **COMMON, **config),
            processing_class=tokenizer,
            model=AutoModelForCausalLM.from_pretrained(base / "sft"),
            ref_model=AutoModelForCausalLM.from_pretrained(base / "sft"),
            reward_model=reward_model,
            value_model=load_reward_model(),
            train_dataset=ids,
            eval_dataset=ids.select(range(PROCESSES)),
        )
        train("PPO", trainer, "objective/scores")

    prompts = Dataset.from_dict({"prompt": [row["prompt"] for row in rows]})
    config = {"per_device_train_batch_size": 16, "max_steps": 3, "num_generations": 4}
    config |= {"max_completion_length": 64, "reward_weights": [0.0, 1.0]}  # the folder's score is only logged
    for name in ("GRPO", "RLOO"):
        trainer = getattr(trl, f"{name}Trainer")(
            model=str(base / "sft"),
            reward_funcs=[str(base / "reward_model"), make_score_ids(reward_model, tokenizer)],
            args=getattr(trl, f"{name}Config")(output_dir=output_dir, **COMMON, **config),
            train_dataset=prompts,
        )
        check_calculate_rewards(name, trainer, tokenizer, rows)
        train(name, trainer, "rewards/reward_model/mean", "rewards/score_ids/mean")
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
        # The models still hold it, and gloo's thread may want the interpreter that is ending: a process then
        # hangs, or aborts and the launcher says FAILED
        sys.stdout.flush()
        os._exit(0)


if __name__ == "__main__":
    main()
