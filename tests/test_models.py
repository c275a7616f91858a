"""Model families: each is sampled and scored exactly as its own stock forward says, or refused before
training.

Some families scale or cap their logits after the output layer, some ignore the mask of a static cache. None
of them crashes: the policy that is trained is silently not the model that is saved."""

import conftest
import pytest
import torch
import transformers
from conftest import FAMILIES, PROMPTS, plain_logits, ppo_flags, read_jsonl, tiny_config

import ppo_rlhf as ppo

SIZE = dict(vocab_size=258, initializer_range=0.25, bos_token_id=1, eos_token_id=1, pad_token_id=0)
SHAPE = dict(SIZE, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
SHAPE |= dict(max_position_embeddings=96)
GPT_NEO = dict(attention_types=[[["global", "local"], 1]], num_layers=2, num_heads=4, window_size=4)

MODELS = {
    **{family: tiny_config(family, vocab_size=260) for family in FAMILIES},
    "opt": transformers.OPTConfig(**SHAPE, ffn_dim=64, word_embed_proj_dim=32, init_std=0.25),
    "phi": transformers.PhiConfig(**SHAPE),
    "gpt-j": transformers.GPTJConfig(**SIZE, n_embd=32, n_layer=2, n_head=4, n_positions=96, rotary_dim=4),
    "mpt": transformers.MptConfig(**SIZE, d_model=32, n_layers=2, n_heads=4, max_seq_len=96),
    "bloom": transformers.BloomConfig(**SIZE, hidden_size=32, n_layer=2, n_head=4),
    "mistral, short window": transformers.MistralConfig(**SHAPE, num_key_value_heads=2, sliding_window=4),
    "gemma2": transformers.Gemma2Config(
        **SHAPE, num_key_value_heads=2, head_dim=8, final_logit_softcapping=5.0
    ),
    "cohere": transformers.CohereConfig(**SHAPE),
    "granite": transformers.GraniteConfig(**SHAPE, num_key_value_heads=2, logits_scaling=4.0),
    "gpt-neo": transformers.GPTNeoConfig(**SIZE, **GPT_NEO, hidden_size=32, max_position_embeddings=96),
}
WORK = {*FAMILIES, "opt", "phi", "gpt-j", "mpt"}
REFUSED = {"gemma2": "gemma2 is not supported", "cohere": "cohere is not", "granite": "granite is not"}


@pytest.mark.parametrize("name", MODELS)
def test_exact_or_refused(name, tmp_path, monkeypatch, capsys):
    """main() on ragged prompts: the log-probs of the rollout are those of the stock forward of each row
    alone, and the run comes to its end with a reward model of the same family; or exit status 2 and one line
    that says why."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(MODELS[name]).eval()
    tokenizer = conftest.tiny_tokenizer()
    judge = conftest.tiny_reward_model(name if name in FAMILIES else "gpt2", vocab_size=260)
    texts = [tokenizer.decode(ids) for ids in PROMPTS]
    calls, rollout = [], ppo.rollout
    monkeypatch.setattr(ppo, "rollout", lambda *a: calls.append((a, rollout(*a))) or calls[-1][1])
    updates = 2 if name in FAMILIES else 1
    flags = ppo_flags(tmp_path, model, judge, tokenizer, texts, texts, max_new_tokens=12, temperature=0.9)
    flags |= dict(total_episodes=6 * updates, batch_size=6, num_mini_batches=1, num_ppo_epochs=1)
    try:
        ppo.main(ppo.Args(**flags))
    except SystemExit as refusal:
        assert refusal.code == 2 and name not in WORK
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert REFUSED.get(name, "log-probs of sampler and forward differ") in line
        assert not (tmp_path / "ppo/model.safetensors").exists()
        return
    assert name not in REFUSED
    (_, ids, mask, *_), (responses, lengths, _, logprobs) = calls[0]
    for i in range(6):
        prompt = ids[i][mask[i].bool()].tolist()
        answer = responses[i, : lengths[i]].tolist()
        logits = plain_logits(model, prompt + answer)[len(prompt) - 1 : -1].double() / 0.9
        expected = logits.log_softmax(-1)[range(len(answer)), answer]
        torch.testing.assert_close(logprobs[i, : len(answer)].double(), expected, atol=1e-4, rtol=1e-4)
    metrics = read_jsonl(tmp_path / "ppo/metrics.jsonl")
    assert len(metrics) == updates
    assert all(m["val/sampler_logprob_gap"] < 1e-4 for m in metrics)
    ppo.load_pretrained(transformers.AutoModelForCausalLM, str(tmp_path / "ppo"))
