"""A converted model against its original: logits against the reference, ids against SentencePiece itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from services.models.internlm2.config import read_config
from services.models.internlm2.reference import reference_logits
from services.models.pretrained import load_causal_lm
from services.models.weights import quiet

_LARGEST_SHARE = 1e-4
"""Largest difference of a logit, as a share of the largest logit; float32 against float64 differs by much less."""
_TEXTS, _TOKENS = 2, 64
_PROBES = (
    "The quick brown fox jumps over the lazy dog.",
    " a  b   c     d\t\te\n\n  f\r\n\r\n",
    "def f(x):\n\n    return x + 1_000_000  # 3.14 * 1234567890\n",
    "中文的句子。日本語の文章です。한국어 नमस्ते مرحبا Привет",
    "It's l'élève; we'll SHOUT HTTPResponse camelCase 👍🏽 👩‍👩‍👧 \u00a0\u3000\u200b e\u0301 ﬁ½ \x00\x01\x7f <0x41> ▁▁",
)


@dataclass(frozen=True, slots=True)
class Verified:
    """The result of a comparison.

    Attributes:
        difference: largest difference of a logit.
        largest: the largest logit.
        tokenizer: whether ids were compared too; SentencePiece is not installed everywhere.
    """

    difference: float
    largest: float
    tokenizer: bool


def check(published: Path, llama: Path, report: Callable[[str, float], None]) -> Verified:
    """Compare the two folders of one model; raises ValueError where they differ.

    The Llama folder is loaded in float32, 4 bytes a weight; the published one is read layer by layer.
    """
    report("tokenizer", 0.9)
    compared = find_spec("sentencepiece") is not None
    if compared:
        _check_ids(published, llama)
    report("logits", 0.95)
    _, config = read_config(published)
    generator = torch.Generator().manual_seed(0)
    ids_BL = torch.randint(config.vocab_size, (_TEXTS, _TOKENS), generator=generator)
    difference, largest = logit_difference(published, llama, ids_BL)
    if not difference <= _LARGEST_SHARE * largest:
        raise ValueError(
            f"{llama}: logits differ from the reference's by up to {difference:.2g}, the largest is {largest:.2g}"
        )
    return Verified(difference, largest, compared)


@torch.no_grad()
def logit_difference(published: Path, llama: Path, ids_BL: Tensor) -> tuple[float, float]:
    """Return the largest difference between transformers' logits and the reference's, and the largest logit."""
    expected_BLV = reference_logits(published, ids_BL)
    with quiet():
        model = load_causal_lm(llama, dtype=torch.float32).eval()
    found_BLV = model(input_ids=ids_BL, use_cache=False).logits.double()
    return float((found_BLV - expected_BLV).abs().max()), float(expected_BLV.abs().max())


def _check_ids(published: Path, llama: Path) -> None:
    from sentencepiece import SentencePieceProcessor
    from tokenizers import Tokenizer

    original = SentencePieceProcessor(model_file=str(published / "tokenizer.model"))
    converted = Tokenizer.from_file(str(llama / "tokenizer.json"))
    for text in _PROBES:
        expected, found = original.encode(text), converted.encode(text, add_special_tokens=False).ids
        if found != expected:
            raise ValueError(f"{llama}: {text!r} is {found[:20]} ..., by SentencePiece it is {expected[:20]} ...")
