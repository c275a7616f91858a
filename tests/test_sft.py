"""Stage 1 against an oracle: float64, stock classes, one unpadded sequence at a time."""

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import EOS, read_jsonl, save, tiny_model, tiny_tokenizer, write_jsonl
from transformers import AutoModelForCausalLM, GenerationConfig

import sft

BYTES = tiny_tokenizer()
TEXTS = [
    "b",
    "an",
    "cat",
    "dogs",
    "eagle",
    "ferret",
    "giraffe",
    "hedgehog",
    "impala gg",
    "jackals jj",
    "kangaroos k",
]
ROWS = [{"prompt": text, "completion": "fine " * (i % 4) + "ok"} for i, text in enumerate(TEXTS)]
SCHEDULE = [1 / 3, 2 / 3, 1, 0.75, 0.25, 0]  # six steps, of which three are warm-up
NAMES = {"model_name_or_path": "base", "dataset_name": "data", "output_dir": "out"}
FLAGS = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "num_train_epochs": 2}
FLAGS |= {"warmup_steps": 3, "weight_decay": 0.3, "max_grad_norm": 0.5, "learning_rate": 0.01}
FLAGS |= {"eval_steps": 4, "max_length": 40}


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def write_data(train, test):
    write_jsonl(Path("data/train.jsonl"), train)
    write_jsonl(Path("data/test.jsonl"), test)


def record(stage, loss_name, monkeypatch, **flags):
    """main(), and what each optimizer step had: learning rate, examples, gradients, parameters."""
    steps, micro_batches, modes = [], [], []
    real_loss, real_states = getattr(stage, loss_name), stage.hidden_states

    def loss(model, examples, device):
        if torch.is_grad_enabled():
            micro_batches.append(examples)
        return real_loss(model, examples, device)

    def hidden_states(model, ids):
        modes.append((torch.is_grad_enabled(), model.training, model.is_gradient_checkpointing))
        return real_states(model, ids)

    class AdamW(torch.optim.AdamW):
        def step(self):
            (group,) = self.param_groups
            assert {p.dtype for p in group["params"]} == {torch.float32}
            before = [p.detach().clone() for p in group["params"]]
            gradients = [p.grad.clone() for p in group["params"]]
            super().step()
            after = [p.detach().clone() for p in group["params"]]
            step = {"lr": group["lr"], "before": before, "gradients": gradients, "after": after}
            steps.append(SimpleNamespace(**step, micro_batches=list(micro_batches), modes=list(modes)))
            micro_batches.clear()

    with monkeypatch.context() as patch:
        patch.setattr(stage, loss_name, loss)
        patch.setattr(stage, "hidden_states", hidden_states)
        patch.setattr(torch.optim, "AdamW", AdamW)
        stage.main(stage.Args(**NAMES | flags))
    return steps


def check_run(steps, model, oracle_loss, metrics, examples, length, checkpointing):
    """Gradients are the oracle's, clipped; parameters after a step are those of AdamW with that gradient."""
    lr, decay, clip = (FLAGS[name] for name in ("learning_rate", "weight_decay", "max_grad_norm"))
    m = [torch.zeros_like(p) for p in model.parameters()]
    v = [torch.zeros_like(p) for p in model.parameters()]
    clipped = 0
    for n, (step, row) in enumerate(zip(steps, metrics, strict=True), 1):
        load(model, step.before)
        model.zero_grad()
        oracle_loss(sum(step.micro_batches, []), row).backward()
        wanted = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
        norm = torch.cat([g.flatten() for g in wanted]).norm().item()
        clipped += norm > clip
        assert row["grad_norm"] == pytest.approx(norm, rel=1e-4)
        rate = lr * SCHEDULE[n - 1]
        assert row["lr"] == pytest.approx(step.lr, abs=1e-12) and step.lr == pytest.approx(rate, abs=1e-12)
        for i, gradient in enumerate(step.gradients):
            torch.testing.assert_close(
                gradient.double(), wanted[i] * min(1, clip / norm), atol=2e-6, rtol=1e-3
            )
            m[i] = 0.9 * m[i] + 0.1 * gradient
            v[i] = 0.999 * v[i] + 0.001 * gradient.double() ** 2
            change = m[i] / (1 - 0.9**n) / ((v[i] / (1 - 0.999**n)).sqrt() + 1e-8)
            updated = step.before[i].double() * (1 - rate * decay) - rate * change
            torch.testing.assert_close(step.after[i].double(), updated, atol=2e-6, rtol=1e-5)
        if n < len(steps):
            assert all(torch.equal(a, b) for a, b in zip(step.after, steps[n].before))
    assert clipped >= 4
    # Every example once an epoch, in batches of similar length, whose order differs between epochs
    batches = [batch for step in steps for batch in step.micro_batches]
    examples = sorted(examples, key=length)
    chunks = [examples[i : i + 2] for i in range(0, len(examples), 2)]
    epochs = [batches[: len(chunks)], batches[len(chunks) :]]
    assert [sorted(epoch, key=lambda batch: length(batch[0])) for epoch in epochs] == [chunks, chunks]
    assert epochs[0] != epochs[1] and chunks not in epochs
    # Dropout is on in every training step, also after an evaluation, and off in evaluation
    modes = steps[-1].modes
    assert {mode[:2] for mode in modes} == {(True, True), (False, False)}
    assert {mode[2] for mode in modes if mode[0]} == {checkpointing}


def load(model, parameters):
    with torch.no_grad():
        for parameter, value in zip(model.parameters(), parameters, strict=True):
            parameter.copy_(value)


def ids(text):
    return BYTES(text).input_ids


def example(row):
    return ids(f"Q: {row['prompt']}\nA:"), [*ids(f" {row['completion']}"), EOS]


def token_losses(model, pair):
    """-log p of the completion's tokens, by the stock forward of one sequence."""
    prompt, completion = pair
    logits = model(input_ids=torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
    return F.cross_entropy(logits, torch.tensor(completion), reduction="none")


def make_base(family, bf16=False):
    model = tiny_model(family)
    odd = {
        "do_sample": True,
        "top_k": 7,
        "repetition_penalty": 1.5,
    }  # as many have it; not of what is saved here
    model.generation_config = GenerationConfig(**odd)
    save(model.bfloat16() if bf16 else model, BYTES, "base")


@pytest.mark.parametrize("family, bf16, checkpointing", [("gpt2", False, False), ("llama", True, True)])
def test_training_is_the_oracles(family, bf16, checkpointing, monkeypatch):
    """Six steps of two micro-batches over two epochs: order, gradients of the mean over the step's completion
    tokens, learning rates, AdamW with decay and clipping, figures. One example is as long as --max_length."""
    make_base(family, bf16)
    long, fits = ({"prompt": "x", "completion": "y" * n} for n in (32, 31))  # with template and EOS 41, 40
    rows = [*ROWS[:-1], fits, long]
    write_data(rows, [*ROWS[::-2][:5], long])
    flags = FLAGS | {"gradient_checkpointing": checkpointing, "max_new_tokens": 4}
    steps = record(sft, "completion_loss", monkeypatch, **flags)
    model = AutoModelForCausalLM.from_pretrained("base", dtype=torch.float64).eval()
    metrics = read_jsonl("out/metrics.jsonl")
    assert [row["step"] for row in metrics] == [1, 2, 3, 4, 5, 6]

    def oracle_loss(examples, row):
        loss = torch.cat([token_losses(model, pair) for pair in examples]).mean()
        assert row["train/loss"] == pytest.approx(loss.item(), rel=1e-5)
        return loss

    examples = [example(row) for row in rows[:-1]]
    check_run(steps, model, oracle_loss, metrics, examples, lambda pair: len(sum(pair, [])), checkpointing)
    for n in range(1, 7):
        assert ("eval/loss" in metrics[n - 1]) == (n in (4, 6))
        if n in (4, 6):
            load(model, steps[n - 1].after)
            held_out = torch.cat([token_losses(model, example(row)) for row in ROWS[::-2][:5]])
            assert metrics[n - 1]["eval/loss"] == pytest.approx(held_out.mean().item(), rel=1e-5)
    saved = AutoModelForCausalLM.from_pretrained("out")
    assert saved.dtype == torch.float32
    assert all(torch.equal(a, b) for a, b in zip(saved.parameters(), steps[-1].after, strict=True))
    config = GenerationConfig.from_pretrained("out")
    wanted = {"do_sample": True, "temperature": 0.7, "top_k": 0, "top_p": 1.0, "max_new_tokens": 4}
    assert {name: getattr(config, name) for name in wanted} == wanted
    assert config.repetition_penalty in (None, 1.0)


def test_order_of_the_data():
    """A function of the seed alone; every row once an epoch; epochs differ; batches are of similar length."""
    lengths = [(17 * i) % 101 + 1 for i in range(203)]
    batches = sft.shuffled_batches(lengths, 4, 3 * 51 - 2, 5)
    rows = [batch.tolist() for batch in batches]
    assert rows == [batch.tolist() for batch in sft.shuffled_batches(lengths, 4, 3 * 51 - 2, 5)]
    assert rows[:51] != [batch.tolist() for batch in sft.shuffled_batches(lengths, 4, 51, 7)]
    epochs = [rows[:51], rows[51:102], rows[102:]]
    assert len(epochs[2]) == 49 and [len(batch) for batch in epochs[0]].count(4) == 50
    for epoch in epochs[:2]:
        assert sorted(sum(epoch, [])) == [*range(203)]
    sets = [{frozenset(batch) for batch in epoch} for epoch in epochs]
    assert len(sets[0] & sets[1]) < 5 and len(sets[0] & sets[2]) < 5
    spread = [max(lengths[i] for i in batch) - min(lengths[i] for i in batch) for batch in rows]
    assert sum(spread) / len(spread) < 12  # at random about 60
    longest = [max(lengths[i] for i in batch) for batch in epochs[0]]
    assert longest != sorted(longest) and max(longest[:25]) > 90 and min(longest[:25]) < 20


def test_schedule_by_hand():
    """Linear to the peak at the last step of the warm-up, half a cosine to zero at the last step of all."""
    assert [sft.warmup_cosine(i, 4, 8) for i in (1, 2, 4)] == [0.25, 0.5, 1.0]
    assert sft.warmup_cosine(5, 4, 8) == pytest.approx(0.5 + 0.5 * math.sqrt(0.5))
    assert sft.warmup_cosine(6, 4, 8) == pytest.approx(0.5) and sft.warmup_cosine(8, 4, 8) == pytest.approx(0)
    assert sft.warmup_cosine(1, 0, 2) == pytest.approx(0.5) and sft.warmup_cosine(3, 3, 3) == 1.0
    assert sft.warmup_cosine(2, 9, 3) == pytest.approx(2 / 9)


def check_defaults(stage, monkeypatch, rates, epochs):
    """Peak rate and epochs follow the size; flags and --max_steps go before; the seed is used."""

    def metrics(**flags):
        flags = NAMES | {"warmup_steps": 1, "per_device_train_batch_size": 4, "overwrite": True} | flags
        stage.main(stage.Args(**flags))
        return read_jsonl("out/metrics.jsonl")

    for size, rate, passes in zip((9_999_999, 10_000_000), rates, epochs):
        monkeypatch.setattr("transformers.PreTrainedModel.num_parameters", lambda self, size=size: size)
        rows = metrics()
        assert len(rows) == 3 * passes and max(row["lr"] for row in rows) == rate  # eleven examples by four
    rows = metrics(learning_rate=0.5e-3, num_train_epochs=2)
    assert len(rows) == 6 and rows[0]["lr"] == 0.5e-3
    some, others = metrics(num_train_epochs=2, max_steps=2, seed=2), metrics(max_steps=2)
    assert len(some) == len(others) == 2 and "eval/loss" in some[1]
    assert some[0]["train/loss"] != others[0]["train/loss"] == rows[0]["train/loss"]  # another order


def test_defaults_by_size(monkeypatch):
    """3e-3 and 6 epochs below 10M parameters, 1e-5 and 2 from there on."""
    make_base("gpt2")
    write_data(ROWS, ROWS[:2])
    check_defaults(sft, monkeypatch, (3e-3, 1e-5), (6, 2))


def test_what_is_trained_on(capsys):
    """`messages`, and hh-rlhf's `chosen` in text, are demonstrations too; the first example is shown."""
    turns = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    chat = [{"role": role, "content": content} for role, content in turns]
    end_ids, where = [EOS], {"where": "row 1"}
    expected = ids("Q: a\nA: b") + [EOS] + ids("Q: c\nA:"), [*ids(" d"), EOS]
    assert sft.encode(BYTES, end_ids, {**where, "messages": chat}, "completion") == expected
    assert (
        sft.encode(BYTES, end_ids, {**where, "prompt": chat[:3], "completion": chat[3:]}, "completion")
        == expected
    )
    assert (
        sft.encode(BYTES, end_ids, {**where, "prompt": chat[:3], "completion": "d"}, "completion") == expected
    )
    text = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: d\n"
    wanted = ids("Q: \n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:\nA:"), expected[1]
    assert sft.encode(BYTES, end_ids, {**where, "chosen": text, "rejected": "x"}, "completion") == wanted
    # An end inside of a completion ends it; one that the template does not write is added
    open_ended = tiny_tokenizer(chat=True)
    wanted = ids("[user] a\n[assistant] "), [*ids("b\n"), EOS]
    assert sft.encode(open_ended, end_ids, {**where, "messages": chat[:2]}, "completion") == wanted
    row = {**where, "prompt": "a", "completion": "b<eos>c"}
    assert sft.encode(BYTES, end_ids, row, "completion") == (ids("Q: a\nA:"), [*ids(" b"), EOS])
    make_base("gpt2")
    write_data([{"messages": chat}, {"messages": chat[2:]}], [{"messages": chat[2:]}])
    sft.main(sft.Args(**NAMES, max_steps=1, max_new_tokens=2, max_length=12))
    out = capsys.readouterr().out
    assert "train: 1 of 2" in out and "'Q: c\\nA:' -> ' d<eos>'" in out
