"""Do the tables of the documents say what the rows in results/ say?

    python benchmark/check_tables.py

Computes the cells of the tables in TABLES again. A cell is a mean; a mean (smallest to largest); smallest to
largest; a difference to the table's first row at the same seed, [with its 95% interval]; a mean, and then
such a difference; or a value for each seed. Of a seed that several files (machines) have, the mean counts for
an interval. Prints each cell that differs and how many agree. Exit status 1 if one differs, or if a table, a
row or a column is not known. Add what a document shows to TABLES.
"""

import re
import sys
from typing import NamedTuple
from unittest.mock import MagicMock

for module in ("matplotlib", "matplotlib.pyplot"):  # tables need no pictures
    sys.modules.setdefault(module, MagicMock())

import beta_sweep  # noqa: E402
import common  # noqa: E402
import methods  # noqa: E402
from common import half_width, mean  # noqa: E402

NUMBER = r"([+-]?[\d,]*\.?\d+)%?"
FORMS = {  # what a cell can be
    "mean": NUMBER,
    "spread": rf"{NUMBER} \({NUMBER} to {NUMBER}\)",
    "range": rf"{NUMBER} to {NUMBER}",
    "difference": rf"{NUMBER} \[{NUMBER}, {NUMBER}\]",
    "mean, difference": rf"{NUMBER}(?: \(\d\))?, {NUMBER} \[{NUMBER}, {NUMBER}\]",
    "values": rf"{NUMBER}, {NUMBER}",
}


class Table(NamedTuple):
    document: str
    heading: str  # of the section
    titles: tuple  # its first titles
    rows: object  # () -> rows, each with a label, a seed, a file and figures
    keys: (
        dict  # title: key of a row, or a function of it; None for words; "difference" is of the title before
    )
    labels: dict  # label in the document: in the rows
    label_columns: int = 1
    first: str = ""  # what differences are to, if not the first row


# ---- Rows ----


def read(*names, label):
    """Rows of files in results/, each with its file and label(row)."""
    found = []
    for name in names:
        for row in common.read_jsonl(common.ROOT / f"benchmark/results/{name}.jsonl"):
            found.append({"seed": 0, **row, "file": name})
    return [{**row, "label": label(row)} for row in found if label(row) is not None]


def of(key):
    return lambda row: row.get(key)


def percent(key):
    return lambda row: 100 * row[key]


def paths_of(rows):
    """The rows of each run."""
    found = {}
    for row in rows:
        found.setdefault((row["file"], row["label"], row["seed"]), []).append(row)
    return list(found.values())


def ends_of(rows):
    """The end of each run of methods.py, with its seconds and the reward model's."""
    return [{**path[-1], "total": methods.total(path[-1])} for path in paths_of(rows)]


def default_beta(row):
    """Its method, if it has the default KL coefficient, DPO's of 0.2, or none."""
    return row["method"] if row.get("beta") in (None, {"TRL DPO": 0.2}.get(row["method"], 0.1)) else None


def at_equal_kl():
    """Gold scores of each method and seed between its finished runs, at equal KL."""
    runs = methods.grouped(read("frontiers", label=of("method")))
    found = []
    for name, seeds in methods.frontiers(runs).items():
        for seed, ends in seeds.items():
            levels = {f"{level} nats": methods.at(ends, "kl", level) for level in methods.LEVELS}
            found.append({"label": name, "seed": seed, "file": "frontiers", **levels})
    return found


def sweep():
    """The end of each run of beta_sweep.py, with the highest gold score of the mean path."""
    paths = paths_of(
        read("beta_sweep", label=lambda row: beta_sweep.label(row["beta"]) if row["kind"] == "ppo" else None)
    )
    found = []
    for path in paths:
        label = path[0]["label"]
        peak = beta_sweep.peak(beta_sweep.over_seeds([own for own in paths if own[0]["label"] == label]))
        found.append({**path[-1], "peak": peak})
    return found


def transposed(rows, column, keys):
    """A row for each key and seed, with the value at each of the rows' `column` under its number."""
    found = {}
    for row in rows:
        for key in keys:
            own = found.setdefault(
                (key, row["seed"]), {"label": key, "seed": row["seed"], "file": row["file"]}
            )
            own[f"{row[column]}"] = row[key]
    return list(found.values())


def real_model():
    found = []
    for seed in (1, 2):
        responses = read(f"real_model_seed{seed}", label=of("prompt"))
        for side in ("sft", "ppo"):
            verdicts = [common.gold_judge.judge(row["prompt"], row[side]) for row in responses]
            row = {key: mean(verdict[key] for verdict in verdicts) for key in verdicts[0]}
            row |= {"rm_score": mean(row[f"{side}_score"] for row in responses)}
            row |= {"words": mean(len(row[side].split()) for row in responses)}
            found.append({**row, "label": side.upper(), "seed": seed, "file": ""})
    return found


# ---- Tables ----

HERE = "benchmark/README.md"
FIGURES = {"RM score": "score", "gold score": "gold", "KL": "kl", "rank correlation": "rank_correlation"}
FIGURES |= {"gold win rate, %": lambda row: 100 * row["win_rate"], "s": "seconds"}
BOTH = ("methods", "methods_other_machine")
PENALIZED = lambda row: row["score"] - 0.1 * row["kl"]
SECOND = lambda row: row["seconds"] if row["file"] == "methods_other_machine" and "n" not in row else None
METHODS = {"RLOO, 4 to a prompt": "RLOO", "GRPO, 8 to a prompt": "GRPO", "TRL's PPO": "TRL PPO"}
METHODS |= {"rloo": "RLOO", "grpo": "GRPO", "TRL's DPO": "TRL DPO"}
FORKS = {
    "--lam 0.95": "lambda 0.95",
    "--no-separate_critic": "shared backbone",
    "--no-separate_critic --vf_coef 0: no values": "no value head",
    "no values": "no value head",
    "decoupled_gae, --lam 0.95": "lambda 0.95, values from 1",
    "value_warmup": "value warm-up",
    "clip_higher": "clip higher",
    "dual_clip": "dual clip",
    "kl_in_loss, k3": "KL in the loss, k3",
    "process_reward": "process reward",
}
VERIFIABLE = {
    "PPO, values on the policy": "PPO",
    "no values: --vf_coef 0": "PPO, no values",
    "critic_from_policy, critic alone for 12 updates": "PPO, own critic learns first",
    "rloo, 8 to a prompt": "RLOO",
    "grpo, 8 to a prompt": "GRPO",
}
CHANGES = {
    "splice of two sentences": "splice",
    "step of another topic": "foreign step",
    "garbled words": "garble",
    "repeated sentence": "repeat",
    "answer to another question": "off topic",
    "second courtesy": "stuff courtesy",
    "steps left out or added": "change steps",
    "filler": "change filler",
}
TABLES = [
    Table(
        HERE,
        "The shipped task",
        ("", "seeds"),
        lambda: read(
            "shipped_task",
            "forks_other_machine",
            label=lambda row: row["file"] if row["variant"] in ("beta 0.1", "PPO") else None,
        ),
        FIGURES
        | {"reward model's accuracy": lambda row: 100 * row["rm_accuracy"]}
        | {"gold, SFT": "gold_sft", "gold, PPO": "gold", "seeds": None},
        {"one machine": "shipped_task", "another": "forks_other_machine"},
    ),
    Table(
        HERE,
        "How much KL penalty",
        ("beta", "RM score"),
        sweep,
        FIGURES
        | {"peak gold": lambda row: row["peak"]["gold"], "at KL": lambda row: row["peak"]["kl"]}
        | {"at episode": lambda row: row["peak"]["episodes"]},
        {},
    ),
    Table(
        HERE,
        "How much KL penalty",
        ("best of n", "1"),
        lambda: transposed(
            read("beta_sweep", label=lambda row: row["kind"] if row["kind"] == "best_of_n" else None),
            "n",
            ("score", "gold", "kl"),
        ),
        {str(2**k): str(2**k) for k in range(7)},
        {"RM score": "score", "gold score": "gold", "KL, at most": "kl"},
    ),
    Table(
        HERE,
        "PPO, or something else?",
        ("", "gold score"),
        lambda: ends_of(read(*BOTH, label=of("method"))),
        FIGURES
        | {"score - 0.1 KL, difference": PENALIZED, "s, training alone": SECOND}
        | {"with the reward model": None},
        METHODS,
    ),
    Table(
        HERE,
        "The same on a second world",
        ("", "gold score"),
        lambda: ends_of(read("frontiers", label=default_beta)),
        FIGURES | {"held-out topics": "gold_held_out", "garbled": "garbled", "s, in all": "total"},
        METHODS,
    ),
    Table(
        HERE,
        "The same on a second world",
        ("", "2 nats"),
        at_equal_kl,
        {f"{level} nats": f"{level} nats" for level in (2, 3, 4)},
        METHODS,
    ),
    Table(
        "README.md",
        "Evidence",
        ("", "gold score"),
        lambda: ends_of(read(*BOTH, label=of("method"))),
        FIGURES | {"seconds": SECOND, "with reward model": None},
        METHODS,
    ),
    Table(
        HERE,
        "Forks",
        ("variant", "gold score"),
        lambda: read("forks", "forks_other_machine", label=of("variant")),
        FIGURES | {"s": lambda row: row["seconds"] if row["file"] == "forks" else None},
        FORKS,
    ),
    Table(
        "benchmark/DEFAULTS.md",
        "Long responses",
        ("variant", "RM score - beta KL"),
        lambda: read("long_responses", label=of("variant")),
        FIGURES
        | {"RM score - beta KL": lambda row: row["score"] - 0.05 * row["kl"]}
        | {"variance explained": "explained_variance"},
        FORKS,
    ),
    Table(
        HERE,
        "Which details matter",
        ("taken out", "instead"),
        lambda: read("details", label=of("variant")),
        FIGURES | {"instead": None, "gold score, difference": "gold", "KL (4.6)": "kl"},
        {},
        first="nothing",
    ),
    Table(
        HERE,
        "Does the reward model track the judge",
        ("pairs", "held-out accuracy (gold scores: 86.0%)"),
        lambda: read("reward_quality", label=lambda row: f"{row['pairs']:,}" if "pairs" in row else None),
        FIGURES | {"held-out accuracy (gold scores: 86.0%)": lambda row: 100 * row["accuracy"]},
        {},
    ),
    Table(
        HERE,
        "Does the reward model track the judge",
        ("beta", "update"),
        lambda: read(
            "reward_quality",
            label=lambda row: f"{row['beta']}, {row['update']}" if "beta" in row else None,
        ),
        FIGURES,
        {"SFT model, 0": "0.1, 0"},
        2,
    ),
    Table(
        HERE,
        "Does the reward model track the judge",
        ("change", "ranked right"),
        lambda: read("errors", label=of("change")),
        {"ranked right": "right", "RM score for a point of gold": "margin"},
        CHANGES,
    ),
    Table(
        HERE,
        "A pretrained model",
        ("", "RM score"),
        real_model,
        {"RM score": "rm_score"} | {key: key for key in ("words", "opening", "closing", "rude", "filler")},
        {},
    ),
    Table(
        HERE,
        "A reward that can be checked",
        ("", "likeliest"),
        lambda: read("verifiable", label=of("method")),
        {"likeliest": percent("greedy"), "one sample": percent("pass@1"), "any of 8": percent("pass@8")}
        | {"KL": "kl", "episodes to 90% in the rollout": "episodes_to_90", "s": "seconds"}
        | {"explained": lambda row: max(row["explained_variance"]) if "curve" in row else None},
        VERIFIABLE,
    ),
]


# ---- The check ----


def tables_of(document):
    """(heading, titles, rows of cells) of each table, without bold and code marks."""
    heading, lines, found = "", [], []
    text = (common.ROOT / document).read_text(encoding="utf-8")
    for line in [*text.splitlines(), ""]:
        if line.startswith("|"):
            cells = line.strip().strip("|").split("|")
            lines.append([re.sub(r"\*\*|`", "", cell).strip() for cell in cells])
        elif lines:
            found.append((heading, lines[0], lines[2:]))
            lines = []
        if line.startswith("#"):
            heading = line.strip("# ")
    return found


def by_seed(values):
    """{(file, seed): value} -> the mean of each seed."""
    seeds = {seed for _, seed in values}
    return [mean(value for (_, other), value in values.items() if other == seed) for seed in sorted(seeds)]


def expected(form, values, first):
    """The numbers of a cell. values, first: {(file, seed): figure} of its row and of the table's first."""
    everything = list(values.values())
    differences = by_seed({run: values[run] - first[run] for run in values if run in first})
    interval = []
    if differences:
        middle, half = mean(differences), half_width(differences)
        interval = [middle, middle - half, middle + half]
    return {
        "mean": [mean(everything)],
        "spread": [mean(everything), min(everything), max(everything)],
        "range": [min(everything), max(everything)],
        "difference": interval,
        "mean, difference": [mean(everything), *interval],
        "values": [values[run] for run in sorted(values, key=lambda run: run[1])],
        "difference alone": interval[:1],
    }[form]


def same(text, value):
    """Is the number in a cell `value`, rounded to as many places?"""
    places = len(text.partition(".")[2])
    return abs(float(text.replace(",", "")) - value) <= 0.5 / 10**places + 1e-9


def check_cell(cell, title, values, first):
    """What is wrong with it, or None."""
    form = next((form for form, pattern in FORMS.items() if re.fullmatch(pattern, cell)), None)
    if form is None:
        return "is of no known form"
    numbers = re.fullmatch(FORMS[form], cell).groups()
    if form == "mean" and "difference" in title:
        form = "difference alone"
    wanted = expected(form, values, first)
    if len(wanted) != len(numbers) or not all(map(same, numbers, wanted)):
        return f"should be {', '.join(f'{x:.4f}' for x in wanted)}"


def check(table, titles, cells_of_rows):
    """(cells that agree, complaints)"""
    rows = table.rows()
    agree, complaints = 0, []

    def values_of(label, key):
        pick = key if callable(key) else of(key)
        own = {(row["file"], row["seed"]): pick(row) for row in rows if row["label"] == label}
        return {run: value for run, value in own.items() if value is not None}

    first = table.first
    for cells in cells_of_rows:
        name = ", ".join(cells[: table.label_columns])
        label = table.labels.get(name, name)
        first = first or label
        if not any(row["label"] == label for row in rows):
            complaints.append(f"{name}: is not in the rows")
            continue
        key = None
        for title, cell in list(zip(titles, cells))[table.label_columns :]:
            if title in table.keys:
                key = table.keys[title]
            elif not title.startswith("difference"):
                complaints.append(f"{title}: is not known")
                continue
            values = values_of(label, key) if key else {}
            if values and re.search(r"\d", cell):
                wrong = check_cell(cell, title, values, values_of(first, key))
                agree += not wrong
                complaints += [f"{name}, {title}: {cell} {wrong}"] if wrong else []
    return agree, complaints


def main():
    total, failed, unchecked = 0, 0, 0
    found = {document: tables_of(document) for document in dict.fromkeys(table.document for table in TABLES)}
    for document, tables in found.items():
        for heading, titles, cells_of_rows in tables:
            own = [table for table in TABLES if (table.document, table.heading) == (document, heading)]
            own = [table for table in own if tuple(titles[:2]) == table.titles]
            if not own:
                unchecked += 1
                continue
            agree, complaints = check(own[0], titles, cells_of_rows)
            total += agree
            failed += len(complaints)
            print(f"{document}, {heading}, {' | '.join(titles[:3])}: {agree} cells agree")
            for complaint in complaints:
                print(f"    {complaint}")
    for table in TABLES:
        if not any((h, tuple(t[:2])) == (table.heading, table.titles) for h, t, _ in found[table.document]):
            failed += 1
            print(f"{table.document}, {table.heading}, {' | '.join(table.titles)}: there is no such table")
    print(f"{total} cells agree, {failed} do not; {unchecked} tables have no rows to check against")
    return total, failed


if __name__ == "__main__":
    raise SystemExit(main()[1] > 0)
