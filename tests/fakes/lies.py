"""What a source may send instead of its block: columns that a careless reader believes."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from google.protobuf.message import DecodeError

from fusion.v1 import block_pb2
from tests.fuzz.mutation import mutated

Lie = Callable[[block_pb2.TokenBlock], block_pb2.TokenBlock]
FAR_BEYOND = 16_000_000


def _ids(block: block_pb2.TokenBlock, data: bytes) -> npt.NDArray[np.int64]:
    size = {block_pb2.ID_DTYPE_UINT16: 2, block_pb2.ID_DTYPE_UINT24: 3, block_pb2.ID_DTYPE_UINT32: 4}[block.id_dtype]
    padded = np.zeros((len(data) // size, 4), np.uint8)
    padded[:, :size] = np.frombuffer(data, np.uint8).reshape(-1, size)
    return padded.view("<u4").reshape(-1).astype(np.int64)


def _with_ids(block: block_pb2.TokenBlock, change: Callable[[npt.NDArray[np.int64]], None]) -> block_pb2.TokenBlock:
    """The block with its candidates' ids changed, all ids in four bytes."""
    tokens, candidates = _ids(block, block.token_ids), _ids(block, block.topk_ids)
    change(candidates)
    block.id_dtype = block_pb2.ID_DTYPE_UINT32
    block.token_ids, block.topk_ids = tokens.astype("<u4").tobytes(), candidates.astype("<u4").tobytes()
    return block


def _logprobs(block: block_pb2.TokenBlock) -> npt.NDArray[np.floating]:
    dtype = "<f2" if block.dtype == block_pb2.LOGPROB_DTYPE_FLOAT16 else "<f4"
    return np.frombuffer(block.topk_logprobs, dtype).reshape(block.num_tokens, block.k).copy()


def nan(block: block_pb2.TokenBlock) -> block_pb2.TokenBlock:
    logprobs_TK = _logprobs(block)
    logprobs_TK[0, 0] = np.nan
    block.topk_logprobs = logprobs_TK.tobytes()
    return block


def unsorted(block: block_pb2.TokenBlock) -> block_pb2.TokenBlock:
    block.topk_logprobs = np.ascontiguousarray(_logprobs(block)[:, ::-1]).tobytes()
    return block


def excess(block: block_pb2.TokenBlock) -> block_pb2.TokenBlock:
    logprobs_TK = _logprobs(block)
    logprobs_TK[:, :2] = np.log(0.9)
    block.topk_logprobs = logprobs_TK.tobytes()
    return block


def id_beyond(block: block_pb2.TokenBlock) -> block_pb2.TokenBlock:
    """Above vocabularies of up to 500 ids."""

    def change(ids: npt.NDArray[np.int64]) -> None:
        ids[0] = 500

    return _with_ids(block, change)


def id_far_beyond(block: block_pb2.TokenBlock) -> block_pb2.TokenBlock:
    def change(ids: npt.NDArray[np.int64]) -> None:
        ids[:] = FAR_BEYOND + np.arange(ids.size)

    return _with_ids(block, change)


def no_candidates(block: block_pb2.TokenBlock) -> block_pb2.TokenBlock:
    block.k, block.topk_ids, block.topk_logprobs = 0, b"", b""
    block.tail = np.zeros(block.num_tokens, "<f4").tobytes()
    return block


def fewer_candidates(block: block_pb2.TokenBlock) -> block_pb2.TokenBlock:
    """One less than was asked for, its mass in the tail: a sound block in itself."""
    logprobs_TK = _logprobs(block)[:, :-1]
    ids_TK = _ids(block, block.topk_ids).reshape(block.num_tokens, block.k)[:, :-1]
    block.token_ids = _ids(block, block.token_ids).astype("<u4").tobytes()
    block.id_dtype = block_pb2.ID_DTYPE_UINT32
    block.topk_ids = np.ascontiguousarray(ids_TK).astype("<u4").tobytes()
    block.topk_logprobs, block.k = np.ascontiguousarray(logprobs_TK).tobytes(), block.k - 1
    tail_T = np.log1p(-np.exp(logprobs_TK.astype(np.float64)).sum(axis=1))
    block.tail = tail_T.astype("<f4").tobytes()
    return block


def short_column(block: block_pb2.TokenBlock) -> block_pb2.TokenBlock:
    block.gold = block.gold[:-4]
    return block


def other_vocabulary(block: block_pb2.TokenBlock) -> block_pb2.TokenBlock:
    block.vocabulary = "0123456789abcdef"
    return block


def ends_beyond(block: block_pb2.TokenBlock) -> block_pb2.TokenBlock:
    ends_T = np.frombuffer(block.byte_ends, "<i4").copy()
    ends_T[0] = 2**31 - 1
    block.byte_ends = ends_T.tobytes()
    return block


LIES: dict[str, tuple[Lie, str]] = {
    "nan": (nan, "NaN"),
    "unsorted": (unsorted, "falling"),
    "excess": (excess, "sum"),
    "id beyond": (id_beyond, "beyond the vocabulary"),
    "id far beyond": (id_far_beyond, "beyond the vocabulary"),
    "no candidates": (no_candidates, "0 candidates instead of"),
    "fewer candidates": (fewer_candidates, "candidates instead of"),
    "short column": (short_column, "gold"),
    "other vocabulary": (other_vocabulary, "answered in vocabulary"),
    "ends beyond": (ends_beyond, "byte_ends"),
}
"""Each lie, and a piece of what must be said about it."""


def mutation(rng: random.Random) -> Lie:
    """A lie that changes some bytes of a block, in such a way that it is still a message."""

    def lie(block: block_pb2.TokenBlock) -> block_pb2.TokenBlock:
        while True:
            try:
                return block_pb2.TokenBlock.FromString(mutated(rng, block.SerializeToString()))
            except DecodeError:
                continue

    return lie
