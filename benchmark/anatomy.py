"""What PPO sees in one answer, token by token: rewards, values and returns, advantages, and the ratio after one update.

    python benchmark/anatomy.py                                    # the shipped task, after sft.py and reward_model.py
    python benchmark/anatomy.py --sft_model_path my_sft/ --reward_model_path my_rm/ --prompt "How do I paint a wall?"

ppo_rlhf.main runs with its own flags, stopped after --updates of its updates. Its functions are wrapped to note what goes
in and out of them, so the figures show what the script computes, and no second version of it. In the last of the updates
--prompt takes the place of the batch's first prompt; its answer is drawn. Three runs with the same seed: as it is; without
the KL penalty (--beta 0); without the value head's learning (--vf_coef 0; the head starts at zero and stays there).

Every flag of ppo_rlhf.py may be given too. Writes anatomy.png, anatomy_beta0.png, anatomy_no_values.png and anatomy.jsonl,
a line for each token, to --output_dir. Needs benchmark/requirements.txt.
"""

import argparse
import json
import sys
import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # files only, no window
import matplotlib.pyplot as plt
import torch
import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import ppo_rlhf  # noqa: E402

BLUE, ORANGE, GREY = "#0072B2", "#E69F00", "#777777"  # Okabe and Ito's colours
RUNS = {  # file: title, what is changed in the flags
    "anatomy": ("as ppo_rlhf.py does it", {}),
    "anatomy_beta0": ("no KL penalty (--beta 0)", {"beta": 0.0}),
    "anatomy_no_values": ("the value head never trained (--vf_coef 0)", {"vf_coef": 0.0}),
}


class Stop(Exception):
    """Leaves ppo_rlhf.main when the last update has been made."""


def watch(args, prompt, updates):
    """Run ppo_rlhf.main for `updates` updates -> a dict for each token of the answer to `prompt` in the last of them."""
    names = ["encode", "left_pad", "rollout", "roll_left", "forward", "penalized_rewards", "gae", "whiten", "catch_signals"]
    real = {name: getattr(ppo_rlhf, name) for name in names}
    seen, calls = {}, Counter()  # function: (arguments, result) of its latest call

    def noted(name):
        def wrapper(*arguments, **named):
            calls[name] += 1
            seen[name] = arguments, real[name](*arguments, **named)
            return seen[name][1]

        return wrapper

    def left_pad(prompts, *rest):
        calls["left_pad"] += 1  # the first call checks the model; then one an update, and a look at how answers differ
        if calls["gae"] == updates:
            raise Stop
        if calls["gae"] == updates - 1 and calls["left_pad"] > 1:
            tokenizer = seen["encode"][0][0]
            prompts = [real["encode"](tokenizer, args.prompt_template, prompt)[0], *prompts[1:]]
        return real["left_pad"](prompts, *rest)

    try:
        for name in names:
            setattr(ppo_rlhf, name, noted(name))
        ppo_rlhf.left_pad, ppo_rlhf.catch_signals = left_pad, list  # Ctrl-C ends this script as any other
        with tempfile.TemporaryDirectory() as folder:
            try:
                ppo_rlhf.main(replace(args, output_dir=folder, eval_steps=10**9, save_steps=10**9))
            except Stop:
                pass
    finally:
        for name in names:
            setattr(ppo_rlhf, name, real[name])

    tokenizer, (_, (responses, lengths)) = seen["encode"][0][0], seen["rollout"]
    (scores, old, ref, mask, beta), rewards = seen["penalized_rewards"]
    (_, values, *_), (raw_advantages, returns) = seen["gae"]
    (policy, value_head, *_), advantages = seen["forward"][0], seen["whiten"][1]
    (_, _, prompt_lengths), sequences = seen["roll_left"]
    n = lengths[0].item()
    L = prompt_lengths[0].item() + n
    with torch.no_grad():  # the policy as the update left it, on the same row
        new, _, new_values = real["forward"](policy, value_head, sequences[:1, :L], prompt_lengths[:1], responses[:1, :n],
                                             mask[:1, :n], args.temperature, seen["forward"][0][7])  # fmt: skip
    columns = {"logprob": old, "ref_logprob": ref, "kl": old - ref, "reward": rewards, "value": values, "return": returns,
               "raw_advantage": raw_advantages, "advantage": advantages, "new_logprob": new, "ratio": (new - old[:1, :n]).exp(),
               "new_value": new_values}  # fmt: skip
    columns = {name: column[0, :n].tolist() for name, column in columns.items()}
    tokens = [tokenizer.decode([i]).strip() or tokenizer.convert_ids_to_tokens(i) for i in responses[0, :n].tolist()]
    shared = {"prompt": prompt, "update": updates, "beta": beta, "cliprange": args.cliprange, "epochs": args.num_ppo_epochs,
              "score": scores[0].item()}  # fmt: skip
    return [{**shared, "position": i, "token": token, "kl_reward": -beta * columns["kl"][i],
             **{name: column[i] for name, column in columns.items()}} for i, token in enumerate(tokens)]  # fmt: skip


def draw(rows, title, price, path):
    """Four panels over the tokens. price: the usual beta, for what the KL would have cost where it costs nothing."""
    first, x, get = rows[0], range(len(rows)), lambda name: [row[name] for row in rows]
    plt.rcParams.update({"font.size": 9.5, "axes.titlesize": 10, "axes.spines.top": False, "axes.spines.right": False})
    figure, (a, b, c, d) = plt.subplots(4, 1, figsize=(9, 9.4), sharex=True, layout="constrained")
    figures = f"score {first['score']:+.2f}, KL {sum(get('kl')):.2f} nats over {len(rows)} tokens"
    figure.suptitle(f"{first['prompt']}  –  {title}\nupdate {first['update']}: {figures}", fontsize=10.5, x=0.01, ha="left",
                    parse_math=False)  # fmt: skip

    def label(axis, name, unit, *entries):  # the legend stands above the panel's right end and covers nothing
        axis.set_title(name, loc="left"), axis.set_ylabel(unit)
        axis.legend(handles=entries, loc="lower right", bbox_to_anchor=(1.0, 0.98), ncols=4, frameon=False, borderaxespad=0.1,
                    handlelength=1.4, columnspacing=1.4)  # fmt: skip

    # (a) Beside most scores the KL could not be seen: then the score's bar is cut. Its size is written in any case.
    charged, score = first["beta"] > 0, first["score"]
    kl = get("kl_reward") if charged else [-price * row["kl"] for row in rows]
    reach = 1.3 * max(1e-3, *map(abs, kl))
    reach = max(reach, 1.2 * abs(score)) if abs(score) < 2 * reach else reach
    tip = max(-reach, min(score, reach))
    name = r"$-\beta\,(\log\pi - \log\pi_{ref})$" if charged else rf"not charged: $-{price:g}\,(\log\pi - \log\pi_{{ref}})$"
    penalty = a.bar(x, kl, label=name, facecolor=ORANGE if charged else "none", edgecolor=ORANGE)
    bar = a.bar(x[-1:], [tip], width=0.4, color=BLUE, label="score, on the last token")
    a.annotate(f"{score:+.2f}" + " (bar cut)" * (tip != score), (x[-1], 0.88 * tip), (-9, 0), textcoords="offset points",
               ha="right", va="center", color=BLUE)  # fmt: skip
    a.set_ylim(-reach, reach)
    label(a, "(a) rewards", "score units", penalty, bar)

    style = {"markersize": 3, "linewidth": 1.2}
    returns = b.plot(x, get("return"), color=BLUE, marker="o", label="return", **style)
    values = b.plot(x, get("value"), color=ORANGE, marker="s", label="value", **style)
    label(b, "(b) values against returns", "score units", *returns, *values)

    sign = [BLUE if row["advantage"] > 0 else ORANGE for row in rows]
    c.bar(x, get("advantage"), color=sign)
    patches = [plt.Rectangle((0, 0), 1, 1, color=colour, label=name) for colour, name in ((BLUE, "above 0"), (ORANGE, "below 0"))]
    label(c, "(c) advantages, whitened over the batch", "standard deviations", *patches)

    d.vlines(x, 1, get("ratio"), color=sign, linewidth=1.5)
    d.scatter(x, get("ratio"), color=sign, s=16, zorder=3)
    for bound in (1 - first["cliprange"], 1 + first["cliprange"]):
        clip = d.axhline(bound, color=GREY, linestyle="--", linewidth=1, label=f"clip bounds 1 ± {first['cliprange']:g}")
    dots = [plt.Line2D([], [], color=colour, marker="o", markersize=4, linestyle="", label=name)
            for colour, name in ((BLUE, "advantage above 0"), (ORANGE, "below 0"))]  # fmt: skip
    label(d, f"(d) ratio after the update's {first['epochs']} epochs", "new / old probability", *dots, clip)
    d.set_xticks(x, get("token"), rotation=90, fontsize=9.5 if len(rows) <= 50 else 8.5, parse_math=False)
    d.set_xlim(-0.8, len(rows) - 0.2)
    d.set_xlabel("tokens of the answer")
    for axis, zero in ((a, 0), (b, 0), (c, 0), (d, 1)):
        axis.axhline(zero, color="black", linewidth=0.6)
        axis.grid(axis="x", alpha=0.2, linewidth=0.6), axis.set_axisbelow(True)
    figure.align_ylabels()
    figure.savefig(path, dpi=105)
    plt.close(figure)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt", default="Please tell me how an eclipse works.", help="the prompt whose answer is drawn")
    parser.add_argument("--updates", type=int, default=20, help="updates to make; 20 is the middle of the default run")
    parser.add_argument("--output_dir", type=Path, default=ROOT / "benchmark/results")
    own, others = parser.parse_known_args()
    args = tyro.cli(ppo_rlhf.Args, args=others)
    if not 1 <= own.updates <= args.total_episodes // args.batch_size:
        parser.error(f"--updates {own.updates}: a run has 1 to {args.total_episodes // args.batch_size} updates")
    ppo_rlhf.transformers.logging.set_verbosity_error(), ppo_rlhf.transformers.logging.disable_progress_bar()
    own.output_dir.mkdir(parents=True, exist_ok=True)
    lines = []
    for name, (title, changes) in RUNS.items():
        rows = watch(replace(args, **changes), own.prompt, own.updates)
        draw(rows, title, args.beta, own.output_dir / f"{name}.png")
        print(f"{own.output_dir / name}.png: {' '.join(row['token'] for row in rows)}", flush=True)
        lines += [json.dumps({"figure": name, **row}, ensure_ascii=False) + "\n" for row in rows]
    (own.output_dir / "anatomy.jsonl").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
