"""The sampler: left padding, static cache and inverse-CDF sampling against plain forwards of single rows."""

import contextlib
import sys
import types

import pytest
import torch
import transformers
from conftest import EOS, NEVER, PAD, PROMPTS, plain_logits, tiny_model, tiny_tokenizer
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import ppo_rlhf as ppo

V = 24
B = len(PROMPTS)
P = max(map(len, PROMPTS))
IDS = torch.tensor([[PAD] * (P - len(prompt)) + prompt for prompt in PROMPTS])
MASK = torch.tensor([[0] * (P - len(prompt)) + [1] * len(prompt) for prompt in PROMPTS])


def sample(model, uniforms, temperature=1.0, end_ids=(EOS,), pad_id=PAD, ids=IDS, mask=MASK, **other):
    return ppo.rollout(model, ids, mask, uniforms, temperature, torch.tensor(end_ids), pad_id, **other)


def cut(row, end_ids):
    """A response up to and with its first end id."""
    ends = [t for t, token in enumerate(row) if token in end_ids]
    return row[: ends[0] + 1] if ends else row


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.3])
def test_tokens_are_the_inverse_cdf_of_a_plain_forward_and_log_probs_are_its_own(family, temperature):
    """That of an unpadded forward of the row alone: each token is the one that its uniform picks, in whatever
    batch, whatever the generation config wants and whatever lies under the mask."""
    model, T = tiny_model(family, vocab_size=V), 11
    model.generation_config = transformers.GenerationConfig(do_sample=True, top_k=2, repetition_penalty=5.0)
    uniforms = torch.rand(T, B)
    responses, lengths, ended, logprobs = sample(model, uniforms, temperature, [NEVER])
    assert lengths.eq(T).all() and not ended.any() and logprobs.shape == (B, T)
    for i, prompt in enumerate(PROMPTS):
        answer = responses[i].tolist()
        logits = plain_logits(model, prompt + answer)[len(prompt) - 1 : -1]  # [T, V]
        probs = (logits.double() / temperature).softmax(-1)
        above = probs.cumsum(-1)[range(T), answer]
        below = above - probs[range(T), answer]
        u = uniforms[:, i].double()
        assert (below - 1e-5 <= u).all() and (u <= above + 1e-5).all()
        expected = probs.log()[range(T), answer]
        torch.testing.assert_close(logprobs[i].double(), expected, atol=1e-5, rtol=1e-5)
    garbage = torch.where(MASK.bool(), IDS, torch.randint(V, IDS.shape))
    state = torch.random.get_rng_state()
    assert torch.equal(sample(model, uniforms, temperature, [NEVER], ids=garbage)[0], responses)
    assert torch.equal(torch.random.get_rng_state(), state), "the uniforms are all the randomness"


@pytest.mark.parametrize("pad_is_end", [False, True])
def test_ends_cut_a_row_and_change_nothing_else(family, pad_is_end):
    """With one end id or several: the answers of a sampler that never stops, cut after the first end. Lengths
    count the end, come from no comparison with the pad, and the last slot may hold it."""
    model, T = tiny_model(family, vocab_size=V), 11
    uniforms = torch.rand(T, B)
    endless, _, _, all_logprobs = sample(model, uniforms, end_ids=[NEVER])
    seen = set()
    last = next(row[-1] for row in endless.tolist() if row[-1] not in row[:-1])
    for end_ids in ([last], [EOS], [PAD, 5], [4, 9, 11], [0, 7, 8, 23], [NEVER, 3]):
        pad = end_ids[-1] if pad_is_end else PAD
        responses, lengths, ended, logprobs = sample(model, uniforms, end_ids=end_ids, pad_id=pad)
        for i, row in enumerate(endless.tolist()):
            expected = cut(row, end_ids)
            n = len(expected)
            assert lengths[i].item() == n and responses[i].tolist() == expected + [pad] * (T - n)
            assert ended[i].item() == (expected[-1] in end_ids)
            assert torch.equal(logprobs[i, :n], all_logprobs[i, :n])
            seen.add("cut off" if expected[-1] not in end_ids else min(n, 2) if n < T else "last slot")
    assert seen == {"cut off", "last slot", 1, 2}, "the seed shows too few cases"


@pytest.mark.parametrize("u", [0.0, 1 - 2**-24, 1.0])
def test_no_token_of_probability_zero_is_ever_sampled(u):
    """The ends of [0, 1], of which 1 is what rounding may make of the largest uniform, with the first and
    last ids impossible. At T = 1, a rollout without a decode step."""
    for seed in range(6):
        model = tiny_model("llama", seed=seed, vocab_size=600)
        with torch.no_grad():  # the first and the last 8 ids get a logit far below all others
            hidden = model.base_model(IDS[:1]).last_hidden_state[0, -1]
            head = model.get_output_embeddings().weight
            head[:8] = head[-8:] = -500 * hidden / hidden.norm() ** 2
        assert plain_logits(model, PROMPTS[0])[-1].log_softmax(-1)[[0, 7, -8, -1]].max() < -200
        response, length, _, logprob = sample(model, torch.full((1, 1), u), ids=IDS[:1], mask=MASK[:1])
        assert response.shape == (1, 1) and length.tolist() == [1] and response.item() < 600
        assert u == 1 or (8 <= response.item() < 592 and logprob.item() > -50)


@pytest.mark.parametrize("size", [1, 4])
def test_slices_of_a_rollout(size):
    """For any --rollout_batch_size the same responses, rows in their order, also where the pad is an end."""
    tokenizer, model = tiny_tokenizer(pad_is_eos=True), tiny_model("qwen2")
    prompts = [types.SimpleNamespace(ids=prompt) for prompt in PROMPTS]
    batches = []
    for slices in (128, size):
        torch.manual_seed(0)
        args = ppo.Args(max_new_tokens=9, rollout_batch_size=slices, temperature=0.9)
        batches.append(ppo.sample(model, tokenizer, prompts, args, [EOS, *range(100, 115)]))
    assert 0 < batches[0].ended.sum() < B and len(vars(batches[0])) >= 10
    for name, whole in vars(batches[0]).items():
        torch.testing.assert_close(getattr(batches[1], name), whole, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("tied", [False, True])
def test_bf16_copy_keeps_what_must_stay_fp32(family, tied):
    """Buffers (RoPE's frequencies) and the output layer, tied or not; the policy is left alone."""
    model = tiny_model(family, vocab_size=V, tie_word_embeddings=tied)
    before = {name: x.clone() for name, x in (*model.state_dict().items(), *model.named_buffers())}
    copied = ppo.bf16_copy(model)
    assert all(p.dtype == torch.bfloat16 for p in copied.base_model.parameters())
    assert torch.equal(copied.get_output_embeddings().weight, model.get_output_embeddings().weight)
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), copied.buffers(), strict=True))
    for name, x in (*model.state_dict().items(), *model.named_buffers()):
        assert torch.equal(x, before[name]) and x.dtype == before[name].dtype, name
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied
    assert sample(copied, torch.rand(5, B))[3].dtype == torch.float32


# ---- On CUDA the decode step is a graph. Without CUDA: the same code, with a graph that is played ----


class Notes(TorchDispatchMode):
    """Notes every kernel that runs."""

    def __init__(self):
        super().__init__()
        self.kernels = []

    def __torch_dispatch__(self, kernel, types, args=(), kwargs=None):
        out = kernel(*args, **(kwargs or {}))
        self.kernels.append((kernel, args, kwargs or {}, out))
        return out

    def seen(self):
        """What a kernel was asked for, without its results: name, shapes, types and numbers."""

        def look(x):
            if isinstance(x, torch.Tensor):
                return x.dtype, x.shape
            return [look(y) for y in x] if isinstance(x, list | tuple) else x

        return [(kernel, look(args), look([*kwargs.items()])) for kernel, args, kwargs, _ in self.kernels]


# What waits for the device or reads the host
HOST = {"_local_scalar_dense", "nonzero", "equal", "masked_select", "lift_fresh", "lift_fresh_copy"}


def waits(kernel, args):
    name = kernel._schema.name.removeprefix("aten::")
    by_mask = name == "index" and any(x is not None and x.dtype == torch.bool for x in args[1])
    return name in HOST or by_mask


class Recorder(Notes):
    """What a CUDA graph does: note every kernel and its memory, undo what was written, then replay them on
    the same memory, with every Python number as it was. Refuses what waits for the device."""

    def __init__(self):
        super().__init__()
        self.before, self.replays = [], 0

    def __torch_dispatch__(self, kernel, types, args=(), kwargs=None):
        if waits(kernel, args):
            raise RuntimeError(f"operation not permitted when stream is capturing: {kernel}")
        for parameter, argument in zip(kernel._schema.arguments, args):
            if parameter.alias_info is not None and parameter.alias_info.is_write:
                self.before.append((argument, argument.clone()))
        return super().__torch_dispatch__(kernel, types, args, kwargs)

    def __exit__(self, *error):
        super().__exit__(*error)
        for tensor, old in reversed(self.before):
            tensor.copy_(old)

    def replay(self):
        self.replays += 1
        for kernel, args, kwargs, out in self.kernels:
            new = kernel(*args, **kwargs)
            for a, b in zip([out], [new]) if isinstance(out, torch.Tensor) else zip(out, new):
                if isinstance(a, torch.Tensor) and a.data_ptr() != b.data_ptr():  # else a view, or in place
                    a.copy_(b)


class OnCuda(TorchFunctionMode):
    """All tensors say that they are on CUDA."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        return True if function == torch.Tensor.is_cuda.__get__ else function(*args, **(kwargs or {}))


@pytest.fixture
def cuda(monkeypatch):
    """torch.cuda's part in a capture. Who asks, as models do, hears when one is under way."""
    state = types.SimpleNamespace(graphs=[], streams=0, capturing=False)
    stream = types.SimpleNamespace(wait_stream=lambda other: None)

    @contextlib.contextmanager
    def capture(graph, stream):
        state.graphs.append(graph)
        state.capturing = True
        with graph:
            yield
        state.capturing = False

    def new_stream():
        state.streams += 1
        return stream

    fakes = dict(Stream=new_stream, current_stream=lambda: stream, CUDAGraph=Recorder, graph=capture)
    fakes |= dict(stream=lambda stream: contextlib.nullcontext())
    fakes |= dict(is_current_stream_capturing=lambda: state.capturing)
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    ppo.side_stream.cache_clear()
    yield state
    ppo.side_stream.cache_clear()


@pytest.mark.parametrize("T", [4, 16])
def test_a_replayed_decode_step_equals_the_step(family, T, cuda):
    """Recorded once and replayed, it writes exactly what the loop writes, and never asks the host. A counter
    in Python, a tensor that is replaced instead of changed, or a shape that depends on data breaks it, and so
    does a model that does something else while it is captured: the kernels are those of the eager step."""
    model = tiny_model(family, vocab_size=V)
    for end_ids in ([NEVER], [EOS, 7]):
        uniforms = torch.rand(T, B)
        starts = []  # of the prompts' forward and of each step, in kernels
        hook = model.base_model.register_forward_pre_hook(lambda *_: starts.append(len(eager.kernels)))  # noqa: B023
        with Notes() as eager:
            expected = sample(model, uniforms, 0.7, end_ids)
        hook.remove()
        with OnCuda():
            off = sample(model, uniforms, 0.7, end_ids, cuda_graph=False)
            assert not cuda.graphs
            got = sample(model, uniforms, 0.7, end_ids)
        for name, *three in zip(("responses", "lengths", "ended", "log-probs"), expected, off, got):
            assert torch.equal(three[0], three[1]) and torch.equal(three[0], three[2]), name
        graph = cuda.graphs.pop()
        assert graph.replays in {T - 3, 8 - 2} and len(graph.kernels) > 20
        assert graph.seen() == eager.seen()[starts[3] :][: len(graph.kernels)]


def test_what_is_not_recorded(cuda, monkeypatch, refused):
    """A sliding window, which counts in Python, is not; of a step that cannot be, the flag is named. All
    rollouts share one side stream."""
    shape = dict(num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, intermediate_size=32)
    config = transformers.MistralConfig(vocab_size=V, hidden_size=32, sliding_window=4, **shape)
    with OnCuda():
        sample(transformers.AutoModelForCausalLM.from_config(config).eval(), torch.rand(5, B))
        assert cuda.streams == 0
        for _ in range(2):
            sample(tiny_model("llama", vocab_size=V), torch.rand(5, B))
        assert cuda.streams == 1 and len(cuda.graphs) == 2
        monkeypatch.setattr(sys.modules[__name__], "HOST", {"embedding"})
        with refused("--no-cuda_graph"):
            sample(tiny_model("llama", vocab_size=V), torch.rand(5, B))


def test_the_loop_asks_the_host_every_8_steps():
    """On CUDA each question is a wait for the device: one `ended.all()` in 8 tokens, which ends the loop."""
    model, ends = tiny_model("llama", vocab_size=V), []
    model.get_output_embeddings().register_forward_hook(lambda *_: ends.append(len(notes.kernels)))
    with Notes() as notes:
        sample(model, torch.rand(34, B), end_ids=[NEVER])
    assert len(ends) == 34 and sum(waits(kernel, args) for kernel, args, *_ in notes.kernels[ends[0] :]) == 4
    ends.clear()
    sample(model, torch.rand(34, B), end_ids=range(V))
    assert len(ends) == 9, "a rollout that does not stop when all responses have ended"
