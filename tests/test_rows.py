"""From rows to ids, in all stages: what is read, which rows are left out and why, what is refused, and that
ids are those of the tokenizer's own chat template and end where it ends a turn."""

import json
import re

import datasets
import pytest
import transformers
from conftest import make_inputs, run_stage, save, tiny_model, tiny_tokenizer, write_jsonl
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

import ppo_rlhf
import reward_model
import sft

SPECIAL = "<pad> <eos> <bos> <|im_start|> <|im_end|> <|eot_id|> <end_of_turn> <|end|> <think>".split()
STAGES = [sft, reward_model, ppo_rlhf]


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


CALLS = "{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}"
TURN = "<|im_start|>{{ m.role }}\n{{ m.content or '' }}" + CALLS + "<|im_end|>\n"
TOOLS = (
    "{% if tools %}[{{ tools | map(attribute='function') | map(attribute='name') | join }}]{% endif %}"
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
)
CHATML = chat_of(TURN, "<|im_start|>assistant\n", TOOLS)
LLAMA3 = chat_of("[{{ m.role }}]\n\n{{ m.content | trim }}<|eot_id|>", "[assistant]\n\n", "{{ bos_token }}")
PHI3 = chat_of("<|{{ m.role }}|>\n{{ m.content }}<|end|>\n", "<|assistant|>\n{% else %}{{ eos_token }}")
LAST = "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
QWEN3_TURN = "<|im_start|>{{ m.role }}\n" + LAST + "{{ m.content }}<|im_end|>\n"
R1 = chat_of("<|{{ m.role }}|>{{ m.content }}{{ eos_token }}", "<|assistant|><think>\n")
LLAMA2_USER = "{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %}"
LLAMA2 = chat_of(LLAMA2_USER + " {{ m.content }} {{ eos_token }}{% endif %}", "", "{{ bos_token }}")
IM_END, THOUGHT = "<|im_end|>", "<think>\n\n</think>\n\n"
U, A, FINE = "<|im_start|>user\nq?<|im_end|>\n", "<|im_start|>assistant\n", "fine<|im_end|>"
LLAMA3_PROMPT = "<bos>[user]\n\nq?<|eot_id|>[assistant]\n\n"
USER, ANSWER = {"role": "user", "content": "q?"}, {"role": "assistant", "content": "fine"}

# name: (tokenizer, ids that the generation config ends at, prompt in text, response in text)
KINDS = {
    "ChatML": (byte_tokenizer(IM_END, None, CHATML), 4, U + A, FINE),
    "ChatML, another EOS": (byte_tokenizer("<eos>", None, CHATML), 1, U + A, FINE),
    "Llama 3": (byte_tokenizer(chat=LLAMA3, adds="<bos> $A"), [1, 5], LLAMA3_PROMPT, "fine<|eot_id|>"),
    "Phi 3": (byte_tokenizer(chat=PHI3), None, "<|user|>\nq?<|end|>\n<|assistant|>\n", "fine<|end|>"),
    "Qwen 3": (byte_tokenizer(IM_END, None, chat_of(QWEN3_TURN, A)), [4, 1], U + A, THOUGHT + FINE),
    "no opening": (byte_tokenizer(IM_END, None, chat_of(TURN)), 4, U, A + FINE),
    "Llama 2": (spm_tokenizer(chat=LLAMA2), 2, None, None),
    "appends EOS": (byte_tokenizer(chat=CHATML, adds="<bos> $A <eos>"), 1, U + A, FINE),
}


def loaded(folder, tokenizer, configured=None):
    """The tokenizer and the ends of responses, as a stage has them from a model's folder."""
    model = tiny_model("gpt2", vocab_size=300)
    model.generation_config.eos_token_id = configured
    save(model, tokenizer, folder / "base")
    model, tokenizer = sft.load_pretrained(transformers.AutoModelForCausalLM, str(folder / "base"))
    return tokenizer, sft.find_end_ids(model, tokenizer)


def encoded(stage, folder, rows, tokenizer, end_ids, **flags):
    """What a stage makes of rows: lists of ids."""
    write_jsonl(folder / "rows/train.jsonl", rows)
    args = stage.Args(dataset_name=str(folder / "rows"), **flags)
    if stage is ppo_rlhf:
        return [[prompt.ids] for prompt in ppo_rlhf.load_prompts(tokenizer, args, "train")]
    load = sft.load_examples if stage is sft else reward_model.load_pairs
    return load(tokenizer, end_ids, args, "train")


@pytest.mark.parametrize("name", KINDS)
def test_ids_are_the_tokenizers_own(name, tmp_path):
    """In all stages: the prompt with its generation prompt, the chat to the end of its last turn. Catches an
    EOS where the template has another end, a second BOS, a lost think block."""
    tokenizer, configured, prompt_text, response_text = KINDS[name]
    prompt = tokenizer.apply_chat_template([USER], add_generation_prompt=True, return_dict=False)
    whole = tokenizer.apply_chat_template([USER, ANSWER], return_dict=False)
    if prompt_text:
        assert tokenizer.decode(prompt) == prompt_text
        whole = tokenizer(prompt_text + response_text, add_special_tokens=False).input_ids
    own = loaded(tmp_path, tokenizer, configured)
    ((first, second),) = encoded(sft, tmp_path, [{"messages": [USER, ANSWER]}], *own)
    assert first == prompt and first + second == whole
    assert encoded(ppo_rlhf, tmp_path, [{"prompt": "q?"}], *own) == [[prompt]]
    row = {"prompt": [USER], "chosen": [ANSWER], "rejected": [{**ANSWER, "content": "fin"}]}
    ((chosen, rejected),) = encoded(reward_model, tmp_path, [row], *own)
    assert chosen == whole and len(rejected) == len(whole) - 1 and rejected[-1] == whole[-1]
    assert whole.count(tokenizer.bos_token_id) == ("{{ bos_token }}" in tokenizer.chat_template)
    row["prompt"] = [USER, ANSWER, USER]  # of which the first response is the template's own
    prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=False)
    assert sft.encode(tokenizer, [whole[-1]], row, "chosen")[0] == prompt


def test_ends_of_a_response(tmp_path):
    """Those of the generation config, one, a list or none, of the tokenizer, and of the template's turns: the
    first token after a turn's text, not one that opens the next turn, and no line break."""
    always_open = chat_of(TURN, "", TOOLS) + A
    for chat, eos, configured, ends in (
        (CHATML, "<eos>", None, [1, 4]),
        (CHATML, "<|im_end|>", 4, [4]),
        (CHATML, "<|im_end|>", [1, 7], [1, 4, 7]),
        (LLAMA3, "<eos>", [5], [1, 5]),
        (always_open, "<eos>", None, [1, 4]),
        (chat_of("{{ m.content }}\n\n"), "<eos>", 2, [1, 2]),
    ):
        tokenizer = byte_tokenizer(eos, chat=chat)
        tokenizer.add_tokens(["\n\n"])  # as Gemma has it
        assert loaded(tmp_path, tokenizer, configured)[1] == ends
    assert loaded(tmp_path, spm_tokenizer(chat=LLAMA2))[1] == [2]


# ---- One table: rows that are read, rows that are left out, data sets that are refused ----

SYSTEM, RESULT = {"role": "system", "content": "s"}, {"role": "tool", "content": "3"}
CALL = [{"type": "function", "function": {"name": "clock"}}]
CALLING = {"role": "assistant", "content": None, "tool_calls": CALL}
CALLED = json.dumps(CALL) + IM_END
DIALOGUE = "\n\nHuman: q\n\nAssistant: a\n\nHuman: r\n\nAssistant:"
HH = f"<|im_start|>user\n{DIALOGUE}<|im_end|>\n{A}"
TOOL = "<|im_start|>tool\n3<|im_end|>\n"
GOOD = {"prompt": "q?", "completion": "fine"}
PAIR = {"prompt": "q?", "chosen": "fine", "rejected": "bad"}
SIDES = [U + A + FINE, U + A + "bad<|im_end|>"]
BAD = {**ANSWER, "content": "bad"}


ending = lambda text: f"{DIALOGUE} {text}"
READ = [  # (stage, row, what is made of it, in text)
    (sft, GOOD, [U + A, FINE]),
    (sft, {"prompt": [USER], "completion": [ANSWER], "messages": [SYSTEM], "where": 1}, [U + A, FINE]),
    (sft, {"prompt": [USER], "completion": [USER, ANSWER]}, [U + A, FINE]),
    (sft, {"messages": [USER, ANSWER] * 2}, [f"{U}{A}{FINE}\n{U}{A}", FINE]),
    (sft, {"messages": [USER, CALLING]}, [U + A, CALLED]),
    (sft, {"messages": [USER, {"role": "assistant", "tool_calls": CALL}]}, [U + A, CALLED]),
    (sft, {"messages": [USER, CALLING, RESULT, ANSWER]}, [f"{U}{A}{CALLED}\n{TOOL}{A}", FINE]),
    (sft, {"chosen": ending("fine \n"), "rejected": "x"}, [HH, FINE]),
    (sft, {**GOOD, "completion": "\n\nAssistant: x <think>"}, [U + A, f"\n\nAssistant: x <think>{IM_END}"]),
    (sft, {**GOOD, "tools": CALL}, [f"[clock]{U}{A}", FINE]),
    (sft, {**GOOD, "tools": json.dumps(CALL)}, [f"[clock]{U}{A}", FINE]),
    (sft, {**GOOD, "tools": None, "prompt_ids": [1]}, [U + A, FINE]),
    (reward_model, PAIR, SIDES),
    (reward_model, {"prompt": [USER], "chosen": [ANSWER], "rejected": "bad", "messages": [USER]}, SIDES),
    (reward_model, {"prompt": [USER], "chosen": [USER, ANSWER], "rejected": [USER, BAD]}, SIDES),
    (reward_model, {"chosen": [USER, ANSWER], "rejected": [USER, BAD]}, SIDES),
    (
        reward_model,
        {"chosen": ending("a\n\nb"), "rejected": ending("c")},
        [HH + x + IM_END for x in ("a\n\nb", "c")],
    ),
    (ppo_rlhf, {"prompt": [USER], "completion": "x", "answer": 3}, [U + A]),
    (ppo_rlhf, {"prompt": "\n\nAssistant: x"}, ["<|im_start|>user\n\n\nAssistant: x<|im_end|>\n" + A]),
    (ppo_rlhf, {"messages": [USER]}, [U + A]),
    (ppo_rlhf, {"messages": [USER, ANSWER] * 2}, [f"{U}{A}{FINE}\n{U}{A}"]),
    (ppo_rlhf, {"messages": [USER, CALLING, RESULT]}, [f"{U}{A}{CALLED}\n{TOOL}{A}"]),
    (ppo_rlhf, {"chosen": ending("a"), "rejected": "x"}, [HH]),
]
GPT, HUMAN = {**ANSWER, "role": "gpt"}, {**USER, "role": "human"}
NULL, LONG = {"role": "assistant", "content": None}, "x" * 150
CHAT, DIALOGUES = {"messages": [USER, ANSWER]}, {"chosen": ending("a"), "rejected": ending("b")}
FIRST, NO_PROMPT = "\n\nHuman: x\n\nAssistant: a", {"chosen": "a", "rejected": "b"}
LEFT_OUT = [  # (stage, a good row, what is changed in it, each in turn, one reason for all)
    (sft, GOOD, [{"completion": x} for x in ("", None, [], 3, {"role": "user"})], "in completion"),
    (sft, GOOD, [{"prompt": x} for x in ("", None, [], 3)], "in prompt"),
    (reward_model, PAIR, [{"prompt": ""}, {"prompt": None}], "in prompt"),
    (ppo_rlhf, GOOD, [{"prompt": x} for x in ("", None, [], 3)], "in prompt"),
    (sft, GOOD, [{name: f"a {IM_END} b"} for name in GOOD], f"with {IM_END} in the text"),
    (sft, GOOD, [{name: "<|im_start|>"} for name in GOOD], "with <|im_start|> in the text"),
    (reward_model, PAIR, [{name: "<|eot_id|>"} for name in PAIR], "with <|eot_id|> in the text"),
    (ppo_rlhf, GOOD, [{"prompt": "<bos>"}, {"tools": [{"function": {"name": "<bos>"}}]}], "with <bos> in"),
    (sft, GOOD, [{"tools": "{"}], "double quotes"),
    (sft, GOOD, [{name: LONG} for name in GOOD], "longer than --max_length"),
    (reward_model, PAIR, [{name: LONG} for name in PAIR], "longer than --max_length"),
    (ppo_rlhf, GOOD, [{"prompt": LONG}], "longer than --max_prompt_length"),
    *((stage, GOOD | PAIR, [{"prompt": [SYSTEM, USER]}], "(no system role)") for stage in STAGES),
    (sft, CHAT, [{"messages": [USER, x]} for x in (GPT, USER)], "end with messages of user and assistant"),
    (sft, CHAT, [{"messages": [*x, ANSWER]} for x in ([], [HUMAN])], "end with messages of user and"),
    (sft, CHAT, [{"messages": [USER, x]} for x in ({}, "fine", {"content": "fine"})], "no role"),
    (
        sft,
        CHAT,
        [{"messages": [USER, NULL]}, {"messages": [USER, {"role": "assistant"}]}],
        "no content (text)",
    ),
    (sft, CHAT, [{"messages": [USER, {**ANSWER, "content": ""}]}], "empty response"),
    (sft, GOOD, [{"prompt": [USER, ANSWER]}], "end with messages of user and assistant"),
    (reward_model, PAIR, [{"rejected": "fine"}], "the same response twice"),
    (reward_model, PAIR, [{"rejected": None, "messages": [USER, BAD]}], "in rejected"),
    (reward_model, PAIR, [{"rejected": [GPT]}, {"chosen": [GPT]}], "user and assistant"),
    (reward_model, DIALOGUES, [{"chosen": FIRST}, {"rejected": FIRST}], "two prompts"),
    (reward_model, DIALOGUES, [NO_PROMPT], "in prompt"),
    (ppo_rlhf, CHAT, [{"messages": [x]} for x in (GPT, ANSWER)], "with a message of user or tool"),
    (ppo_rlhf, GOOD, [{"prompt": [USER, x]} for x in (GPT, ANSWER)], "with a message of user or tool"),
]
MISNAMED = [{"prompt": "q?", "chosen": "fine", "reject": "bad", "messages": [USER, BAD]}]
REFUSED = [  # (stage, rows, words of the message)
    (sft, [{"prompt": "q?", "response": "fine", "chosen": "fine"}], "completion"),
    (sft, [{"text": "fine"}], "completion"),
    (sft, [{"completion": "fine"}], "prompt"),
    (sft, [{"prompt": "q?", "messages": json.dumps([USER, ANSWER])}], "0 of 1"),
    (sft, [["q?", "fine"]], "row 1"),
    (reward_model, MISNAMED, "rejected"),
    (reward_model, [{**PAIR, "chosen": 0.5}], "chosen"),
    (ppo_rlhf, [{"question": "q?"}], "prompt"),
    (ppo_rlhf, [GOOD, {"prompt": ""}, {"prompt": IM_END}], "in prompt (first: row 2); 1 with"),
]


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    return loaded(tmp_path_factory.mktemp("own"), byte_tokenizer(IM_END, chat=CHATML, adds="<bos> $A"))


@pytest.mark.parametrize("stage, row, texts", READ)
def test_rows_that_are_read(stage, row, texts, own, tmp_path):
    """In every form that data sets have; columns that are not asked for are not looked at."""
    (example,) = encoded(stage, tmp_path, [row], *own)
    assert [own[0].decode(ids) for ids in example] == texts


@pytest.mark.parametrize("stage, good, changes, reason", LEFT_OUT)
def test_rows_that_are_left_out(stage, good, changes, reason, own, tmp_path, capsys):
    """Counted, with the reason and the first one's number; no column beside is taken in its place."""
    n = len(changes)
    limit = {"max_prompt_length" if stage is ppo_rlhf else "max_length": 110}
    alone = encoded(stage, tmp_path, [good] * n, *own, **limit)
    assert capsys.readouterr().out == f"train: {n} of {n} rows\n" and len(alone) == n
    wrong = [good | change for change in changes]
    assert encoded(stage, tmp_path, [good] * n + wrong, *own, **limit) == alone
    pattern = rf"train: {n} of {2 * n} rows; {n} .*{re.escape(reason)}.* \(first: row {n + 1}\)\n"
    assert re.fullmatch(pattern, capsys.readouterr().out)


@pytest.mark.parametrize("stage, rows, words", REFUSED)
def test_data_sets_that_are_refused(stage, rows, words, own, tmp_path, refused):
    """A column that is not there, or holds no text in its first row; most rows left out."""
    with refused(words):
        encoded(stage, tmp_path, rows, *own)


def test_a_generation_prompt_that_is_not_in_the_chat(tmp_path, refused):
    """R1 and QwQ open <think> for the model, but write chats without: nothing can be trained."""
    own = loaded(tmp_path, byte_tokenizer(chat=R1))
    for stage, row in ((sft, GOOD), (reward_model, PAIR)):
        with refused("0 of 1 rows; 1 whose chat does not begin with the prompt's tokens"):
            encoded(stage, tmp_path, [row], *own)
    open_ended = tiny_tokenizer(chat=True)  # an end that the template does not write is added
    assert sft.encode(open_ended, [1], GOOD, "completion")[1] == [*open_ended("fine\n").input_ids, 1]


def test_the_count_of_rows(capsys, refused):
    """By reason, in the order in which they appear; the rest in the order of the file. Half is enough."""

    def encode_row(number):
        if number in (7, 11, 1500):
            raise ValueError("odd" if number == 11 else "too long")
        return -number

    kept = sft.encode_rows(encode_row, range(2000), "test")
    assert kept == [-number for number in range(2000) if number not in (7, 11, 1500)]
    line = "test: 1,997 of 2,000 rows; 2 too long (first: row 8); 1 odd (first: row 12)\n"
    assert capsys.readouterr().out == line
    assert len(sft.encode_rows(encode_row, [7, 1, 7, 2], "test")) == 2
    with refused("test: 2 of 5 rows"):
        sft.encode_rows(encode_row, [7, 1, 7, 2, 7], "test")


# ---- Reading ----


def test_rows_as_they_stand(tmp_path):
    """Dates, nulls and separators as in the file; no other file; columns of one row alone; any name."""
    rows = [{"prompt": "2020-01-01", "answer": None, "tools": [{"default": None}], "where": 1.0, "ids": [2]}]
    rows += [{"prompt": "2020-01-02T10:20:30+02:00", "answer": "1", "row": "x"}, {"prompt": "a\u2028b"}]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (tmp_path / "train.jsonl").write_text(text + "\n", encoding="utf-8")
    (tmp_path / "other.jsonl").write_text("{")
    found = ppo_rlhf.load_rows(str(tmp_path), "train")
    assert found == rows and isinstance(found[0]["where"], float)


def test_keys_that_arrow_adds(tmp_path):
    """In tables all messages have the keys of all others, with None, which a template would list."""
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "clock"}}]}
    tools = [{"function": {"name": name, "parameters": {name: {"type": "string"}}}} for name in ("a", "b")]
    rows = [{"messages": [USER, ANSWER], "tools": tools[:1], "answer": 0}]
    rows += [{"messages": [USER, call, RESULT, ANSWER], "tools": tools[1:], "answer": None}]
    table = datasets.Dataset.from_list(rows)
    assert table[0]["tools"][0]["function"]["parameters"]["b"] is None
    table.to_parquet(tmp_path / "rows/train.parquet")
    assert sft.load_rows(str(tmp_path / "rows"), "train") == rows


# ---- --prompt_template ----

TEMPLATES = {  # as typed: (before and after the prompt)
    "Question: {prompt}\\nAnswer:": ("Question: ", "\nAnswer:"),
    "'\"{prompt}\"'\\\\": ("'\"", "\"'\\\\"),
    "{{ x }} {% y %}{prompt}}} {# z": ("{{ x }} {% y %}", "}} {# z"),
    "\n\n é\u2028{prompt}\n\n": ("\n\n é\u2028", "\n\n"),
    "{prompt}": ("", ""),
}


@pytest.mark.parametrize("template", TEMPLATES, ids=range(len(TEMPLATES)))
@pytest.mark.parametrize("adds", [None, "<bos> $A", "$A <eos>"])
@pytest.mark.parametrize("make", [byte_tokenizer, spm_tokenizer])
def test_prompt_template(template, adds, make):
    """The text as given, BOS once where the tokenizer writes it, the response after one space, EOS. Catches
    Jinja in a text, lost line breaks, an EOS that the tokenizer appends."""
    before, after = TEMPLATES[template]
    if make is spm_tokenizer:
        adds = adds and adds.replace("bos", "s").replace("eos", "/s")
    tokenizer = make(adds=adds or "$A")
    tokenizer.chat_template = sft.chat_template(template, tokenizer)
    start = tokenizer.bos_token if adds and adds.startswith("<") else ""
    for reply, written in (("fine", " fine"), (" fine", " fine"), ("\nfine ", "\nfine ")):
        row = {"prompt": "{{ q }}\n", "completion": reply}
        prompt, response = sft.encode(tokenizer, [tokenizer.eos_token_id], row, "completion")
        texts = [f"{start}{before}{{{{ q }}}}\n{after}", written + tokenizer.eos_token]
        ids = [tokenizer(text, add_special_tokens=False).input_ids for text in (texts[0], "".join(texts))]
        assert prompt == ids[0] and prompt + response == ids[1]
    chat = [{"role": role, "content": role[0]} for role in ("user", "assistant", "user")]
    text = f"{before}u{after} a{tokenizer.eos_token}{before}u{after}"
    assert tokenizer.apply_chat_template(chat, tokenize=False) == start + text
    with pytest.raises(Exception, match="no place for role system"):
        tokenizer.apply_chat_template([SYSTEM, *chat])


def test_prompt_template_in_a_run(tmp_path, capsys):
    """It replaces a chat template and is saved with the tokenizer; the old template's end is none any more.
    Without a template of either kind there is a default."""
    make_inputs(tmp_path, [GOOD] * 2)
    (tmp_path / "base/chat_template.jinja").unlink()
    save(tiny_model("gpt2", vocab_size=300), byte_tokenizer(), tmp_path / "base")
    run_stage(sft, tmp_path, tmp_path / "default")
    assert r"'Prompt: q?\nResponse:' -> ' fine<eos>'" in capsys.readouterr().out
    loaded(tmp_path, byte_tokenizer(chat=CHATML, adds="<bos> $A"), [1, 7])
    run_stage(sft, tmp_path, tmp_path / "out", prompt_template="Question: {prompt}\\nAnswer:")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.apply_chat_template([USER], tokenize=False) == "<bos>Question: q?\nAnswer:"
    assert transformers.GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id == [1, 7]
