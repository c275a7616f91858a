"""benchmark/handoff.py's reward function for TRL, which needs no TRL itself."""

import pytest
import torch
from conftest import EOS, PAD, REPOSITORY, tiny_reward_model, tiny_tokenizer

import ppo_rlhf


@pytest.mark.parametrize("pad_is_eos", [False, True])
@pytest.mark.parametrize("ended", [False, True])
def test_score_ids_is_the_score_of_stage_3(family, pad_is_eos, ended, monkeypatch):
    """The same scores as `reward_fn`, also where the pad is the EOS and where a response was cut off."""
    monkeypatch.syspath_prepend(REPOSITORY / "benchmark")
    import handoff

    model, tokenizer = tiny_reward_model(family), tiny_tokenizer(pad_is_eos)
    model.config.pad_token_id = None if pad_is_eos else PAD  # as reward_model.py saves it
    prompts = [[{"role": "user", "content": text}] for text in ("x", "yz yz", "a b")]
    responses = [[9, 8] + [EOS] * ended, [7] + [EOS] * ended, [9, 10, 11, 12] + [EOS] * ended]
    starts = [tokenizer.apply_chat_template(p, add_generation_prompt=True).input_ids for p in prompts]
    rows = [torch.tensor(prompt + response) for prompt, response in zip(starts, responses)]
    lengths = torch.tensor([len(row) for row in rows])
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=tokenizer.pad_token_id)
    with torch.no_grad():
        expected = ppo_rlhf.reward_fn(model, tokenizer, padded, lengths, lengths, prompts).tolist()
    score_ids = handoff.make_score_ids(model, tokenizer)
    assert score_ids(prompts=prompts, completion_ids=responses) == pytest.approx(expected, abs=1e-4)
