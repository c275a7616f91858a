"""The way to larger engines: TRL takes the folders of runs/ as they are, and gives the same scores.

    python benchmark/handoff.py --trl_python /path/to/trl_env/bin/python [--base_dir runs]

Here: responses to the held-out prompts, sampled and scored with ppo_rlhf.py's own functions. There, in TRL's
environment (benchmark/requirements.txt): TRL's PPO scores the same responses (`get_reward`) and trains for
three updates; its GRPO and RLOO trainers, which run on accelerate, DeepSpeed and FSDP, train for two steps
each. Exit status 1 if a score differs by more than 1e-4.
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path


def ours(base):
    """Sample and score responses to the test prompts -> what the child needs, as plain lists."""
    import common

    import ppo_rlhf

    models = common.load(base)
    tokenizer = models.tokenizer
    rows = []
    for text in common.held_out():
        chat = [{"role": "user", "content": text}]
        rows.append({"prompt_ids": ppo_rlhf.render(tokenizer, {}, chat, add_generation_prompt=True)})
    end_ids = ppo_rlhf.find_end_ids(models.reference, tokenizer)
    common.torch.manual_seed(1)
    batch = ppo_rlhf.sample(models.reference, tokenizer, rows, ppo_rlhf.Args(), end_ids)
    scores = ppo_rlhf.score(models.reward_model, tokenizer, batch, rows, 64)
    width = max(len(row["prompt_ids"]) for row in rows)
    sequences = []
    for row, response in zip(rows, batch.responses.tolist()):
        padding = [tokenizer.pad_token_id] * (width - len(row["prompt_ids"]))
        sequences.append(padding + row["prompt_ids"] + response)
    texts = [tokenizer.decode(row["prompt_ids"]) for row in rows]
    paths = {"sft": str(base / "sft"), "reward_model": str(base / "reward_model")}
    return {"texts": texts, "sequences": sequences, "width": width, "scores": scores.tolist(), **paths}


def theirs(spec):
    """In TRL's environment: the same scores, then each trainer for a moment."""
    import torch
    import transformers
    import trl
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
    from trl.experimental.ppo import PPOConfig, PPOTrainer
    from trl.experimental.utils import get_reward

    tokenizer = AutoTokenizer.from_pretrained(spec["sft"], padding_side="left")
    load_reward = AutoModelForSequenceClassification.from_pretrained
    reward_model = load_reward(spec["reward_model"], num_labels=1).eval()
    sequences = torch.tensor(spec["sequences"])
    with torch.no_grad():
        _, scores, _ = get_reward(reward_model, sequences, tokenizer.pad_token_id, spec["width"])
    difference = (scores - torch.tensor(spec["scores"])).abs().max().item()
    print(f"trl {trl.__version__}, torch {torch.__version__}, transformers {transformers.__version__}")
    print(f"get_reward: {len(scores)} scores, deviation {scores.std():.2f}, at most {difference:.1e} apart")
    assert difference < 1e-4, "TRL scores the same responses differently"

    common = {"output_dir": tempfile.mkdtemp(), "report_to": "none", "save_strategy": "no", "use_cpu": True}
    common |= {"disable_tqdm": True, "bf16": False, "gradient_checkpointing": False, "logging_steps": 1}
    common |= {"learning_rate": 1e-5, "temperature": 0.7}
    ids = Dataset.from_dict({"input_ids": tokenizer(spec["texts"], add_special_tokens=False).input_ids})
    config = {"per_device_train_batch_size": 32, "num_mini_batches": 2, "num_sample_generations": 0}
    task = {"total_episodes": 96, "response_length": 64, "stop_token": "eos", "missing_eos_penalty": 1.0}
    trainer = PPOTrainer(
        args=PPOConfig(**common, **config, **task, kl_coef=0.1),
        processing_class=tokenizer,
        model=AutoModelForCausalLM.from_pretrained(spec["sft"]),
        ref_model=AutoModelForCausalLM.from_pretrained(spec["sft"]),
        reward_model=reward_model,
        value_model=load_reward(spec["reward_model"], num_labels=1),
        train_dataset=ids,
        eval_dataset=ids.select(range(1)),
    )
    trainer.train()
    report("PPOTrainer", trainer, "objective/scores")
    prompts = Dataset.from_dict({"prompt": spec["texts"]})
    common |= {"max_steps": 2, "per_device_train_batch_size": 16}
    size = {"num_generations": 4, "max_completion_length": 64}
    for name in ("GRPO", "RLOO"):
        config = getattr(trl, f"{name}Config")(**common, **size)
        models = {"model": spec["sft"], "reward_funcs": spec["reward_model"]}
        trainer = getattr(trl, f"{name}Trainer")(**models, args=config, train_dataset=prompts)
        trainer.train()
        report(f"{name}Trainer", trainer, "reward")


def report(name, trainer, key):
    values = [row[key] for row in trainer.state.log_history if key in row]
    assert values and all(map(math.isfinite, values)), f"{name}: no finite {key}"
    print(f"{name}: {len(values)} steps from the same folders, {key} {', '.join(f'{x:.2f}' for x in values)}")


def main():
    as_it_is = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_it_is)
    parser.add_argument("--trl_python", default=sys.executable)
    parser.add_argument("--base_dir", type=Path, default=Path(__file__).resolve().parent.parent / "runs")
    parser.add_argument("--spec", help=argparse.SUPPRESS)  # the child's
    args = parser.parse_args()
    if args.spec:
        return theirs(json.loads(Path(args.spec).read_text()))
    spec = Path(tempfile.mkdtemp()) / "spec.json"
    spec.write_text(json.dumps(ours(args.base_dir.resolve())))
    raise SystemExit(subprocess.run([args.trl_python, __file__, "--spec", spec]).returncode)


if __name__ == "__main__":
    main()
