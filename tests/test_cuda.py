"""The CUDA path, without CUDA: the three scripts as they run on a GPU, on a CPU that plays one.

What is played: tensors of the "GPU" and of the host, which do not mix; every branch `device.type == "cuda"`; bf16 autocast,
bf16 models, the sampler's copy of the policy; the decode step's capture and replay. What is not: CUDA's own kernels, their
rounding, speed and memory.
"""

import contextlib
import copy
import functools
import math
import sys
import types

import pytest
import torch
from conftest import (EOS, NEVER, PAD, PROMPTS, REPOSITORY, read_jsonl, save, stop_and_resume, tiny_model, tiny_reward_model,
                      tiny_tokenizer, write_jsonl)  # fmt: skip
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import ppo_rlhf as ppo
import reward_model
import sft

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")


def tensors_in(x):
    if isinstance(x, torch.Tensor):
        yield x
    elif isinstance(x, (list, tuple, dict)):
        for item in x.values() if isinstance(x, dict) else x:
            yield from tensors_in(item)


class Stream:
    def wait_stream(self, other):
        """Everything runs in order here."""


class FakeCuda(TorchFunctionMode):
    """A GPU of bookkeeping. All tensors are the CPU's; the storages of some are marked: made with device="cuda", moved there,
    or computed from such. Those say that they are on CUDA, and an operation that takes one of them and an array of the
    host's fails, as on CUDA."""

    WAITS = {"item", "tolist", "__bool__", "__int__", "__float__", "__index__", "numpy"}  # the host waits for the device
    # These may take both: they copy, take indices from the host, or compute nothing.
    BOTH = {"copy_", "__getitem__", "__setitem__", "__set__", "_has_compatible_shallow_copy_type"}

    def __init__(self):
        super().__init__()
        self.storages, self.graphs, self.streams, self.caps, self.waits, self.capturing = {}, [], [], [], 0, False

    def __enter__(self):
        self.patch, autocast = pytest.MonkeyPatch(), torch.autocast
        for name, value in dict(
            is_available=lambda: True, synchronize=lambda *_: None, Stream=Stream, current_stream=Stream, stream=self.on_stream, CUDAGraph=RecordedGraph, graph=self.capture,
            is_current_stream_capturing=lambda: self.capturing,
            max_memory_allocated=lambda *_: 1e9, memory_allocated=lambda *_: 1e9, reset_peak_memory_stats=lambda *_: None,
            get_device_properties=lambda *_: types.SimpleNamespace(total_memory=2**31), set_per_process_memory_fraction=self.caps.append,
        ).items():  # fmt: skip
            self.patch.setattr(torch.cuda, name, value)
        # Or else a torch that was built for CUDA asks the driver more, and there may be none; one built for CPUs says None too.
        self.patch.setattr(torch.accelerator, "current_accelerator", lambda *_, **__: None)
        self.patch.setattr(torch, "autocast", lambda device_type, dtype=None, **other: autocast("cpu", dtype, **other))
        self.patch.setattr(torch, "set_float32_matmul_precision", lambda precision: None)  # of the CPU's products too
        self.patch.setattr(ppo, "matmul_flops", functools.partial(ppo.matmul_flops, n=64))
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.patch.undo()

    def on_stream(self, stream):
        self.streams.append(stream)
        return contextlib.nullcontext()

    @contextlib.contextmanager
    def capture(self, graph, stream=None):
        assert stream is (self.streams[-1] if self.streams else None), "not on the stream of the warm-up"
        self.graphs.append(graph)
        self.capturing = True
        try:
            with graph:
                yield
        finally:
            self.capturing = False

    def holds(self, tensor):
        return tensor.untyped_storage()._cdata in self.storages

    def mark(self, tensor):
        storage = tensor.untyped_storage()
        self.storages[storage._cdata] = StorageWeakRef(storage)  # while it is kept, no other storage gets this number
        return tensor

    def move(self, tensor, device, dtypes):
        moved = tensor.to(*dtypes) if dtypes else tensor
        if self.holds(tensor) == (device.type == "cuda"):
            return self.mark(moved) if self.holds(tensor) else moved
        assert not self.capturing, "a copy between host and GPU cannot be captured"
        return self.mark(moved.clone()) if device.type == "cuda" else moved.clone()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs, name = dict(kwargs or {}), function.__name__
        given = list(tensors_in((args, kwargs)))
        on_gpu = any(self.holds(tensor) for tensor in given)
        if on_gpu and function in (torch.Tensor.device.__get__, torch.Tensor.is_cuda.__get__):
            return CUDA if function == torch.Tensor.device.__get__ else True
        hidden = name == "__getitem__" and any(tensor.dtype == torch.bool for tensor in given[1:])  # how many are True?
        self.waits += on_gpu and (name in self.WAITS or hidden)
        if name in ("to", "cpu", "cuda"):
            said = [*args[1:], *kwargs.values()]
            devices = [torch.device(x) for x in said if isinstance(x, (str, torch.device))]
            devices += [CUDA if self.holds(x) else CPU for x in said if isinstance(x, torch.Tensor)]
            devices += {"cpu": [CPU], "cuda": [CUDA]}.get(name, [])
            if devices and devices[0].type != "meta":
                return self.move(args[0], devices[0], [x for x in said if isinstance(x, torch.dtype)])
        if kwargs.get("device") is not None:
            on_gpu = torch.device(kwargs["device"]).type == "cuda"
            kwargs["device"] = CPU if on_gpu else kwargs["device"]
        elif on_gpu and name not in self.BOTH and any(tensor.dim() and not self.holds(tensor) for tensor in given):
            where = [f"{'cuda' if self.holds(tensor) else 'cpu'}{list(tensor.shape)}" for tensor in given]
            raise RuntimeError(f"{name}: expected all tensors to be on the same device, got {', '.join(where)}")
        out = function(*args, **kwargs)
        if on_gpu:
            for tensor in tensors_in([out, args[0]] if name == "__set__" else out):  # parameter.data = what was moved
                self.mark(tensor)
        return out


class RecordedGraph(TorchDispatchMode):
    """What a CUDA graph does, on a CPU. Capture: note every kernel with the tensors it reads and writes; what was
    written meanwhile is put back, since a capture runs nothing. Replay: the same kernels on the same memory, with every
    Python number as it was at the capture. What would make CUDA's capture fail, fails here: a kernel whose result the
    host waits for, and a tensor made from host memory."""

    HOST = {"_local_scalar_dense", "nonzero", "equal", "masked_select", "_unique2", "unique_dim", "lift_fresh", "lift_fresh_copy"}

    def __init__(self):
        super().__init__()
        self.kernels, self.before, self.replays = [], [], 0

    def __torch_dispatch__(self, kernel, types, args=(), kwargs=None):
        name = kernel._schema.name.removeprefix("aten::")
        hidden = name.startswith("index") and any(x.dtype == torch.bool for x in tensors_in(args[1:2]))  # a nonzero
        assert name not in self.HOST and not hidden, f"aten::{name} cannot be captured: it waits for the device or reads host memory"
        for parameter, argument in zip(kernel._schema.arguments, args):
            if parameter.alias_info is not None and parameter.alias_info.is_write:
                self.before.append((argument, argument.clone()))
        out = kernel(*args, **(kwargs or {}))
        self.kernels.append((kernel, args, kwargs or {}, out))
        return out

    def __exit__(self, *error):
        super().__exit__(*error)
        for tensor, old in reversed(self.before):
            tensor.copy_(old)

    def replay(self):
        self.replays += 1
        for kernel, args, kwargs, out in self.kernels:
            new = kernel(*args, **kwargs)
            for a, b in zip([out], [new]) if isinstance(out, torch.Tensor) else zip(out, new):
                if isinstance(a, torch.Tensor) and a.data_ptr() != b.data_ptr():  # else a view, or changed in place
                    a.copy_(b)


@pytest.fixture
def cuda():
    return FakeCuda()


# ---------------------------------------------------------------------------------------------------------------
# The fake itself: it must see what it is there for
# ---------------------------------------------------------------------------------------------------------------


def test_the_fake_gpu_refuses_what_cuda_refuses(cuda):
    """Arrays of host and GPU do not mix, scalars of the host do; what is computed on the GPU stays there."""
    with cuda:
        host, gpu = torch.ones(3), torch.ones(3, device="cuda")
        for mixed in (lambda: host + gpu, lambda: torch.cat([gpu, host]), lambda: gpu.index_select(0, torch.tensor([1])),
                      lambda: host * gpu.sum(), lambda: torch.nn.functional.linear(host, torch.ones(2, 3, device="cuda"))):  # fmt: skip
            with pytest.raises(RuntimeError, match="same device"):
                mixed()
        assert (gpu + torch.tensor(1.0)).device == CUDA and gpu[torch.tensor([0])].is_cuda and gpu.view(3, 1)[1:].is_cuda
        assert gpu.cpu().device == CPU and torch.zeros(2).device == CPU and torch.zeros_like(gpu).device == CUDA
        assert gpu.new_zeros(2).device == CUDA and torch.arange(3, device=gpu.device).device == CUDA
        layer = copy.deepcopy(torch.nn.Linear(3, 2).to("cuda", torch.bfloat16))
        assert all(p.device == CUDA and p.dtype == torch.bfloat16 for p in layer.parameters())
        layer.float()(gpu).sum().backward()
        assert layer.weight.grad.device == CUDA
        gpu += 1
        assert gpu.cpu().tolist() == [2, 2, 2] and gpu.to(CPU).data_ptr() != gpu.data_ptr()


@pytest.mark.parametrize("step", [lambda x: x.sum().item(), lambda x: x[x > 0], lambda x: x + torch.ones(2).to("cuda"), lambda x: bool(x.any()),
                                  lambda x: x + torch.tensor([1.0, 2.0], device="cuda")])  # fmt: skip
def test_the_fake_graph_refuses_what_a_capture_refuses(cuda, step):
    """A question to the host, also a hidden one, and a copy from its memory."""
    with cuda:
        x = torch.ones(2, device="cuda")
        with pytest.raises(AssertionError, match="captured"), torch.cuda.graph(torch.cuda.CUDAGraph()):
            step(x)


# ---------------------------------------------------------------------------------------------------------------
# The decode step as a CUDA graph
# ---------------------------------------------------------------------------------------------------------------

V = 24


@pytest.mark.parametrize("eos_id", [NEVER, EOS, 7])
def test_a_replayed_step_equals_the_step(cuda, family, eos_id):
    """One decode step, recorded once and replayed for all others, writes exactly what the loop writes, whether the model
    runs for the first time or a second rollout makes a new graph. Catches what a graph would freeze or lose: a
    counter in Python (also one in transformers' cache), a tensor that is replaced instead of changed, a state
    that the capture itself moves on, a question to the host inside the step."""
    model, T = tiny_model(family, vocab_size=V), 16
    batches = [(*ppo.left_pad(PROMPTS, PAD, "cpu")[:2], torch.rand(T, len(PROMPTS))) for _ in range(2)]
    expected = [ppo.rollout(model, *batch, 0.7, eos_id, PAD) for batch in batches]
    with cuda:
        model.to("cuda")
        for batch, (responses, lengths) in zip(batches, expected):
            got = ppo.rollout(model, *(x.to("cuda") for x in batch), 0.7, eos_id, PAD)
            assert got[0].is_cuda and torch.equal(got[0].cpu(), responses) and torch.equal(got[1].cpu(), lengths)
    assert len(cuda.graphs) == 2 and all(graph.replays >= T - 8 for graph in cuda.graphs) and len(cuda.graphs[0].kernels) > 20
    assert len({*cuda.streams}) == 1, "cuBLAS keeps a workspace for every stream"


@pytest.mark.parametrize("tied", [False, True])
def test_models_that_are_only_read(family, tied):
    """bf16 weights, but the buffers and the output layer as they were; the original is left alone, tied or not. Catches RoPE's
    frequencies in bf16, with which a long text is read by another model, and logits rounded to bf16."""
    model = tiny_model(family, vocab_size=V, tie_word_embeddings=tied).eval()
    model.load_state_dict({name: weight * 1.001 for name, weight in model.state_dict().items()})  # none of them exact in bf16
    before = {name: tensor.clone() for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    copied = copy.deepcopy(model)
    ppo.to_bf16(copied)
    assert all(torch.equal(tensor, before[name]) for name, tensor in (*model.named_parameters(), *model.named_buffers()))
    assert all(torch.equal(tensor, before[name]) for name, tensor in copied.named_buffers())
    assert torch.equal(copied.get_output_embeddings().weight, model.get_output_embeddings().weight)
    assert {p.dtype for p in copied.base_model.parameters()} == {torch.bfloat16}
    copied.load_state_dict(model.state_dict())  # as the sampler is refreshed
    ids = torch.randint(V, (1, 12))
    with torch.no_grad():
        hidden = copied.base_model(input_ids=ids, use_cache=False).last_hidden_state
        logits = copied.get_output_embeddings()(hidden.float())
        expected = model(input_ids=ids).logits
    assert 0 < (logits - expected).std() < 0.03 * expected.std()


# ---------------------------------------------------------------------------------------------------------------
# Whole runs
# ---------------------------------------------------------------------------------------------------------------

WORDS = ["one", "two two", "three?", "4", "five five five", "6 6", "seven"]


@pytest.fixture
def flags(tmp_path):
    """Flags of short runs of the three stages, on models and data that are written to tmp_path."""
    tokenizer, small = tiny_tokenizer(), dict(initializer_range=0.05)
    rows = [{"prompt": word, "completion": word[::-1], "chosen": word, "rejected": word[::-1] + "!"} for word in WORDS]
    write_jsonl(tmp_path / "data/train.jsonl", rows[:-1])
    write_jsonl(tmp_path / "data/test.jsonl", rows[-1:])
    model = save(tiny_model("llama", **small), tokenizer, tmp_path / "model")
    every = dict(dataset_name=str(tmp_path / "data"), output_dir=str(tmp_path / "out"), prompt_template="{prompt}:", max_new_tokens=10,
                 per_device_train_batch_size=3, learning_rate=1e-3, save_steps=1)  # fmt: skip
    training = dict(model_name_or_path=model, num_train_epochs=2, warmup_steps=1, logging_steps=1, eval_steps=1)
    return {
        sft: dict(every, **training),
        reward_model: dict(every, **training, normalization_samples=8),
        ppo: dict(every, sft_model_path=model, batch_size=8, total_episodes=24, num_mini_batches=2, temperature=1.0,
                  reward_model_path=(save(tiny_reward_model("llama", **small), tokenizer, tmp_path / "rm"),)),
    }  # fmt: skip


def metrics_of(stage, flags, cuda=None):
    """main() on the CPU or on the fake GPU -> the lines of its metrics.jsonl."""
    with cuda or contextlib.nullcontext():
        stage.main(stage.Args(**{"overwrite": True, **flags}))
    return read_jsonl(f"{flags['output_dir']}/metrics.jsonl")


@pytest.mark.parametrize("extras", [{}, dict(gradient_checkpointing=True, gradient_accumulation_steps=2)])
@pytest.mark.parametrize("stage", [sft, reward_model])
def test_stages_1_and_2_on_the_fake_gpu(cuda, flags, stage, extras):
    """The figures of the CPU's run, up to bf16's rounding. Catches a batch, a label or a mask left on the host."""
    expected = metrics_of(stage, {**flags[stage], **extras})
    metrics = metrics_of(stage, {**flags[stage], **extras}, cuda)
    for a, b in zip(metrics, expected, strict=True):
        for name in a.keys() & {"loss/train", "loss/test", "eval/loss"}:
            assert a[name] != b[name], "no bf16 in it: the fake GPU was not used"
            assert a[name] == pytest.approx(b[name], rel=0.02)


def test_the_host_waits_rarely(cuda, flags, monkeypatch):
    """It asks the device once in eight decode steps, and never in a micro-batch: eight of them in the place of one cost no
    question more, but for transformers' own, one a forward, whether several sequences are packed into a row. Catches an
    .item() in an inner loop, for which a GPU would stand still."""
    monkeypatch.setattr("transformers.masking_utils.find_packed_sequence_indices", lambda position_ids: None)
    model, T = tiny_model("gpt2", vocab_size=V), 40
    ids, mask, _ = ppo.left_pad(PROMPTS, PAD, "cpu")
    with cuda:
        ppo.rollout(model.to("cuda"), ids.to("cuda"), mask.to("cuda"), torch.rand(T, len(PROMPTS), device="cuda"), 1.0, NEVER, PAD)
    assert cuda.waits == 4  # after the steps 8, 16, 24, 32
    waits = []
    for micro_batch in (8, 1):
        before = cuda.waits
        metrics_of(ppo, {**flags[ppo], "num_mini_batches": 1, "per_device_train_batch_size": micro_batch}, cuda)
        waits.append(cuda.waits - before)
    assert waits[0] == waits[1] > 0


EXTRAS = dict(separate_critic=True, ptx_coef=0.5, gradient_checkpointing=True, entropy_coef=0.01, whiten_rewards=True,
              adaptive_kl_target=1.0, length_penalty=0.01, ensemble="mean-std")  # fmt: skip


@pytest.mark.parametrize("extras", [{}, EXTRAS])
def test_ppo_on_the_fake_gpu(cuda, flags, monkeypatch, extras):
    """A whole run: no tensor on the wrong device, bf16 where it saves time, fp32 where it must be, the sampler in step with
    the policy, and the CPU's figures as long as policies are the same. Catches what no CPU run executes."""
    flags = {**flags[ppo], **extras}
    if extras:
        flags.update(ptx_dataset_name=flags["dataset_name"], reward_model_path=flags["reward_model_path"] * 2)
    expected = metrics_of(ppo, flags)
    real, models, dtypes = {name: getattr(ppo, name) for name in ("forward", "rollout", "reward_fn")}, [], set()

    def forward(policy, value_head, *rest, **other):
        trained = [policy, value_head, *(x for x in (*rest, *other.values()) if isinstance(x, torch.nn.Module))]  # a critic?
        assert policy is models[0] and {p.dtype for model in trained for p in model.parameters()} == {torch.float32}
        hook = policy.get_output_embeddings().register_forward_hook(lambda module, inputs, logits: dtypes.add(logits.dtype))
        out = real["forward"](policy, value_head, *rest, **other)
        hook.remove()
        return out

    def rollout(model, *rest):
        models.append(model)
        if len(models) > 1:  # the first is check_model's, of the policy itself
            assert {(p.dtype, p.requires_grad) for p in model.base_model.parameters()} == {(torch.bfloat16, False)}
            assert {b.dtype for b in model.buffers() if b.is_floating_point()} == {torch.float32}
            assert model.get_output_embeddings().weight.dtype == torch.float32
        if len(models) > 1 and model is models[1]:  # the sampler, not the reference
            assert all(torch.equal(p, models[0].state_dict()[name].to(p.dtype)) for name, p in model.state_dict().items())
        return real["rollout"](model, *rest)

    def reward_fn(model, *rest):
        assert {p.dtype for p in model.base_model.parameters()} == {torch.bfloat16} and model.score.weight.dtype == torch.float32
        return real["reward_fn"](model, *rest)

    for function in (forward, rollout, reward_fn):
        monkeypatch.setattr(ppo, function.__name__, function)
    metrics = metrics_of(ppo, flags, cuda)
    assert dtypes == {torch.float32}, "bf16 logits: a ratio lives on the third digit"
    assert len(models) == len(cuda.graphs) == 1 + 3 + 2 + 2  # check_model's, the updates', two looks', the end's
    assert models[0] is not models[1] and {models.index(model) for model in models} == {0, 1, len(models) - 2}
    assert metrics[0].keys() - expected[0].keys() == {"mfu"} and not expected[0].keys() - metrics[0].keys()
    assert all(math.isfinite(value) for m in metrics for value in m.values()) and metrics[0]["mfu"] > 0
    for name in ("objective/scores", "objective/entropy", "policy/grad_norm", "loss/value_avg"):
        assert metrics[0][name] == pytest.approx(expected[0][name], rel=0.05)


@pytest.mark.parametrize("stage", [sft, reward_model, ppo])
def test_a_resumed_run_on_the_fake_gpu(cuda, flags, tmp_path, stage):
    """Stopped after step 2 and resumed, the run ends as one that was never stopped. Catches a state that comes back to the
    wrong device, and a sampler that is not the loaded policy."""
    flags = {**flags[stage], "overwrite": False}
    whole = metrics_of(stage, {**flags, "output_dir": str(tmp_path / "whole")}, cuda)
    with cuda:
        stop_and_resume(stage, flags)
    resumed = read_jsonl(tmp_path / "out/metrics.jsonl")
    same = [{name: m[name] for name in m if not name.startswith(("time", "tokens_per", "eps", "mfu"))} for m in (*whole, *resumed)]
    assert same[: len(whole)] == same[len(whole) :] and len(whole) > 2
    assert (tmp_path / "whole/model.safetensors").read_bytes() == (tmp_path / "out/model.safetensors").read_bytes()


def test_the_benchmark_of_speed_on_the_fake_gpu(cuda, tmp_path, monkeypatch):
    """The jobs of benchmark/speed.py --device cuda, on a small workload. Catches a contender or a mode that only a GPU runs,
    and that would fail there after the machine was paid for."""
    monkeypatch.syspath_prepend(REPOSITORY / "benchmark")
    monkeypatch.setitem(sys.modules, "ppo_rlhf", ppo)  # each job loads a fresh one
    import speed

    load_ppo = speed.load_ppo

    def load_with_a_small_matmul(spec):
        fresh = load_ppo(spec)
        fresh.matmul_flops = functools.partial(fresh.matmul_flops, n=64)
        return fresh

    monkeypatch.setattr(speed, "load_ppo", load_with_a_small_matmul)
    monkeypatch.setattr(speed, "start", lambda script, spec: speed.make_models(spec) or [])
    options = types.SimpleNamespace(device="cuda", updates=1, memory_cap=1, micro_batch=None)
    spec = speed.prepare("smoke", speed.WORKLOADS["smoke"], tmp_path / "inputs", options)
    spec.update(scratch=str(tmp_path), batches=[2])
    with cuda:
        for contender in ("ours", "ours_separate_critic"):
            _, second = speed.ours({**spec, "contender": contender})
            assert second["peak_cuda_mib"] == 1e9 / 2**20 and 0 < second["rollout"] + second["score"] + second["optimize"]
        assert {row["mib"] for row in speed.memory_job(spec)} == {1e9 / 2**20} and set(cuda.caps) == {0.5}
        times = iter([1.0, 2.0, 3.0, 4.0])

        def seconds_of(torch, run, repeats=10):
            if repeats == 5:  # a rollout, and not a product of 8192 x 8192
                run()
            return next(times)

        monkeypatch.setattr(speed, "seconds_of", seconds_of)
        (row,) = speed.decode_job(spec)
        assert row["step_ms"] == 1e3 / 4 and row["bandwidth"] == 2**31 / 1e9
        assert speed.mfu_job(spec)[0]["peak"] == 2 * 8192**3 / 4 / 1e12
