"""A tiny BERT with a tokenizer of whole words, a Hugging Face folder: small enough to be trained in a test."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

WORDS = [
    "the",
    "a",
    "of",
    "in",
    "and",
    "is",
    "was",
    "lives",
    "works",
    "who",
    "where",
    "city",
    "founder",
    "river",
    "red",
    "blue",
    "anna",
    "boris",
    "carla",
    "dora",
    ".",
    ",",
    "?",
]
_SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]


def write_encoder(folder: Path, words: list[str] = WORDS, *, seed: int = 0) -> Path:
    """Write the folder of an encoder that knows `words`; return it."""
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    vocabulary = {word: number for number, word in enumerate([*_SPECIAL, *words])}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.enable_truncation(max_length=8)  # as real folders do, for a use of their own
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(vocabulary), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=64, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    return folder
