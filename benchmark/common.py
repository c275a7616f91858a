"""What the benchmarks on the shipped task share: stages that are run once, and the judging of policies."""

import argparse
import copy
import functools
import json
import math
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import torch
import transformers
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

ROOT = Path(__file__).resolve().parent.parent
# --world is read before all other flags, as the judge that is imported below is the world's. Stages run in
# its folder: the data sets and the starting model of their defaults, data/..., are then the world's too.
known = argparse.ArgumentParser(add_help=False)
known.add_argument("--world", type=Path, default=ROOT)
WORLD = known.parse_known_args()[0].world.resolve()
DATA = WORLD / "data"
if not (DATA / "judge.py").exists():
    known.error(f"--world: there is no data/judge.py in {WORLD}; data/make_world.py makes it")
sys.path[:0] = [str(ROOT), str(DATA)]

import judge as gold_judge  # noqa: E402

import ppo_rlhf  # noqa: E402

ppo_rlhf.transformers.logging.set_verbosity_error()
ppo_rlhf.transformers.logging.disable_progress_bar()
SHIPPED = WORLD == ROOT
RESULTS = ROOT / "benchmark/results" if SHIPPED else WORLD / "results"
BASELINES = WORLD / ("runs/shipped_task" if SHIPPED else "runs/baselines")  # seed1/{sft,reward_model}, ...
# What the judge counts in a response, beside its steps and courtesies
ERRORS = ("foreign", "garbled", "repeated", "misplaced", "disordered", "rude", "filler", "vague")
# Student's t for 95% intervals of a mean, by the number of values (seeds)
T_975 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}


# ---- Running ----


def keep_checkpoint(folder):
    """Keep the newest checkpoint of a run as a hard link, which costs nothing during the run."""
    state = folder / "checkpoint/state.pt"
    if state.exists():
        link = folder / f"kept/{state.stat().st_ino}.link"
        link.parent.mkdir(exist_ok=True)
        if not link.exists():
            os.link(state, link)


def run_once(folder, command, threads=None, keep=False):
    """Run a command whose output is `folder`, unless that is done -> seconds. A stopped stage is resumed.
    keep: its checkpoints are copied as it goes, for `checkpoints` below."""
    folder = Path(folder)
    done = folder / "wall_seconds"
    if not done.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        env = {**os.environ, "OMP_NUM_THREADS": str(threads)} if threads else None
        start = time.time()
        with open(folder.parent / f"{folder.name}.log", "w") as log:
            words = [sys.executable, *map(str, command)]
            process = subprocess.Popen(words, cwd=WORLD, env=env, stdout=log, stderr=log)
            while process.poll() is None:
                time.sleep(0.2)
                if keep:
                    keep_checkpoint(folder)
        if process.returncode:
            raise SystemExit(f"{log.name}: {Path(log.name).read_text().strip().splitlines()[-1]}")
        seconds = time.time() - start
        for link in folder.glob("kept/*.link"):
            state = torch.load(link, map_location="cpu", weights_only=True)
            progress = state["progress"]
            update = progress[0] if isinstance(progress, (tuple, list)) else progress
            weights = state["model"]
            policy = {name[7:]: x for name, x in weights.items() if name.startswith("policy.")}
            torch.save(policy or weights, folder / f"kept/{update:06d}.pt")
            link.unlink()
        own = folder / "stamp.json"  # TRL's versions
        own.write_text(json.dumps(stamp() | (json.loads(own.read_text()) if own.exists() else {})))
        done.write_text(str(seconds))
    return float(done.read_text())


def seconds_of(folder):
    """What a finished run took; 0 if it was not run by run_once."""
    path = Path(folder, "wall_seconds")
    return float(path.read_text()) if path.exists() else 0.0


def run_all(jobs, parallel, name, keep=False):
    """run_once for each (folder, command) of jobs, `parallel` at a time on an equal share of torch's threads.
    Two single-threaded runs on two cores get about a third more done than two after each other."""
    threads = max(1, torch.get_num_threads() // parallel)
    with ThreadPoolExecutor(parallel) as pool:
        runs = pool.map(lambda job: run_once(*job, threads, keep), jobs)
        list(tqdm(runs, desc=name, total=len(jobs)))


def checkpoints(run):
    """(update, weights of the policy) of the checkpoints that a PPO run kept, in order."""
    for path in sorted(Path(run).glob("kept/*.pt")):
        yield int(path.stem), torch.load(path, map_location="cpu", weights_only=True)


def baselines(folder, seeds, parallel):
    """SFT and reward model of each seed, made with default flags where they are missing."""
    for script in ("sft", "reward_model"):
        jobs = []
        for base, seed in ((folder / f"seed{seed}", seed) for seed in seeds):
            start = {"model_name_or_path": base / "sft"} if script == "reward_model" else {}
            if not (base / script / "config.json").exists():
                jobs.append(job(base / script, f"{script}.py", seed=seed, **start))
        run_all(jobs, parallel, script)


def job(folder, script, *words, **flags):
    """(folder, command) of a stage that resumes where it was stopped."""
    flags = [word for name, value in flags.items() for word in (f"--{name}", value)]
    begun = (folder / "checkpoint/state.pt").exists()
    begin = "--resume" if begun else "--overwrite"
    return folder, [ROOT / script, "--output_dir", folder, begin, *flags, *words]


def ppo_job(folder, base, seed, *words, script="ppo_rlhf.py", **flags):
    """The same of a PPO run from the models in `base`. Of a flag that is given twice the last counts."""
    models = {"sft_model_path": base / "sft", "reward_model_path": base / "reward_model"}
    return job(folder, script, *words, seed=seed, **{**models, **flags})


# ---- Judging ----


def read_jsonl(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def write_jsonl(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def stamp(folder=None):
    """Commit (with a + if code or data have changed), machine and versions: of a finished run, or now."""
    path = Path(folder or "", "stamp.json")
    if folder and path.exists():
        return json.loads(path.read_text())
    git = lambda *words: subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True).stdout
    changed = git("--no-optional-locks", "status", "-uno", "--porcelain", "--", "*.py", "*.patch", "data")
    commit = (git("rev-parse", "--short", "HEAD").strip() or "unknown") + "+" * bool(changed)
    cpu = [line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")]
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    machine = f"{gpu or (cpu or [platform.machine()])[0]}, {os.cpu_count()} cores"
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    return {"commit": commit, "machine": machine, "versions": versions}


def write_results(path, rows):
    """Rows of results/, each with a stamp, unless it brings its run's."""
    now = stamp()
    write_jsonl(path, [now | row for row in rows])


def cached(path, make, *arguments):
    """Rows of the file `path`, made and written if it is not there."""
    if not path.exists():
        part = path.with_suffix(".part")
        write_jsonl(part, make(*arguments))
        part.replace(path)
    return read_jsonl(path)


def held_out(limit=None):
    """Texts of the held-out prompts."""
    return [row["prompt"] for row in read_jsonl(DATA / "prompts/test.jsonl")][:limit]


def load_policy(folder):
    return ppo_rlhf.load_pretrained(AutoModelForCausalLM, str(folder))[0].eval()


def load_reward_model(folder):
    return ppo_rlhf.load_pretrained(AutoModelForSequenceClassification, str(folder))[0].eval()


def load(base, reward_model=None):
    """Reference, reward model and tokenizer of a folder with sft/ and reward_model/, and the scale of
    scores: mean and standard deviation over SFT responses to the held-out prompts."""
    reference, tokenizer = ppo_rlhf.load_pretrained(AutoModelForCausalLM, str(base / "sft"))
    reward_model = load_reward_model(reward_model or base / "reward_model")
    models = SimpleNamespace(reference=reference.eval(), tokenizer=tokenizer, mean=0.0, std=1.0)
    models.reward_model = reward_model
    scores = [row["score"] for row in respond(reference, models, held_out() * 2, seed=0)]
    models.mean = statistics.mean(scores)
    models.std = statistics.stdev(scores)
    return models


@torch.no_grad()
def respond(policy, models, texts, seed):
    """A sampled response to each text, with the same random numbers for every policy -> rows with prompt,
    response, score (in the models' scale), kl (nats), length (tokens), ended, gold (the judge's score), the
    judge's counts, and off_topic: steps, and none of them the topic's."""
    args = ppo_rlhf.Args()
    tokenizer = models.tokenizer
    end_ids = ppo_rlhf.find_end_ids(models.reference, tokenizer)
    torch.manual_seed(seed)
    found = []
    for start in range(0, len(texts), 128):
        rows = [{"prompt": text} for text in texts[start : start + 128]]
        prompts = []
        for row in rows:
            chat = [{"role": "user", "content": row["prompt"]}]
            text = ppo_rlhf.render(tokenizer, row, chat, add_generation_prompt=True)
            ids = tokenizer(text, add_special_tokens=False).input_ids
            prompts.append(SimpleNamespace(ids=ids, row=row))
        batch = ppo_rlhf.sample(policy, tokenizer, prompts, args, end_ids)
        inputs = (batch.sequences, batch.starts, batch.responses, args.temperature)
        logprobs, ref_logprobs = (ppo_rlhf.forward(m, *inputs)[0] for m in (policy, models.reference))
        scores = ppo_rlhf.score(models.reward_model, tokenizer, batch, prompts, 64)  # [b]
        columns = {
            "prompt": [row["prompt"] for row in rows],
            "response": tokenizer.batch_decode(batch.responses, skip_special_tokens=True),
            "score": ((scores - models.mean) / models.std).tolist(),
            "kl": ((logprobs - ref_logprobs) * batch.mask).sum(1).tolist(),
            "length": batch.response_lengths.tolist(),
            "ended": batch.ended.tolist(),
        }
        found += [dict(zip(columns, values)) for values in zip(*columns.values())]
    for row in found:
        verdict = gold_judge.judge(row["prompt"], row["response"])
        row["gold"] = verdict.pop("score")
        row |= verdict | {"off_topic": verdict["foreign"] > 0 and not verdict["steps"]}
    return found


@functools.cache
def trained_topics():
    """Topics of the training prompts; make_world.py can hold some out."""
    prompts = [row["prompt"] for row in read_jsonl(DATA / "prompts/train.jsonl")]
    return {gold_judge.TOPIC_OF_PROMPT[prompt] for prompt in prompts}


def average(rows):
    """Their means; where the training prompts lack topics, the gold score of both kinds as well."""
    keys = ("gold", "score", "kl", "length", "ended", "steps", "opening", "closing", *ERRORS, "off_topic")
    found = {key: mean(row[key] for row in rows) for key in keys}
    parts = {"gold_trained": [], "gold_held_out": []}
    for row in rows:
        trained = gold_judge.TOPIC_OF_PROMPT[row["prompt"]] in trained_topics()
        parts["gold_trained" if trained else "gold_held_out"].append(row["gold"])
    return found | ({key: mean(golds) for key, golds in parts.items()} if all(parts.values()) else {})


def win_rate(rows, others):
    """Share of prompts on which the first response is worth more; a tie is half a win."""
    return mean((a["gold"] > b["gold"]) + (a["gold"] == b["gold"]) / 2 for a, b in zip(rows, others))


def along(run, models, texts, samples, seed=0, updates=None):
    """Rows of means for the SFT model (update 0) and the kept checkpoints of a PPO run: all, or those of some
    updates and the last."""
    rows = []
    policy = copy.deepcopy(models.reference)
    sft = None
    kept = [(0, models.reference.state_dict()), *checkpoints(run)]
    for update, weights in kept:
        if updates and update not in (0, *updates, kept[-1][0]):
            continue
        policy.load_state_dict(weights)
        found = respond(policy, models, texts * samples, seed)
        sft = sft or found
        scores, golds = ([row[key] for row in found] for key in ("score", "gold"))
        row = {"update": update, "episodes": update * ppo_rlhf.Args.batch_size, "responses": len(found)}
        row |= {"win_rate": win_rate(found, sft), "rank_correlation": gold_judge.spearman(scores, golds)}
        rows.append({**row, **average(found)})
    return rows


# ---- Statistics and tables ----


def mean(values):
    values = list(values)
    return sum(values) / len(values)


def half_width(values):
    """Of the 95% interval of the values' mean, by Student's t over seeds; NaN where there is none."""
    n = len(values)
    return T_975[n] * statistics.stdev(values) / math.sqrt(n) if n in T_975 else math.nan


def spread(values, form=".2f"):
    """Mean and range."""
    values = list(values)
    text = f"{mean(values):{form}}"
    return text + (f" ({min(values):{form}} to {max(values):{form}})" if len(values) > 1 else "")


def interval(values, form="+.2f"):
    """Mean and 95% interval."""
    half = half_width(values)
    text = f"{mean(values):{form}}"
    low, high = mean(values) - half, mean(values) + half
    return text if math.isnan(half) else f"{text} [{low:{form}}, {high:{form}}]"


def rate_interval(rates, responses):
    """Mean and 95% interval in percent of rates over `responses` each: by logits, so within 0 and 100. A rate
    of 0 or 1 counts as half a response from it."""
    edge = 1 / (2 * responses)
    logits = [math.log(rate / (1 - rate)) for rate in (min(max(x, edge), 1 - edge) for x in rates)]
    half = half_width(logits)
    text = f"{100 * mean(rates):.0f}"
    low, high = (100 / (1 + math.exp(-mean(logits) - side)) for side in (-half, half))
    return text if math.isnan(half) else f"{text} [{low:.0f}, {high:.0f}]"


def print_table(titles, rows):
    """As Markdown."""
    for cells in (titles, ["---"] * len(titles), *rows):
        print(f"| {' | '.join(map(str, cells))} |")


def parser(doc):
    """With the flags that all have."""
    found = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = found.add_argument
    add("--world", type=Path, default=ROOT, help="folder that data/make_world.py made; runs go there too")
    add("--seeds", type=int, nargs="+", default=[1, 2, 3])
    add("--parallel", type=int, default=2, help="runs at a time, on an equal share of the cores")
    add("--limit", type=int, help="held-out prompts; all by default")
    add("--base_dir", type=lambda x: Path(x).resolve(), default=BASELINES, help="seed1/{sft,reward_model}")
    add("--output_dir", type=Path, default=RESULTS)
    return found


def make_copy(folder, patches):
    """A copy of ppo_rlhf.py with patches of this folder (forks/NAME or ablations/NAME) -> its path."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    shutil.copy(ROOT / "ppo_rlhf.py", folder)
    # Without a repository around the folder: inside one, git apply takes paths from its root, silently
    env = {**os.environ, "GIT_CEILING_DIRECTORIES": str(folder.resolve().parent)}
    for name in patches:
        patch = ROOT / f"benchmark/{name}.patch"
        subprocess.run(["git", "apply", patch], cwd=folder, env=env, check=True)
    return folder / "ppo_rlhf.py"
