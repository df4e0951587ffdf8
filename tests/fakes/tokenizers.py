"""Small tokenizers of the three families, trained in a moment on a few lines in many scripts.

Each is a `tokenizers.Tokenizer`; `vocabulary(name)` wraps one without importing transformers. Names:
    byte_level, byte_level_prefix       byte-level BPE, without and with a space put in front of a text
    llama3                              byte-level BPE as in Llama 3: own pattern, whole words looked up before merging,
                                        control tokens and added tokens outside the model's table
    qwen                                the same as in Qwen 2: text rewritten by NFC, which loses things
    gemma, llama, metaspace             SentencePiece-style BPE with byte fallback: no dummy prefix; one put in by the
                                        normalizer; one put in by the pre-tokenizer
    unigram, unigram_prefix             Unigram with byte fallback, without and with dummy prefix
    unigram_nfkc                        Unigram without byte fallback, text rewritten by NFKC: loses things
"""

from __future__ import annotations

import json
from functools import cache
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from fusion_core.vocabulary import Vocabulary

LOSSLESS = ("byte_level", "byte_level_prefix", "llama3", "gemma", "llama", "metaspace", "unigram", "unigram_prefix")
"""Lossless on any text without U+2581 (which SentencePiece-style tokenizers read as a space)."""
FAMILIES = (*LOSSLESS, "qwen", "unigram_nfkc")
WITHOUT_PREFIX = {
    "byte_level_prefix": "byte_level",
    "llama": "gemma",
    "metaspace": "gemma",
    "unigram_prefix": "unigram",
}

SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>")
CORPUS = [
    "The cat sat on the mat, and the other cat sat there too; then they went to the theatre together.",
    "the theory of the thing is that there is nothing to it, other than the thin end of the wedge",
    "def add(a, b):\n    return a + b\n\n\nclass Thing(object):\n\tdef __init__(self):\n\t\tself.thing = None\r\n",
    "In 1815, 12 * 12 = 144 and 17 + 25 = 42; 3.14159 is not 22/7.   Three   spaces.  Two  spaces. ",
    "Die Würde des Menschen ist unantastbar. Ça va très bien, merci à tous les élèves où ils étaient.",
    "日本語の文章です。日本の言葉を学ぶ。中文的句子也在这里，中文很好。",
    "مرحبا بالعالم، هذا نص عربي قصير. שלום עולם, זה טקסט קצר.",
    "Привет, мир! Это короткий текст. Γειά σου Κόσμε, αυτό είναι ένα κείμενο.",
    "👩‍👩‍👧 👍🏽 🎉🎉 e\u0301 a\u0308 n\u0303 ﬁ ² ½ Å",
]


def _byte_level(add_prefix_space: bool, vocab_size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space, use_regex=True)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    return tokenizer


def _byte_level_outside(style: str, vocab_size: int) -> Tokenizer:
    pattern = (
        r"'(?:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    tokenizer = Tokenizer(models.BPE(ignore_merges=style == "llama3"))
    if style == "qwen":
        tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in ("\t\t", "<table>")])
    tokenizer.add_special_tokens(["<reserved>"])
    return tokenizer


def _byte_pieces() -> list[str]:
    return [f"<0x{byte:02X}>" for byte in range(256)]


def _space_normalizer(dummy_prefix: bool) -> normalizers.Normalizer:
    replace = normalizers.Replace(" ", "\u2581")
    return normalizers.Sequence([normalizers.Prepend("\u2581"), replace]) if dummy_prefix else replace


def _decoder() -> decoders.Decoder:
    return decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])


def _bpe_model(vocab_size: int, normalizer: normalizers.Normalizer | None = None) -> dict[str, Any]:
    """The `model` of a BPE over the corpus with spaces as U+2581: pieces in `vocab`, earliest first, and `merges`."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    if normalizer is not None:
        trained.normalizer = normalizer
    trained.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=vocab_size, show_progress=False))
    model: dict[str, Any] = json.loads(trained.to_str())["model"]
    return model


def _sentencepiece_bpe(style: str, vocab_size: int) -> Tokenizer:
    model = _bpe_model(vocab_size - 260)
    pieces = [*SPECIAL, *_byte_pieces(), *sorted(model["vocab"], key=model["vocab"].get)]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={piece: index for index, piece in enumerate(dict.fromkeys(pieces))},
            merges=[tuple(merge) for merge in model["merges"]],
            byte_fallback=True,
            unk_token="<unk>",
            fuse_unk=True,
        )
    )
    if style == "metaspace":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    else:
        tokenizer.normalizer = _space_normalizer(style == "llama")
    tokenizer.decoder = _decoder()
    tokenizer.add_special_tokens(list(SPECIAL))
    if style == "gemma":  # runs of newlines and markup are added tokens that are not control tokens
        tokenizer.add_tokens([AddedToken(t, normalized=False) for t in ("\n\n", "\n\n\n", "<table>", "\t\t")])
    return tokenizer


def _unigram(dummy_prefix: bool, byte_fallback: bool, vocab_size: int) -> Tokenizer:
    # Training a Unigram gives other scores in every process; pieces of a BPE, the earlier the likelier, do not change.
    model = _bpe_model(vocab_size - 260, None if byte_fallback else normalizers.NFKC())
    pieces = [(piece, -4.0 - index / 100) for piece, index in sorted(model["vocab"].items(), key=lambda item: item[1])]
    lowest = pieces[-1][1]
    front = [(piece, 0.0) for piece in SPECIAL]
    front += [(piece, lowest - 1.0) for piece in _byte_pieces()] if byte_fallback else []
    vocab = front + [(piece, score) for piece, score in pieces if piece not in dict(front)]
    tokenizer = Tokenizer(models.Unigram(vocab, unk_id=SPECIAL.index("<unk>"), byte_fallback=byte_fallback))
    if byte_fallback:
        tokenizer.normalizer = _space_normalizer(dummy_prefix)
        tokenizer.decoder = _decoder()
    else:
        tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
        tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(list(SPECIAL))
    return tokenizer


@cache
def train(name: str, vocab_size: int) -> Tokenizer:
    """A tokenizer of the named kind: always the same."""
    if name in ("byte_level", "byte_level_prefix"):
        return _byte_level(name == "byte_level_prefix", vocab_size)
    if name in ("llama3", "qwen"):
        return _byte_level_outside(name, vocab_size)
    if name in ("gemma", "llama", "metaspace"):
        return _sentencepiece_bpe(name, vocab_size)
    return _unigram(name == "unigram_prefix", name != "unigram_nfkc", vocab_size)


def description(name: str, vocab_size: int = 640) -> dict[str, Any]:
    """The content of its `tokenizer.json`, a fresh copy."""
    parsed: dict[str, Any] = json.loads(train(name, vocab_size).to_str())
    return parsed


@cache
def vocabulary(name: str, vocab_size: int = 640) -> Vocabulary:
    """The vocabulary of a tokenizer, with the roles of its special tokens."""
    return wrap(description(name, vocab_size))


def wrap(described: dict[str, Any]) -> Vocabulary:
    """The vocabulary of a `tokenizer.json` content whose special tokens have the names of `SPECIAL`."""
    id_of = {added["content"]: added["id"] for added in described["added_tokens"]}
    roles = {"bos": id_of["<bos>"], "eos": id_of["<eos>"], "pad": id_of["<pad>"]}
    return Vocabulary(described, roles, frozenset(id_of[piece] for piece in SPECIAL))
