"""How much leash: PPO at seven betas and best-of-n against the same reward model, judged by the gold judge on the way.

    python benchmark/beta_sweep.py --seeds 1 2 3            # about two hours of CPU time, two runs at a time
    python benchmark/beta_sweep.py --draw_only              # the table, the fits and the pictures from the rows, seconds

Reads   --base_dir/seed1/{sft,reward_model} and so on, made by default flags if they are not there (see shipped_task.py).
Writes  --base_dir/beta_sweep/seed1/beta_0.1/ and so on: the PPO runs, with all checkpoints, one every 5 updates, and the
        judged rows. What is there is skipped the next time, so a stopped sweep goes on and a finished one is only drawn.
        Into --output_dir: beta_sweep.jsonl (raw rows and fits), beta_sweep.png (over KL), beta_sweep_updates.png (over episodes).

Each checkpoint answers the held-out prompts --samples times. Update 0 is the SFT model; a win is a higher gold score than
its answer to the same prompt drawn with the same luck, a tie half a win. Best-of-n: --best_of N answers of the SFT model to
each prompt; for every n the unbiased estimate of the expected best of n by the reward model's score, from all subsets of n of
the N. Its KL is log n - (n - 1) / n, an upper bound where answers repeat (Beirami et al. 2024, arXiv 2401.01879).

Fits, by least squares over the points of all seeds, with d = sqrt(KL), as in Gao et al. 2022 (arXiv 2210.10760, whose letter
beta is not the price of KL; here it is b):

    PPO         gold(d) - gold(0) = d (a - b log d)         once from the runs at beta 0, once from all runs
    best-of-n   gold(d) - gold(0) = d (a - b d)

R2 is 1 - (squared residuals) / (squared deviations from the points' mean). Intervals of win rates are Student's t over seeds:
the prompts are the same for all. "Peak" is the highest gold score of a path averaged over seeds: the largest of some noisy
means, found on the answers that it is read from, so a little too high.
"""

import argparse
import copy
import json
import math
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from itertools import chain
from pathlib import Path

import common
import matplotlib

matplotlib.use("Agg")  # files only, no window
import matplotlib.pyplot as plt
import torch
from common import T_975, mean, ppo_rlhf
from tqdm import tqdm

SAVE_STEPS = 5
MARKERS = "os^vDPX<>*"
LABELS = {"gold": "gold score (at most 4)", "score": "RM score (in standard deviations of SFT's)", "kl": "KL (nats an answer)"}
ORANGE = "#D55E00"  # not in viridis
FAMILIES = {  # how the fit of each is drawn
    "PPO, beta 0": {"color": ORANGE, "linestyle": "--"},
    "PPO, all betas": {"color": ORANGE, "linestyle": ":"},
    "best-of-n": {"color": "black", "linestyle": "--"},
}


def quiet():
    """For a process that judges: one thread."""
    torch.set_num_threads(1)


def cached(path, make, *arguments):
    """Rows of the file `path`, made and written if it is not there."""
    if not path.exists():
        part = path.with_suffix(".part")
        common.write_jsonl(part, make(*arguments))
        part.replace(path)
    return common.read_jsonl(path)


def judge_run(run, base, texts, samples):
    """A row for the SFT model and for each checkpoint of a PPO run: means over `samples` answers to each text."""
    reference, reward_model, tokenizer = common.load(base)
    policy, rows = copy.deepcopy(reference), []
    for update, weights in chain([(0, reference.state_dict())], common.checkpoints(run)):
        policy.load_state_dict(weights)
        judged = [common.answers(policy, reference, reward_model, tokenizer, texts, seed) for seed in range(samples)]
        judged = [row for rows_of_seed in judged for row in rows_of_seed]
        sft = judged if update == 0 else sft
        wins = [(row["gold"] > other["gold"]) + (row["gold"] == other["gold"]) / 2 for row, other in zip(judged, sft)]
        means = {key: mean(row[key] for row in judged) for key in ("score", "gold", "kl", "length", "ended")}
        rows.append({"update": update, "episode": update * ppo_rlhf.Args.batch_size, "win_rate": mean(wins), **means})
    return rows


def judge_best_of_n(base, texts, best_of):
    """A row for each n = 1, 2, 4, ... up to `best_of`: what the best of n answers of the SFT model is like."""
    reference, reward_model, tokenizer = common.load(base)
    sets = [common.answers(reference, reference, reward_model, tokenizer, texts, seed) for seed in range(best_of)]
    keys = ("score", "gold", "length")
    table = {key: torch.tensor([[row[key] for row in rows] for rows in sets], dtype=torch.float64).T for key in keys}
    order = table["score"].argsort(1)  # [prompts, N] worst first
    rows = []
    for n in [2**k for k in range(best_of.bit_length())]:
        # The i-th worst of N is the best of its subset if the n - 1 others are among the i - 1 worse ones.
        weights = torch.tensor([math.comb(i, n - 1) / math.comb(best_of, n) for i in range(best_of)], dtype=torch.float64)  # [N]
        means = {key: (table[key].gather(1, order) @ weights).mean().item() for key in keys}
        rows.append({"n": n, "kl": math.log(n) - (n - 1) / n, **means})
    return rows


def root(kl):
    return math.sqrt(max(kl, 0.0))  # an estimate from samples may be below 0


def features(family, d):
    """[points, 2]: what the coefficients a and b are multiplied by."""
    return torch.stack([d, -(d * d if family == "best-of-n" else torch.xlogy(d, d))], 1)


def fit(family, paths):
    """Least squares of gold(d) - gold(0) over the points of `paths`, each a list of rows that begins with the SFT model's."""
    points = [(root(row["kl"]), row["gold"] - path[0]["gold"]) for path in paths for row in path[1:]]
    d, gain = torch.tensor(points, dtype=torch.float64).T  # [points] each
    design = features(family, d)  # [points, 2]
    solution = torch.linalg.lstsq(design, gain[:, None]).solution[:, 0]  # [2]
    residuals, deviations = gain - design @ solution, gain - gain.mean()  # [points]
    r2 = (1 - residuals.square().sum() / deviations.square().sum()).item()
    return {"kind": "fit", "family": family, "a": solution[0].item(), "b": solution[1].item(), "r2": r2, "points": len(gain),
            "d_max": d.max().item(), "gold_0": mean(path[0]["gold"] for path in paths)}  # fmt: skip


def average(paths):
    """Mean over seeds, point by point: paths of equal length -> one path."""
    keys = paths[0][0].keys() - {"kind", "seed", "beta"}
    return [{key: mean(row[key] for row in rows) for key in keys} for rows in zip(*paths)]


def peak(path):
    return max(path, key=lambda row: row["gold"])


def gold_at(path, kl):
    """Gold score where a path first reaches `kl`: between two checkpoints, on a line over sqrt(KL); NaN if it never does."""
    for low, high in zip(path, path[1:]):
        if low["kl"] <= kl < high["kl"]:
            share = (root(kl) - root(low["kl"])) / (root(high["kl"]) - root(low["kl"]))
            return low["gold"] + share * (high["gold"] - low["gold"])
    return math.nan


def interval(values):
    """Mean of shares and 95% interval by Student's t over seeds, in percent, cut to 0 ... 100."""
    center = mean(values)
    if len(values) < 2:
        return f"{100 * center:.0f}"
    half = common.half_width(values)
    return f"{100 * center:.0f} [{100 * max(0, center - half):.0f}, {100 * min(1, center + half):.0f}]"


def print_tables(runs, best, fits):
    """runs: {beta: paths of the seeds}; best: best-of-n paths of the seeds."""
    print("\n| beta | final RM score | final gold | win rate, % | KL, nats | length, tokens | peak gold | at KL | at episode |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for beta, paths in runs.items():
        last, top, golds = average(paths)[-1], peak(average(paths)), [path[-1]["gold"] for path in paths]
        print(f"| {beta} | {last['score']:.2f} | {last['gold']:.2f} ({min(golds):.2f} to {max(golds):.2f}) "
              f"| {interval([path[-1]['win_rate'] for path in paths])} | {last['kl']:.1f} | {last['length']:.0f} "
              f"| {top['gold']:.2f} | {top['kl']:.1f} | {top['episode']:.0f} |")  # fmt: skip
    print("\n| best of n | RM score | gold | KL, nats | length, tokens |\n| --- | --- | --- | --- | --- |")
    for row in average(best):
        print(f"| {row['n']:.0f} | {row['score']:.2f} | {row['gold']:.2f} | {row['kl']:.2f} | {row['length']:.0f} |")
    print("\n| fit | a | b | R2 | points |\n| --- | --- | --- | --- | --- |")
    for row in fits:
        print(f"| {row['family']} | {row['a']:.3f} | {row['b']:.3f} | {row['r2']:.3f} | {row['points']} |")


def print_said_and_seen(runs, best):
    """What is said of the leash, and beside it what these rows show; every figure is of paths averaged over seeds."""

    def at(row):
        return f"{row['gold']:.2f} at {row['kl']:.1f} nats"

    means = {beta: average(paths) for beta, paths in runs.items()}
    tops, ends = {beta: peak(path) for beta, path in means.items()}, {beta: path[-1] for beta, path in means.items()}
    first = max(ends, key=lambda beta: ends[beta]["gold"])
    print("\nsaid: 0.02 to 0.2 is a usual beta (ppo_rlhf.py)")
    print(f"seen: the highest final gold score is {at(ends[first])}, at beta {first}; in order of beta: "
          + ", ".join(f"{row['gold']:.2f}" for row in ends.values()))  # fmt: skip
    free = next((beta for beta in runs if float(beta) == 0), None)
    if free:
        worse = sum(path[-1]["gold"] < path[0]["gold"] for path in runs[free])
        print("said: without the penalty the gold score rises, then falls, while the RM score goes on rising (Gao et al. 2022)")
        print(f"seen: beta 0 begins at {means[free][0]['gold']:.2f}, peaks at {at(tops[free])} and ends at {at(ends[free])}, "
              f"below its start in {worse} of {len(runs[free])} seeds; RM score {tops[free]['score']:.2f} at the peak, "
              f"{ends[free]['score']:.2f} at the end")  # fmt: skip
        print("said: the penalty buys no more gold at the same KL than stopping early without it (Gao et al. 2022)")
        print("seen: gold score where each beta ends, and where the path of beta 0 passes the same KL: "
              + ", ".join(f"beta {beta} {row['gold']:.2f} and {gold_at(means[free], row['kl']):.2f}"
                          for beta, row in ends.items() if beta != free))  # fmt: skip
    last = average(best)[-1]
    near = [row["gold"] for path in means.values() for row in path[1:] if abs(row["kl"] - last["kl"]) < 0.5]
    print("said: best-of-n gains more gold for each nat than RL (Gao et al. 2022)")
    print(f"seen: best of {last['n']:.0f}: {at(last)}; PPO within 0.5 nats of that: "
          + (f"{min(near):.2f} to {max(near):.2f} ({len(near)} mean checkpoints)" if near else "no checkpoint"))  # fmt: skip


def draw_paths(axis, runs, key, x):
    """One colour and marker a beta: thin lines are seeds, thick ones their mean."""
    for i, (beta, paths) in enumerate(runs.items()):
        # dark to light with rising beta, without viridis's yellow, which is too pale for a line on white
        colour = plt.cm.viridis(0.88 * i / max(1, len(runs) - 1))
        for path in paths:
            axis.plot([x(row) for row in path], [row[key] for row in path], color=colour, linewidth=0.5, alpha=0.55)
        path = average(paths)
        axis.plot([x(row) for row in path], [row[key] for row in path], color=colour, linewidth=1.6, marker=MARKERS[i],
                  markersize=4.5, markevery=max(1, len(path) // 5), label=f"beta {beta}")  # fmt: skip
    axis.set_ylabel(LABELS[key])
    axis.grid(alpha=0.25, linewidth=0.6)


def draw_over_kl(runs, best, fits, path):
    """Above, over the square root of KL; below, over KL on a log axis, the gold score from the SFT model's upwards."""
    figure, axes = plt.subplots(2, 2, figsize=(10, 8.4), layout="constrained")
    tops, mean_best = [peak(average(paths)) for paths in runs.values()], average(best)
    for axis, key, over in zip(axes.flat, ("gold", "score") * 2, (root, root, float, float)):
        draw_paths(axis, runs, key, lambda row: over(row["kl"]))
        axis.plot([over(row["kl"]) for row in mean_best], [row[key] for row in mean_best], color="black", linewidth=1.6,
                  marker="|", markersize=8, label="best-of-n")  # fmt: skip
        axis.plot([over(row["kl"]) for row in tops], [row[key] for row in tops], marker="*", markersize=10, color="white",
                  markeredgecolor="black", linestyle="", zorder=5, label="highest gold of a beta")  # fmt: skip
        for row in fits if key == "gold" else []:
            d = torch.linspace(0, row["d_max"], 1000, dtype=torch.float64)  # [1000]
            curve = row["gold_0"] + features(row["family"], d) @ torch.tensor([row["a"], row["b"]], dtype=torch.float64)  # [1000]
            x = d if over is root else d * d
            axis.plot(x, curve, linewidth=1.4, label=f"fit: {row['family']}", **FAMILIES[row["family"]])
        axis.set_xlabel("square root of KL (nats an answer)" if over is root else LABELS["kl"])
    for axis in axes[1]:
        axis.set_xscale("log", nonpositive="mask"), axis.set_xlim(left=0.05), axis.xaxis.set_major_formatter("{x:g}")
    axes[1, 0].set_ylim(mean_best[0]["gold"] - 0.3, peak(tops)["gold"] + 0.4)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper left", ncols=5, frameon=False,
                  title="thick: mean over seeds; thin: each seed", alignment="left")
    figure.savefig(path, dpi=105)
    plt.close(figure)


def draw_over_episodes(runs, path):
    figure, axes = plt.subplots(1, 3, figsize=(10, 3.9), layout="constrained")
    for axis, key in zip(axes, ("gold", "score", "kl")):
        draw_paths(axis, runs, key, lambda row: row["episode"])
        axis.set_xlabel("episodes")
    axes[2].set_yscale("log", nonpositive="mask"), axes[2].yaxis.set_major_formatter("{x:g}")  # update 0 has none
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper left", ncols=9, frameon=False, columnspacing=1.2,
                  title="thick: mean over seeds; thin: each seed", alignment="left")
    figure.savefig(path, dpi=105)
    plt.close(figure)


def report(rows, output):
    """Tables, fits and pictures from the rows -> the rows of the fits."""
    betas = sorted({row["beta"] for row in rows if row["kind"] == "ppo"}, key=float)
    seeds = sorted({row["seed"] for row in rows})
    runs = {beta: [[row for row in rows if row["kind"] == "ppo" and (row["beta"], row["seed"]) == (beta, seed)] for seed in seeds]
            for beta in betas}  # fmt: skip
    best = [[row for row in rows if row["kind"] == "best_of_n" and row["seed"] == seed] for seed in seeds]
    free = [path for beta in betas if float(beta) == 0 for path in runs[beta]]
    fits = [fit(family, paths) for family, paths in zip(FAMILIES, (free, [*chain(*runs.values())], best))
            if sum(len(path) - 1 for path in paths) > 2]  # fmt: skip
    print_tables(runs, best, fits)
    print_said_and_seen(runs, best)
    plt.rcParams.update({"font.size": 9.5, "axes.spines.top": False, "axes.spines.right": False})
    draw_over_kl(runs, best, fits, output / "beta_sweep.png")
    draw_over_episodes(runs, output / "beta_sweep_updates.png")
    return fits


def check(args):
    """Bad flags end the run here, with one line."""
    try:
        prices = [float(beta) for beta in args.betas]
    except ValueError:
        prices = [-1.0]
    if not all(0 <= price < math.inf for price in prices) or len({*prices}) < len(prices) or len(prices) > len(MARKERS):
        ppo_rlhf.fail(f"--betas {' '.join(args.betas)}: must be up to {len(MARKERS)} different numbers of at least 0")
    if len({*args.seeds}) < len(args.seeds) or len(args.seeds) > max(T_975) or min(args.seeds) < 0:
        ppo_rlhf.fail(f"--seeds {' '.join(map(str, args.seeds))}: must be up to {max(T_975)} different numbers of at least 0")
    least = {"total_episodes": SAVE_STEPS * ppo_rlhf.Args.batch_size, "samples": 1, "best_of": 2, "limit": 1, "parallel": 1}
    for name, bound in least.items():
        if getattr(args, name) is not None and getattr(args, name) < bound:
            ppo_rlhf.fail(f"--{name} {getattr(args, name)}: must be at least {bound}")


def collect(args):
    """Make and judge what is not there yet -> rows of all PPO runs and of best-of-n."""
    base_dir, texts = args.base_dir.resolve(), common.held_out(args.limit)
    sweep, jobs = base_dir / "beta_sweep", []  # jobs of judging: (what is judged, arguments of `cached`)
    common.baselines(base_dir, args.seeds, args.parallel)
    flags = ["--total_episodes", args.total_episodes, "--save_steps", SAVE_STEPS, "--save_total_limit", 1000]
    common.run_all([common.ppo_job(sweep / f"seed{seed}/beta_{beta}", base_dir / f"seed{seed}", seed, "--beta", beta, *flags)
                    for beta in args.betas for seed in args.seeds], args.parallel, "ppo_rlhf.py")  # fmt: skip
    for seed in args.seeds:
        base, path = base_dir / f"seed{seed}", sweep / f"seed{seed}/best_of_n_judged_{len(texts)}x{args.best_of}.jsonl"
        jobs.append(({"kind": "best_of_n", "seed": seed}, (path, judge_best_of_n, base, texts, args.best_of)))
        for beta in args.betas:
            run = sweep / f"seed{seed}/beta_{beta}"
            made = [json.loads((run / "args.json").read_text())[flag] for flag in ("total_episodes", "save_steps")]
            if made != [args.total_episodes, SAVE_STEPS]:
                ppo_rlhf.fail(f"{run}: was made with --total_episodes {made[0]} --save_steps {made[1]}, not "
                              f"{args.total_episodes} and {SAVE_STEPS}; give another --base_dir or --total_episodes")  # fmt: skip
            path = run / f"judged_{len(texts)}x{args.samples}.jsonl"
            jobs.append(({"kind": "ppo", "seed": seed, "beta": beta}, (path, judge_run, run, base, texts, args.samples)))
    with ProcessPoolExecutor(args.parallel, multiprocessing.get_context("spawn"), quiet) as pool:
        judged = [pool.submit(cached, *arguments) for _, arguments in jobs]
        return [{**what, **row} for future, (what, _) in zip(tqdm(judged, desc="judge"), jobs) for row in future.result()]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--betas", nargs="+", default=["0", "0.01", "0.05", "0.1", "0.2", "0.5", "1.0"], metavar="BETA",
                        help="prices of KL, written as in the folders' names")  # fmt: skip
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--total_episodes", type=int, default=10240, help="of each PPO run")
    parser.add_argument("--samples", type=int, default=2, help="answers of each checkpoint to each held-out prompt")
    parser.add_argument("--best_of", type=int, default=64, help="answers of the SFT model to each held-out prompt")
    parser.add_argument("--limit", type=int, help="held-out prompts; all by default")
    parser.add_argument("--parallel", type=int, default=2, help="PPO runs, or runs judged, at a time")
    parser.add_argument("--base_dir", type=Path, default=common.BASELINES)
    parser.add_argument("--output_dir", type=Path, default=common.RESULTS)
    parser.add_argument("--draw_only", action="store_true", help="run nothing: draw the rows in --output_dir/beta_sweep.jsonl")
    args = parser.parse_args()
    check(args)
    table = args.output_dir / "beta_sweep.jsonl"
    if args.draw_only and not table.exists():
        ppo_rlhf.fail(f"{table}: there is no such file; run without --draw_only first")
    args.output_dir.mkdir(parents=True, exist_ok=True)
    rows = [row for row in common.read_jsonl(table) if row["kind"] != "fit"] if args.draw_only else collect(args)
    fits = report(rows, args.output_dir)
    common.write_jsonl(table, [*rows, *fits])


if __name__ == "__main__":
    main()
