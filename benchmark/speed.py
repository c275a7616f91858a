"""How fast and how lean is ppo_rlhf.py? Every figure of the README's section on speed comes from here.

    python benchmark/speed.py --workload cpu-tiny --trl_python /path/to/trl_env/bin/python     # side by side, on a CPU
    python benchmark/speed.py --workload cpu-gpt2 --trl_python ... --contenders ours ours_separate_critic trl
    python benchmark/speed.py --device cuda --trl_python ...               # gpt2-124m, qwen2.5-0.5b, pythia-1b on a GPU
    python benchmark/speed.py --workload cpu-tiny --profile                # where one update's time goes, op by op
    python benchmark/speed.py --mode decode --device cuda                  # a decode step against the memory's bandwidth
    python benchmark/speed.py --mode mfu --device cuda                     # the update against a matmul of the same run
    python benchmark/speed.py --mode memory --workload cpu-gpt2            # peak memory of each phase
    python benchmark/speed.py --mode growth                                # time against batch, length, size; 200 updates
    python benchmark/speed.py --workload qwen2.5-0.5b-b64 --device cuda --contenders ours --micro_batch 8 --memory_cap 24

Contenders:
    ours                   ppo_rlhf.py as it is: policy and values share one trunk
    ours_separate_critic   ppo_rlhf.py --separate_critic, a second network for the values: the same amount of work as TRL's
    trl                    TRL 1.12.0's PPOTrainer (trl_ppo.py); on CUDA fp32 weights with bf16 autocast, as ours
    trl_bf16               the same with all weights and Adam in bf16: lighter, but small steps are rounded away
    tutorial               the loop of blog posts (tutorial_ppo.py): one prompt at a time, no KV cache

What is equal: checkpoints, prompts, episodes an update, longest prompt and response, temperature, stop at EOS, epochs,
minibatches (so optimizer steps, but see tutorial_ppo.py), beta and learning rate. The rate is so small that the policy,
and with it the length of its answers, stays what it is. What is not: each contender's own random numbers; the micro-batch
(TRL cannot split a minibatch); the algorithms' details (TRL's policy and critic share nothing).

How it is timed: each contender runs in a fresh process, in turn, `--rounds` times. An update is timed from one rollout's
start to the next one's, logging included; the first is a warm-up; the table holds medians, and ratios of medians round by
round. Loading is not timed, nor is our last update, after which the model is saved. Peak memory is the whole process's:
VmHWM, the highest resident set, and torch's peak on CUDA. Raw rows go to benchmark/results/. The parent only waits: it
imports no torch.
"""

import argparse
import importlib.util
import json
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
REPO = HERE.parent
CONTENDERS = {"ours": "speed.py", "ours_separate_critic": "speed.py", "trl": "trl_ppo.py", "trl_bf16": "trl_ppo.py",
              "tutorial": "tutorial_ppo.py"}  # fmt: skip

# Shapes of published models, filled with random weights: speed does not depend on what a model knows.
SHAPES = {
    "smoke": dict(model_type="gpt2", vocab_size=512, n_embd=64, n_layer=2, n_head=2),  # only to test this file
    "4x128": dict(model_type="gpt2", vocab_size=1024, n_embd=128, n_layer=4, n_head=4),  # the shipped task's
    "gpt2-124m": dict(model_type="gpt2"),  # the defaults of its config class
    "qwen2.5-0.5b": dict(model_type="qwen2", vocab_size=151936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24,
                         num_attention_heads=14, num_key_value_heads=2, tie_word_embeddings=True),
    "pythia-1b": dict(model_type="gpt_neox", vocab_size=50304, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16,
                      num_attention_heads=8, max_position_embeddings=2048),
}  # fmt: skip

# micro_batch is ours alone and changes no gradient. On CUDA a minibatch has 16 episodes: TRL runs a minibatch in one
# piece, with logits of every position, and more of them would not fit.
WORKLOADS = {
    "smoke": dict(shape="smoke", prompt_length=12, response_length=8, episodes=8, minibatches=2, micro_batch=4),
    "cpu-tiny": dict(shape=None, response_length=64, episodes=64, minibatches=4, micro_batch=16),
    "cpu-gpt2": dict(shape="gpt2-124m", prompt_length=32, response_length=48, episodes=8, minibatches=1, micro_batch=8),
}
for _shape in ("gpt2-124m", "qwen2.5-0.5b", "pythia-1b"):
    for _episodes in (64, 512):
        WORKLOADS[f"{_shape}-b{_episodes}"] = dict(shape=_shape, prompt_length=512, response_length=53, episodes=_episodes,
                                                   minibatches=_episodes // 16, micro_batch=16)  # fmt: skip
FAILED = []  # names of jobs that failed: the exit status tells
COMMON = dict(temperature=0.7, epochs=4, beta=0.1, learning_rate=1e-6, missing_eos_penalty=1.0)


# ---------------------------------------------------------------------------------------------------------------
# The parent: makes the inputs, starts one process after another, prints one table.
# ---------------------------------------------------------------------------------------------------------------


def start(script, spec, python=sys.executable):
    """Run one job in a fresh process -> its rows (list of dicts), or None if it failed."""
    with tempfile.TemporaryDirectory() as scratch:
        spec = {**spec, "scratch": scratch, "out": f"{scratch}/rows.jsonl"}
        Path(scratch, "spec.json").write_text(json.dumps(spec))
        env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": f"{scratch}/datasets", "TOKENIZERS_PARALLELISM": "false",
               "WANDB_MODE": "disabled"}  # fmt: skip
        if spec["device"] == "cpu":
            env["CUDA_VISIBLE_DEVICES"] = ""
        begun = time.time()
        with open(f"{scratch}/log.txt", "w+") as log:
            shown = None if spec.get("verbose") else log
            code = subprocess.run([python, HERE / script, f"{scratch}/spec.json"], env=env, stdout=shown, stderr=log).returncode
            name = spec.get("contender", spec["job"])
            print(f"  {name}: {'done' if code == 0 else f'FAILED (exit status {code})'}, {time.time() - begun:.0f} s in all",
                  file=sys.stderr, flush=True)  # fmt: skip
            if code:
                FAILED.append(name)
                log.seek(0)
                print("    " + "    ".join(log.readlines()[-12:]), file=sys.stderr)
                return None
        out = Path(spec["out"])
        return [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []


def prepare(name, workload, folder, options):
    """Policy, reward model and prompts of a workload -> the job that every contender gets."""
    folder.mkdir(parents=True, exist_ok=True)
    spec = {**COMMON, **workload, "workload": name, "device": options.device, "updates": options.updates, "job": "contender",
            "memory_cap": options.memory_cap, "prompts": str(folder)}  # fmt: skip
    spec["micro_batch"] = options.micro_batch or spec["micro_batch"]
    if spec["shape"] is None:  # the shipped task, with as few held-out prompts as possible: they are not timed
        spec.update(policy=str(options.sft_model_path), reward=str(options.reward_model_path), template="Prompt: {prompt}\nResponse:")
        for path in (options.sft_model_path, options.reward_model_path):
            if not (path / "config.json").exists():
                raise SystemExit(f"speed.py: error: no model in {path}; run sft.py and reward_model.py first")
        shutil.copy(REPO / "data/prompts/train.jsonl", folder)
        first = (REPO / "data/prompts/test.jsonl").read_text().splitlines()[0]
        (folder / "test.jsonl").write_text(first + "\n")
    else:  # every prompt has the same length: nothing can be won by trimming
        spec.update(policy=f"{folder}/policy", reward=f"{folder}/reward", template="{prompt}")
        letters = random.Random(0)
        for split, number in (("train", 2 * spec["episodes"]), ("test", 1)):
            prompts = ["".join(letters.choices("abcdefghijklmnopqrstuvwxyz", k=spec["prompt_length"])) for _ in range(number)]
            (folder / f"{split}.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
        if start("speed.py", {**spec, "job": "make_models"}) is None:
            raise SystemExit(1)
    return spec


def median(rows, key):
    values = [row[key] for row in rows if row.get(key) is not None]
    return statistics.median(values) if values else None


def show(header, rows):
    """A Markdown table; numbers with three digits."""

    def cell(x):
        return "-" if x is None else x if isinstance(x, str) else f"{x:,.0f}" if abs(x) >= 100 else f"{x:.3g}"

    text = [[cell(x) for x in row] for row in rows]
    widths = [max(len(row[i]) for row in [header, *text]) for i in range(len(header))]
    for row in [header, ["-" * w for w in widths], *text]:
        print("| " + " | ".join(x.ljust(w) for x, w in zip(row, widths)) + " |")


def save(name, rows):
    rows = [{"machine": machine(), **row} for row in rows]
    path = HERE / "results" / f"{name}.jsonl"
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    print(f"\nraw rows: {path.relative_to(REPO)}\n")


def heading(text, rows):
    print(f"\n{text}; {machine()}; {rows[0]['versions'] if rows else 'nothing measured'}")


def machine():
    cpu = [line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")]
    return f"{cpu[0] if cpu else platform.machine()}, {os.cpu_count()} cores, OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS', '-')}"


def compare(name, spec, options):
    contenders = options.contenders or [c for c in CONTENDERS if c != "trl_bf16" or options.device == "cuda"]
    collected = []
    for round_ in range(options.rounds):
        for contender in contenders:
            job = {**spec, "contender": contender}
            python = options.trl_python if contender.startswith("trl") else sys.executable
            for row in start(CONTENDERS[contender], job, python) or []:
                collected.append({"workload": name, "contender": contender, "round": round_, **row})
    measured = [row for row in collected if row["update"] > 1]  # the first is a warm-up
    summary = {}
    for contender in contenders:
        rows = [row for row in measured if row["contender"] == contender]
        if rows:
            s = summary[contender] = {key: median(rows, key) for key in ("seconds", "rollout", "score", "optimize", "response_length")}
            for key in ("peak_rss_mib", "peak_cuda_mib"):
                s[key] = max((row[key] for row in rows if row[key]), default=None)
            seconds = [row["seconds"] for row in rows]
            s.update(range=f"{min(seconds):.3g}-{max(seconds):.3g}", n=len(rows), versions=rows[0]["versions"])
    print(f"\n{name}: {spec['episodes']} episodes an update, {spec['epochs']} epochs x {spec['minibatches']} minibatches; {machine()}")
    for contender, s in summary.items():
        print(f"  {contender}: {s['versions']}, {s['n']} updates measured")
    memory = "peak_cuda_mib" if options.device == "cuda" else "peak_rss_mib"
    ours, table = summary.get("ours"), []

    def ratios(slow, fast):
        """How much longer `slow` takes, round by round: its neighbours on the machine change less within a round."""
        pairs = [[median([row for row in measured if (row["contender"], row["round"]) == (c, i)], "seconds") for c in (slow, fast)]
                 for i in range(options.rounds)]  # fmt: skip
        found = [pair[0] / pair[1] for pair in pairs if all(pair)]
        text = f"{statistics.median(found):.2f}" if found else "-"
        return text + f" ({min(found):.2f}-{max(found):.2f})" * (len(found) > 1)

    for contender, s in summary.items():
        share = ours[memory] / s[memory] if ours and ours[memory] and s[memory] else None
        table.append([contender, spec["episodes"] / s["seconds"], s["seconds"], s["range"], s["rollout"], s["score"], s["optimize"],
                      s["response_length"], s["peak_rss_mib"], s["peak_cuda_mib"], ratios(contender, "ours"), share])  # fmt: skip
    show(["contender", "episodes/s", "s/update", "range", "rollout s", "score s", "update s", "tokens/answer", "peak RSS MiB",
          "CUDA peak MiB", "ours is faster by", "ours' memory / its"], table)  # fmt: skip
    for contender in ("trl", "trl_bf16"):
        if "ours_separate_critic" in summary and contender in summary:
            print(f"equal work (ours_separate_critic against {contender}): {ratios(contender, 'ours_separate_critic')}")
    save(f"speed_{name}", collected)


def decode(name, spec, options):
    batches = options.batches or ([64, 512] if options.device == "cuda" else [8, 64])
    rows = start("speed.py", {**spec, "job": "decode", "batches": batches}) or []
    heading(f"{name}: one decode step against the floor, (weights + real keys and values) / bandwidth", rows)
    show(["batch", "step ms", "floor ms", "step / floor", "GB/step", "bandwidth GB/s"],
         [[str(r["batch"]), r["step_ms"], r["floor_ms"], r["step_ms"] / r["floor_ms"], r["gb"], r["bandwidth"]] for r in rows])  # fmt: skip
    save(f"decode_{name}", rows)


def mfu(name, spec, options):
    rows = start("speed.py", {**spec, "job": "mfu"}) or []
    heading(f"{name}: useful FLOPs of the update phase against a matmul of the same run", rows)
    show(["update s", "TFLOP", "TFLOP/s", "matmul TFLOP/s", "MFU"],
         [[r["seconds"], r["tflop"], r["tflop"] / r["seconds"], r["peak"], f"{r['tflop'] / r['seconds'] / r['peak']:.0%}"] for r in rows])  # fmt: skip
    save(f"mfu_{name}", rows)


def memory(name, spec, options):
    rows = start("speed.py", {**spec, "job": "memory"}) or []
    kind = "allocated on CUDA" if options.device == "cuda" else "resident"
    heading(f"{name}: peak memory {kind}, phase by phase, MiB", rows)
    phases = list(dict.fromkeys(row["phase"] for row in rows))
    show(["phase", "peak MiB"], [[phase, max(row["mib"] for row in rows if row["phase"] == phase)] for phase in phases])
    save(f"memory_{name}", rows)


def growth(folder, options):
    """Time of an update against batch, response length and model size; then 200 updates of a small model."""
    small = options.shape or ("gpt2-124m" if options.device == "cuda" else "4x128")
    base = dict(shape=small, prompt_length=32, response_length=32, episodes=64, minibatches=4, micro_batch=16)
    layers = SHAPES[small].get("n_layer", 12)
    variants = [("episodes", n, dict(episodes=n, minibatches=n // 16)) for n in (32, 64, 128, 256)]
    variants += [("response tokens", n, dict(response_length=n, prompt_length=8)) for n in (24, 56, 120, 248)]
    variants += [("layers", n, dict(shape={**SHAPES[small], "n_layer": n})) for n in (layers // 2, layers, 2 * layers, 3 * layers)]
    rows = []
    for axis, x, change in variants:
        spec = prepare(f"{axis}-{x}", {**base, **change}, folder / f"{axis}-{x}".replace(" ", "-"), options)
        measured = [row for row in start("speed.py", {**spec, "contender": "ours"}) or [] if row["update"] > 1]
        if measured:
            rows.append({"axis": axis, "x": x, "versions": measured[0]["versions"],
                         **{key: median(measured, key) for key in ("seconds", "rollout", "score", "optimize")}})  # fmt: skip
        shutil.rmtree(spec["prompts"])
    spec = prepare("long", {**base, "episodes": 16, "minibatches": 1}, folder / "long", options)
    long = start("speed.py", {**spec, "contender": "ours", "updates": options.long_updates, "watch": True}) or []

    heading(f"seconds of an update ({small}, other things as they are: {base['episodes']} episodes, 32 + 32 tokens)", rows)
    show(["against", "", "s/update", "rollout s", "score s", "update s"],
         [[r["axis"], str(r["x"]), r["seconds"], r["rollout"], r["score"], r["optimize"]] for r in rows])  # fmt: skip
    for axis in ("episodes", "response tokens", "layers"):
        points = [(r["x"], r["optimize"]) for r in rows if r["axis"] == axis]
        if len(points) > 2:
            print(f"update phase against {axis}: correlation with a straight line {statistics.correlation(*zip(*points)):.4f}")
    if long:
        tenth = max(1, len(long) // 10)
        first, last = long[tenth : 2 * tenth], long[-tenth:]  # the first tenth warms up: allocators, caches
        for key, unit in (("seconds", "s"), ("rss_mib", "MiB resident"), ("cuda_mib", "MiB allocated on CUDA")):
            if median(first, key) is not None:
                print(f"{len(long)} updates: {median(first, key):.4g} {unit} early, {median(last, key):.4g} at the end")
    save("growth", rows + [{"axis": "long", **row} for row in long])
    plot(rows, long)


def plot(rows, long):
    try:
        import matplotlib
    except ImportError:
        return print("no plot: pip install -r benchmark/requirements.txt")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 4, figsize=(16, 3.6), constrained_layout=True)
    for ax, axis in zip(axes, ("episodes", "response tokens", "layers")):
        points = [row for row in rows if row["axis"] == axis]
        for key, label in (("seconds", "whole update"), ("optimize", "optimization"), ("rollout", "rollout"), ("score", "scoring")):
            ax.plot([p["x"] for p in points], [p[key] for p in points], marker="o", label=label)
        ax.set(xlabel=axis, ylabel="seconds", xlim=(0, None), ylim=(0, None))
    axes[0].legend(frameon=False)
    axes[3].plot([row["update"] for row in long], [row["cuda_mib"] or row["rss_mib"] for row in long], color="C4")
    axes[3].set(xlabel="update", ylabel="MiB in use", ylim=(0, None))
    figure.savefig(HERE / "results/growth.png", dpi=120)
    print("plot: benchmark/results/growth.png")


# ---------------------------------------------------------------------------------------------------------------
# A child: one job in a process of its own.
# ---------------------------------------------------------------------------------------------------------------


def load_ppo(spec):
    """ppo_rlhf.py as a module, from its file; with --memory_cap, torch refuses to allocate more on the GPU."""
    source = importlib.util.spec_from_file_location("ppo_rlhf", REPO / "ppo_rlhf.py")
    sys.modules["ppo_rlhf"] = ppo = importlib.util.module_from_spec(source)
    source.loader.exec_module(ppo)
    ppo.transformers.logging.set_verbosity_error()
    ppo.transformers.logging.disable_progress_bar()
    if spec["device"] == "cuda" and spec["memory_cap"]:
        total = ppo.torch.cuda.get_device_properties(0).total_memory
        ppo.torch.cuda.set_per_process_memory_fraction(spec["memory_cap"] * 2**30 / total)
    return ppo


def make_models(spec):
    """Policy and reward model with random weights, and a byte tokenizer.

    The tokenizer's EOS is one id of tens of thousands that random weights write alike, so nearly every answer of every
    contender has full length."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedTokenizerFast

    torch.manual_seed(0)
    shape = SHAPES[spec["shape"]] if isinstance(spec["shape"], str) else spec["shape"]
    config = AutoConfig.for_model(**shape)
    vocab = {byte: i for i, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocab["<pad>"], vocab["<eos>"] = len(vocab), config.vocab_size - 1
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")
    config.eos_token_id = config.bos_token_id = None
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(spec["policy"])
    config.num_labels, config.pad_token_id = 1, tokenizer.pad_token_id
    config.reward_mean, config.reward_std = 0.0, 1.0
    AutoModelForSequenceClassification.from_config(config, dtype=torch.bfloat16).save_pretrained(spec["reward"])
    for path in (spec["policy"], spec["reward"]):
        tokenizer.save_pretrained(path)


def versions():
    import torch
    import transformers

    where = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    return f"torch {torch.__version__}, transformers {transformers.__version__}, {where}"


def ppo_args(ppo, spec):
    return ppo.Args(
        sft_model_path=spec["policy"], reward_model_path=(spec["reward"],), dataset_name=spec["prompts"],
        output_dir=f"{spec['scratch']}/ppo", prompt_template=spec["template"], max_prompt_length=4096,
        total_episodes=spec["episodes"] * (2 + spec["updates"]), batch_size=spec["episodes"], max_new_tokens=spec["response_length"],
        temperature=spec["temperature"], beta=spec["beta"], missing_eos_penalty=spec["missing_eos_penalty"],
        learning_rate=spec["learning_rate"], num_ppo_epochs=spec["epochs"], num_mini_batches=spec["minibatches"],
        per_device_train_batch_size=spec["micro_batch"], eval_steps=10**9, save_steps=10**9, overwrite=True,
        separate_critic=spec.get("contender") == "ours_separate_critic",
    )  # fmt: skip


def status(key, reset=False):
    """VmHWM (highest resident set so far) or VmRSS (now) of this process, in MiB. Reset: the peak starts anew."""
    value = next(int(line.split()[1]) / 1024 for line in open("/proc/self/status") if line.startswith(key))
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    return value


def ours(spec):
    """Rows of ppo_rlhf.main: one an update, without the last, which looks at answers and saves a checkpoint too."""
    ppo = load_ppo(spec)
    torch, starts, watched = ppo.torch, [], []
    cuda = spec["device"] == "cuda"

    class Timed(ppo.tqdm):  # the loop over updates runs through one, so whole updates can be timed, logging included
        def __init__(self, *args, desc=None, **kwargs):
            self.over_updates = desc == "ppo"  # and not over the steps of a phase
            super().__init__(*args, desc=desc, **kwargs)

        def __iter__(self):
            if not self.over_updates:
                yield from super().__iter__()
                return
            for update in super().__iter__():
                starts.append(ppo.now(torch.device(spec["device"])))
                if spec.get("watch"):
                    watched.append((status("VmRSS"), torch.cuda.memory_allocated() / 2**20 if cuda else None))
                yield update
            starts.append(ppo.now(torch.device(spec["device"])))

    ppo.tqdm = Timed
    ppo.main(ppo_args(ppo, spec))
    rows = []
    for i, line in enumerate(Path(spec["scratch"], "ppo/metrics.jsonl").read_text().splitlines()[:-1]):
        row = json.loads(line)
        rows.append({"update": i + 1, "seconds": starts[i + 1] - starts[i], "rollout": row["time/rollout"], "score": row["time/score"],
                     "optimize": row["time/update"], "response_length": row["response_length"], "peak_rss_mib": status("VmHWM"),
                     "peak_cuda_mib": torch.cuda.max_memory_allocated() / 2**20 if cuda else None, "memory_cap_gib": spec["memory_cap"]})  # fmt: skip
        if watched:
            rows[-1].update(rss_mib=watched[i][0], cuda_mib=watched[i][1])
    return rows


def phases(ppo, on_mark):
    """Call on_mark(update, phase that ended) at ppo_rlhf.py's four clock readings an update."""
    names, count, now = ("between", "rollout", "score", "update"), [0], ppo.now
    ppo.matmul_flops = lambda device: 1e15  # it reads the clock too

    def marked(device):
        on_mark(count[0] // 4 + 1, names[count[0] % 4] if count[0] else "load")
        count[0] += 1
        return now(device)

    now_device = ppo.torch.device("cuda" if ppo.torch.cuda.is_available() else "cpu")
    ppo.now = lambda device: (now(now_device), marked(device))[1]  # what was launched belongs to the phase that ends


def memory_job(spec):
    ppo, rows = load_ppo(spec), []
    cuda = spec["device"] == "cuda"

    def on_mark(update, phase):
        if cuda:
            mib = ppo.torch.cuda.max_memory_allocated() / 2**20
            ppo.torch.cuda.reset_peak_memory_stats()
        else:
            mib = status("VmHWM", reset=True)
        rows.append({"update": update, "phase": phase, "mib": mib})

    phases(ppo, on_mark)
    ppo.main(ppo_args(ppo, spec))
    return rows


def profile_job(spec):
    """One update after the warm-up, op by op, one table a phase."""
    ppo = load_ppo(spec)
    from torch.profiler import ProfilerActivity, profile

    cuda, running = spec["device"] == "cuda", []

    def on_mark(update, phase):
        if running:
            profiler, begun = running.pop()
            profiler.stop()
            took = time.perf_counter() - begun
            by = "self_device_time_total" if cuda else "self_cpu_time_total"
            print(f"\n{phase}: {took:.3f} s under the profiler")
            print(profiler.key_averages().table(sort_by=by, row_limit=spec["profile_rows"], max_name_column_width=45), flush=True)
        if update == 2 and phase != "update":
            profiler = profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda)
            profiler.start()
            running.append((profiler, time.perf_counter()))

    phases(ppo, on_mark)
    ppo.main(ppo_args(ppo, {**spec, "updates": 1}))
    return []


def seconds_of(torch, run, repeats=10):
    """The shortest of a few timed calls, after one that is not counted: the peak of a bandwidth or a matmul."""
    sync = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    times = []
    for _ in range(repeats + 1):
        sync()
        begun = time.perf_counter()
        run()
        sync()
        times.append(time.perf_counter() - begun)
    return min(times[1:])


def embeddings(torch, model):
    return {p for m in model.modules() if isinstance(m, torch.nn.Embedding) for p in m.parameters()}


def decode_job(spec):
    """Time of a decode step: a long rollout less a short one, so that prefill and the capture of the graph cancel."""
    ppo, rows = load_ppo(spec), []
    torch, device = ppo.torch, spec["device"]
    policy, tokenizer = ppo.load_model(ppo.AutoModelForCausalLM, spec["policy"], "--workload")
    policy.to(device).eval()
    if device == "cuda":
        ppo.to_bf16(policy)  # as the sampler is
    config, P, short = policy.config, spec["prompt_length"], min(8, spec["response_length"] // 2)
    big = torch.empty(2**30 if device == "cuda" else 2**28, dtype=torch.uint8, device=device)
    other = torch.empty_like(big)
    bandwidth = 2 * big.numel() / seconds_of(torch, lambda: other.copy_(big))  # bytes read and written, a second
    del big, other
    dtype, head = next(policy.base_model.parameters()).dtype, policy.get_output_embeddings().weight
    skip = embeddings(torch, policy) - {head}  # looked up: one row a token, not the whole
    weights = sum(p.numel() * p.itemsize for p in policy.parameters() if p not in skip)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = config.hidden_size // config.num_attention_heads * heads
    for B in spec["batches"]:
        prompts = torch.randint(0, 200, (B, P), device=device)
        mask = torch.ones_like(prompts)

        def run(T):
            uniforms = torch.rand(T, B, device=device)
            ppo.rollout(policy, prompts, mask, uniforms, spec["temperature"], tokenizer.eos_token_id, tokenizer.pad_token_id)

        long = spec["response_length"]
        times = [seconds_of(torch, lambda: run(T), repeats=5) for T in (short, long)]  # noqa: B023
        cache = 2 * config.num_hidden_layers * width * B * (P + (short + long) / 2) * dtype.itemsize
        rows.append({"batch": B, "step_ms": 1e3 * (times[1] - times[0]) / (long - short), "floor_ms": 1e3 * (weights + cache) / bandwidth,
                     "gb": (weights + cache) / 1e9, "bandwidth": bandwidth / 1e9, "device": device})  # fmt: skip
    return rows


def mfu_job(spec):
    """Useful FLOPs of the update phase: forward and backward (three forwards' worth) of real tokens, over its time."""
    rows = ours({**spec, "contender": "ours"})
    ppo = sys.modules["ppo_rlhf"]
    torch, device = ppo.torch, spec["device"]
    config = ppo.AutoConfig.from_pretrained(spec["policy"])
    with torch.device("meta"):
        model = ppo.AutoModelForCausalLM.from_config(config)
    skip = embeddings(torch, model)
    matrices = sum(p.numel() for p in model.base_model.parameters() if p.dim() == 2 and p not in skip)
    # Real lengths: fixed in workloads with random weights, a mean in the shipped task's (short prompts of about 14 tokens).
    R = median(rows[1:], "response_length")
    L = spec.get("prompt_length", 14) + R
    head = config.hidden_size * config.vocab_size
    attention = 2 * config.num_hidden_layers * config.hidden_size * L**2  # causal: half of 4 L^2 d a layer
    flops = 3 * spec["epochs"] * spec["episodes"] * (2 * matrices * L + 2 * head * R + attention)
    n, dtype = (8192, torch.bfloat16) if device == "cuda" else (1536, torch.float32)
    a, b = torch.randn(2, n, n, device=device, dtype=dtype)
    peak = 2 * n**3 / seconds_of(torch, lambda: a @ b)
    return [{"seconds": median(rows[1:], "optimize"), "tflop": flops / 1e12, "peak": peak / 1e12}]


JOBS = {"make_models": make_models, "contender": ours, "memory": memory_job, "profile": profile_job, "decode": decode_job, "mfu": mfu_job}


def main():
    if len(sys.argv) == 2 and sys.argv[1].endswith("spec.json"):  # a child
        spec = json.loads(Path(sys.argv[1]).read_text())
        rows = [{"versions": versions(), **row} for row in JOBS[spec["job"]](spec) or []]
        return Path(spec["out"]).write_text("".join(json.dumps(row) + "\n" for row in rows))

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", nargs="+", help=f"one or more of {', '.join(WORKLOADS)}; default: all that fit --device")
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, help="default: all")
    parser.add_argument("--mode", choices=["speed", "decode", "mfu", "memory", "growth"], default="speed")
    parser.add_argument("--profile", action="store_true", help="where the time of one of our updates goes, op by op")
    parser.add_argument("--profile_rows", type=int, default=25)
    parser.add_argument("--updates", type=int, default=6, help="measured updates of each contender and round, after one warm-up")
    parser.add_argument("--rounds", type=int, default=1, help="times that the contenders take turns")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--trl_python", default=sys.executable, help="the interpreter of an environment with trl==1.12.0")
    parser.add_argument("--memory_cap", type=float, help="GiB of GPU memory that a contender may use")
    parser.add_argument("--micro_batch", type=int, help="episodes in one of our forward passes; changes no gradient")
    parser.add_argument("--batches", type=int, nargs="+", help="--mode decode: batch sizes")
    parser.add_argument("--shape", choices=["smoke", "4x128", "gpt2-124m"], help="--mode growth: the model in the middle")
    parser.add_argument("--long_updates", type=int, default=200, help="--mode growth: updates of the long run")
    parser.add_argument("--sft_model_path", type=Path, default=REPO / "runs/sft", help="the policy of cpu-tiny")
    parser.add_argument("--reward_model_path", type=Path, default=REPO / "runs/reward_model", help="the reward model of cpu-tiny")
    options = parser.parse_args()
    names = options.workload or [name for name in WORKLOADS if name != "smoke" and ("-b" in name) == (options.device == "cuda")]
    for name in names:
        if name not in WORKLOADS:
            parser.error(f"--workload {name}: choose from {', '.join(WORKLOADS)}")
    with tempfile.TemporaryDirectory() as folder:
        if options.mode == "growth":
            return growth(Path(folder), options)
        for name in names:
            if options.mode == "decode" and WORKLOADS[name]["shape"] is None:
                print(f"{name}: its prompts have no fixed length; decode is measured on the other workloads")
                continue
            spec = prepare(name, WORKLOADS[name], Path(folder, name), options)
            if options.profile:
                start("speed.py", {**spec, "job": "profile", "profile_rows": options.profile_rows, "verbose": True})
            else:
                {"speed": compare, "decode": decode, "mfu": mfu, "memory": memory}[options.mode](name, spec, options)
            if spec["shape"]:
                shutil.rmtree(spec["prompts"])  # gigabytes of random weights


if __name__ == "__main__":
    main()
    sys.exit(1 if FAILED else 0)
