"""How much KL penalty: PPO at seven betas and best-of-n against the same reward model, judged on the way.

    python benchmark/beta_sweep.py --seeds 1 2 3            # about an hour of CPU time
    python benchmark/beta_sweep.py --draw_only              # table, fits and picture from the rows, seconds

A beta is a number, or BETA:EPISODES where a run is longer, as over-optimization takes its time. The runs, a
checkpoint kept every 3 updates, and the judged rows stay in --base_dir/beta_sweep/seed1/beta_0.1 and so on.
Writes beta_sweep.jsonl (rows and fits) and beta_sweep.png (the longest run without a penalty, every seed).

Each checkpoint responds to the held-out prompts --samples times. Update 0 is the SFT model. Best-of-n:
--best_of N responses of the SFT model to each prompt; for every n the unbiased estimate of the expected best
of n by the reward model's score, from all subsets of n of the N. Its KL is log n - (n - 1) / n, an upper
bound where responses repeat (Beirami et al. 2024, arXiv 2401.01879).

Fits, by least squares over the points of all seeds, with d = sqrt(KL), as in Gao et al. 2022 (arXiv
2210.10760, whose letter beta is not the KL coefficient; here it is b):

    PPO         gold(d) - gold(0) = d (a - b log d)         once from the runs at beta 0, once from all runs
    best-of-n   gold(d) - gold(0) = d (a - b d)

"Peak", the highest mean gold score of a path, is found on the responses it is read from: a little too high.
"""

import math
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from itertools import chain

import common
import matplotlib

matplotlib.use("Agg")  # files only, no window
import matplotlib.pyplot as plt
import torch
from common import mean
from tqdm import tqdm

import ppo_rlhf

SAVE_STEPS = 3
FAMILIES = ("PPO, beta 0", "PPO, all betas", "best-of-n")  # what is fitted
BLUE, ORANGE, GREY = "#0072B2", "#E69F00", "#777777"  # Okabe and Ito's colours


def judge_run(run, base, texts, samples):
    torch.set_num_threads(1)
    rows = common.along(run, common.load(base), texts, samples)
    return [row | common.stamp(run) for row in rows]


def judge_best_of_n(base, texts, best_of):
    """A row for each n = 1, 2, 4, ... up to `best_of`: what the best of n responses of the SFT model is
    like."""
    torch.set_num_threads(1)
    models = common.load(base)
    sets = [common.respond(models.reference, models, texts, seed) for seed in range(best_of)]
    tables = {}  # of [prompts, N]
    for key in ("score", "gold", "length"):
        tables[key] = torch.tensor([[row[key] for row in rows] for rows in sets], dtype=torch.float64).T
    order = tables["score"].argsort(1)  # [prompts, N] worst first
    rows = []
    for n in [2**k for k in range(best_of.bit_length())]:
        # The i-th worst of N is the best of its subset if the n - 1 others are among the i - 1 worse ones.
        weights = [math.comb(i, n - 1) / math.comb(best_of, n) for i in range(best_of)]
        weights = torch.tensor(weights, dtype=torch.float64)  # [N]
        means = {key: (x.gather(1, order) @ weights).mean().item() for key, x in tables.items()}
        rows.append({"n": n, "kl": math.log(n) - (n - 1) / n, **means, **common.stamp()})
    return rows


def coefficient(beta):
    """Its number: 0.1 of "0.1", 0 of "0:10240"."""
    return float(beta.partition(":")[0])


def label(beta):
    """As tables and pictures name it: "0.1", "0, 10,240 episodes"."""
    value, _, episodes = beta.partition(":")
    return value + (f", {int(episodes):,} episodes" if episodes else "")


def root(kl):
    return math.sqrt(max(kl, 0.0))  # an estimate from samples may be below 0


def features(family, d):
    """[points, 2]: what the coefficients a and b are multiplied by."""
    return torch.stack([d, -(d * d if family == "best-of-n" else torch.xlogy(d, d))], 1)


def fit(family, paths):
    """Least squares of gold(d) - gold(0) over the points of paths that begin with the SFT model's."""
    points = [(root(row["kl"]), row["gold"] - path[0]["gold"]) for path in paths for row in path[1:]]
    d, gain = torch.tensor(points, dtype=torch.float64).T  # [points] each
    design = features(family, d)  # [points, 2]
    solution = torch.linalg.lstsq(design, gain[:, None]).solution[:, 0]  # [2]
    residuals = gain - design @ solution  # [points]
    r2 = 1 - residuals.square().sum() / (gain - gain.mean()).square().sum()
    found = {"a": solution[0].item(), "b": solution[1].item(), "r2": r2.item(), "points": len(gain)}
    return {"kind": "fit", "family": family, **found}


def over_seeds(paths):
    """Mean over seeds, point by point: paths of equal length -> one path."""
    keys = [key for key, value in paths[0][-1].items() if isinstance(value, (int, float)) and key != "seed"]
    keys = [key for key in keys if all(row.get(key) is not None for path in paths for row in path)]
    return [{key: mean(row[key] for row in rows) for key in keys} for rows in zip(*paths)]


def peak(path):
    return max(path, key=lambda row: row["gold"])


def print_tables(runs, best, fits):
    """runs: {beta: paths of the seeds}; best: best-of-n paths of the seeds."""
    titles = ["beta", "RM score", "gold score", "gold win rate, %", "KL, nats", "tokens"]
    table = []
    for beta, paths in runs.items():
        last = over_seeds(paths)[-1]
        top = peak(over_seeds(paths))
        golds = common.spread(path[-1]["gold"] for path in paths)
        wins = common.spread((100 * path[-1]["win_rate"] for path in paths), ".0f")
        figures = [f"{last['kl']:.1f}", f"{last['length']:.0f}", f"{top['gold']:.2f}", f"{top['kl']:.1f}"]
        figures.append(f"{top['episodes']:.0f}")
        table.append([label(beta), f"{last['score']:.2f}", golds, wins, *figures])
    common.print_table([*titles, "peak gold", "at KL", "at episode"], table)
    keys = ("n", "score", "gold", "kl", "length")
    table = [[f"{row[key]:.2f}" for key in keys] for row in over_seeds(best)]
    common.print_table(["best of n", "RM score", "gold score", "KL, nats", "tokens"], table)
    table = [[row["family"], *(f"{row[key]:.3f}" for key in ("a", "b", "r2")), row["points"]] for row in fits]
    common.print_table(["fit", "a", "b", "R2", "points"], table)


def draw(paths, path):
    """Gold score and reward model's score against episodes, a line style a seed."""
    plt.rcParams.update({"font.size": 9.5, "axes.spines.top": False, "axes.spines.right": False})
    figure, axis = plt.subplots(figsize=(7, 3.8), layout="constrained")
    names = {"score": "reward model's score (SDs of the SFT model's)", "gold": "gold score (at most {:g})"}
    for (key, name), colour in zip(names.items(), (ORANGE, BLUE)):
        for i, rows in enumerate(paths):
            line = [row["episodes"] for row in rows], [row[key] for row in rows]
            label = None if i else name.format(common.gold_judge.BEST)
            axis.plot(*line, ("-", "--", ":", "-.")[i % 4], color=colour, linewidth=1.6, label=label)
    default = ppo_rlhf.Args.total_episodes
    axis.axvline(default, color=GREY, linestyle="--", linewidth=1, label=f"default budget, {default:,}")
    axis.axhline(0, color="black", linewidth=0.6)
    axis.set_xlabel("episodes, without a KL penalty; a line style a seed")
    axis.set_ylabel("score")
    axis.xaxis.set_major_formatter("{x:,.0f}")
    axis.grid(alpha=0.25, linewidth=0.6)
    axis.legend(loc="lower left", frameon=False)
    figure.savefig(path, dpi=105)
    plt.close(figure)


def report(rows, output):
    """Tables, fits and picture from the rows -> the rows of the fits."""
    betas = sorted({row["beta"] for row in rows if row["kind"] == "ppo"}, key=lambda x: (coefficient(x), x))
    seeds = sorted({row["seed"] for row in rows})
    own = lambda beta, seed: [row for row in rows if (row.get("beta"), row["seed"]) == (beta, seed)]
    runs = {beta: [own(beta, seed) for seed in seeds] for beta in betas}
    best = [[row for row in rows if row["kind"] == "best_of_n" and row["seed"] == seed] for seed in seeds]
    free = [path for beta in betas if coefficient(beta) == 0 for path in runs[beta]]
    families = zip(FAMILIES, (free, [*chain(*runs.values())], best))
    fits = [fit(family, paths) for family, paths in families if sum(len(path) - 1 for path in paths) > 2]
    print_tables(runs, best, fits)
    if free:
        longest = max(path[-1]["episodes"] for path in free)
        draw([path for path in free if path[-1]["episodes"] == longest], output / "beta_sweep.png")
    return fits


def collect(args):
    """Make and judge what is not there yet -> rows of all PPO runs and of best-of-n."""
    texts = common.held_out(args.limit)
    common.baselines(args.base_dir, args.seeds, args.parallel)
    ppo = []
    jobs = []  # of judging: (what is judged, arguments of `cached`)
    for seed in args.seeds:
        base = args.base_dir / f"seed{seed}"
        sweep = args.base_dir / f"beta_sweep/seed{seed}"
        path = sweep / f"best_of_n_judged_{len(texts)}x{args.best_of}.jsonl"
        jobs.append(({"kind": "best_of_n", "seed": seed}, (path, judge_best_of_n, base, texts, args.best_of)))
        for beta in args.betas:
            value, _, episodes = beta.partition(":")
            run = sweep / f"beta_{beta.replace(':', '_')}"
            flags = {"beta": value, "total_episodes": episodes or args.total_episodes}
            ppo.append(common.ppo_job(run, base, seed, save_steps=SAVE_STEPS, **flags))
            path = run / f"judged_{len(texts)}x{args.samples}.jsonl"
            what = {"kind": "ppo", "seed": seed, "beta": beta}
            jobs.append((what, (path, judge_run, run, base, texts, args.samples)))
    common.run_all(ppo, args.parallel, "ppo", keep=True)
    with ProcessPoolExecutor(args.parallel, multiprocessing.get_context("spawn")) as pool:
        judged = [pool.submit(common.cached, *arguments) for _, arguments in jobs]
        found = [(what, future.result()) for future, (what, _) in zip(tqdm(judged, desc="judge"), jobs)]
    return [{**what, **row} for what, rows in found for row in rows]


def main():
    parser = common.parser(__doc__)
    add = parser.add_argument
    betas = ["0:10240", "0", "0.01", "0.05", "0.1", "0.2", "0.5", "1.0"]
    add("--betas", nargs="+", default=betas, help="each BETA or BETA:EPISODES")
    add("--total_episodes", type=int, default=ppo_rlhf.Args.total_episodes, help="of each PPO run")
    add("--samples", type=int, default=2, help="responses of each checkpoint to each held-out prompt")
    add("--best_of", type=int, default=64, help="responses of the SFT model to each held-out prompt")
    add("--draw_only", action="store_true", help="run nothing: draw the rows in beta_sweep.jsonl")
    args = parser.parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    table = args.output_dir / "beta_sweep.jsonl"
    if args.draw_only:
        rows = [row for row in common.read_jsonl(table) if row["kind"] != "fit"]
    else:
        rows = collect(args)
    fits = report(rows, args.output_dir)
    common.write_jsonl(table, [*rows, *fits])


if __name__ == "__main__":
    main()
