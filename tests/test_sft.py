"""Stage 1 against an oracle: float64, stock classes, one unpadded sequence at a time."""

from pathlib import Path

import conftest
import pytest
import torch
import torch.nn.functional as F
from conftest import EOS, REPOSITORY, read_jsonl, save, tiny_model, tiny_tokenizer, write_jsonl
from transformers import AutoModelForCausalLM, GenerationConfig

import sft

BYTES = tiny_tokenizer()
TEXTS = "b,an,cat,dogs,eagle,ferret,giraffe,hedgehog,impala gg,jackals jj,kangaroos k".split(",")
ROWS = [{"prompt": text, "completion": "fine " * (i % 4) + "ok"} for i, text in enumerate(TEXTS)]
SCHEDULE = [1 / 3, 2 / 3, 1, 0.75, 0.25, 0]  # six steps, of which three are warm-up
NAMES = {"model_name_or_path": "base", "dataset_name": "data", "output_dir": "out"}
FLAGS = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "num_train_epochs": 2}
FLAGS |= {"warmup_steps": 3, "weight_decay": 0.3, "learning_rate": 0.01}
FLAGS |= {"eval_steps": 4, "max_length": 40}


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def write_data(train, test):
    write_jsonl(Path("data/train.jsonl"), train)
    write_jsonl(Path("data/test.jsonl"), test)


def record(stage, loss_name, monkeypatch, **flags):
    """main() -> what each optimizer step had, its examples too, and the modes of the model."""
    micro_batches, modes = [], []
    real_loss, real_states = getattr(stage, loss_name), stage.hidden_states

    def loss(model, examples, device):
        if torch.is_grad_enabled():
            micro_batches.append((len(steps), examples))
        return real_loss(model, examples, device)

    def hidden_states(model, ids):
        modes.append((torch.is_grad_enabled(), model.training, model.is_activation_checkpointing))
        return real_states(model, ids)

    with monkeypatch.context() as patch:
        steps = conftest.listen_to(patch, "AdamW")
        patch.setattr(stage, loss_name, loss)
        patch.setattr(stage, "hidden_states", hidden_states)
        stage.main(stage.Args(**NAMES | flags))
    for n, step in enumerate(steps):
        step.micro_batches = [examples for m, examples in micro_batches if m == n]
    return steps, modes


def check_run(steps, modes, model, oracle_loss, metrics, examples, length, flags):
    """Gradients are the oracle's, clipped; parameters after a step are those of AdamW with that gradient."""
    clip = flags["max_grad_norm"] or float("inf")
    adam = conftest.Adam(steps[0].before, 1e-8, flags["weight_decay"])
    clipped = 0
    for step, row, fraction in zip(steps, metrics, SCHEDULE, strict=True):
        conftest.set_parameters(model.parameters(), step.before)
        model.zero_grad()
        oracle_loss(sum(step.micro_batches, []), row).backward()
        wanted = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
        norm = torch.cat([g.flatten() for g in wanted]).norm().item()
        clipped += norm > clip
        assert row["grad_norm"] == pytest.approx(norm, rel=1e-4)
        rate = flags["learning_rate"] * fraction
        assert (row["lr"], step.lr) == pytest.approx((rate, rate), abs=1e-12)
        updated = adam.step(step.gradients, [rate] * len(wanted))
        for i, gradient in enumerate(step.gradients):
            scaled = wanted[i] * min(1, clip / norm)
            torch.testing.assert_close(gradient.double(), scaled, atol=2e-6, rtol=1e-3)
            torch.testing.assert_close(step.after[i].double(), updated[i], atol=1e-5, rtol=1e-4)
    assert clipped >= 4 or not flags["max_grad_norm"]
    # Every example once an epoch, in batches of similar length, whose order differs between epochs
    batches = [batch for step in steps for batch in step.micro_batches]
    examples = sorted(examples, key=length)
    chunks = [examples[i : i + 2] for i in range(0, len(examples), 2)]
    epochs = [batches[: len(chunks)], batches[len(chunks) :]]
    assert [sorted(epoch, key=lambda batch: length(batch[0])) for epoch in epochs] == [chunks, chunks]
    assert epochs[0] != epochs[1] and chunks not in epochs
    # Dropout is on in every training step, also after an evaluation, and off in evaluation
    assert {mode[:2] for mode in modes} == {(True, True), (False, False)}
    assert {mode[2] for mode in modes if mode[0]} == {flags["gradient_checkpointing"]}


def ids(text):
    return BYTES(text).input_ids


def example(row):
    return [ids(f"Q: {row['prompt']}\nA:"), [*ids(f" {row['completion']}"), EOS]]


def token_losses(model, pair):
    """-log p of the completion's tokens, by the stock forward of one sequence."""
    prompt, completion = pair
    logits = model(input_ids=torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
    return F.cross_entropy(logits, torch.tensor(completion), reduction="none")


def make_base(family, bf16=False):
    model = tiny_model(family)
    # As many have it; nothing of this is saved
    model.generation_config = GenerationConfig(do_sample=True, top_k=7, repetition_penalty=1.5)
    save(model.bfloat16() if bf16 else model, BYTES, "base")


@pytest.mark.parametrize("family, odd", [("gpt2", False), ("llama", True)])
def test_training_is_the_oracles(family, odd, monkeypatch):
    """Six steps of two micro-batches over two epochs; one example is as long as --max_length. The odd one is
    in bf16 on disk, recomputes activations and does not clip."""
    make_base(family, bf16=odd)
    long, fits = ({"prompt": "x", "completion": "y" * n} for n in (32, 31))  # with template and EOS 41, 40
    rows = [*ROWS[:-1], fits, long]
    write_data(rows, [*ROWS[::-2][:5], long])
    flags = FLAGS | {"gradient_checkpointing": odd, "max_new_tokens": 4, "max_grad_norm": 0.0 if odd else 0.5}
    steps, modes = record(sft, "completion_loss", monkeypatch, **flags)
    model = AutoModelForCausalLM.from_pretrained("base", dtype=torch.float64).eval()
    metrics = read_jsonl("out/metrics.jsonl")
    assert [row["step"] for row in metrics] == [1, 2, 3, 4, 5, 6]

    def oracle_loss(examples, row):
        loss = torch.cat([token_losses(model, pair) for pair in examples]).mean()
        assert row["train/loss"] == pytest.approx(loss.item(), rel=1e-5)
        return loss

    examples = [example(row) for row in rows[:-1]]
    check_run(steps, modes, model, oracle_loss, metrics, examples, lambda pair: len(sum(pair, [])), flags)
    for n in range(1, 7):
        assert ("eval/loss" in metrics[n - 1]) == (n in (4, 6))
        if n in (4, 6):
            conftest.set_parameters(model.parameters(), steps[n - 1].after)
            held_out = torch.cat([token_losses(model, example(row)) for row in ROWS[::-2][:5]])
            assert metrics[n - 1]["eval/loss"] == pytest.approx(held_out.mean().item(), rel=1e-5)
    saved = AutoModelForCausalLM.from_pretrained("out")
    assert saved.dtype == torch.float32
    assert all(torch.equal(a, b) for a, b in zip(saved.parameters(), steps[-1].after, strict=True))
    config = GenerationConfig.from_pretrained("out")
    wanted = {"do_sample": True, "temperature": 0.7, "top_k": 0, "top_p": 1.0, "max_new_tokens": 4}
    assert {name: getattr(config, name) for name in wanted} == wanted and not config.repetition_penalty


def test_order_of_the_data():
    """Of more rows than one pool: every row once an epoch, batches of similar length in any order."""
    lengths = [(17 * i) % 101 + 1 for i in range(203)]
    rows = [batch.tolist() for batch in sft.shuffled_batches(lengths, 4, 2 * 51 - 1, 5)]
    assert [len(batch) for batch in rows[:51]].count(4) == 50 and sorted(sum(rows[:51], [])) == [*range(203)]
    spread = [max(lengths[i] for i in batch) - min(lengths[i] for i in batch) for batch in rows]
    assert sum(spread) / len(spread) < 12  # at random about 60
    assert len({*map(frozenset, rows[:51])} & {*map(frozenset, rows[51:])}) < 5 and len(rows) == 101


def test_schedule_without_warmup_or_decay():
    assert [sft.warmup_cosine(*steps) for steps in ((1, 0, 2), (3, 3, 3), (2, 9, 3))] == pytest.approx(
        [0.5, 1, 2 / 9]
    )


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
    rows = metrics(learning_rate=0.5e-3, num_train_epochs=2, max_steps=-1)
    assert len(rows) == 6 and rows[0]["lr"] == 0.5e-3
    some, others = metrics(num_train_epochs=2, max_steps=2, seed=2), metrics(max_steps=2)
    assert len(some) == len(others) == 2 and "eval/loss" in some[1]
    assert some[0]["train/loss"] != others[0]["train/loss"] == rows[0]["train/loss"]  # another order


def test_defaults_by_size(monkeypatch):
    """3e-3 and 6 epochs below 10M parameters, 1e-5 and 2 from there on."""
    make_base("gpt2")
    write_data(ROWS, ROWS[:2])
    check_defaults(sft, monkeypatch, (3e-3, 1e-5), (6, 2))


def test_every_id_is_learned():
    """0 as any other, if a tokenizer has a word there; the prompt's ids are not."""
    model = tiny_model("llama")
    pairs = [([5, 0, 6], [0, 7, 0, EOS]), ([3], [9, 0])]
    losses = torch.cat([token_losses(model, pair) for pair in pairs])
    assert sft.completion_loss(model, pairs, "cpu").item() == pytest.approx(losses.sum().item(), rel=1e-5)


def test_weights_from_scratch_depend_on_the_seed(monkeypatch):
    """Catches a model that is made before its seed is set."""
    monkeypatch.chdir(REPOSITORY)
    weights = []

    def find_end_ids(model, tokenizer):
        weights.append(next(model.parameters()).clone())
        raise KeyboardInterrupt

    monkeypatch.setattr(sft, "find_end_ids", find_end_ids)
    for seed in (1, 1, 2):
        with pytest.raises(KeyboardInterrupt):
            sft.main(sft.Args(seed=seed, output_dir="never"))
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
