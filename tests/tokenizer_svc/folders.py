"""Tiny model folders of every kind of tokenizer, trained where the test runs; and strings that are hard."""

import json
from pathlib import Path

import sentencepiece
from hypothesis import strategies as st
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

LINES = [
    "The quick brown fox jumps over the lazy dog. It was the best of times, it was the worst of times.",
    "Größe, naïve café, Übermut; 你好世界，這是一個測試。こんにちは世界。Привет, мир!",
    "def main():\n    print(f'hello {name}')\n\n    return 3.14 * 1234567890",
    "family 👩‍👩‍👧 flags 🇩🇪 thumbs 👍🏽 faces 😀😃 combining e\u0301 n\u0303",
] * 25
HARD_STRINGS = [
    "", " ", "   ", "\n", "\r\n", "\t\t x", " leading", "trailing ", "two  spaces   three", "a\u00a0b\u2003c",
    "👩\u200d👩\u200d👧\u200d👦", "🇩🇪🇫🇷", "👍🏽👍", "e\u0301\u0302\u0303",
    "Z\u0351\u036b\u0343A\u0334\u0335L\u0320\u0368",
    "zero\u200bwidth\u200djoin\ufeff", "你好，世界", "日本語のテキスト", "한국어", "العربية", "עברית", "ไทย",
    "\U00020000\U0002a6d6", "\x00\x01\x7f", "<0xE4><0x41>", "▁▁under", "Ġbyte level", "<|im_start|>",
    "a<|im_end|>b", "</s>", "<unk>x", "<think>why</think>", "1234567890", "1,234.5e-6",
    "print('x')\n\n\n    y\n", "a" * 300, "\ufffd\ufffd", "\U000f0000\U000ffffd", "x <", "<|im_",
]  # fmt: skip
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
ERNIE = (
    "{{ cls_token }}{% for message in messages %}"
    "{% if message.role == 'system' %}{{ message.content }}\n"
    "{% elif message.role == 'user' %}User: {{ message.content }}\nAssistant: "
    "{% else %}{{ message.content }}{{ sep_token }}{% endif %}{% endfor %}"
)

texts = st.lists(st.text(max_size=8) | st.sampled_from(HARD_STRINGS), max_size=6).map("".join)


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


def train_sentencepiece(folder: Path, **options) -> None:
    identity = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=500,
        hard_vocab_limit=False,
        byte_fallback=True,
        character_coverage=0.98,
        minloglevel=2,
        **{"model_type": "bpe", **identity, **options},
    )


def sentencepiece_folder(folder: Path, **options) -> Path:
    """Laid out as ERNIE-4.5's: sentencepiece, with control tokens behind its vocabulary."""
    folder.mkdir()
    train_sentencepiece(folder, **options)
    size = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model")).get_piece_size()
    added = ["<|end_of_sentence|>", "<|begin_of_sentence|>", "<|im_start|>", "<|im_end|>", "<think>"]
    write_json(folder / "added_tokens.json", {content: size + n for n, content in enumerate(added)})
    write_json(folder / "special_tokens_map.json", {"additional_special_tokens": added[2:4]})
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"}
    names |= {"sep_token": added[0], "cls_token": added[1]}
    write_json(
        folder / "tokenizer_config.json",
        {"tokenizer_class": "Ernie4_5_Tokenizer", "chat_template": ERNIE, **names},
    )
    return folder


def byte_level_folder(folder: Path) -> Path:
    """Laid out as Qwen's: byte-level BPE, ChatML."""
    folder.mkdir()
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(LINES, trainer)
    tokenizer.add_tokens(["<think>", "</think>", AddedToken("<mask>", lstrip=True, special=True)])
    return _save(folder, tokenizer, {"eos_token": "<|im_end|>", "chat_template": CHATML})


def llama_folder(folder: Path) -> Path:
    """Laid out as Llama's and Mixtral's tokenizer.json: BPE over ▁, bytes for what it does not know, bos."""
    folder.mkdir()
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>"]
    words = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=words, limit_alphabet=60, show_progress=False
    )
    tokenizer.train_from_iterator(LINES, trainer)
    spec = json.loads(tokenizer.to_str())
    spec["added_tokens"] = [token for token in spec["added_tokens"] if not token["content"].startswith("<0x")]
    tokenizer = Tokenizer.from_str(json.dumps(spec))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "chat_template": CHATML}
    return _save(folder, tokenizer, names)


def unigram_folder(folder: Path) -> Path:
    """A Unigram vocabulary, which holds its own special tokens among its pieces."""
    folder.mkdir()
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    special = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.UnigramTrainer(
        vocab_size=400, special_tokens=special, unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(LINES, trainer)
    return _save(folder, tokenizer, {"eos_token": "</s>", "unk_token": "<unk>", "chat_template": CHATML})


def _save(folder: Path, tokenizer: Tokenizer, config: dict) -> Path:
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **config})
    return folder


FOLDERS = {
    "sentencepiece": sentencepiece_folder,
    "byte_level": byte_level_folder,
    "llama": llama_folder,
    "unigram": unigram_folder,
}
