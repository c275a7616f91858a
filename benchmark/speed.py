"""How fast and how lean is ppo_rlhf.py?

    python benchmark/speed.py --workload cpu-tiny cpu-gpt2 --trl_python trl_env/bin/python
    python benchmark/speed.py --device cuda --trl_python ...      # gpt2-124m, qwen2.5-0.5b, pythia-1b
    python benchmark/speed.py --mode decode --workload cpu-gpt2   # a decode step against the bandwidth
    python benchmark/speed.py --mode memory --workload cpu-gpt2   # peak memory of each phase

Contenders: ours (a second network for the values: the same amount of work as TRL's); ours_shared (policy and
values share one backbone); trl (TRL 1.12.0's PPOTrainer; on CUDA fp32 weights with bf16 autocast, as ours);
trl_bf16 (all weights and Adam in bf16: lighter, but small steps are rounded away).
Checkpoints, prompts and flags are equal. Not equal: random numbers; the micro-batch (TRL cannot split a
minibatch); gradient clipping.

Each contender runs in a fresh process, in turn, --rounds times. The first update is a warm-up; the table
holds medians, and ratios of medians round by round. Loading and the end of a run are not timed. Peak memory
is the whole process's, and torch's on CUDA. On a CPU all runs keep freed memory from going back to the
kernel (MALLOC_MMAP_MAX_, MALLOC_TRIM_THRESHOLD_): less time, more memory. MFU: useful FLOPs of ours_shared's
update phase over its time, against a matrix product of the same machine.
"""

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import common
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

import ppo_rlhf as ppo

HERE = Path(__file__).resolve().parent
CONTENDERS = ("ours", "ours_shared", "trl", "trl_bf16")
# Shapes of published models, filled with random weights: speed does not depend on what a model knows
SHAPES = {
    "smoke": {"model_type": "gpt2", "vocab_size": 512, "n_embd": 64, "n_layer": 2, "n_head": 2},  # a test
    "gpt2-124m": {"model_type": "gpt2"},  # the defaults of its config class
    "qwen2.5-0.5b": {"model_type": "qwen2", "vocab_size": 151936, "tie_word_embeddings": True}
    | {"num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2}
    | {"hidden_size": 896, "intermediate_size": 4864},
    "pythia-1b": {"model_type": "gpt_neox", "vocab_size": 50304, "max_position_embeddings": 2048}
    | {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 8},
}
# name: (shape, prompt length, response length, episodes, minibatches, our micro-batch). On CUDA a minibatch
# has 16 episodes: TRL runs it in one piece, with logits of every position.
WORKLOADS = {
    "smoke": ("smoke", 12, 8, 8, 2, 4),
    "cpu-tiny": (None, 14, 64, 64, 4, 16),  # the shipped task's models; prompts of about 14 tokens
    "cpu-gpt2": ("gpt2-124m", 32, 48, 8, 1, 8),
}
for _shape in ("gpt2-124m", "qwen2.5-0.5b", "pythia-1b"):
    for _episodes in (64, 512):
        WORKLOADS[f"{_shape}-b{_episodes}"] = (_shape, 512, 53, _episodes, _episodes // 16, 16)


# ---- The parent: makes the inputs, starts one process after another, prints one table ----


def start(command, spec):
    """Run one job in a fresh process -> its rows, what it wrote to spec["out"]."""
    folder = Path(spec["scratch"])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "spec.json").write_text(json.dumps(spec))
    quiet = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "WANDB_MODE": "disabled"}
    env = {**os.environ, **quiet, "HF_DATASETS_CACHE": f"{folder}/datasets"}
    if spec["device"] == "cpu":
        env |= {"CUDA_VISIBLE_DEVICES": "", "MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "-1"}
    with open(folder / "log.txt", "w") as log:
        words = list(map(str, command))
        code = subprocess.run(words, cwd=common.ROOT, env=env, stdout=log, stderr=log).returncode
    if code:
        lines = (folder / "log.txt").read_text().splitlines()
        raise SystemExit("\n".join([f"speed.py: error: {command[1]} failed", *lines[-12:]]))
    return common.read_jsonl(spec["out"])


def child(job, spec):
    spec = {**spec, "job": job, "out": f"{spec['scratch']}/rows.jsonl"}
    return start([sys.executable, HERE / "speed.py", f"{spec['scratch']}/spec.json"], spec)


def prepare(name, folder, options):
    """Policy, reward model and prompts of a workload -> the spec that every job gets."""
    keys = ("shape", "prompt_length", "response_length", "episodes", "minibatches", "micro_batch")
    spec = dict(zip(keys, WORKLOADS[name]), device=options.device, updates=options.updates)
    spec |= {"scratch": str(folder), "prompts": f"{folder}/prompts"}
    prompts = folder / "prompts"
    prompts.mkdir(parents=True)
    if spec["shape"] is None:  # the shipped task, with one held-out prompt: they are not timed
        spec |= {"policy": str(options.base_dir / "sft"), "reward": str(options.base_dir / "reward_model")}
        shutil.copy(common.ROOT / "data/prompts/train.jsonl", prompts)
        common.write_jsonl(prompts / "test.jsonl", [{"prompt": common.held_out(1)[0]}])
        return spec
    spec |= {"policy": f"{folder}/policy", "reward": f"{folder}/reward"}
    letters = random.Random(0)
    for split, number in (("train", 2 * spec["episodes"]), ("test", 1)):
        texts = ["".join(letters.choices("abcdefgh", k=spec["prompt_length"])) for _ in range(number)]
        common.write_jsonl(prompts / f"{split}.jsonl", [{"prompt": text} for text in texts])
    child("make_models", spec)
    return spec


def flags_of(spec):
    """ppo_rlhf.py's flags for a contender; TRL gets the same."""
    B = spec["episodes"]
    flags = {"sft_model_path": spec["policy"], "reward_model_path": spec["reward"]}
    flags |= {"dataset_name": spec["prompts"], "output_dir": f"{spec['scratch']}/run"}
    flags |= {"total_episodes": B * (1 + spec["updates"]), "batch_size": B, "rollout_batch_size": B}
    flags |= {"max_new_tokens": spec["response_length"], "num_mini_batches": spec["minibatches"]}
    flags |= {"per_device_train_batch_size": spec["micro_batch"], "save_steps": 10**9}
    # So small a rate that the policy, and with it the length of its responses, stays what it is
    return {**flags, "max_prompt_length": 4096, "num_ppo_epochs": 4, "learning_rate": 1e-6}


def measure(spec, options):
    """Rows of one contender, one an update."""
    folder = Path(spec["scratch"], "run")
    shutil.rmtree(folder, ignore_errors=True)
    if spec["contender"].startswith("trl"):
        words = [word for name, value in flags_of(spec).items() for word in (f"--{name}", value)]
        words += ["--pure_bf16"] if spec["contender"] == "trl_bf16" else []
        script = [options.trl_python, HERE / "trl_run.py", "--times", *words]
        return start(script, {**spec, "out": f"{folder}/times.jsonl"})
    rows = child("ours", spec)
    for row in rows:
        for key, name in (("rollout", "rollout"), ("score", "score"), ("optimize", "update")):
            row[key] = row[f"time/{name}"]
        row["seconds"] = row["rollout"] + row["score"] + row["optimize"]
    return rows


def median(rows, key):
    return statistics.median(row[key] for row in rows)


def show(header, rows):
    common.print_table(header, [[x if isinstance(x, str) else f"{x:,.3g}" for x in row] for row in rows])


def save(options, name, rows):
    path = options.output_dir / f"{name}.jsonl"
    common.write_results(path, rows)
    print(f"\nrows: {path}; {common.stamp()['machine']}; {rows[0]['versions']}\n")


def compare(name, spec, options):
    rows = []
    for round_ in range(options.rounds):
        for contender in options.contenders:
            for row in measure({**spec, "contender": contender}, options):
                rows.append({"workload": name, "contender": contender, "round": round_, **row})
            print(f"  round {round_}: {contender}", file=sys.stderr, flush=True)
    measured = [row for row in rows if row["update"] > 1]  # the first is a warm-up
    memory = "peak_cuda_mib" if options.device == "cuda" else "peak_rss_mib"

    def ratios(slow, fast):
        """How much longer `slow` takes, round by round: a round's neighbours share the machine's load."""
        own = lambda name, i: [row for row in measured if (row["contender"], row["round"]) == (name, i)]
        if fast not in options.contenders:
            return ""
        rounds = range(options.rounds)
        found = [median(own(slow, i), "seconds") / median(own(fast, i), "seconds") for i in rounds]
        return f"{statistics.median(found):.2f} ({min(found):.2f}-{max(found):.2f})"

    table = []
    for contender in options.contenders:
        own = [row for row in measured if row["contender"] == contender]
        figures = [median(own, key) for key in ("seconds", "rollout", "score", "optimize", "response_length")]
        peak = max(row[memory] or 0 for row in own)
        cells = [contender, spec["episodes"] / figures[0], *figures, peak]
        table.append([*cells, ratios(contender, "ours"), ratios(contender, "ours_shared")])
    titles = ["contender", "episodes/s", "s an update", "rollout", "scoring", "update", "tokens a response"]
    show([*titles, "peak MiB", "time / ours", "time / ours_shared"], table)
    ours = [row for row in measured if row["contender"] == "ours_shared"]
    if ours:
        work = child("flops", {**spec, "response_length": median(ours, "response_length")})[0]
        speed = work["tflop"] / median(ours, "optimize")
        share = f"{speed / work['peak']:.0%} of a matrix product's {work['peak']:.3g}"
        print(f"ours_shared, update phase: {work['tflop']:.3g} TFLOP at {speed:.3g} TFLOP/s, {share} (MFU)")
        save(options, f"mfu_{name}", [{**work, "seconds": median(ours, "optimize")}])
    save(options, f"speed_{name}", rows)


def decode(name, spec, options):
    batches = [64, 512] if options.device == "cuda" else [8, 64]
    rows = child("decode", {**spec, "batches": batches})
    print(f"\n{name}: a decode step against the floor, (weights + real keys and values) / bandwidth")
    cells = [[*(row[key] for key in ("batch", "step_ms", "floor_ms", "gb", "bandwidth"))] for row in rows]
    show(["batch", "step ms", "floor ms", "GB/step", "bandwidth GB/s"], cells)
    save(options, f"decode_{name}", rows)


def memory(name, spec, options):
    rows = child("memory", spec)
    print(f"\n{name}: peak memory by phase, MiB")
    phases = dict.fromkeys(row["phase"] for row in rows)
    show(["phase", "peak MiB"], [[p, max(row["mib"] for row in rows if row["phase"] == p)] for p in phases])
    save(options, f"memory_{name}", rows)


# ---- A child: one job in a process of its own ----


def run_ours(spec):
    ppo.main(ppo.Args(**flags_of(spec), separate_critic="shared" not in spec.get("contender", "")))


def versions():
    gpu = torch.cuda.is_available()
    where = torch.cuda.get_device_name() if gpu else f"CPU, {torch.get_num_threads()} threads"
    return f"torch {torch.__version__}, transformers {transformers.__version__}, {where}"


def peak_rss():
    """Highest resident set of this process, in MiB."""
    line = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def ours(spec):
    run_ours(spec)
    rows = common.read_jsonl(f"{spec['scratch']}/run/metrics.jsonl")
    cuda = torch.cuda.max_memory_allocated() / 2**20 if spec["device"] == "cuda" else None
    return [
        {**row, "versions": versions(), "peak_cuda_mib": cuda, "peak_rss_mib": peak_rss()} for row in rows
    ]


def make_models(spec):
    """Policy and reward model with random weights, and a byte tokenizer. Its EOS is one id of tens of
    thousands that random weights write alike, so nearly every response of every contender has full
    length."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    torch.manual_seed(0)
    config = AutoConfig.for_model(**SHAPES[spec["shape"]])
    vocab = {byte: i for i, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocab |= {"<pad>": len(vocab), "<eos>": config.vocab_size - 1}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")
    end = "{{ eos_token if m.role == 'assistant' else '' }}"
    tokenizer.chat_template = f"{{% for m in messages %}}{{{{ m.content }}}}{end}{{% endfor %}}"
    config.bos_token_id = None
    config.eos_token_id = vocab["<eos>"]
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(spec["policy"])
    config.num_labels = 1
    config.pad_token_id = tokenizer.pad_token_id
    reward_model = AutoModelForSequenceClassification.from_config(config, dtype=torch.bfloat16)
    reward_model.save_pretrained(spec["reward"])
    for path in (spec["policy"], spec["reward"]):
        tokenizer.save_pretrained(path)


def memory_job(spec):
    """ppo_rlhf.py reads the clock four times an update, between its phases; here the peak is read there
    too."""
    names = ("between", "rollout", "scoring", "update")
    rows = []

    def marked():
        if spec["device"] == "cuda":
            mib = torch.cuda.max_memory_allocated() / 2**20
            torch.cuda.reset_peak_memory_stats()
        else:
            mib = peak_rss()
            Path("/proc/self/clear_refs").write_text("5")  # the peak is reset
        phase = names[len(rows) % 4] if rows else "load"
        rows.append({"update": len(rows) // 4 + 1, "phase": phase, "mib": mib, "versions": versions()})
        return time.time()

    ppo.time = type("Clock", (), {"time": staticmethod(marked)})
    run_ours(spec)
    return rows


def seconds_of(run, repeats=10):
    """The shortest of a few timed calls, after one that is not counted."""
    sync = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    times = []
    for _ in range(repeats + 1):
        sync()
        begun = time.perf_counter()
        run()
        sync()
        times.append(time.perf_counter() - begun)
    return min(times[1:])


def decode_job(spec):
    """Time of a decode step: a long rollout less a short one, so that prefill and a graph's capture
    cancel."""
    device = spec["device"]
    policy, tokenizer = ppo.load_pretrained(AutoModelForCausalLM, spec["policy"])
    policy.to(device).eval()
    if device == "cuda":
        policy = ppo.bf16_copy(policy)  # as the sampler is
    config = policy.config
    P = spec["prompt_length"]
    long = spec["response_length"]
    short = min(8, long // 2)
    big = torch.empty(2**30 if device == "cuda" else 2**28, dtype=torch.uint8, device=device)
    other = torch.empty_like(big)
    bandwidth = 2 * big.numel() / seconds_of(lambda: other.copy_(big))  # bytes read and written
    head = policy.get_output_embeddings().weight
    tables = [m.weight for m in policy.modules() if isinstance(m, torch.nn.Embedding)]
    looked_up = {id(table) for table in tables if table is not head}  # one row a token
    weights = sum(p.numel() * p.itemsize for p in policy.parameters() if id(p) not in looked_up)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = config.hidden_size // config.num_attention_heads * heads
    itemsize = next(policy.base_model.parameters()).itemsize
    ends = torch.tensor([tokenizer.eos_token_id], device=device)
    rows = []
    for B in spec["batches"]:
        prompts = torch.randint(0, 200, (B, P), device=device)
        mask = torch.ones_like(prompts)  # [B, P]
        times = []
        for T in (short, long):
            uniforms = torch.rand(T, B, device=device)
            inputs = prompts, mask, uniforms, ppo.Args.temperature, ends, tokenizer.pad_token_id
            times.append(seconds_of(lambda: ppo.rollout(policy, *inputs), repeats=5))  # noqa: B023
        cache = 2 * config.num_hidden_layers * width * B * (P + (short + long) / 2) * itemsize
        row = {"batch": B, "step_ms": 1e3 * (times[1] - times[0]) / (long - short)}
        row |= {"floor_ms": 1e3 * (weights + cache) / bandwidth, "gb": (weights + cache) / 1e9}
        rows.append({**row, "bandwidth": bandwidth / 1e9, "device": device, "versions": versions()})
    return rows


def flops(spec):
    """Useful TFLOP of an update phase, forward and backward (three forwards' worth) of real tokens, and the
    TFLOP/s of a matrix product."""
    config = AutoConfig.from_pretrained(spec["policy"])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    tables = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    matrices = sum(p.numel() for p in model.base_model.parameters() if p.dim() == 2 and id(p) not in tables)
    R = spec["response_length"]
    L = spec["prompt_length"] + R
    head = config.hidden_size * config.vocab_size
    attention = 2 * config.num_hidden_layers * config.hidden_size * L**2  # causal: half of 4 L^2 d a layer
    total = 3 * 4 * spec["episodes"] * (2 * matrices * L + 2 * head * R + attention)
    cuda = spec["device"] == "cuda"
    n = 8192 if cuda else 1536
    a, b = torch.randn(2, n, n, device=spec["device"], dtype=torch.bfloat16 if cuda else torch.float32)
    peak = 2 * n**3 / seconds_of(lambda: a @ b)
    return [{"tflop": total / 1e12, "peak": peak / 1e12, "versions": versions()}]


JOBS = {"make_models": make_models, "ours": ours, "memory": memory_job, "decode": decode_job, "flops": flops}


def main():
    if len(sys.argv) == 2 and sys.argv[1].endswith("spec.json"):  # a child
        spec = json.loads(Path(sys.argv[1]).read_text())
        rows = JOBS[spec["job"]](spec) or []
        return common.write_jsonl(Path(spec["out"]), rows)
    as_it_is = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_it_is)
    add = parser.add_argument
    add("--workload", nargs="+", choices=WORKLOADS, help="default: all that fit --device")
    add("--contenders", nargs="+", choices=CONTENDERS, help="default: all that fit --device")
    add("--mode", choices=["speed", "decode", "memory"], default="speed")
    add("--updates", type=int, default=6, help="measured, of each contender and round, after a warm-up")
    add("--rounds", type=int, default=1, help="times that the contenders take turns")
    add("--device", choices=["cpu", "cuda"], default="cpu")
    add("--trl_python", default=sys.executable, help="the interpreter of an environment with trl==1.12.0")
    add("--base_dir", type=Path, default=common.ROOT / "runs", help="with sft and reward_model, for cpu-tiny")
    add("--output_dir", type=Path, default=common.RESULTS)
    options = parser.parse_args()
    options.base_dir = options.base_dir.resolve()
    cuda = options.device == "cuda"
    options.contenders = options.contenders or [c for c in CONTENDERS if c != "trl_bf16" or cuda]
    names = [name for name in WORKLOADS if name != "smoke" and ("-b" in name) == cuda]
    for name in options.workload or names:
        with tempfile.TemporaryDirectory() as folder:
            spec = prepare(name, Path(folder), options)
            {"speed": compare, "decode": decode, "memory": memory}[options.mode](name, spec, options)


if __name__ == "__main__":
    main()
