"""Which of PPO's implementation details matter here? Each is taken out alone, and the gold judge says what was lost.

    python benchmark/details.py --seeds 1 2 3

Every ablation is a copy of ppo_rlhf.py with a few words replaced, or a flag, run with default flags on the shipped task from
the same SFT and reward model as the script as it is. The policies that come out are judged alike, by common.answers: right
positions, temperature 0.7 and the normalized reward model, whatever they were trained with, and the same luck for all.

A difference is ablation minus the script as it is, at the same seed. Its interval is that of Student's t over the seeds,
mean +- t(97.5%, n-1) * standard deviation / sqrt(n). Of twenty such intervals one leaves 0 out by chance.

Some of the mistakes are caught by checks in the script: sampler against forward at the start, KL 0, ratio 1. Each ablation
first makes two updates with the checks in it, to see which of them ends the run. Then they are out, in every copy, the
unchanged one too: they decide whether a run goes on, and nothing else.

Reads   --base_dir: seed1/{sft,reward_model} and so on, made by default flags where they are missing.
Writes  benchmark/results/details.jsonl, a row for each detail and seed, and details.png. The runs are kept in --work_dir and
        skipped the next time, so a stopped sweep goes on.
Takes   45 PPO runs for three seeds (fourteen details and none), two at a time, and a short one for each detail.
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path

from common import (BASELINES, COLOURS, RESULTS, ROOT, answers, baselines, half_width, held_out, load, mean, ppo_job, ppo_rlhf, run_all,
                    write_jsonl)  # fmt: skip
from judge import judge
from tqdm import tqdm
from transformers import AutoModelForCausalLM

WHOLE = "nothing"
# detail: what takes its place, replacements in ppo_rlhf.py (each text must occur exactly once), flags
DETAILS = {
    WHOLE: ("the script as it is", {}, []),
    "positions of real tokens": (
        "the sampler counts slots, left pads too; the update does not",
        {"position_ids=(prompt_mask.cumsum(1) - 1).clamp(min=0)": "position_ids=torch.arange(P, device=device).expand(B, P)",
         "position = prompt_mask.sum(1, keepdim=True)": "position = torch.full((B, 1), P, device=device)"}, [],
    ),
    # What gae() finds on a pad it masks, so the score of an answer that ends early is lost. Only an answer that fills all
    # slots has no slot after its last token: it keeps its score there.
    "score on the last token": (
        "one slot later, on padding; a full row keeps it",
        {"last = mask.sum(1).long() - 1": "last = mask.sum(1).long().clamp(max=mask.shape[1] - 1)"}, [],
    ),
    "temperature in the log-probs": (
        "sampled at 0.7, log-probs of policy and reference at 1",
        {"(hidden.float()).div_(temperature)": "(hidden.float())",
         "(ref_hidden).div_(args.temperature)": "(ref_hidden)"}, [],
    ),
    "value clipping": (
        "plain squared error",
        {"torch.max((new_values - returns) ** 2, (clipped - returns) ** 2)": "(new_values - returns) ** 2"}, [],
    ),
    "advantage whitening": (
        "advantages as they are", {"advantages = whiten(advantages, mask)": "advantages = advantages * mask"}, [],
    ),
    "dropout off": (
        "0.1 in the policy: sampling, old log-probs, update",
        {"setattr(config, name, 0.0)": "setattr(config, name, 0.1 if auto_class is AutoModelForCausalLM else 0.0)",
         "        policy.eval()\n        batch = ": "        policy.train()\n        batch = ",
         "model.train(args.gradient_checkpointing)": "model.train()"}, [],
    ),
    "missing-EOS penalty": ("--missing_eos_penalty 0", {}, ["--missing_eos_penalty", 0]),
    "value head from zero": (
        "torch's random start of a linear layer",
        {"torch.nn.init.zeros_(value_head.weight), torch.nn.init.zeros_(value_head.bias)":
             "torch.manual_seed(args.seed), value_head.reset_parameters()"}, [],
    ),
    "score normalization": (
        "the reward model's raw scores",
        {"(score_sequences(reward_model, sequences, lengths) - config.reward_mean) / config.reward_std":
             "score_sequences(reward_model, sequences, lengths)"}, [],
    ),
    "value head's learning rate": ("--value_learning_rate 1e-4, the policy's", {}, ["--value_learning_rate", 1e-4]),
    "small weight of the value loss": (
        "--vf_coef 0.5 --value_learning_rate 3e-3", {}, ["--vf_coef", 0.5, "--value_learning_rate", 3e-3],
    ),
    "GAE's lambda below 1": ("--lam 1", {}, ["--lam", 1]),
    "warm-up": ("--warmup_steps 0", {}, ["--warmup_steps", 0]),
    "Adam's eps of 1e-5": ("1e-8, torch's default", {"eps=1e-5, weight_decay": "eps=1e-8, weight_decay"}, []),
}  # fmt: skip
# check: what it says when it ends a run; its text; its text without an effect
CHECKS = {
    "sampler = forward": ("probabilities of sampler and scorer differ", "if worst > 1e-3:", "if False:"),
    "KL = 0": ("KL is not 0 at the start", "assert masked_mean(kl.abs(), mask) < tolerance", "assert True"),
    "ratio = 1": ("ratio is not 1 on the first minibatch", "assert first_log_ratio < tolerance", "assert True"),
}
MARKERS = "os^Dv<>ph*"


def fail(message):
    print(f"details.py: error: {message}", file=sys.stderr)
    raise SystemExit(2)


def write_copy(path, source, edits, name):
    """A copy of ppo_rlhf.py with the replacements in it."""
    for old, new in edits.items():
        if source.count(old) != 1:
            fail(f"{name}: its text occurs {source.count(old)} times in ppo_rlhf.py, not once: {old!r}")
        source = source.replace(old, new)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(source, encoding="utf-8")


def stopped_by(folder, base, seed, flags):
    """Name of the check that ends the copy in `folder` within two updates, "" if none does."""
    verdict = folder / "stopped_by"
    if not verdict.exists():
        with tempfile.TemporaryDirectory() as output_dir:
            _, command = ppo_job(output_dir, base, seed, *flags, "--total_episodes", 2 * ppo_rlhf.Args.batch_size,
                                 "--dataset_test_split", "test[:2]")  # fmt: skip
            command = [sys.executable, folder / "ppo_rlhf.py", *command[1:]]
            run = subprocess.run([*map(str, command)], cwd=ROOT, capture_output=True, text=True)
        names = [name for name, (message, *_) in CHECKS.items() if message in run.stderr]
        if run.returncode and not names:
            fail(f"{folder}: {run.stderr.strip().splitlines()[-1]}")
        verdict.write_text(names[0] if run.returncode else "")
    return verdict.read_text()


def judged(policy, models, texts, samples):
    """Means over `samples` answers to each of `texts`: gold score, the reward model's, KL, and so on."""
    rows = [row for seed in range(samples) for row in answers(policy, *models, texts, seed)]
    garbled = [judge(row["prompt"], row["response"])["garbled"] for row in rows]
    keys = ["gold", "score", "kl", "length", "ended"]
    return {**{key: mean(row[key] for row in rows) for key in keys}, "garbled": mean(garbled), "answers": len(rows)}


def compare(rows):
    """Rows of all seeds -> {detail: its figures over the seeds}, the greatest loss first."""
    found = {}
    for name in dict.fromkeys(row["detail"] for row in rows):
        own = {row["seed"]: row for row in rows if row["detail"] == name}
        whole = {row["seed"]: row["gold"] for row in rows if row["detail"] == WHOLE}
        found[name] = {key: [row[key] for row in own.values()] for key in ("gold", "kl", "length", "garbled")}
        found[name] |= {"stopped_by": [row["stopped_by"] for row in own.values()][0],
                        "difference": [row["gold"] - whole[seed] for seed, row in own.items()]}  # fmt: skip
    return dict(sorted(found.items(), key=lambda item: mean(item[1]["difference"])))


def print_table(found):
    columns = ["taken out", "instead", "gold score without it", "difference [95% interval]", "seen to matter", "KL, nats",
               "length, tokens", "garbled an answer", "stopped by the check"]  # fmt: skip
    print(f"| {' | '.join(columns)} |\n{'| --- ' * len(columns)}|")
    for name, row in found.items():
        gold, difference, half = row["gold"], mean(row["difference"]), half_width(row["difference"])
        change, seen = f"{difference:+.2f}", "one seed only"
        if not math.isnan(half):
            change += f" [{difference - half:+.2f}, {difference + half:+.2f}]"
            seen = "no: 0 is in the interval"
            if abs(difference) > half:
                seen = f"yes, {'worse' if difference < 0 else 'better'} without"
        instead = DETAILS[name][0] if name in DETAILS else "before PPO"
        if name in (WHOLE, "SFT model"):
            change, seen = change * (name != WHOLE), ""
        print(f"| {name} | {instead} | {mean(gold):.2f} ({min(gold):.2f} to {max(gold):.2f}) | {change} | {seen} "
              f"| {mean(row['kl']):.2f} | {mean(row['length']):.1f} | {mean(row['garbled']):.3f} | {row['stopped_by']} |")


def draw(found, seeds, path):
    """A row for each detail: the difference of each seed as a mark, their mean as a bar, its interval as a line."""
    import matplotlib  # not at the top: the tests read DETAILS without it

    matplotlib.use("Agg")  # files only, no window
    import matplotlib.pyplot as plt

    whole, sft = found[WHOLE]["gold"], mean(found["SFT model"]["difference"])
    names = [name for name in found if name in DETAILS and name != WHOLE]
    plt.rcParams.update({"font.size": 9.5, "axes.titlesize": 10, "axes.spines.top": False, "axes.spines.right": False})
    figure, axis = plt.subplots(figsize=(9.5, 1.6 + 0.42 * len(names)), layout="constrained")
    noise = axis.axvspan(min(whole) - mean(whole), max(whole) - mean(whole), color="#DDDDDD", zorder=0,
                         label="range over seeds with every detail")  # fmt: skip
    axis.axvline(0, color="black", linewidth=0.8)
    start = axis.axvline(sft, color="black", linewidth=1, linestyle=":", label="SFT model (no PPO)")
    marks = []
    for place, name in enumerate(names):
        differences, half = found[name]["difference"], half_width(found[name]["difference"])
        axis.barh(place, mean(differences), height=0.6, color=COLOURS[4], alpha=0.6)
        if not math.isnan(half):
            axis.plot([mean(differences) - half, mean(differences) + half], [place, place], color=COLOURS[0], linewidth=1.2)
        marks = [axis.plot(x, place, marker, color=COLOURS[3], markersize=5, markeredgecolor="white", label=f"seed {seed}")[0]
                 for x, marker, seed in zip(differences, MARKERS, seeds)]  # fmt: skip
    # An interval over few seeds can be far wider than all that was seen, and would shrink the rest to a point
    seen = [x for name in names for x in found[name]["difference"]] + [sft, 0.0]
    room = 0.08 * (max(seen) - min(seen)) + 0.05
    axis.set_xlim(min(seen) - room, max(seen) + room + 0.1 * (max(seen) - min(seen)))
    axis.set_yticks(range(len(names)), [name + " *" * bool(found[name]["stopped_by"]) for name in names])
    axis.set_ylim(len(names) - 0.4, -0.6)
    axis.set_xlabel("gold score without the detail, minus gold score with it, same seed (points; an answer is worth at most 4)")
    bar = plt.Rectangle((0, 0), 1, 1, color=COLOURS[4], alpha=0.6, label="mean over seeds")
    interval = plt.Line2D([], [], color=COLOURS[0], linewidth=1.2, label="95% interval (may be cut)")
    figure.legend(handles=[*marks, bar, interval, noise, start], loc="outside upper left", ncols=4, frameon=False)
    axis.set_title("one detail taken out at a time  (* the script's own checks refuse it)", loc="left")
    axis.grid(axis="x", alpha=0.25, linewidth=0.6), axis.set_axisbelow(True)
    figure.savefig(path, dpi=105)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--details", nargs="+", default=list(DETAILS), choices=list(DETAILS), metavar="DETAIL")
    parser.add_argument("--total_episodes", type=int, default=ppo_rlhf.Args.total_episodes, help="of every run")
    parser.add_argument("--samples", type=int, default=4, help="answers judged to each held-out prompt")
    parser.add_argument("--limit", type=int, help="held-out prompts; all without it")
    parser.add_argument("--base_dir", type=Path, default=BASELINES)
    parser.add_argument("--work_dir", type=Path, default=ROOT / "runs/details")
    parser.add_argument("--output_dir", type=Path, default=RESULTS)
    parser.add_argument("--parallel", type=int, default=2, help="runs at a time")
    args = parser.parse_args()
    if min(args.parallel, args.samples, 1 if args.limit is None else args.limit) < 1 or not 1 <= len({*args.seeds}) <= 10:
        fail("--parallel, --samples and --limit must be at least 1, and there may be 1 to 10 --seeds")
    if args.total_episodes < ppo_rlhf.Args.batch_size:
        fail(f"--total_episodes {args.total_episodes}: one update takes {ppo_rlhf.Args.batch_size}")
    base, work_dir, seeds = args.base_dir.resolve(), args.work_dir.resolve(), [*dict.fromkeys(args.seeds)]
    source = (ROOT / "ppo_rlhf.py").read_text(encoding="utf-8")
    checks_out = {old: new for _, old, new in CHECKS.values()}
    details = {name: DETAILS[name] for name in dict.fromkeys([WHOLE, *args.details])}
    folders = {name: work_dir / name.replace(" ", "_").replace("'", "") for name in details}

    # Runs that are kept must be of the same code and length, or they would be compared with others
    now = {"base_dir": str(base), "total_episodes": args.total_episodes, "code": ppo_rlhf.checksum(ROOT / "ppo_rlhf.py")}
    began = work_dir / "sweep.json"
    if began.exists() and json.loads(began.read_text()) != now:
        fail(f"{work_dir} holds runs of another ppo_rlhf.py, --base_dir or --total_episodes; name another --work_dir")
    for name, (_, edits, _) in details.items():  # all of them first: a text that is no longer found shows at once
        write_copy(folders[name] / "checked/ppo_rlhf.py", source, edits, name)
        write_copy(folders[name] / "ppo_rlhf.py", source, {**edits, **checks_out}, name)
    began.write_text(json.dumps(now))

    baselines(base, seeds, args.parallel)
    first = base / f"seed{seeds[0]}"
    stopped = {name: stopped_by(folders[name] / "checked", first, seeds[0], flags)
               for name, (_, _, flags) in tqdm(details.items(), desc="checks")}  # fmt: skip
    jobs = []
    for seed in seeds:  # all details of one seed first: a stopped sweep has a whole picture
        for name, (_, _, flags) in details.items():
            folder, command = ppo_job(folders[name] / f"seed{seed}", base / f"seed{seed}", seed, *flags,
                                      "--total_episodes", args.total_episodes)  # fmt: skip
            jobs.append((folder, [folders[name] / "ppo_rlhf.py", *command[1:]]))
    run_all(jobs, args.parallel, "ppo")

    texts, rows = held_out(args.limit), []
    for seed in seeds:
        models = load(base / f"seed{seed}")
        for name in tqdm(["SFT model", *details], desc=f"judging seed {seed}"):
            policy = models[0]
            if name in details:
                policy, _ = ppo_rlhf.load_model(AutoModelForCausalLM, str(folders[name] / f"seed{seed}"), name)
            rows.append({"detail": name, "seed": seed, "stopped_by": stopped.get(name, ""), "total_episodes": args.total_episodes,
                         **judged(policy, models, texts, args.samples)})  # fmt: skip
    write_jsonl(args.output_dir / "details.jsonl", rows)
    found = compare(rows)
    print_table(found)
    draw(found, seeds, args.output_dir / "details.png")
    print(f"{args.output_dir / 'details.png'}: {len(details) - 1} details, {len(seeds)} seeds, {args.samples} answers to each of "
          f"{len(texts)} held-out prompts")  # fmt: skip


if __name__ == "__main__":
    main()
