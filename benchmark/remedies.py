"""The table of remedies: each of ppo_rlhf.py's remedies against over-optimization and forgetting, on and off, on the shipped task.

    python benchmark/remedies.py --seeds 1 2 3              # needs runs/shipped_task (made if it is not there)
    python benchmark/remedies.py --seeds 1 --total_episodes 640 --remedies none "length penalty"     # a short look

Every run is ppo_rlhf.py in a process of its own with default flags, but for those of its remedy, --beta and --seed. What has been
run is kept in BASE_DIR/remedies, and a stopped sweep goes on. The final policies are judged on the held-out prompts, eight
answers to each: gold score and reward-model score (of the seed's own reward model, in every row), KL, length, share of different
answers; and their perplexity on the held-out demonstrations: what the SFT model knew and the policy forgot, the alignment tax.
A remedy's effect is its difference to `none` with the same seed; the interval is Student's, 95%, over the seeds.
Rows go to benchmark/results/remedies.jsonl, where those of other seeds and remedies stay, the picture to remedies.png beside it.
"""

import argparse
import math
from pathlib import Path

import common
import torch

ENSEMBLE = ["--reward_model_path", "{own}", "{other1}", "{other2}"]  # the seed's own reward model and those of two other seeds
REMEDIES = {  # name: flags
    "none": [],
    "adaptive KL, target 3": ["--adaptive_kl_target", "3"],
    "entropy bonus 0.01": ["--entropy_coef", "0.01"],
    "ensemble of 3, mean": [*ENSEMBLE, "--ensemble", "mean"],
    "ensemble of 3, minimum": [*ENSEMBLE, "--ensemble", "min"],
    "ensemble of 3, mean - std": [*ENSEMBLE, "--ensemble", "mean-std"],
    "length penalty 0.02": ["--length_penalty", "0.02"],
    "PPO-ptx 0.1": ["--ptx_coef", "0.1"],
    "whitened rewards": ["--whiten_rewards"],
    "shorter leash: beta doubled": ["--beta", "{double}"],  # no remedy of its own: what the plainest one does
}
COLUMNS = {  # key: (title, digits)
    "gold": ("gold score", 2), "kl": ("KL, nats", 1), "score": ("RM score", 2), "length": ("tokens", 1),
    "distinct": ("different answers", 2), "perplexity": ("demonstration perplexity", 2), "seconds": ("s a run", 0),
}  # fmt: skip


@torch.no_grad()
def perplexity(policy, tokenizer):
    """exp of the mean loss of a token of the held-out demonstrations' answers, at temperature 1 as in sft.py."""
    total = count = 0
    rows = common.read_jsonl(common.ROOT / "data/demonstrations/test.jsonl")
    encoded = [common.ppo_rlhf.encode(tokenizer, common.ppo_rlhf.Args.prompt_template, r["prompt"], r["completion"]) for r in rows]
    for start in range(0, len(encoded), 64):
        ids, starts, labels, mask = common.ppo_rlhf.lay_out(encoded[start : start + 64], tokenizer.pad_token_id, "cpu")
        states = common.ppo_rlhf.response_states(policy, ids, starts, labels.shape[1])  # [b, t, d]
        total += (common.ppo_rlhf.logprobs(policy.get_output_embeddings()(states), labels) * mask).sum().item()
        count += mask.sum().item()
    return math.exp(-total / count)


def measure(folder, base, samples):
    """The final policy of a run -> a row of figures."""
    reference, reward_model, tokenizer = common.load(base)
    policy, _ = common.ppo_rlhf.load_model(common.AutoModelForCausalLM, str(folder), "policy")
    rows = common.answers(policy, reference, reward_model, tokenizer, common.held_out() * samples, seed=0)
    different = {(row["prompt"], row["response"]) for row in rows}
    return {**{key: common.mean(row[key] for row in rows) for key in ("gold", "kl", "score", "length")},
            "distinct": len(different) / len(rows), "perplexity": perplexity(policy, tokenizer)}  # fmt: skip


def effect(rows, name, key):
    """Differences of `key` to `none` with the same seed -> (mean, half of the 95% interval, each)."""
    none = {(row["beta"], row["seed"]): row[key] for row in rows if row["remedy"] == "none"}
    each = [row[key] - none[row["beta"], row["seed"]] for row in rows if row["remedy"] == name]
    return common.mean(each), common.half_width(each), each


def draw(rows, path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = [name for name in dict.fromkeys(row["remedy"] for row in rows) if name != "none"]
    keys = ["gold", "kl", "length", "distinct", "perplexity"]
    plt.rcParams.update({"font.size": 9, "axes.titlesize": 9.5, "axes.spines.top": False, "axes.spines.right": False})
    figure, axes = plt.subplots(1, len(keys), figsize=(10, 0.6 + 0.3 * len(names)), sharey=True)
    for axis, key in zip(axes, keys):
        for i, name in enumerate(names):
            mean, half, each = effect(rows, name, key)
            clear = abs(mean) > half  # the interval leaves out 0
            axis.errorbar(mean, i, xerr=half, color=common.COLOURS[0] if clear else "#888888", marker="o", markersize=5, linewidth=1.4)
            axis.plot(each, [i] * len(each), "|", color="#000000", markersize=7)
        axis.axvline(0, color="#000000", linewidth=0.8)
        axis.set_title(COLUMNS[key][0])
        axis.locator_params(axis="x", nbins=4)
        axis.grid(axis="x", alpha=0.25, linewidth=0.6)
    axes[0].set_yticks(range(len(names)), names)
    axes[0].invert_yaxis()
    beta = rows[0]["beta"]
    figure.supxlabel(f"difference to the same seed without it, beta {beta}: mean and 95% interval (blue: leaves out 0), | each seed",
                     fontsize=9)  # fmt: skip
    figure.tight_layout(w_pad=0.8)
    figure.savefig(path, dpi=105)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--beta", type=float, default=0.02, help="a short leash hides what remedies do; default 0.02")
    parser.add_argument("--total_episodes", type=int, default=10240)
    parser.add_argument("--remedies", nargs="+", choices=list(REMEDIES), metavar="NAME", default=list(REMEDIES),
                        help=f"of: {'; '.join(REMEDIES)}")  # fmt: skip
    parser.add_argument("--samples", type=int, default=8, help="answers to each held-out prompt")
    parser.add_argument("--parallel", type=int, default=2, help="runs at a time")
    parser.add_argument("--base_dir", type=Path, default=common.BASELINES, help="with seed1/sft, seed1/reward_model, ...")
    args = parser.parse_args()
    base = args.base_dir.resolve()
    others = {seed: [s for s in (1, 2, 3, 4) if s != seed][:2] for seed in args.seeds}
    common.baselines(base, sorted({*args.seeds, *sum(others.values(), [])}), args.parallel)

    jobs = {}
    for name in args.remedies:
        for seed in args.seeds:
            values = {"own": base / f"seed{seed}/reward_model", "double": 2 * args.beta}
            values.update({f"other{i}": base / f"seed{s}/reward_model" for i, s in enumerate(others[seed], 1)})
            folder = base / f"remedies/seed{seed}/{name.replace(' ', '_').replace(',', '')}_at_{args.beta}_{args.total_episodes}"
            flags = ["--beta", args.beta, "--total_episodes", args.total_episodes]
            flags += [flag.format(**values) for flag in REMEDIES[name]]  # of two --beta, the last counts
            jobs[name, seed] = common.ppo_job(folder, base / f"seed{seed}", seed, *flags)
    common.run_all(list(jobs.values()), args.parallel, "ppo")
    path = common.RESULTS / "remedies.jsonl"
    same = {"beta": args.beta, "episodes": args.total_episodes, "samples": args.samples}  # rows of other seeds and remedies stay
    found = {(row["remedy"], row["seed"]): row for row in (common.read_jsonl(path) if path.exists() else []) if same.items() <= row.items()}
    for (name, seed), (folder, _) in jobs.items():
        found[name, seed] = {"remedy": name, "seed": seed, **same, "seconds": float((folder / "wall_seconds").read_text()),
                             **measure(folder, base / f"seed{seed}", args.samples)}  # fmt: skip
    rows = [found[key] for name in REMEDIES for key in sorted(found) if key[0] == name]
    common.write_jsonl(path, rows)

    print("| remedy | seeds | " + " | ".join(title for title, _ in COLUMNS.values()) + " | effect on gold, 95% interval |")
    print("| --- " * (len(COLUMNS) + 3) + "|")
    for name in dict.fromkeys(row["remedy"] for row in rows):
        own = [row for row in rows if row["remedy"] == name]
        cells = [str(len(own))] + [f"{common.mean(row[key] for row in own):.{digits}f}" for key, (_, digits) in COLUMNS.items()]
        mean, half, _ = effect(rows, name, "gold")
        cells.append("" if name == "none" else f"{mean:+.2f} [{mean - half:+.2f}, {mean + half:+.2f}]")
        print(f"| {name} | " + " | ".join(cells) + " |")
    if {row["remedy"] for row in rows} != {"none"}:
        draw(rows, common.RESULTS / "remedies.png")


if __name__ == "__main__":
    main()
