"""The way out to larger engines: TRL takes the folders of runs/ as they are, and scores our rollouts to the same numbers.

    python benchmark/handoff.py --trl_python /path/to/trl_env/bin/python [--sft runs/sft --reward_model runs/reward_model]

TRL 1.12.0 lives in an environment of its own (benchmark/requirements.txt says which). Here: answers to the held-out prompts,
sampled and scored with ppo_rlhf.py's own functions. There: TRL's PPO scores the same answers (`get_reward`) and trains for
three updates; its GRPO and RLOO trainers, which run on accelerate, DeepSpeed and FSDP, train for two steps each, with the
SFT folder as the model and the reward folder as the reward. Exit status 1 if a score differs by more than 1e-4.
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def ours(args):
    """Roll out and score the test prompts -> what the child needs, as plain lists."""
    sys.path.insert(0, str(ROOT))
    import ppo_rlhf as ppo
    import torch

    policy, tokenizer = ppo.load_model(ppo.AutoModelForCausalLM, args.sft, "--sft")
    reward_model, _ = ppo.load_model(ppo.AutoModelForSequenceClassification, args.reward_model, "--reward_model")
    texts = [ppo.Args.prompt_template.replace("{prompt}", row["prompt"]) for row in ppo.load_rows(args.dataset, "test", ["prompt"])]
    prompts, mask, prompt_lengths = ppo.left_pad([tokenizer(text).input_ids for text in texts], tokenizer.pad_token_id, "cpu")
    torch.manual_seed(1)
    responses, lengths = ppo.rollout(policy.eval(), prompts, mask, torch.rand(ppo.Args.max_new_tokens, len(texts)),
                                     ppo.Args.temperature, tokenizer.eos_token_id, tokenizer.pad_token_id)  # fmt: skip
    sequences = ppo.roll_left(prompts, responses, prompt_lengths)
    with torch.no_grad():
        scores = ppo.score_sequences(reward_model.eval(), sequences, prompt_lengths + lengths)
    return {"texts": texts, "query_responses": torch.cat([prompts, responses], 1).tolist(), "context_length": prompts.shape[1],
            "scores": scores.tolist(), "sft": args.sft, "reward_model": args.reward_model}  # fmt: skip


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
    reward_model = AutoModelForSequenceClassification.from_pretrained(spec["reward_model"], num_labels=1).eval()
    with torch.no_grad():
        _, scores, _ = get_reward(reward_model, torch.tensor(spec["query_responses"]), tokenizer.pad_token_id, spec["context_length"])
    difference = (scores - torch.tensor(spec["scores"])).abs().max().item()
    print(f"trl {trl.__version__}, torch {torch.__version__}, transformers {transformers.__version__}")
    print(f"get_reward: {len(scores)} scores, largest difference from ours {difference:.1e} (their deviation is {scores.std():.2f})")
    assert difference < 1e-4, "TRL scores the same answers differently"

    common = dict(output_dir=tempfile.mkdtemp(), report_to="none", save_strategy="no", disable_tqdm=True, use_cpu=True, bf16=False,
                  gradient_checkpointing=False, learning_rate=1e-5, logging_steps=1, temperature=0.7)  # fmt: skip
    trainer = PPOTrainer(
        args=PPOConfig(**common, total_episodes=96, per_device_train_batch_size=32, num_mini_batches=2, num_sample_generations=0,
                       response_length=64, stop_token="eos", missing_eos_penalty=1.0, kl_coef=0.1),
        processing_class=tokenizer, model=AutoModelForCausalLM.from_pretrained(spec["sft"]),
        ref_model=AutoModelForCausalLM.from_pretrained(spec["sft"]), reward_model=reward_model,
        value_model=AutoModelForSequenceClassification.from_pretrained(spec["reward_model"], num_labels=1),
        train_dataset=(ids := Dataset.from_dict({"input_ids": tokenizer(spec["texts"]).input_ids})), eval_dataset=ids.select(range(1)),
    )  # fmt: skip
    trainer.train()
    report("PPOTrainer", trainer, "objective/scores")
    for name in ("GRPO", "RLOO"):
        config = getattr(trl, f"{name}Config")(**common, max_steps=2, per_device_train_batch_size=16, num_generations=4, max_completion_length=64)
        trainer = getattr(trl, f"{name}Trainer")(model=spec["sft"], reward_funcs=spec["reward_model"], args=config,
                                                 train_dataset=Dataset.from_dict({"prompt": spec["texts"]}))  # fmt: skip
        trainer.train()
        report(f"{name}Trainer", trainer, "reward")


def report(name, trainer, key):
    values = [row[key] for row in trainer.state.log_history if key in row]
    assert values and all(map(math.isfinite, values)), f"{name}: no finite {key}"
    print(f"{name}: {len(values)} steps from the same folders, {key} {', '.join(f'{value:.2f}' for value in values)}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl_python", default=sys.executable)
    parser.add_argument("--sft", default=str(ROOT / "runs/sft"))
    parser.add_argument("--reward_model", default=str(ROOT / "runs/reward_model"))
    parser.add_argument("--dataset", default=str(ROOT / "data/prompts"))
    parser.add_argument("--spec", help=argparse.SUPPRESS)  # the child's
    args = parser.parse_args()
    if args.spec:
        return theirs(json.loads(Path(args.spec).read_text()))
    spec = Path(tempfile.mkdtemp()) / "spec.json"
    spec.write_text(json.dumps(ours(args)))
    raise SystemExit(subprocess.run([args.trl_python, __file__, "--spec", spec]).returncode)


if __name__ == "__main__":
    main()
