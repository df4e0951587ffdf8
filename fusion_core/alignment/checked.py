"""Refuse blocks and encodings that do not fit: compiled loops read wherever an id or an offset says."""

from __future__ import annotations

import numpy as np

from fusion_core.arrays import Int32
from fusion_core.blocks import PADDING_ID, Block
from fusion_core.vocabulary import Encoding, Vocabulary

_LARGEST_PADDING = 4096
"""Most ids beyond the tokenizer's: output layers are padded to a multiple of some power of two."""
_ABOVE_ONE = 1e-2
"""Nats by which rounding on the wire may bring a log-probability above 0."""


def check_block(block: Block, source: Vocabulary) -> None:
    """Raise ValueError naming the column of the block that does not fit the vocabulary.

    Candidates may be beyond the tokenizer's ids, as far as output layers are padded; their mass goes to the tail.
    """
    if block.vocabulary != source.fingerprint:
        raise ValueError(f"vocabulary: the block's fingerprint is {block.vocabulary}, expected {source.fingerprint}")
    num_tokens, ids_TK = block.token_ids_T.shape[0], block.topk_ids_TK
    if ids_TK.ndim != 2 or (num_tokens and not ids_TK.shape[1]):
        raise ValueError(f"topk_ids: expected at least one candidate a row, got the shape {ids_TK.shape}")
    columns = (
        ("token_ids", block.token_ids_T, np.int32, (num_tokens,)),
        ("byte_ends", block.byte_ends_T, np.int32, (num_tokens,)),
        ("topk_ids", ids_TK, np.int32, (num_tokens, ids_TK.shape[1])),
        ("topk_logprobs", block.topk_logprobs_TK, np.float32, (num_tokens, ids_TK.shape[1])),
        ("tail", block.tail_T, np.float32, (num_tokens,)),
        ("gold", block.gold_T, np.float32, (num_tokens,)),
        ("mask", block.mask_T, np.bool_, (num_tokens,)),
    )
    for name, column, dtype, shape in columns:
        if column.shape != shape or column.dtype != dtype:
            raise ValueError(
                f"{name}: expected the shape {shape} of {np.dtype(dtype)}, got {column.shape} of {column.dtype}"
            )
    if block.num_text_tokens < 0 or (not block.num_text_tokens and block.text_bytes):
        raise ValueError(f"token_ids: {num_tokens} rows for a text of {len(block.text_bytes)} bytes")
    _check_ids("token_ids", block.token_ids_T, 0, source.size)
    _check_ids("topk_ids", ids_TK, PADDING_ID, source.size + _LARGEST_PADDING)
    check_byte_ends("byte_ends:", block.byte_ends_T, len(block.text_bytes))
    for name, column, _, _ in columns[3:6]:
        if not column.max(initial=-np.inf) <= _ABOVE_ONE:  # NaN fails every comparison
            raise ValueError(f"{name}: expected log-probabilities up to 0, got {column.max()}")


def check_encoding(target: Encoding, vocabulary: Vocabulary, num_bytes: int) -> None:
    """Raise ValueError when `target` is no encoding of a text of this length in the vocabulary."""
    shape = target.token_ids_T.shape
    if len(shape) != 1 or target.byte_ends_T.shape != shape or target.lossless_T.shape != shape:
        raise ValueError(
            f"target: token_ids, byte_ends and lossless have the shapes {shape}, {target.byte_ends_T.shape} and "
            f"{target.lossless_T.shape}, expected one shape (T,)"
        )
    _check_ids("target: token_ids", target.token_ids_T, 0, vocabulary.size)
    check_byte_ends("target: byte_ends", target.byte_ends_T, num_bytes)


def check_byte_ends(name: str, byte_ends_T: Int32, num_bytes: int) -> None:
    """Raise ValueError unless the offsets rise from 0 to the text's length."""
    last = int(byte_ends_T[-1]) if len(byte_ends_T) else 0
    if last != num_bytes or (len(byte_ends_T) and byte_ends_T[0] < 0) or (byte_ends_T[1:] < byte_ends_T[:-1]).any():
        raise ValueError(f"{name} must rise from 0 to the text's {num_bytes} bytes")


def _check_ids(name: str, ids: Int32, lowest: int, size: int) -> None:
    if ids.size and (ids.min() < lowest or ids.max() >= size):
        raise ValueError(f"{name}: expected ids from {lowest} to {size - 1}, got {ids.min()} to {ids.max()}")
