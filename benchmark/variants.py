"""ppo_rlhf.py with a change, over seeds, judged: which change matters?

    python benchmark/variants.py shipped_task --seeds 1 2 3 4 5
    python benchmark/variants.py details --seeds 1 2 3
    python benchmark/variants.py mitigations --seeds 1 2 3 4 5 --flags "--beta 0.01"
    python benchmark/variants.py forks --variants PPO RLOO GRPO --seeds 1 2 3
    python benchmark/variants.py iterated --seeds 1 2 3 4 5
    python benchmark/variants.py details --world runs/second_world

A variant is a copy of ppo_rlhf.py with patches of benchmark/forks or benchmark/ablations, if any, and flags.
Each runs in a process of its own from the same SFT and reward model, which are made where they are missing.
The final policies are judged alike, by the unpatched sampler and reward model, with the same random numbers:
gold score, KL, length, and the perplexity on held-out demonstrations, which is what the SFT model knew.
"iterated" (Bai et al. 2022) trains a reward model on 3,000 more pairs, of responses of the first variant's
policy or of the SFT model (data/label.py), and a policy against it, both from the same SFT model.

A difference is to the first variant of the set at the same seed, its interval Student's t over the seeds. Of
twenty such intervals one leaves 0 out by chance. Runs are kept in --work_dir under a checksum of script,
patches and flags, and skipped the next time, in any set. results/SET.jsonl has a row a variant and seed.
"""

import hashlib
import math
from pathlib import Path

import common
import torch

import ppo_rlhf
import sft

ENSEMBLE = "--reward_model_path {own} {other1} {other2}"  # the seed's own reward model and two other seeds'
SETS = {  # set: {variant: (patches, flags)}; the first is what the others are compared with
    "shipped_task": {
        "beta 0.1": ((), ""),  # the default: what "details" and "forks" compare with
        "beta 1.0": ((), "--beta 1.0"),
        "beta 0, long": ((), "--beta 0 --total_episodes 10240"),
    },
    "details": {
        "nothing": ((), ""),
        "positions of real tokens": (("ablations/slot_positions",), ""),
        "score on the last token": (("ablations/score_one_slot_late",), ""),
        "temperature in the log-probs": (("ablations/logprobs_without_temperature",), ""),
        "value clipping": (("ablations/no_value_clipping",), ""),
        "advantage whitening": (("ablations/no_advantage_whitening",), ""),
        "dropout off": (("ablations/dropout_on",), ""),
        "value head from zero": (("ablations/random_value_head",), ""),
        "score normalization": (("ablations/no_score_normalization",), ""),
        "Adam's eps of 1e-5": (("ablations/adam_eps",), ""),
        "missing-EOS penalty": ((), "--missing_eos_penalty 0"),
        "value head's learning rate": ((), "--value_learning_rate 1e-4"),
        "small weight of the value loss": ((), "--vf_coef 0.5 --value_learning_rate 3e-3"),
        "GAE's lambda of 1": ((), "--lam 0.95"),
        "warm-up": ((), "--warmup_steps 0"),
    },
    "mitigations": {
        "none": ((), ""),
        "beta doubled": ((), "--beta {double}"),
        "adaptive KL, target 3": ((), "--adaptive_kl_target 3"),
        "entropy bonus 0.01": ((), "--entropy_coef 0.01"),
        "length penalty 0.02": ((), "--length_penalty 0.02"),
        "PPO-ptx 0.1": (("forks/ptx",), ""),
        "whitened rewards": (("forks/whiten_rewards",), ""),
        "ensemble of 3, mean": (("forks/ensemble",), ENSEMBLE),
        "ensemble of 3, minimum": (("forks/ensemble",), f"{ENSEMBLE} --ensemble_coef inf"),
        "ensemble of 3, mean - std": (("forks/ensemble",), f"{ENSEMBLE} --ensemble_coef 1"),
    },
    "forks": {
        "PPO": ((), ""),
        "lambda 0.95": ((), "--lam 0.95"),
        "lambda 0.95, values from 1": (("forks/decoupled_gae",), "--lam 0.95"),
        "shared backbone": ((), "--no-separate_critic"),
        "shared backbone, lambda 0.95": ((), "--no-separate_critic --lam 0.95"),
        "value warm-up": (("forks/value_warmup",), ""),
        "clip higher": (("forks/clip_higher",), ""),
        "dual clip": (("forks/dual_clip",), ""),
        "KL in the loss, k3": (("forks/kl_in_loss",), ""),
        "process reward": (("forks/process_reward",), ""),
        "no value head": ((), "--no-separate_critic --vf_coef 0"),
        "RLOO": (("forks/rloo",), "--no-separate_critic --vf_coef 0 --num_generations 4"),
        "GRPO": (("forks/grpo",), "--no-separate_critic --vf_coef 0 --num_generations 8"),
    },
    "iterated": {
        "round 0": ((), ""),
        "new pairs by the policy": ((), "--reward_model_path {by_policy}"),
        "new pairs by the SFT model": ((), "--reward_model_path {by_sft}"),
    },
}


@torch.no_grad()
def perplexity(policy, models):
    """exp of the mean loss of a token of the held-out demonstrations' completions, at temperature 1."""
    end_ids = ppo_rlhf.find_end_ids(models.reference, models.tokenizer)
    rows = common.read_jsonl(common.DATA / "demonstrations/test.jsonl")
    pairs = [sft.encode(models.tokenizer, end_ids, row, "completion") for row in rows]
    total = sum(sft.completion_loss(policy, pairs[i : i + 64], "cpu") for i in range(0, len(pairs), 64))
    return math.exp(total / sum(len(completion) for _, completion in pairs))


def judged(folder, base, models, others, texts):
    """One row: the final policy of a run, in means over responses to the texts; others: the SFT model's."""
    policy = common.load_policy(folder)
    rows = common.respond(policy, models, texts, seed=0)
    accuracy = [
        row for row in common.read_jsonl(base / "reward_model/metrics.jsonl") if "eval/accuracy" in row
    ]
    row = {"responses": len(rows), "seconds": float((folder / "wall_seconds").read_text())}
    row |= {"rm_accuracy": accuracy[-1]["eval/accuracy"], "gold_sft": common.average(others)["gold"]}
    row |= {"win_rate": common.win_rate(rows, others), "perplexity": perplexity(policy, models)}
    row["different"] = len({(row["prompt"], row["response"]) for row in rows}) / len(rows)
    return [{**row, **common.average(rows), **common.stamp(folder)}]


def relabel(args, runs):
    """New pairs, behind the old ones, and their reward models. runs: {seed: folder of the first variant}"""
    stages = {"new pairs": [], "reward models": []}
    for seed, run in runs.items():
        sft_model = args.base_dir / f"seed{seed}/sft"
        for who, policy in (("by_policy", run), ("by_sft", sft_model)):
            flags = {"policy": policy, "add": "data/preferences", "seed": seed}
            pairs, command = common.job(run / who / "pairs", common.DATA / "label.py", **flags)
            stages["new pairs"].append((pairs, command))
            flags = {"model_name_or_path": sft_model, "dataset_name": pairs, "seed": seed}
            stages["reward models"].append(common.job(run / who / "reward_model", "reward_model.py", **flags))
    for title, jobs in stages.items():
        common.run_all(jobs, args.parallel, title)


def print_table(rows):
    names = list(dict.fromkeys(row["variant"] for row in rows))
    first = {row["seed"]: row["gold"] for row in rows if row["variant"] == names[0]}
    columns = {  # key: (title, format)
        "win_rate": ("gold win rate against SFT", ".0%"),
        "kl": ("KL, nats", ".1f"),
        "score": ("RM score", ".2f"),
        "length": ("tokens", ".1f"),
        "different": ("different", ".2f"),
        "perplexity": ("demonstration perplexity", ".2f"),
        "foreign": ("foreign a response", ".2f"),
        "garbled": ("garbled a response", ".2f"),
        "repeated": ("repeated a response", ".2f"),
        "seconds": ("s a run", ".0f"),
    }
    titles = ["variant", "seeds", "gold score", "difference, 95% interval", *(t for t, _ in columns.values())]
    table = []
    for name in names:
        own = [row for row in rows if row["variant"] == name]
        difference = [row["gold"] - first[row["seed"]] for row in own]
        cells = [name, len(own), common.spread(row["gold"] for row in own)]
        cells.append("" if name == names[0] else common.interval(difference))
        cells += [f"{common.mean(row[key] for row in own):{form}}" for key, (_, form) in columns.items()]
        table.append(cells)
    common.print_table(titles, table)
    accuracy = common.spread({row["seed"]: row["rm_accuracy"] for row in rows}.values(), ".1%")
    gold_sft = common.spread({row["seed"]: row["gold_sft"] for row in rows}.values())
    print(f"\ngold score of the SFT models {gold_sft}; held-out accuracy of the reward models {accuracy}")


def main():
    parser = common.parser(__doc__)
    add = parser.add_argument
    add("set", choices=SETS)
    add("--variants", nargs="+", metavar="NAME", help="of the set; its first is always run")
    add("--flags", default="", help='flags of ppo_rlhf.py for all runs, as in "--beta 0.01"')
    add("--samples", type=int, default=4, help="responses judged to each held-out prompt")
    add("--work_dir", type=lambda x: Path(x).resolve(), default=common.WORLD / "runs/variants")
    args = parser.parse_args()
    variants = SETS[args.set]
    if args.variants:
        unknown = {*args.variants} - {*variants}
        if unknown:
            parser.error(f"--variants: not in {args.set}: {', '.join(unknown)}; it has {', '.join(variants)}")
        variants = {name: variants[name] for name in dict.fromkeys([next(iter(variants)), *args.variants])}
    shared = args.flags.split()
    beta = float(shared[shared.index("--beta") + 1]) if "--beta" in shared else ppo_rlhf.Args.beta
    others = {seed: [s for s in (1, 2, 3, 4) if s != seed][:2] for seed in args.seeds}
    wanted = {*args.seeds}
    if any("{other1}" in flags for _, flags in variants.values()):
        wanted |= {*sum(others.values(), [])}
    common.baselines(args.base_dir, sorted(wanted), args.parallel)
    jobs = {}
    first = next(iter(variants))
    for name, (patches, flags) in variants.items():
        files = ["ppo_rlhf.py", *(f"benchmark/{patch}.patch" for patch in patches)]
        text = b"".join((common.ROOT / file).read_bytes() for file in files) + f"{shared} {flags}".encode()
        slug = "_".join(Path(patch).name for patch in patches) or "flags"
        folder = args.work_dir / f"{slug}_{hashlib.sha256(text).hexdigest()[:8]}"
        script = common.make_copy(folder / "script", patches)
        for seed in args.seeds:
            values = {"own": args.base_dir / f"seed{seed}/reward_model", "double": 2 * beta}
            for who in ("by_policy", "by_sft"):
                values[who] = jobs.get((first, seed), (folder,))[0] / who / "reward_model"
            for i, other in enumerate(others[seed], 1):
                values[f"other{i}"] = args.base_dir / f"seed{other}/reward_model"
            words = [*shared, *flags.format(**values).split()]
            base = args.base_dir / f"seed{seed}"
            jobs[name, seed] = common.ppo_job(folder / f"seed{seed}", base, seed, *words, script=script)
    jobs = dict(sorted(jobs.items(), key=lambda item: item[0][1]))  # a stopped run has complete seeds
    if any("{by_" in flags for _, flags in variants.values()):
        common.run_all([jobs[first, seed] for seed in args.seeds], args.parallel, "ppo, round 0")
        relabel(args, {seed: jobs[first, seed][0] for seed in args.seeds})
    common.run_all(list(jobs.values()), args.parallel, "ppo")

    rows = []
    texts = common.held_out(args.limit)
    for seed in args.seeds:
        base = args.base_dir / f"seed{seed}"
        models = common.load(base)
        others = common.respond(models.reference, models, texts * args.samples, seed=0)
        for name in variants:
            folder = jobs[name, seed][0]
            path = folder / f"judged_{len(texts)}x{args.samples}.jsonl"
            row = common.cached(path, judged, folder, base, models, others, texts * args.samples)[0]
            rows.append({"variant": name, "seed": seed, "flags": args.flags, **row})
    common.write_results(args.output_dir / f"{args.set}.jsonl", rows)
    print_table(rows)


if __name__ == "__main__":
    main()
