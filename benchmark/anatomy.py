"""What PPO sees in one response, token by token: rewards, values, advantages, ratio after one update.

    python benchmark/anatomy.py [--prompt "How do I paint a wall?"]     # after sft.py and reward_model.py
    python benchmark/anatomy.py --draw_only                             # pictures from anatomy.jsonl

ppo_rlhf.main runs with its own flags, all of which may be given, and is stopped after --updates of its
updates. Some of its functions are wrapped to note what goes in and out, so the figures show what the script
computes. In the last of the updates --prompt takes the place of the batch's first prompt; its response is
drawn. Three runs: as it is; without the KL penalty; without the value head's learning (it starts at zero and
stays there).

Writes anatomy.png, anatomy_beta0.png, anatomy_no_values.png and anatomy.jsonl, a line for each token.
"""

import argparse
import json
import tempfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import common
import matplotlib

matplotlib.use("Agg")  # files only, no window
import matplotlib.pyplot as plt
import torch
import tyro

import ppo_rlhf

BLUE, ORANGE, GREY = "#0072B2", "#E69F00", "#777777"  # Okabe and Ito's colours
RUNS = {  # file: title, what is changed in the flags
    "anatomy": ("as ppo_rlhf.py does it", {}),
    "anatomy_beta0": ("no KL penalty (--beta 0)", {"beta": 0.0}),
    "anatomy_no_values": ("the value head never trained (--vf_coef 0)", {"vf_coef": 0.0}),
}


class Stop(Exception):
    """Leaves ppo_rlhf.main when the last update has been made."""


def watch(args, prompt, updates):
    """Run ppo_rlhf.main for `updates` updates -> a dict for each token of the response to `prompt` in the
    last."""
    names = ("sample", "penalized_rewards", "gae", "whiten", "save_checkpoint")
    real = {name: getattr(ppo_rlhf, name) for name in names}
    seen = {}  # function: (arguments, result) of its latest call
    samples = []

    def noted(name):
        def wrapper(*arguments):
            if name == "save_checkpoint":
                seen[name] = arguments, None
                raise Stop
            if name == "sample":
                samples.append(name)
                if len(samples) == updates:
                    chat = [{"role": "user", "content": prompt}]
                    text = ppo_rlhf.render(arguments[1], {}, chat, add_generation_prompt=True)
                    ids = arguments[1](text, add_special_tokens=False).input_ids
                    arguments[2][0] = SimpleNamespace(ids=ids, row={}, shown=prompt)
            seen[name] = arguments, real[name](*arguments)
            return seen[name][1]

        return wrapper

    try:
        for name in names:
            setattr(ppo_rlhf, name, noted(name))
        with tempfile.TemporaryDirectory() as folder:
            ppo_rlhf.main(replace(args, output_dir=folder, save_steps=updates))
    except Stop:
        pass
    finally:
        for name in names:
            setattr(ppo_rlhf, name, real[name])
    (_, tokenizer, *_), batch = seen["sample"]
    (scores, kl, _, beta), rewards = seen["penalized_rewards"]
    (_, values, *_), (_, returns) = seen["gae"]
    trained = seen["save_checkpoint"][0][2]
    n = batch.response_lengths[0]
    texts = batch.sequences[:1, : batch.lengths[0]], batch.starts[:1], batch.responses[:1, :n]
    with torch.no_grad():  # the policy as the update left it, on the same row
        new_logprobs, _, _ = ppo_rlhf.forward(trained["policy"], *texts, args.temperature)
    columns = {
        "kl": kl,
        "kl_reward": -beta * kl,
        "reward": rewards,
        "value": values,
        "return": returns,
        "advantage": seen["whiten"][1],
        "ratio": (new_logprobs - batch.logprobs[:1, :n]).exp(),
    }
    ids = batch.responses[0, :n].tolist()
    columns = {name: column[0, :n].tolist() for name, column in columns.items()}
    columns["token"] = [tokenizer.decode([i]).strip() or tokenizer.convert_ids_to_tokens(i) for i in ids]
    shared = {"prompt": prompt, "update": updates, "beta": beta, "cliprange": args.cliprange}
    shared |= {"epochs": args.num_ppo_epochs, "score": scores[0].item()}
    return [{**shared, **dict(zip(columns, column))} for column in zip(*columns.values())]


def draw(rows, title, price, path):
    """Four panels over the tokens. price: the usual beta, for what the KL would have cost where it costs
    nothing."""
    first = rows[0]
    x = range(len(rows))
    get = lambda name: [row[name] for row in rows]
    plt.rcParams.update({"font.size": 9.5, "axes.spines.top": False, "axes.spines.right": False})
    figure, (a, b, c, d) = plt.subplots(4, 1, figsize=(9, 9.4), sharex=True, layout="constrained")
    score = first["score"]
    figures = f"score {score:+.2f}, KL {sum(get('kl')):.2f} nats over {len(rows)} tokens"
    title = f"{first['prompt']}  -  {title}\nupdate {first['update']}: {figures}"
    figure.suptitle(title, fontsize=10.5, x=0.01, ha="left", parse_math=False)

    def label(axis, name, unit):  # the legend stands above the panel's right end and covers nothing
        axis.set_title(name, loc="left", fontsize=10)
        axis.set_ylabel(unit)
        axis.legend(loc="lower right", bbox_to_anchor=(1.0, 0.98), ncols=4, frameon=False, borderaxespad=0.1)

    kl = get("kl_reward") if first["beta"] else [-price * row["kl"] for row in rows]
    name = "-beta * KL" if first["beta"] else f"not charged: -{price:g} * KL"
    a.bar(x, kl, label=name, facecolor=ORANGE if first["beta"] else "none", edgecolor=ORANGE)
    a.bar(x[-1:], [score], width=0.4, color=BLUE, label=f"score, {score:+.2f}, on the last token")
    reach = 1.3 * max(1e-3, *map(abs, kl))
    a.set_ylim(-reach, reach)  # of most scores the bar is cut, or the KL could not be seen
    label(a, "(a) rewards, in SDs of the SFT model's scores", "reward")
    b.plot(x, get("return"), color=BLUE, marker="o", markersize=3, label="return")
    b.plot(x, get("value"), color=ORANGE, marker="s", markersize=3, label="value")
    label(b, "(b) return: sum of the rewards from here on; value: what the critic expected", "reward")
    for name, colour, sign in (("advantage above 0", BLUE, 1), ("below 0", ORANGE, -1)):
        own = [i for i in x if rows[i]["advantage"] * sign > 0]
        c.bar(own, [rows[i]["advantage"] for i in own], color=colour, label=name)
        d.vlines(own, 1, [rows[i]["ratio"] for i in own], color=colour, linewidth=1.5)
        d.scatter(own, [rows[i]["ratio"] for i in own], color=colour, s=16, zorder=3, label=name)
    label(c, "(c) advantage: return - value, whitened over the batch", "SDs of the batch")
    for bound, name in ((1 - first["cliprange"], None), (1 + first["cliprange"], "clip bounds")):
        d.axhline(bound, color=GREY, linestyle="--", linewidth=1, label=name)
    label(d, f"(d) ratio: new / old probability, after {first['epochs']} epochs", "ratio")
    d.set_xticks(x, get("token"), rotation=90, fontsize=9, parse_math=False)
    d.set_xlim(-0.8, len(rows) - 0.2)
    d.set_xlabel("tokens of the response")
    for axis, zero in ((a, 0), (b, 0), (c, 0), (d, 1)):
        axis.axhline(zero, color="black", linewidth=0.6)
        axis.grid(axis="x", alpha=0.2, linewidth=0.6)
    figure.align_ylabels()
    figure.savefig(path, dpi=105)
    plt.close(figure)


def main():
    as_it_is = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_it_is)
    parser.add_argument("--prompt", default="Please tell me how an eclipse works.")
    parser.add_argument("--updates", type=int, default=12, help="to make; default: half of a default run")
    parser.add_argument("--figures_dir", type=Path, default=common.RESULTS)
    parser.add_argument(
        "--draw_only", action="store_true", help="run nothing: draw the rows in anatomy.jsonl"
    )
    own, others = parser.parse_known_args()
    args = tyro.cli(ppo_rlhf.Args, args=others)
    if not 1 <= own.updates <= args.total_episodes // args.batch_size:
        parser.error(f"--updates {own.updates}: a run has {args.total_episodes // args.batch_size} updates")
    own.figures_dir.mkdir(parents=True, exist_ok=True)
    table = own.figures_dir / "anatomy.jsonl"
    drawn = common.read_jsonl(table) if own.draw_only else []
    lines = []
    for name, (title, changes) in RUNS.items():
        rows = [row for row in drawn if row["figure"] == name]
        rows = rows or watch(replace(args, **changes), own.prompt, own.updates)
        draw(rows, title, args.beta, own.figures_dir / f"{name}.png")
        print(f"{own.figures_dir / name}.png: {' '.join(row['token'] for row in rows)}", flush=True)
        lines += [json.dumps({"figure": name, **row}, ensure_ascii=False) + "\n" for row in rows]
    table.write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
