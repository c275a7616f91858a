"""Checkpoints as they stand on the Hub: weights under older names, tokenizers that their class would rebuild,
pads without an embedding, positions that end."""

import json

import pytest
import torch
import transformers
from conftest import make_inputs, run_stage, save, tiny_config, tiny_model, tiny_tokenizer
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import reward_model
import sft

BUFFERS = {  # of the first layer, in files of older versions of the library
    "gpt_neox": ("gpt_neox.layers.0.attention.{}", "bias", "masked_bias", "rotary_emb.inv_freq"),
    "gpt2": ("h.0.attn.{}", "bias", "masked_bias"),
    "llama": ("model.layers.0.self_attn.{}", "rotary_emb.inv_freq"),
}


@pytest.mark.parametrize("family", BUFFERS)
def test_published_weights(family, tmp_path):
    """Load as a language model and as the reward model of stage 2, each weight what it was. GPT-NeoX calls
    its head embed_out on disk; OpenAI's file of GPT-2 has the backbone alone."""
    make_inputs(tmp_path, [{"prompt": "a", "chosen": "b", "rejected": "c"}])
    model = tiny_model(family)
    folder = save(model, tiny_tokenizer(), tmp_path / "base")
    weights = load_file(tmp_path / "base/model.safetensors")
    assert ("embed_out.weight" in weights) == (family == "gpt_neox")
    if family == "gpt2":
        weights = {name.removeprefix("transformer."): weight for name, weight in weights.items()}
    path, *names = BUFFERS[family]
    weights |= {path.format(name): torch.ones(4) for name in names}
    save_file(weights, tmp_path / "base/model.safetensors", metadata={"format": "pt"})
    causal, _ = sft.load_pretrained(AutoModelForCausalLM, folder)
    assert torch.equal(causal.get_output_embeddings().weight, model.get_output_embeddings().weight)
    run_stage(reward_model, tmp_path, tmp_path / "out", learning_rate=1e-9)
    judge, _ = sft.load_pretrained(AutoModelForSequenceClassification, str(tmp_path / "out"))
    for loaded in (causal, judge):
        for ours, theirs in zip(loaded.base_model.parameters(), model.base_model.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)


TEXT = "Steps 1234:\n\n1. Mix 250 g of flour.\n\n2. Bake it, isn't it?"


@pytest.mark.parametrize("name", ["GPT2Tokenizer", "Qwen2Tokenizer", "GPTNeoXTokenizer"])
def test_tokenizers_are_what_the_file_says(name, tmp_path):
    """Whatever their class would make of it, in what is loaded and in what is saved."""
    bpe = Tokenizer(models.BPE())
    bpe.decoder = decoders.ByteLevel()
    digits = pre_tokenizers.Digits(individual_digits=True)  # as SmolLM2 has it
    bpe.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    names = {"special_tokens": ["<|endoftext|>", "<|im_end|>"]}
    names["initial_alphabet"] = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator([TEXT] * 40, trainers.BpeTrainer(vocab_size=300, **names))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>")
    tokenizer.chat_template = "x"
    model = tiny_model("llama", vocab_size=300)
    path = save(model, tokenizer, tmp_path / "base")
    config = tmp_path / "base/tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"tokenizer_class": name}))
    for _ in range(2):
        _, loaded = sft.load_pretrained(AutoModelForCausalLM, path)
        assert loaded(TEXT, add_special_tokens=False).input_ids == bpe.encode(TEXT).ids
        assert loaded.eos_token == "<|im_end|>" and loaded.chat_template == "x"
        path = save(model, loaded, tmp_path / "saved")


@pytest.mark.parametrize(
    "size, token, pad", [(258, "<pad>", 0), (258, None, 1), (258, "<new>", 1), (259, "<new>", 258)]
)
def test_pads(size, token, pad, tmp_path):
    """One without an embedding, or none, becomes EOS, which is masked by length; id 0 is a pad as any."""
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = token
    path = save(tiny_model("gpt2", vocab_size=size), tokenizer, tmp_path)
    assert sft.load_pretrained(AutoModelForCausalLM, path)[1].pad_token_id == pad


def test_context(refused):
    """As many positions as a model has; with longrope, as many as leave its frequencies as they are."""
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "rope_theta": 1e4}
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "max_position_embeddings": 96, "pad_token_id": 0}
    longrope = transformers.Phi3Config(**sizes, original_max_position_embeddings=24, rope_scaling=rope)
    for config, limit in ((tiny_config("gpt2"), 96), (tiny_config("llama"), 96), (longrope, 24)):
        sft.check_context(config, limit)
        with refused(f"context of {limit}"):
            sft.check_context(config, limit + 1)
    sft.check_context(transformers.BloomConfig(), 10**6)


def test_check_model_needs_no_memory():
    """Logits of a few positions, as [2, L, V] would be the largest tensor of the run; padding is not read."""
    model, seen = tiny_model("gpt2"), []
    model.get_output_embeddings().register_forward_hook(lambda *call: seen.append(call[2].shape))
    sft.check_model(model, tiny_tokenizer(), [[5] * 90, [7, 8, 9]])
    assert seen and all(shape.numel() <= 2 * 32 * 258 for shape in seen)
