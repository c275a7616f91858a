"""Model families: each is sampled and scored exactly as its own stock forward says, or refused before training.

Some families scale or cap their logits after the output layer, some ignore the mask of a static cache.
For none of them does anything crash: the policy that is trained is silently not the model that is saved.
"""

import pytest
import torch
import transformers
from conftest import FAMILIES, read_jsonl, save, tiny_config, tiny_reward_model, tiny_tokenizer, write_jsonl

import ppo_rlhf as ppo
import sft

SIZE = dict(vocab_size=258, max_position_embeddings=96, initializer_range=0.25, bos_token_id=1, eos_token_id=1, pad_token_id=0)
SHAPE = dict(SIZE, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
GROUPED = dict(SHAPE, num_key_value_heads=2)
GPT_NEO = dict(attention_types=[[["global", "local"], 1]], num_layers=2, num_heads=4, hidden_size=32, window_size=4)

MODELS = {
    **{family: tiny_config(family, vocab_size=260) for family in FAMILIES},  # Qwen2's tokenizer class adds a token
    "opt": transformers.OPTConfig(**SHAPE, ffn_dim=64, word_embed_proj_dim=32, init_std=0.25),
    "phi": transformers.PhiConfig(**SHAPE),
    "falcon": transformers.FalconConfig(**SHAPE),
    "smollm3": transformers.SmolLM3Config(**GROUPED),
    "stablelm": transformers.StableLmConfig(**GROUPED),
    "mistral, window 64": transformers.MistralConfig(**GROUPED, sliding_window=64),
    "mistral, window 4": transformers.MistralConfig(**GROUPED, sliding_window=4),
    "gemma2": transformers.Gemma2Config(**GROUPED, head_dim=8, sliding_window=64, final_logit_softcapping=5.0),
    "cohere": transformers.CohereConfig(**GROUPED),
    "granite": transformers.GraniteConfig(**GROUPED, logits_scaling=4.0),
    "gpt-neo": transformers.GPTNeoConfig(**SIZE, **GPT_NEO),
    "gpt-j": transformers.GPTJConfig(**SIZE, n_embd=32, n_layer=2, n_head=4, n_positions=96, rotary_dim=4),
    "mpt": transformers.MptConfig(vocab_size=258, d_model=32, n_layers=2, n_heads=4, max_seq_len=96, initializer_range=0.25),
    "bloom": transformers.BloomConfig(vocab_size=258, hidden_size=32, n_layer=2, n_head=4, initializer_range=0.25),
}
MUST_WORK = {*FAMILIES, "opt", "phi", "falcon", "smollm3", "stablelm", "gpt-j", "mpt"}
T = 12


@pytest.mark.parametrize("name", MODELS)
def test_exact_or_refused(name, tmp_path, monkeypatch, capsys):
    """One update of main() on ragged prompts. What was sampled is the inverse CDF of the stock forward of each row
    alone, and what was scored is that forward's log-prob; or main() has ended with status 2, one line that names the
    family, and nothing written. Catches logits that are
    scaled after the output layer (Granite, Cohere, Gemma), attention that adds its mask to its scores instead of obeying it
    (GPT-J, MPT, which a boolean mask would mislead), windows shorter than the cache (GPT-Neo)."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(MODELS[name]).eval()
    tokenizer = tiny_tokenizer()
    judge = name if name in FAMILIES else "gpt2"  # any family can judge any other that shares its tokenizer
    for split in ("train", "test"):
        write_jsonl(tmp_path / "data" / f"{split}.jsonl", [{"prompt": p} for p in ("a", "bcd efg hij", "kl", "mnop?")])
    calls = {}

    def listen(function):
        real = getattr(ppo, function)
        monkeypatch.setattr(ppo, function, lambda *a: calls.setdefault(function, []).append((a, real(*a))) or calls[function][-1][1])

    listen("rollout"), listen("penalized_rewards")
    args = ppo.Args(
        sft_model_path=save(model, tokenizer, tmp_path / "sft"), dataset_name=str(tmp_path / "data"), prompt_template="{prompt}",
        reward_model_path=(save(tiny_reward_model(judge, vocab_size=260), tokenizer, tmp_path / "rm"),), output_dir=str(tmp_path / "ppo"),
        total_episodes=4, batch_size=4, num_mini_batches=1, num_ppo_epochs=1, max_new_tokens=T, temperature=0.9, beta=0.1,
    )  # fmt: skip
    try:
        ppo.main(args)
    except SystemExit as refusal:
        assert refusal.code == 2 and name not in MUST_WORK
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert "--sft_model_path" in line and f"`{model.config.model_type}` is not supported" in line
        assert not (tmp_path / "ppo").exists()
        return
    (_, prompts, prompt_mask, uniforms, *_), (responses, lengths) = next(
        call for call in calls["rollout"] if call[0][3].shape == (T, 4)
    )
    (_, scored, *_), _ = calls["penalized_rewards"][0]
    for i in range(4):
        prompt, n = prompts[i][prompt_mask[i].bool()], int(lengths[i])
        answer = responses[i, :n]
        with torch.no_grad():
            logits = model(input_ids=torch.cat([prompt, answer])[None]).logits[0, len(prompt) - 1 : -1].double() / 0.9
        picked = range(n), answer
        torch.testing.assert_close(scored[i, :n].double(), logits.log_softmax(-1)[picked], atol=1e-4, rtol=1e-4)
        p = logits.softmax(-1)
        above = p.cumsum(-1)[picked]
        u = uniforms[:n, i].double()
        assert (above - p[picked] - 1e-4 <= u).all() and (u <= above + 1e-4).all()
    assert len(read_jsonl(tmp_path / "ppo" / "metrics.jsonl")) == 1


@pytest.mark.parametrize("name", ["granite", "cohere"])
def test_stage_1_refuses_what_stage_3_would(name, tmp_path, capsys):
    """A family that scales its logits after the output layer: stage 1 says so before it trains. Catches a model that is
    trained on other logits than its own, and refused by stage 3 alone, when two trainings are paid for."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(MODELS[name])
    for split in ("train", "test"):
        write_jsonl(tmp_path / "data" / f"{split}.jsonl", [{"prompt": "a", "completion": "b"}])
    path = save(model, tiny_tokenizer(), tmp_path / "base")
    with pytest.raises(SystemExit) as refusal:
        sft.main(sft.Args(model_name_or_path=path, dataset_name=str(tmp_path / "data"), output_dir=str(tmp_path / "sft"), max_new_tokens=8))
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert refusal.value.code == 2 and "--model_name_or_path" in line and f"`{name}` is not supported" in line
    assert not (tmp_path / "sft").exists()
