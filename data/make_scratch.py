"""Write data/scratch, which `python sft.py` starts from: a config, a tokenizer, its chat template.

python data/make_scratch.py [FOLDER]
"""

import sys
from pathlib import Path

from tokenizers import ByteLevelBPETokenizer
from transformers import LlamaConfig, PreTrainedTokenizerFast

DATA = Path(__file__).resolve().parent
sys.path.insert(0, str(DATA.parent))

from sft import chat_template, load_rows  # noqa: E402

TEMPLATE = "Prompt: {prompt}\nResponse:"


def main(folder):
    rows = load_rows(str(DATA / "demonstrations"), "train")
    texts = [f"{TEMPLATE.format(prompt=row['prompt'])} {row['completion']}" for row in rows]
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, vocab_size=1024, min_frequency=0, special_tokens=["<pad>", "<eos>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, pad_token="<pad>", eos_token="<eos>")
    tokenizer.chat_template = chat_template(TEMPLATE, tokenizer)
    tokenizer.save_pretrained(folder)
    # A Llama: its reward model learns in fewer passes than a GPT-2's which steps belong to a topic
    size = {"num_hidden_layers": 3, "hidden_size": 128, "intermediate_size": 336, "num_attention_heads": 4}
    ids = {"vocab_size": len(tokenizer), "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
    config = LlamaConfig(**size, **ids, max_position_embeddings=576, tie_word_embeddings=True)
    config.save_pretrained(folder)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else DATA / "scratch")
