"""Which model families of transformers can the scripts train?

    python benchmark/families.py               all of them, some seven minutes; or a few: llama gpt2

A tiny random model of each family (causal language models of text), made from its config and saved to disk as
published ones are, goes through the three scripts: two steps of stage 1, two of stage 2 from there, two
updates of stage 3. A Llama scores the families without a reward model of their own. Stock classes then load
what was saved and read single rows, without padding, mask or cache. The largest differences are compared with
TOLERANCE: of logits, from the output layer on the states that the scripts train on; of log-probs of stage 3's
first responses, from the sampler's; of the scores of these responses, from stage 3's.

Prints a line a family and a table by outcome; the lines go to benchmark/results/families.jsonl.
"""

import argparse
import contextlib
import dataclasses
import io
import json
import os
import shutil
import sys
import tempfile
import unittest.mock
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["HF_HUB_OFFLINE"] = "1"

import tokenizers  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification  # noqa: E402
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES  # noqa: E402

import ppo_rlhf  # noqa: E402
import reward_model  # noqa: E402
import sft  # noqa: E402

STAGES = ("stage 1", "stage 2", "stage 3")
TRACEBACK = "traceback, "
TOLERANCE = 5e-4  # families that work differ by at most 1e-4, others by 1e-3 and more
LARGEST_STEPS = 0.01  # two of AdamW's, of at most about 8e-4 a weight; other random weights differ by 1
# Encoders; decoders of encoder-decoders; models of more than text; GPT-2 by another name; and two whose small
# config cannot be made or does not come back as it was saved
LEFT_OUT = """
    bert bert-generation big_bird camembert data2vec-text electra ernie megatron-bert rembert roberta
    roberta-prelayernorm roc_bert roformer xlm xlm-roberta xlm-roberta-xl xmod xlnet reformer

    bart bigbird_pegasus blenderbot blenderbot-small marian mbart moshi musicgen musicgen_melody mvp pegasus
    plbart prophetnet trocr whisper

    blt cohere_compass_text dots3_note emu3 fuyu gemma3 gemma3n gemma4 gemma4_assistant gemma4_unified
    gemma4_unified_assistant git got_ocr2 llama4 mllama moss_transcribe_diarize phi4_multimodal qwen3_5
    qwen3_5_moe qwen4_exp

    gpt-sw3

    dbrx qwen4_exp_text
""".split()
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<pad>", "<|im_start|>", "<|im_end|>"]
PROMPTS = ["Hi", "Why is the sky blue?", "Add 12 and 7", "Name a river, please, and say where it is."] * 2
ROWS = [
    {"prompt": text, "completion": "Fine." * (i + 1), "chosen": "Good" * (i + 1), "rejected": "bad"}
    for i, text in enumerate(PROMPTS)
]
# Passed to every config (GPT-2 and others know them by their own names) ...
SIZES = dict(vocab_size=len(SPECIAL) + 256, hidden_size=32, intermediate_size=64, num_hidden_layers=2)
SIZES |= dict(num_attention_heads=4, max_position_embeddings=256, initializer_range=0.25)
SIZES |= dict(bos_token_id=2, eos_token_id=2, pad_token_id=0)
# ... and these to those that have them. Windows are shorter than the rows, as published ones may be
EXTRA = dict(num_key_value_heads=2, sliding_window=16, init_std=0.25, head_dim=8, qk_nope_head_dim=8)
EXTRA |= dict(qk_rope_head_dim=8, v_head_dim=8, q_lora_rank=16, kv_lora_rank=16, num_experts=4, n_group=1)
EXTRA |= dict(num_local_experts=4, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
EXTRA |= dict(n_shared_experts=1, shared_expert_intermediate_size=32, topk_group=1, ffn_dim=64)
EXTRA |= dict(word_embed_proj_dim=32, rotary_dim=4, num_shared_experts=1, first_k_dense_replace=1)
EXTRA |= dict(
    linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=8
)
HYBRID = dict(layer_types=["linear_attention", "full_attention"])
MAMBA = dict(mamba_n_heads=4, mamba_d_head=16, mamba_expand=2)
INKLING = dict(unpadded_vocab_size=SIZES["vocab_size"], swa_head_dim=8, sliding_window_size=16, rel_extent=16)
PER_LAYER = dict(vocab_size_per_layer_input=SIZES["vocab_size"])
LOGITS = dict(logits_scaling=8.0)  # as in published Granite models; the config's default of 1 changes nothing
OVERRIDES = {
    "bailing_hybrid": HYBRID,
    "bamba": MAMBA | dict(attn_layer_indices=[1]),
    "cpmant": dict(dim_head=8, dim_ff=64, position_bias_num_buckets=32),
    "dory": dict(sliding_window=256),
    "dots3_note_text": dict(num_key_value_heads=4),
    "falcon_h1": dict(mamba_n_heads=4, mamba_d_head=8, mamba_d_ssm=32, lm_head_multiplier=0.04),
    "gemma3n_text": PER_LAYER | dict(num_kv_shared_layers=0, layer_types=["full_attention"] * 2),
    "gemma4_text": PER_LAYER | dict(hidden_size_per_layer_input=8),
    "gpt_neo": dict(num_layers=2, window_size=16, attention_types=[[["global", "local"], 1]]),
    **dict.fromkeys(["granite", "granite_swa", "granitemoe", "granitemoe_swa", "granitemoeshared"], LOGITS),
    "granitemoehybrid": MAMBA | HYBRID | LOGITS,
    "hyperclovax": LOGITS,
    **dict.fromkeys(["inkling_text", "inkling2_text", "inkling2_loop_text"], INKLING),
    "jamba": dict(attn_layer_period=2, attn_layer_offset=1),
    "kimi_linear": HYBRID | dict(linear_head_dim=8),
    "lfm2_moe": dict(layer_types=["conv", "full_attention"]),
    "lfm3": dict(num_hidden_layers=4),
    "longcat_flash": dict(zero_expert_num=2, expert_ffn_hidden_size=32, moe_topk=2),
    "mamba2": dict(num_heads=4, head_dim=16, n_groups=1, state_size=16),
    **dict.fromkeys(["qwen3_5_text", "qwen3_5_moe_text", "qwen3_next"], HYBRID),
    "recurrent_gemma": dict(block_types=["recurrent", "attention"]),
    "xlstm": dict(num_heads=4),
    "zamba": dict(num_hidden_layers=4, layers_block_type=["mamba", "hybrid"] * 2),
    "zamba2": dict(layers_block_type=["mamba", "hybrid"]),
    "zaya": dict(num_experts_per_tok=1),
}


def make_tokenizer():
    """Byte-level, without merges, with a chat template as Qwen's."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*SPECIAL, *alphabet])}
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[]))
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    bpe.add_special_tokens(SPECIAL)
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<pad>"
    )
    made.chat_template = CHATML
    return made


def make_config(family, **options):
    config_class = transformers.CONFIG_MAPPING[family]
    names = {field.name for field in dataclasses.fields(config_class)}
    extra = {name: value for name, value in EXTRA.items() if name in names}
    if "kv_lora_rank" in names:  # latent attention: as many keys as queries
        extra["num_key_value_heads"] = SIZES["num_attention_heads"]
    return config_class(**SIZES | extra | OVERRIDES.get(family, {}) | options)


def make_model(config, auto_class=AutoModelForCausalLM):
    """Random weights (fresh norms, biases and pads are 1 and 0), so large that a token seen through a mask or
    a shifted position changes log-probs in the first digits."""
    torch.manual_seed(0)
    model = auto_class.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
        embeddings = model.get_input_embeddings().weight
        embeddings[0] = embeddings[1:].std() * torch.randn_like(embeddings[0])
    return model


def save(model, tokenizer, folder):
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def attempt(function, *args):
    """-> (what stopped it: None, the line of exit status 2, or an exception; what it printed)"""
    stdout, stderr = io.StringIO(), io.StringIO()
    problem = None
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        try:
            function(*args)
        except SystemExit:
            problem = stderr.getvalue().strip().splitlines()[-1].removeprefix("error: ")
        except Exception as error:
            problem = f"{TRACEBACK}{type(error).__name__}: {error}".splitlines()[0]
    return problem, stdout.getvalue()


def watch(name, seen):
    """Keep the first result of a function of stage 3, as it runs."""
    function = getattr(ppo_rlhf, name)

    def watched(*args, **options):
        result = function(*args, **options)
        seen.setdefault(name, result)
        return result

    return unittest.mock.patch.object(ppo_rlhf, name, watched)


def largest(a, b):
    return float(f"{(a - b).abs().max().item():.1e}")


@torch.no_grad()
def logits_difference(folder):
    """Stock logits, and the output layer on the states that the scripts read."""
    stock = AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.randint(3, 259, (1, 60), generator=torch.Generator().manual_seed(1))
    ours = stock.get_output_embeddings()(sft.hidden_states(stock, ids))
    return largest(stock(ids, use_cache=False).logits, ours)


@torch.no_grad()
def sampler_difference(batch, temperature):
    stock = AutoModelForCausalLM.from_pretrained("sft")
    differences = []
    for i, (start, end) in enumerate(zip(batch.starts, batch.lengths)):
        ids = batch.sequences[i : i + 1, :end]
        logprobs = (stock(ids, use_cache=False).logits[0, start - 1 : -1] / temperature).log_softmax(-1)
        logprobs = logprobs.gather(1, ids[0, start:, None])[:, 0]
        differences.append(largest(logprobs, batch.logprobs[i, : end - start]))
    return max(differences)


@torch.no_grad()
def score_difference(batch, scores, folder):
    stock = AutoModelForSequenceClassification.from_pretrained(folder)
    stock.config.pad_token_id = None  # else a pad that was sampled last would be taken for padding
    rows = zip(batch.sequences, batch.lengths)
    logits = [stock(ids[None, :end], use_cache=False).logits[0] for ids, end in rows]
    return largest(torch.cat(logits), scores)


def backbone_difference():
    """How far stage 2's two steps went from the weights it should have started from."""
    before = AutoModelForCausalLM.from_pretrained("sft").base_model.state_dict()
    after = AutoModelForSequenceClassification.from_pretrained("reward_model").base_model.state_dict()
    return max(largest(before[name].float(), after[name].float()) for name in before)


def prepare():
    """What all families share, in the current folder: data, and a Llama as reward model."""
    Path("data").mkdir()
    for split in ("train", "test"):
        Path(f"data/{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    judge = make_model(make_config("llama", num_labels=1), AutoModelForSequenceClassification)
    save(judge, make_tokenizer(), "llama")


def try_family(family):
    """Make a model of the family and run the three stages in the current folder -> a row of the results."""
    for folder in ("base", "sft", "reward_model", "ppo"):
        shutil.rmtree(folder, ignore_errors=True)
    config = make_config(family)
    tokenizer = make_tokenizer()
    model = make_model(config)
    has_classifier = type(config) in transformers.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
    row = {"family": family, "class": type(model).__name__, "has_classifier": has_classifier}
    row["has_backbone"] = model.base_model is not model
    save(model, tokenizer, "base")
    if row["has_backbone"]:
        row["logits"] = logits_difference("base")
    flags = dict(dataset_name="data", overwrite=True, per_device_train_batch_size=4)
    short = flags | dict(max_steps=2, warmup_steps=1)
    args = sft.Args(**short, model_name_or_path="base", output_dir="sft", max_new_tokens=8)
    row["stage 1"], printed = attempt(sft.main, args)
    notes = [line for line in printed.splitlines() if line.startswith("note: ")]
    row["note"] = " ".join(note.removeprefix("note: ") for note in notes)
    if row["stage 1"]:
        return row
    row["logits"] = max(row["logits"], logits_difference("sft"))
    args = reward_model.Args(**short, model_name_or_path="sft", output_dir="reward_model")
    row["stage 2"], _ = attempt(reward_model.main, args)
    if not row["stage 2"]:
        row["moved"] = backbone_difference()
    judge = "llama" if row["stage 2"] else "reward_model"
    flags |= dict(sft_model_path="sft", reward_model_path=judge, output_dir="ppo", max_new_tokens=24)
    flags |= dict(total_episodes=16, batch_size=8, num_mini_batches=2)
    args = ppo_rlhf.Args(**flags)
    seen = {}
    with watch("sample", seen), watch("score", seen):
        row["stage 3"], _ = attempt(ppo_rlhf.main, args)
    if "sample" in seen:
        row["sampler"] = sampler_difference(seen["sample"], args.temperature)
    if "score" in seen:
        row["scores"] = score_difference(seen["sample"], seen["score"], judge)
    if not row["stage 3"]:
        row["logits"] = max(row["logits"], logits_difference("ppo"))
    return row


def outcome(row):
    """By what was measured here, whatever the scripts say."""
    if "class" not in row:
        return "cannot be made here"
    if not row["has_backbone"]:
        return "no backbone of its own"
    if row["logits"] > TOLERANCE:
        return "changes its logits after the output layer"
    if row.get("stage 1"):
        return "stopped in stage 1"
    if "sampler" not in row or row["sampler"] > TOLERANCE:
        return "cannot be sampled with a static cache"
    if row["stage 3"] or row["scores"] > TOLERANCE:
        return "stopped in stage 3"
    if not row["has_classifier"]:
        return "no sequence-classification class"
    if row["stage 2"] or row["moved"] > LARGEST_STEPS:
        return "stopped in stage 2"
    return "works"


def table(rows):
    groups = {}
    for row in rows:
        groups.setdefault(row["outcome"], []).append(row["family"])
    lines = ["| | families | |", "| --- | --- | --- |"]
    for name, families in sorted(groups.items(), key=lambda group: -len(group[1])):
        lines.append(f"| {name} | {len(families)} | {', '.join(families)} |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    every = [name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if name not in LEFT_OUT]
    parser.add_argument("families", nargs="*", metavar="family", default=every)
    families = parser.parse_args().families
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        prepare()
        for family in families:
            try:
                row = try_family(family)
            except Exception as error:
                row = {"family": family, "error": f"{type(error).__name__}: {error}"}
            row["outcome"] = outcome(row)
            rows.append(row)
            problems = [f"{name}: {row[name]}" for name in ("note", *STAGES) if row.get(name)]
            print(f"{family}: {row['outcome']}. {' | '.join(problems) or row.get('error', '')}", flush=True)
    if families == every:
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (ROOT / "benchmark/results/families.jsonl").write_text(text)
    print(table(rows))
    crashed = [row["family"] for row in rows if any(TRACEBACK in (row.get(name) or "") for name in STAGES)]
    print("a traceback where one line should be:", ", ".join(crashed) or "none")


if __name__ == "__main__":
    main()
