"""Random texts and random blocks of source distributions for property tests."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from fusion_core.blocks import Block
from fusion_core.vocabulary import Encoding, Vocabulary
from tests.fakes.tokenizers import CORPUS, SPECIAL

AWKWARD = [
    " ", "  ", "    ", "\t", "\t\t", "\r\n", "\n", "\n\n\n", "\x00", "\u2581", "\ufeff", "\u00a0", "\u3000",
    "\u0301", "e\u0301", "👩‍👩‍👧", "👍🏽", "🇩🇪", "日本語", "مرحبا", "שלום", "ﬁ²½", "<table>", "<0x41>", "Ġ", "Ċ",
    *SPECIAL, "the", " the", "thing", " other", "def ", "12", "'ll", ".", ",",
]  # fmt: skip
"""Stumbling blocks of tokenizers: spaces of all kinds, bytes of NUL, joiners, marks, names of control tokens."""

corpus_pieces = st.builds(
    lambda line, a, b: line[min(a, b) : max(a, b)], st.sampled_from(CORPUS), *[st.integers(0, 60)] * 2
)


LOSSY_TO_SOME = ("\u2581", "<0x41>")
"""SentencePiece-style tokenizers read the first as a space, Unigram ones with byte tokens the second as one byte."""


def texts(max_pieces: int = 8, lossless: bool = False) -> st.SearchStrategy[bytes]:
    """UTF-8 texts in many scripts; `lossless` leaves out what some of the families rewrite."""
    random_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)
    piece = st.one_of(st.sampled_from(AWKWARD), corpus_pieces, random_text)
    joined = st.lists(piece, max_size=max_pieces).map("".join)
    if lossless:
        joined = joined.filter(lambda text: not any(part in text for part in LOSSY_TO_SOME))
    return joined.map(str.encode)


def full_rows(vocabulary: Vocabulary, encoding: Encoding, seed: int, width: int | None = None) -> np.ndarray:
    """float64 [T, V] probabilities, peaked at a few ids and at the realised token, zero nowhere."""
    rng = np.random.default_rng(seed)
    rows = np.exp(rng.normal(0, 3, size=(encoding.num_tokens, width or vocabulary.size)))
    realised = np.arange(encoding.num_tokens), encoding.token_ids_T
    rows[realised] += rng.random(encoding.num_tokens) * rows.sum(axis=1)
    # Tokens that share a beginning with the realised one matter most where token boundaries differ.
    for t, token in enumerate(encoding.token_ids_T):
        low, high = vocabulary.byte_table.prefix_range(vocabulary.token_bytes(int(token))[:1])
        rows[t, vocabulary.byte_table.sorted_ids_V[low:high]] *= 20
    return rows / rows.sum(axis=1, keepdims=True)


def block_of(vocabulary: Vocabulary, text: bytes, encoding: Encoding, probs_TV: np.ndarray, k: int) -> Block:
    """The block that a source with these distributions would send."""
    top_TK = np.argsort(-probs_TV, axis=1, kind="stable")[:, :k].astype(np.int32)
    topk_TK = np.take_along_axis(probs_TV, top_TK, axis=1)
    with np.errstate(divide="ignore"):
        tail_T = np.log(np.maximum(0.0, 1.0 - topk_TK.sum(axis=1)) if k < probs_TV.shape[1] else np.zeros(len(top_TK)))
    block = Block(
        text_bytes=text,
        token_ids_T=encoding.token_ids_T,
        byte_ends_T=encoding.byte_ends_T,
        topk_ids_TK=top_TK,
        topk_logprobs_TK=np.log(topk_TK).astype(np.float32),
        tail_T=tail_T.astype(np.float32),
        gold_T=np.log(probs_TV[np.arange(encoding.num_tokens), encoding.token_ids_T]).astype(np.float32),
        vocabulary=vocabulary.fingerprint,
        mask_T=encoding.lossless_T,
        ends_document=encoding.ends_document,
    )
    block.validate()
    return block


def random_block(vocabulary: Vocabulary, text: bytes, seed: int, k: int, *, ends: bool = False) -> Block:
    """`ends`: with an end row."""
    encoding = vocabulary.encode(text)
    if ends:
        assert vocabulary.eos_id is not None
        encoding = encoding.with_end(vocabulary.eos_id)
    return block_of(vocabulary, text, encoding, full_rows(vocabulary, encoding, seed), k)
