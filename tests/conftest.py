"""What the tests share: where the scripts are, tiny models of five families, tiny tokenizers, small files.

The models have random weights so large that their predictions depend strongly on every token and position: a
shifted position id or a token seen through a mask changes log-probs in the first digit.
"""

import contextlib
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

# Before torch and datasets are imported: CPU only, offline, one thread, and no trace in the user's own cache
HOME = tempfile.mkdtemp(prefix="rlhf-tests-")
os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", CUDA_VISIBLE_DEVICES="")
os.environ.update(PYTHONDONTWRITEBYTECODE="1", OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")
os.environ.update(HF_HOME=HOME, HF_DATASETS_CACHE=f"{HOME}/datasets")
REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))
sys.dont_write_bytecode = True

import datasets  # noqa: E402
import pytest  # noqa: E402
import tokenizers  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402

datasets.disable_progress_bars()
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
torch.set_num_threads(1)

PAD, EOS = 0, 1  # of the tiny tokenizer; with pad == eos, both are EOS
NEVER = -1  # the id of an EOS that does not come
PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [3], [7, 3, 3, 9], [4, 2], [12, 13, 14, 15, 16, 17, 18], [20, 21, 22, 23]]
FAMILIES = ["gpt2", "gpt_neox", "llama", "qwen2", "qwen3"]  # absolute positions, then four kinds of RoPE


def pytest_unconfigure(config):
    shutil.rmtree(HOME, ignore_errors=True)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture
def refused(capsys):
    """A context that must end with status 2 and one line on stderr, which has these words."""

    @contextlib.contextmanager
    def check(words):
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            yield
        error = capsys.readouterr().err
        assert end.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1, error
        assert words in error, error

    return check


def tiny_config(family, width=32, positions=96, dropout=0.0, **other):
    """2 layers; grouped-query attention where the family has it."""
    common = dict(vocab_size=258, initializer_range=0.25, bos_token_id=EOS, eos_token_id=EOS)
    common |= dict(pad_token_id=PAD) | other
    if family == "gpt2":
        drop = dict(resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout)
        shape = dict(n_positions=positions, n_embd=width, n_layer=2, n_head=4)
        return transformers.GPT2Config(**common, **drop, **shape)
    common |= dict(hidden_size=width, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    common |= dict(max_position_embeddings=positions, attention_dropout=dropout)
    if family == "gpt_neox":
        return transformers.GPTNeoXConfig(**common, hidden_dropout=dropout)
    common |= dict(num_key_value_heads=2)
    if family == "qwen3":
        return transformers.Qwen3Config(**common, head_dim=8)
    return {"llama": transformers.LlamaConfig, "qwen2": transformers.Qwen2Config}[family](**common)


def tiny_model(family, seed=0, kind="CausalLM", **config):
    """A model with random weights, biases and norms included (fresh ones are 0 and 1)."""
    torch.manual_seed(seed)
    auto_class = getattr(transformers, f"AutoModelFor{kind}")
    model = auto_class.from_config(tiny_config(family, **config)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def tiny_reward_model(family, seed=1, **config):
    return tiny_model(family, seed, "SequenceClassification", num_labels=1, **config)


def tiny_tokenizer(pad_is_eos=False, chat=False):
    """Byte-level, without merges: 256 bytes, <pad> and <eos>. Any text can be written, one id a byte.
    Its chat template: "Q: {user}\\nA: {assistant}<eos>"; with `chat`, roles in brackets and no EOS."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(["<pad>", "<eos>", *alphabet])}
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[]))
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    bpe.add_special_tokens(["<pad>", "<eos>"])
    special = dict(eos_token="<eos>", pad_token="<eos>" if pad_is_eos else "<pad>")
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, **special)
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant] {% endif %}"
        if chat
        else "{% for m in messages %}{% if m['role'] == 'user' %}Q: {{ m['content'] }}\nA:"
        "{% else %} {{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
    )
    return tokenizer


def save(model, tokenizer, folder):
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def ppo_flags(folder, policy, judge, tokenizer, train, test=("x", "yz yz"), **other):
    """Write the models and prompts of a run of stage 3 to `folder` -> its flags. A judge of None is a
    rule."""
    write_jsonl(folder / "data/train.jsonl", [{"prompt": p} for p in train])
    write_jsonl(folder / "data/test.jsonl", [{"prompt": p} for p in test])
    flags = dict(sft_model_path=save(policy, tokenizer, folder / "sft"), output_dir=str(folder / "ppo"))
    flags |= dict(reward_model_path=save(judge, tokenizer, folder / "rm") if judge else "")
    return flags | dict(dataset_name=str(folder / "data")) | other


def make_inputs(folder, rows, **config):
    """What a run of any stage needs: base, rm and data."""
    save(tiny_model("gpt2", **config), tiny_tokenizer(), folder / "base")
    save(tiny_reward_model("gpt2", **config), tiny_tokenizer(), folder / "rm")
    for split in ("train", "test"):
        write_jsonl(folder / f"data/{split}.jsonl", rows)
    return folder


def run_stage(stage, inputs=".", out="out", **other):
    """main() of a script on what make_inputs made: two steps, by flags with the names of other stages too."""
    flags = {"model_name_or_path": f"{inputs}/base", "sft_model_path": f"{inputs}/base"}
    flags |= {"reward_model_path": f"{inputs}/rm", "dataset_name": f"{inputs}/data", "output_dir": str(out)}
    flags |= {"max_steps": 2, "total_episodes": 8, "batch_size": 4, "num_mini_batches": 2}
    flags |= {"per_device_train_batch_size": 2, "max_new_tokens": 4}
    known = stage.Args.__dataclass_fields__
    stage.main(stage.Args(**{name: value for name, value in flags.items() if name in known} | other))


def write_jsonl(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def read_jsonl(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def plain_logits(model, ids):
    """The yardstick: one row, no padding, mask or cache, the stock forward -> [len(ids), V]."""
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]


def copies(tensors):
    return [tensor.detach().clone() for tensor in tensors]


def listen_to(patch, name):
    """Notes what every step of an optimizer has and does -> list, which grows with the steps."""
    steps = []

    class Listening(getattr(torch.optim, name)):
        def step(self):
            parameters = [p for group in self.param_groups for p in group["params"]]
            assert {p.dtype for p in parameters} == {torch.float32}
            step = SimpleNamespace(lr=self.param_groups[0]["lr"], before=copies(parameters))
            step.gradients = copies(p.grad for p in parameters)
            super().step()
            step.after = copies(parameters)
            steps.append(step)

    patch.setattr(torch.optim, name, Listening)
    return steps


class Adam:
    """The textbook's, in float64, with weight decay as AdamW has it: betas 0.9 and 0.999."""

    def __init__(self, parameters, eps, decay=0.0):
        self.x, self.eps, self.decay = [p.double() for p in parameters], eps, decay
        self.m, self.v, self.n = [0.0] * len(self.x), [0.0] * len(self.x), 0

    def step(self, gradients, rates):
        """-> parameters after the step; `rates` has one for each."""
        self.n += 1
        for i, (g, rate) in enumerate(zip(gradients, rates, strict=True)):
            self.m[i] = 0.9 * self.m[i] + 0.1 * g.double()
            self.v[i] = 0.999 * self.v[i] + 0.001 * g.double() ** 2
            unbiased = (self.v[i] / (1 - 0.999**self.n)).sqrt()
            change = self.m[i] / (1 - 0.9**self.n) / (unbiased + self.eps)
            self.x[i] = self.x[i] * (1 - rate * self.decay) - rate * change
        return self.x


def set_parameters(parameters, values):
    with torch.no_grad():
        for parameter, value in zip(parameters, values, strict=True):
            parameter.copy_(value)
