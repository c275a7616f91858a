"""Ids are those of the tokenizer's own chat template, in all stages, and end where it ends a turn."""

import datetime

import datasets
import pytest
import torch
import transformers
from conftest import EOS, save, tiny_config, tiny_tokenizer, write_jsonl
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

import ppo_rlhf
import reward_model
import sft

SPECIAL = "<pad> <eos> <bos> <|im_start|> <|im_end|> <|eot_id|> <end_of_turn> <|end|> <think>".split()
ID = {token: i for i, token in enumerate(SPECIAL)}
TOOLS = [{"type": "function", "function": {"name": "clock", "description": "the time"}}]


class Stop(Exception):
    pass


def byte_tokenizer(eos="<eos>", bos="<bos>", chat=None, adds=None):
    """One id a byte, after the special ones; `adds` is what it writes by itself, as "<bos> $A <eos>"."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *alphabet])}
    bpe = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    bpe.add_tokens([AddedToken("<think>", special=False)])  # as Qwen 3 has it
    return finish(bpe, SPECIAL[:-1], adds or "$A", chat, eos_token=eos, bos_token=bos, pad_token="<pad>")


def spm_tokenizer(chat=None, adds="<s> $A"):
    """As Llama 2 and Mistral have it: a space is a ▁, one ▁ is put before a text, BOS before that; no pad."""
    special = ["<unk>", "<s>", "</s>"]
    letters = ["▁", "\n", *(chr(i) for i in range(33, 127)), "▁f", "▁q"]
    vocabulary = {token: i for i, token in enumerate([*special, *letters])}
    bpe = Tokenizer(models.BPE(vocab=vocabulary, merges=[("▁", "f"), ("▁", "q")], unk_token="<unk>"))
    bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    bpe.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return finish(bpe, special, adds, chat, eos_token="</s>", bos_token="<s>", unk_token="<unk>")


def finish(bpe, special, adds, chat, **names):
    bpe.add_special_tokens(special)
    pieces = [(token, bpe.token_to_id(token)) for token in special if token in adds]
    bpe.post_processor = processors.TemplateProcessing(single=adds, special_tokens=pieces)
    names = {name: token for name, token in names.items() if token}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, **names)
    tokenizer.chat_template = chat
    return tokenizer


def chat_of(turn, generation="", start=""):
    """A template of a turn, what opens a response, and a start."""
    turns = "{% for m in messages %}" + turn + "{% endfor %}"
    return start + turns + "{% if add_generation_prompt %}" + generation + "{% endif %}"


CHATML_TURN = "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
CHATML = chat_of(CHATML_TURN, "<|im_start|>assistant\n")
LLAMA3 = chat_of("[{{ m.role }}]\n\n{{ m.content | trim }}<|eot_id|>", "[assistant]\n\n", "{{ bos_token }}")
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
GEMMA_TURN = "[{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<end_of_turn>\n"
GEMMA = chat_of(GEMMA_TURN, "[model\n", "{{ bos_token }}" + NO_SYSTEM)
PHI3 = chat_of("<|{{ m.role }}|>\n{{ m.content }}<|end|>\n", "<|assistant|>\n{% else %}{{ eos_token }}")
EMPTY_THOUGHT = "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
QWEN3_TURN = "<|im_start|>{{ m.role }}\n" + EMPTY_THOUGHT + "{{ m.content }}<|im_end|>\n"
R1_ANSWER = "<|Assistant|>{{ m.content.split('</think>')[-1] }}{{ eos_token }}"
R1_TURN = "{% if m.role == 'user' %}<|User|>{{ m.content }}{% else %}" + R1_ANSWER + "{% endif %}"
R1 = chat_of(R1_TURN, "<|Assistant|><think>\n", "{{ bos_token }}")
TOOL_LIST = (
    "{% if tools %}[{{ tools | map(attribute='function') | map(attribute='name') | join }}]{% endif %}"
)
ZEPHYR = chat_of("<|{{ m.role }}|>\n{{ m.content + eos_token }}\n", "<|assistant|>\n")
LLAMA2_USER = "{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %}"
LLAMA2_TURN = LLAMA2_USER + " {{ m.content }} {{ eos_token }}{% endif %}"
LLAMA2 = chat_of(LLAMA2_TURN, "", "{{ bos_token }}")
TODAY = datetime.date.today().strftime("%d %b %Y")
U, A = "<|im_start|>user\nq?<|im_end|>\n", "<|im_start|>assistant\n"

IM_END = "<|im_end|>"
EMPTY = "<think>\n\n</think>\n\nfine<|im_end|>"
DATED = "{{ strftime_now('%d %b %Y') }}" + CHATML
LLAMA3_PROMPT = "<bos>[user]\n\nq?<|eot_id|>[assistant]\n\n"
GEMMA_PROMPT = "<bos>[user\nq?<end_of_turn>\n[model\n"

# name: (tokenizer, ids that the generation config ends at, prompt in text, response in text)
KINDS = {
    "ChatML": (byte_tokenizer(IM_END, None, CHATML), 4, U + A, "fine<|im_end|>"),
    "ChatML, another EOS": (byte_tokenizer("<eos>", None, CHATML), 1, U + A, "fine<|im_end|>"),
    "Llama 3": (byte_tokenizer(chat=LLAMA3, adds="<bos> $A"), [1, 5], LLAMA3_PROMPT, "fine<|eot_id|>"),
    "Gemma": (byte_tokenizer(chat=GEMMA), [1, 6], GEMMA_PROMPT, "fine<end_of_turn>"),
    "Phi 3": (byte_tokenizer(chat=PHI3), None, "<|user|>\nq?<|end|>\n<|assistant|>\n", "fine<|end|>"),
    "Qwen 3": (byte_tokenizer(IM_END, None, chat_of(QWEN3_TURN, A)), [4, 1], U + A, EMPTY),
    "no opening": (byte_tokenizer(IM_END, None, chat_of(CHATML_TURN)), 4, U, A + "fine<|im_end|>"),
    "tools": (byte_tokenizer(IM_END, None, TOOL_LIST + CHATML), 4, "[clock]" + U + A, "fine<|im_end|>"),
    "a date": (byte_tokenizer(IM_END, None, DATED), 4, TODAY + U + A, "fine<|im_end|>"),
    "Llama 3, always opened": (
        byte_tokenizer(chat=LLAMA3.replace("{% if add_generation_prompt %}", "{% if true %}")),
        [1, 5],
        LLAMA3_PROMPT,
        "fine<|eot_id|>",
    ),
    "Zephyr": (byte_tokenizer(chat=ZEPHYR), 1, "<|user|>\nq?<eos>\n<|assistant|>\n", "fine<eos>"),
    "Llama 2": (spm_tokenizer(chat=LLAMA2), 2, None, None),
    "appends EOS": (byte_tokenizer(chat=CHATML, adds="<bos> $A <eos>"), 1, U + A, "fine<|im_end|>"),
}
USER, ANSWER = {"role": "user", "content": "q?"}, {"role": "assistant", "content": "fine"}


def make_models(folder, tokenizer, ends=EOS, name="base"):
    """A causal language model and a classifier with this tokenizer."""
    config = tiny_config("gpt2", vocab_size=300, num_labels=1)
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.generation_config.eos_token_id = ends
    save(model, tokenizer, folder / name)
    model = transformers.AutoModelForSequenceClassification.from_config(config)
    save(model, tokenizer, folder / f"rm {name}")


def ids_of(stage, folder, rows, monkeypatch, base="base", rm="rm base", **flags):
    """Ids of all rows that main() of a stage makes of a data set, and nothing more of the run."""
    write_jsonl(folder / "rows/train.jsonl", rows)
    write_jsonl(folder / "rows/test.jsonl", rows[:1])
    names = {"dataset_name": "rows", "output_dir": "never"}
    if stage is ppo_rlhf:
        names |= {"sft_model_path": base, "reward_model_path": rm}
    else:
        names |= {"model_name_or_path": base}
    seen = []

    def check_model(model, tokenizer, rows, *extra):
        seen.extend(rows)
        raise Stop

    monkeypatch.setattr(stage, "check_model", check_model)
    with pytest.raises(Stop):
        stage.main(stage.Args(**{name: str(folder / value) for name, value in names.items()}, **flags))
    return seen


@pytest.mark.parametrize("name", KINDS)
def test_ids_are_the_tokenizers_own(name, tmp_path, monkeypatch):
    """Of twelve real kinds, in all stages: the prompt with its generation prompt, the chat to the end of its
    last turn. Catches an EOS where the template has another end, a second BOS, a lost think block."""
    tokenizer, ends, prompt_text, response_text = KINDS[name]
    tools = {"tools": TOOLS} if name == "tools" else {}
    make_models(tmp_path, tokenizer, ends)
    own = {"return_dict": False, **tools}
    prompt = tokenizer.apply_chat_template([USER], add_generation_prompt=True, **own)
    whole = tokenizer.apply_chat_template([USER, ANSWER], **own)
    assert whole[: len(prompt)] == prompt
    if prompt_text:
        assert tokenizer.decode(prompt) == prompt_text
        whole = tokenizer(prompt_text + response_text, add_special_tokens=False).input_ids
    row = {"messages": [USER, ANSWER], **tools}
    assert ids_of(sft, tmp_path, [row], monkeypatch)[:2] == [whole] * 2  # and the printed sample
    assert ids_of(ppo_rlhf, tmp_path, [{"prompt": "q?", **tools}], monkeypatch) == [prompt] * 2
    row = {"prompt": [USER], "chosen": [ANSWER], "rejected": [{**ANSWER, "content": "fin"}], **tools}
    chosen, rejected, *_ = ids_of(reward_model, tmp_path, [row], monkeypatch)
    assert chosen == whole and len(rejected) == len(whole) - 1 and rejected[-1] == whole[-1]
    assert whole.count(tokenizer.bos_token_id) == ("{{ bos_token }}" in tokenizer.chat_template)
    row["prompt"] = [USER, ANSWER, USER]  # of which the first response is the template's own
    prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, **own)
    encoded = sft.encode(tokenizer, [whole[-1]], {"where": "", **row}, "chosen")
    assert encoded[0] == prompt and encoded[1][-1] == whole[-1]


def refusal(*arguments, **flags):
    """The one line that ids_of ends with, which names the row."""
    *arguments, capsys = arguments
    with pytest.raises(SystemExit) as end:
        ids_of(*arguments, **flags)
    error = capsys.readouterr().err
    assert end.value.code == 2 and "row 1" in error and error.count("\n") == 1
    return error


def test_a_generation_prompt_that_is_not_in_the_chat(tmp_path, monkeypatch, capsys):
    """R1 and QwQ open <think> for the model, but write chats without: refused, and the difference shown."""
    make_models(tmp_path, byte_tokenizer(chat=R1))
    row = {"prompt": "q?", "completion": "fine", "chosen": "a", "rejected": "b"}
    for stage in (sft, reward_model):
        assert r"'<think>\n'" in refusal(stage, tmp_path, [row], monkeypatch, capsys)


def test_ends_of_a_response():
    """Those of the generation config, one, a list or none, of the tokenizer, and of the template's turns."""
    model = transformers.AutoModelForCausalLM.from_config(tiny_config("gpt2", vocab_size=300))
    for chat, eos, configured, ends in (
        (CHATML, "<eos>", None, [1, 4]),
        (CHATML, "<|im_end|>", 4, [4]),
        (CHATML, "<|im_end|>", [1, 7], [1, 4, 7]),
        (LLAMA3, "<eos>", [5], [1, 5]),
        (GEMMA, "<eos>", 1, [1, 6]),
        (PHI3, "<eos>", 1, [1, 7]),
        (ZEPHYR, "<eos>", 1, [1]),
        (chat_of("{{ m.content }}\n"), "<eos>", 2, [1, 2]),
    ):
        model.generation_config.eos_token_id = configured
        assert sft.find_end_ids(model, byte_tokenizer(eos, chat=chat)) == ends
    assert sft.find_end_ids(model, spm_tokenizer(chat=LLAMA2)) == [2]
    tokenizer = byte_tokenizer(chat=chat_of("{{ m.content }}\n\n"))
    tokenizer.add_tokens(["\n\n"])  # as Gemma has it: paragraphs are no ends
    assert sft.find_end_ids(model, tokenizer) == [1, 2]


TEMPLATES = {  # as typed: (before and after the prompt)
    "Question: {prompt}\\nAnswer:": ("Question: ", "\nAnswer:"),
    "Question: {prompt}\nAnswer:": ("Question: ", "\nAnswer:"),
    "'\"{prompt}\"'\\\\": ("'\"", "\"'\\\\"),
    "{{ x }} {% y %}{prompt}}} {# z": ("{{ x }} {% y %}", "}} {# z"),
    "\n\n é\u2028{prompt}\n\n": ("\n\n é\u2028", "\n\n"),
    "{prompt}": ("", ""),
}


@pytest.mark.parametrize("template", TEMPLATES, ids=range(len(TEMPLATES)))
@pytest.mark.parametrize("adds", [None, "<bos> $A", "$A <eos>"])
@pytest.mark.parametrize("make", [byte_tokenizer, spm_tokenizer])
def test_prompt_template(template, adds, make):
    """Without a chat template: the text as given, BOS once where the tokenizer writes it, the response after
    one space, EOS. Catches Jinja in a text, lost line breaks, an EOS that the tokenizer appends."""
    before, after = TEMPLATES[template]
    if make is spm_tokenizer:
        adds = adds and adds.replace("bos", "s").replace("eos", "/s")
    tokenizer = make(adds=adds or "$A")
    tokenizer.chat_template = sft.chat_template(template, tokenizer)
    start = tokenizer.bos_token if adds and adds.startswith("<") else ""
    for reply, written in (("fine", " fine"), (" fine", " fine"), ("\nfine ", "\nfine ")):
        row = {"prompt": "{{ q }}\n", "completion": reply, "where": ""}
        prompt, response = sft.encode(tokenizer, [tokenizer.eos_token_id], row, "completion")
        texts = [f"{start}{before}{{{{ q }}}}\n{after}", written + tokenizer.eos_token]
        ids = [tokenizer(text, add_special_tokens=False).input_ids for text in (texts[0], "".join(texts))]
        assert prompt == ids[0] and prompt + response == ids[1]
    chat = [{"role": role, "content": role[0]} for role in ("user", "assistant", "user")]
    text = f"{before}u{after} a{tokenizer.eos_token}{before}u{after}"
    assert tokenizer.apply_chat_template(chat, tokenize=False) == start + text
    with pytest.raises(Exception, match="no place for role system"):
        tokenizer.apply_chat_template([SYSTEM, *chat])


def test_prompt_template_goes_through_all_stages(tmp_path, monkeypatch):
    """It is saved with the tokenizer; later stages, `pipeline` and `generate` read it, and every end."""
    make_models(tmp_path, byte_tokenizer(chat=CHATML, adds="<bos> $A"), [1, 7])
    rows = [{"prompt": f"q {i}?", "completion": "fine", "chosen": "a", "rejected": "b"} for i in range(4)]
    for split in ("train", "test"):
        write_jsonl(tmp_path / f"data/{split}.jsonl", rows)
    monkeypatch.chdir(tmp_path)
    data, steps = {"dataset_name": "data"}, {"max_steps": 1, "warmup_steps": 1}
    flags = data | steps | {"prompt_template": "Question: {prompt}\\nAnswer:", "max_new_tokens": 9}
    sft.main(sft.Args(**flags, model_name_or_path="base", output_dir="sft"))
    reward_model.main(reward_model.Args(**data, **steps, model_name_or_path="sft", output_dir="rm"))
    flags = data | {
        "sft_model_path": "sft",
        "reward_model_path": "rm",
        "output_dir": "ppo",
        "max_new_tokens": 9,
    }
    ppo_rlhf.main(ppo_rlhf.Args(**flags, total_episodes=4, batch_size=4, num_mini_batches=2))
    text = "<bos>Question: q 0?\nAnswer:"
    make_models(tmp_path, byte_tokenizer(), name="plain")
    found = ids_of(sft, tmp_path, rows[:1], monkeypatch, "plain")[0]
    assert byte_tokenizer().decode(found) == "Prompt: q 0?\nResponse: fine<eos>"  # the default
    for stage in (reward_model, ppo_rlhf):
        found = ids_of(stage, tmp_path, rows[:1], monkeypatch, "sft", "rm")[0]
        assert byte_tokenizer().decode(found).startswith(text) and found.count(ID["<bos>"]) == 1
    for folder in ("sft", "ppo"):
        path = str(tmp_path / folder)
        tokenizer = transformers.AutoTokenizer.from_pretrained(path)
        model = transformers.AutoModelForCausalLM.from_pretrained(path)
        prompt = tokenizer.apply_chat_template([{"role": "user", "content": "q 0?"}], return_tensors="pt")
        assert tokenizer.decode(prompt.input_ids[0]) == text
        write = transformers.pipeline("text-generation", model=path)
        answer = write([{"role": "user", "content": "q 0?"}], do_sample=False)[0]["generated_text"][-1]
        width = prompt.input_ids.shape[1]
        greedy = model.generate(**prompt, do_sample=False)[0, width:]
        assert answer == {"role": "assistant", "content": tokenizer.decode(greedy, skip_special_tokens=True)}
        for end, length in ((1, 3), (7, 3), (4, 9)):  # 4 ended turns of the template that is no more

            def force(ids, scores, token=end, at=width + 2):
                wanted = token if ids.shape[1] == at else 99
                return scores.scatter(1, torch.full((1, 1), wanted), 1e9)

            assert model.generate(**prompt, logits_processor=[force]).shape[1] == width + length


ENDS = byte_tokenizer("<|im_end|>", chat=CHATML.replace("<|im_end|>", "<eos>", 1))
OTHERS = [tiny_tokenizer(), byte_tokenizer(chat=CHATML + " "), byte_tokenizer(chat=ZEPHYR), ENDS]


@pytest.mark.parametrize("other", OTHERS, ids=["vocabulary", "template", "turns", "ends"])
def test_a_reward_model_that_reads_other_prompts(other, tmp_path, monkeypatch, capsys):
    """Another vocabulary or another template is refused, also if only responses end otherwise."""
    make_models(tmp_path, byte_tokenizer(chat=CHATML))
    make_models(tmp_path, other, name="other")
    assert ids_of(ppo_rlhf, tmp_path, [{"prompt": "q?"}], monkeypatch)
    rows = [{"prompt": "q?"}]
    assert "template" in refusal(ppo_rlhf, tmp_path, rows, monkeypatch, capsys, rm="rm other")


DIALOGUE = "\n\nHuman: q\n\nAssistant:"
SYSTEM, RESULT = {"role": "system", "content": "s"}, {"role": "tool", "content": "3"}
GPT, MODEL, HUMAN = {**ANSWER, "role": "gpt"}, {**ANSWER, "role": "model"}, {**USER, "role": "human"}
TOOL = "<|im_start|>tool\n3<|im_end|>\n"
PROMPTS = [
    ({"prompt": [USER], "completion": "x", "answer": 3}, U + A),
    ({"messages": [USER, ANSWER]}, U + A),
    ({"messages": [USER]}, U + A),
    ({"prompt": [SYSTEM, USER]}, "<|im_start|>system\ns<|im_end|>\n" + U + A),
    ({"messages": [USER, ANSWER] * 2}, U + A + "fine<|im_end|>\n" + U + A),
    ({"messages": [USER, ANSWER, RESULT]}, U + A + "fine<|im_end|>\n" + TOOL + A),
    ({"chosen": f"{DIALOGUE} a", "rejected": "x"}, f"<|im_start|>user\n{DIALOGUE}<|im_end|>\n{A}"),
]
REFUSED = [
    (ppo_rlhf, {"prompt": [USER, ANSWER]}),
    (ppo_rlhf, {"messages": [USER, GPT]}),
    (ppo_rlhf, {"messages": [USER, MODEL]}),
    (sft, {"messages": [USER, GPT]}),
    (sft, {"messages": [HUMAN, ANSWER]}),
    (sft, {"messages": [USER, ANSWER, USER]}),
    (sft, {"messages": [ANSWER]}),
    (sft, {"prompt": [USER, ANSWER], "completion": [ANSWER]}),
    (reward_model, {"prompt": [USER], "chosen": [GPT], "rejected": [ANSWER]}),
    (reward_model, {"chosen": [USER, ANSWER], "rejected": [USER, MODEL]}),
    (reward_model, {"chosen": "a", "rejected": "b"}),
]


@pytest.mark.parametrize("row, text", PROMPTS)
def test_prompts_of_stage_3(row, text, tmp_path, monkeypatch):
    """Messages, dialogues of which the last answer is dropped, hh-rlhf's texts; other columns are nothing."""
    tokenizer = byte_tokenizer(IM_END, None, CHATML)
    make_models(tmp_path, tokenizer)
    assert ids_of(ppo_rlhf, tmp_path, [row], monkeypatch)[0] == tokenizer(text).input_ids


@pytest.mark.parametrize("stage, row", REFUSED)
def test_roles_that_are_refused(stage, row, tmp_path, monkeypatch, capsys):
    """A prompt that ends with an answer, by whatever role, and an answer that is not the assistant's."""
    make_models(tmp_path, byte_tokenizer(IM_END, None, CHATML))
    assert "user" in refusal(stage, tmp_path, [row], monkeypatch, capsys)


@pytest.mark.parametrize("stage", [sft, reward_model, ppo_rlhf])
def test_keys_that_arrow_adds(stage, tmp_path):
    """In a file of tables all messages and tools have the keys of all others, with None: not in what is read.
    Catches a chat template that lists another tool's parameters, or sees a tool call in every message."""
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "clock"}}]}
    tools = [{"function": {"name": name, "parameters": {name: {"type": "string"}}}} for name in ("a", "b")]
    chats = [[USER, ANSWER], [USER, call, RESULT, ANSWER]]
    rows = [{"messages": chat, "tools": [tool], "answer": 0} for chat, tool in zip(chats, tools)]
    table = datasets.Dataset.from_list(rows)
    assert table[0]["tools"][0]["function"]["parameters"]["b"] is None
    table.to_parquet(tmp_path / "rows/train.parquet")
    found = stage.load_rows(str(tmp_path / "rows"), "train")
    assert [{key: value for key, value in row.items() if key != "where"} for row in found] == rows
