"""Stage 2 against an oracle: float64, stock classes, one unpadded sequence at a time."""

import math

import pytest
import torch
import torch.nn.functional as F
import transformers
from conftest import EOS, read_jsonl, save, set_parameters, tiny_config, tiny_model
from test_rows import LLAMA3, byte_tokenizer
from test_sft import BYTES, FLAGS, NAMES, TEXTS, check_defaults, check_run, ids, record, write_data
from test_sft import here as here  # a fixture
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PhiConfig

import reward_model

# Of different lengths; the longer side is the chosen one in every other pair
ROWS = [{"prompt": text, "chosen": "good " * (i % 4 + 1), "rejected": "bad"} for i, text in enumerate(TEXTS)]
ROWS[1::2] = [row | {"chosen": "ok", "rejected": "worse" * (len(row["chosen"]) // 5)} for row in ROWS[1::2]]
HELD_OUT = ROWS[2:7]
# Left out: no preference, a side that is too long by one token, another prompt. The longest is kept
LONGEST = {"prompt": "x", "chosen": "a", "rejected": "y" * 31}
DROPPED = [LONGEST | other for other in ({"rejected": "a"}, {"rejected": "y" * 32}, {"chosen": "y" * 32})]


def pair(row):
    return tuple([*ids(f"Q: {row['prompt']}\nA: {row[side]}"), EOS] for side in ("chosen", "rejected"))


def make_base(family):
    """A GPT-2, whose output layer is the embedding, or a Phi, whose output layer has a bias."""
    model = tiny_model("gpt2")
    if family == "phi":
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        config = PhiConfig(vocab_size=258, max_position_embeddings=96, initializer_range=0.25, **sizes)
        model = AutoModelForCausalLM.from_config(config)
        torch.nn.init.normal_(model.lm_head.bias)
    save(model, BYTES, "base")


def score(model, side):
    """The stock classifier on one sequence -> its score, and its last hidden states."""
    output = model(input_ids=torch.tensor([side]), output_hidden_states=True)
    return output.logits[0, 0], output.hidden_states[-1][0]


@pytest.mark.parametrize("family, lm, center", [("gpt2", 0.7, 0.2), ("phi", 0.7, 0.2), ("gpt2", 0.0, 0.0)])
def test_training_is_the_oracles(family, lm, center, monkeypatch, capsys):
    """Bradley-Terry, mean over pairs; the language-model loss of the chosen side, mean over tokens, through
    the SFT model's output layer; the squared sum of both scores. Held-out figures by hand."""
    make_base(family)
    write_data([*DROPPED, *ROWS[1:], LONGEST], [*HELD_OUT, *DROPPED])
    flags = FLAGS | {"lm_coef": lm, "center_coef": center, "gradient_checkpointing": lm == 0}
    flags |= {"max_grad_norm": 0.5 if lm else 0.0}
    steps, modes = record(reward_model, "pair_scores", monkeypatch, **flags)
    pairs = [pair(row) for row in [*ROWS[1:], LONGEST]]
    out = capsys.readouterr().out
    assert "train: 11 of 14" in out and "test: 5 of 8" in out

    auto_class, double = AutoModelForSequenceClassification, {"dtype": torch.float64}
    model = auto_class.from_pretrained("base", num_labels=1, **double).eval()
    model.config.pad_token_id = None  # the stock class then reads the last token of its one sequence
    output_layer = AutoModelForCausalLM.from_pretrained("base", **double).get_output_embeddings()
    output_layer.requires_grad_(False)

    def oracle_loss(examples, row):
        margins, centers, tokens = [], [], []
        for chosen, rejected in examples:
            better, hidden = score(model, chosen)
            worse, _ = score(model, rejected)
            margins.append(better - worse)
            centers.append((better + worse) ** 2)
            logits = output_layer(hidden[:-1])
            tokens.append(F.cross_entropy(logits, torch.tensor(chosen[1:]), reduction="none"))
        margin = torch.stack(margins)
        loss = F.softplus(-margin).mean()
        assert row["train/loss"] == pytest.approx(loss.item(), rel=1e-4)
        assert row["train/accuracy"] == pytest.approx((margin > 0).double().mean().item())
        return loss + center * torch.stack(centers).mean() + lm * torch.cat(tokens).mean()

    metrics = read_jsonl("out/metrics.jsonl")
    check_run(steps, modes, model, oracle_loss, metrics, pairs, lambda sides: max(map(len, sides)), flags)
    set_parameters(model.parameters(), steps[-1].after)
    with torch.no_grad():
        held_out = [[score(model, side)[0].item() for side in pair(row)] for row in HELD_OUT]
    for name, wanted in by_hand([better - worse for better, worse in held_out]).items():
        assert metrics[-1][name] == pytest.approx(wanted, abs=1e-4), name
    assert [("eval/ece" in row) for row in metrics] == [False, False, False, True, False, True]
    stock, info = auto_class.from_pretrained("out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and stock.num_labels == 1
    assert all(torch.equal(a, b) for a, b in zip(stock.parameters(), steps[-1].after, strict=True))


def by_hand(margins):
    """Held-out figures. ECE: ten bins of confidence from 0.5 to 1, mean gaps weighted by the bins' shares."""
    n, bins = len(margins), {}
    for margin in margins:
        confidence = 1 / (1 + math.exp(-abs(margin)))
        bins.setdefault(min(int((confidence - 0.5) / 0.05), 9), []).append((confidence, margin > 0))
    mean = lambda xs: sum(xs) / len(xs)
    gaps = [mean([c for c, _ in part]) - mean([right for _, right in part]) for part in bins.values()]
    return {
        "eval/loss": sum(math.log(1 + math.exp(-margin)) for margin in margins) / n,
        "eval/accuracy": sum(margin > 0 for margin in margins) / n,
        "eval/margin": sum(margins) / n,
        "eval/ece": sum(abs(gap) * len(part) / n for gap, part in zip(gaps, bins.values())),
    }


def test_held_out_figures_by_hand(monkeypatch):
    """Margins right and wrong in one bin, a tie, confidence 1 in the last bin; the last batch is partial."""
    margins = "0.05 -0.1 0.3 0.35 -0.33 1.0 -1.1 1.05 2.0 -2.1 2.2 4.0 -30.0 0.0 -0.31 0.9 -3.0"
    margins = [float(margin) for margin in margins.split()]
    pairs = [([i], []) for i in range(len(margins))]
    sizes = []

    def pair_scores(model, batch, device):
        assert not torch.is_grad_enabled() and not model.training
        sizes.append(len(batch))
        chosen = torch.tensor([margins[side[0]] + 0.5 for side, _ in batch])
        return chosen, torch.full((len(batch),), 0.5), None

    monkeypatch.setattr(reward_model, "pair_scores", pair_scores)
    figures = reward_model.evaluate(torch.nn.Dropout(), pairs, 7, "cpu")
    assert sizes == [7, 7, 3]
    wanted = by_hand(margins)
    assert 0.05 < wanted["eval/ece"] < 0.5 and figures.keys() == wanted.keys()
    for name in wanted:
        assert float(figures[name]) == pytest.approx(wanted[name], abs=1e-5), name


@pytest.mark.parametrize("pad, saved", [("<pad>", 0), ("<eos>", None), ("<|eot_id|>", None)])
def test_stock_classes_read_the_same_score(pad, saved):
    """A saved model gives the stock class a pad to read before, but not if that is an end, EOS or a turn's,
    which belongs to the sequence; `pipeline` shows the score itself, not its sigmoid."""
    tokenizer = byte_tokenizer(chat=LLAMA3)
    tokenizer.pad_token = pad
    save(tiny_model("llama", vocab_size=300), tokenizer, "base")
    write_data(ROWS, ROWS)
    reward_model.main(reward_model.Args(**NAMES, max_steps=1))
    stock = AutoModelForSequenceClassification.from_pretrained("out").eval()
    assert stock.config.pad_token_id == saved
    side = tokenizer("good<|eot_id|>").input_ids
    with torch.no_grad():
        (ours,), *_ = reward_model.pair_scores(stock, [(side, side)], "cpu")
        assert stock(input_ids=torch.tensor([side])).logits.item() == pytest.approx(ours.item(), abs=1e-5)
    classify = transformers.pipeline("text-classification", model="out")
    assert classify("good<|eot_id|>")[0]["score"] == pytest.approx(ours.item(), abs=1e-5)


def test_the_new_head_and_the_defaults(monkeypatch):
    """Of std 1/sqrt(d+1), by the seed; 8e-4 and 2 epochs below 10M parameters, else 1e-5 and 1."""
    config = tiny_config("gpt2")
    config.n_embd, config.n_layer = 256, 1
    save(AutoModelForCausalLM.from_config(config), BYTES, "base")
    write_data(ROWS, ROWS[:2])
    heads = []
    for seed in (1, 1, 2):
        flags = {"max_steps": 1, "seed": seed, "overwrite": True}
        ((step,), _) = record(reward_model, "pair_scores", monkeypatch, **flags)
        (head,) = [p for p in step.before if p.shape == (1, 256)]
        assert head.std().item() == pytest.approx(1 / math.sqrt(257), rel=0.15) and abs(head.mean()) < 0.02
        heads.append(head)
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])
    make_base("gpt2")
    check_defaults(reward_model, monkeypatch, (8e-4, 1e-5), (2, 1))
