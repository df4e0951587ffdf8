"""A block as one row of a Parquet table, and back: ids by falling probability, log-probabilities in steps of 1/16 nat.

Shape legend: T rows of a block, K candidates, N candidates of all rows that are there (neither padding nor impossible).

Every log-probability of a row is rounded to a multiple of `STEP_NATS`, and the row is brought back to a sum of one when
it is read. The realised token is left out of the rounding: its log-probability comes back exactly, as float32. With
errors of at most STEP/2, Hoeffding's lemma bounds the Kullback-Leibler divergence of a decoded row to the original by
STEP^2 / 8 = 0.00049 nats for every row there is; with errors spread evenly it is STEP^2 / 24 = 0.00016.

The columns compress well: steps from one candidate to the next are small numbers, and Parquet's BYTE_STREAM_SPLIT puts
the high bytes of ids together. Any Parquet reader can read the columns; see `SCHEMA`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from fusion_core.arrays import Bool, Float32, Float64, Int32, UInt16
from fusion_core.blocks import PADDING_ID, Block

STEP_NATS = 1 / 16
_NO_MASS = 2**16 - 1
"""Number of steps that stands for no mass at all; in `tail`: none outside the candidates."""
_MOST_STEPS = _NO_MASS - 1
"""Largest number of steps, 4,096 nats: smaller probabilities are rounded up, and are zero in floating point anyway."""
_MASS_TOLERANCE = 5e-3
_LEAST_RESCALED_MASS = 1e-6
"""Least mass beside the realised token that is rescaled: smaller ones are below the precision of float32."""


def _list_of(values: pa.DataType) -> pa.DataType:
    return pa.list_(pa.field("element", values, nullable=False))


SCHEMA = pa.schema(
    [
        pa.field("key", pa.binary(16), nullable=False),
        pa.field("text", pa.binary(), nullable=False),
        # Realised tokens: ids, bytes of text that they cover, log-probabilities in nats, 0 where masked.
        pa.field("token_ids", _list_of(pa.int32()), nullable=False),
        pa.field("token_bytes", _list_of(pa.int32()), nullable=False),
        pa.field("gold", _list_of(pa.float32()), nullable=False),
        pa.field("mask", _list_of(pa.bool_()), nullable=False),
        # Candidates: how many a row has, their ids by falling probability, row by row, and by how many steps each is
        # less likely than the one before it in its row (the first: than certainty).
        pa.field("num_candidates", _list_of(pa.int32()), nullable=False),
        pa.field("topk_ids", _list_of(pa.int32()), nullable=False),
        pa.field("topk_steps", _list_of(pa.uint16()), nullable=False),
        # Steps of the mass outside the candidates, without the realised token's where it is no candidate.
        pa.field("tail", _list_of(pa.uint16()), nullable=False),
        pa.field("k", pa.int32(), nullable=False),
        pa.field("ends_document", pa.bool_(), nullable=False),  # the last row is the end row
    ],
    metadata={"format": "llm-fusion scored windows 1", "step_nats": str(STEP_NATS)},
)
SPLIT_COLUMNS = ("token_ids", "gold", "topk_ids", "topk_steps", "tail")
"""The columns that compress better with Parquet's BYTE_STREAM_SPLIT."""


def encode_row(key: bytes, block: Block) -> pa.RecordBatch:
    """Return a block as a batch of one row; ValueError when a realised token's log-probability contradicts its row."""
    ids_TK, steps_TK, there_TK = _sorted(block)
    beside_T = _tail_beside_gold(block)
    columns: dict[str, Any] = {
        "key": pa.array([key], pa.binary(16)),
        "text": pa.array([block.text_bytes], pa.binary()),
        "token_ids": _list(block.token_ids_T),
        "token_bytes": _list(np.diff(block.byte_ends_T, prepend=np.int32(0))),
        "gold": _list(block.gold_T),
        "mask": _list(block.mask_T),
        "num_candidates": _list(there_TK.sum(axis=1, dtype=np.int32)),
        "topk_ids": _list(ids_TK[there_TK]),
        "topk_steps": _list(np.diff(steps_TK, axis=1, prepend=0)[there_TK].astype(np.uint16)),
        "tail": _list(_steps_of_mass(beside_T)),
        "k": pa.array([block.k], pa.int32()),
        "ends_document": pa.array([block.ends_document], pa.bool_()),
    }
    return pa.record_batch([columns[field.name] for field in SCHEMA], schema=SCHEMA)


def decode_row(table: pa.Table | pa.RecordBatch, row: int, vocabulary: str) -> Block:
    """Return the block in a row of a table or batch with `SCHEMA`; ValueError when it is damaged."""
    token_ids_T = _values(table, "token_ids", row)
    num_tokens, k = len(token_ids_T), table.column("k")[row].as_py()
    count_T = _values(table, "num_candidates", row)
    gold_T, tail_steps_T = _values(table, "gold", row), _values(table, "tail", row)
    ids_N, rises_N = _values(table, "topk_ids", row), _values(table, "topk_steps", row)
    if not num_tokens == len(count_T) == len(gold_T) == len(tail_steps_T):
        raise ValueError("columns: rows of different lengths")
    if not len(ids_N) == len(rises_N) == count_T.sum() or k < 0 or np.any((count_T < 0) | (count_T > k)):
        raise ValueError("num_candidates: other than there are candidates")
    ids_TK, steps_TK, there_TK = _padded(count_T, k, ids_N, rises_N)
    logprobs_TK, tail_T = _logprobs(ids_TK, steps_TK, there_TK, token_ids_T, gold_T, tail_steps_T)
    ids_TK, logprobs_TK = _falling(ids_TK, logprobs_TK)
    block = Block(
        text_bytes=table.column("text")[row].as_py(),
        token_ids_T=token_ids_T,
        byte_ends_T=np.cumsum(_values(table, "token_bytes", row), dtype=np.int32),
        topk_ids_TK=ids_TK,
        topk_logprobs_TK=logprobs_TK,
        tail_T=tail_T,
        gold_T=gold_T,
        vocabulary=vocabulary,
        mask_T=_values(table, "mask", row),
        ends_document=table.column("ends_document")[row].as_py(),
        covered_mass=float(1.0 - np.exp(tail_T.astype(np.float64)).mean()) if num_tokens else 0.0,
    )
    block.validate()
    return block


def row_keys(table: pa.Table | pa.RecordBatch) -> list[bytes]:
    """Return the keys of all rows of a table."""
    keys: list[bytes] = table.column("key").to_pylist()
    return keys


def concatenated(rows: Sequence[pa.RecordBatch]) -> pa.Table:
    return pa.Table.from_batches(rows, schema=SCHEMA).combine_chunks()


def _sorted(block: Block) -> tuple[Int32, Int32, Bool]:
    """Return ids, steps below certainty and the mask of real candidates, by falling probability, padding last."""
    ids_TK = block.topk_ids_TK
    there_TK = (ids_TK != PADDING_ID) & (block.topk_logprobs_TK > -np.inf)
    nats_TK = np.clip(-block.topk_logprobs_TK, 0, _MOST_STEPS * STEP_NATS)
    steps_TK = np.rint(nats_TK / np.float32(STEP_NATS)).astype(np.int32)
    steps_TK[~there_TK] = _NO_MASS
    if np.any(steps_TK[:, 1:] < steps_TK[:, :-1]):
        order_TK = np.argsort(steps_TK, axis=1, kind="stable")
        ids_TK, steps_TK, there_TK = (
            np.take_along_axis(column, order_TK, axis=1) for column in (ids_TK, steps_TK, there_TK)
        )
    return ids_TK, steps_TK, there_TK


def _tail_beside_gold(block: Block) -> Float64:
    """Return the mass outside the candidates, without the realised token's; ValueError where it is negative."""
    gold_T, tail_T = np.exp(block.gold_T.astype(np.float64)), np.exp(block.tail_T.astype(np.float64))
    realised_TK = (block.topk_ids_TK == block.token_ids_T[:, None]) & (block.topk_logprobs_TK > -np.inf)
    candidate_T = realised_TK.any(axis=1)
    as_candidate_T = np.where(realised_TK, np.exp(block.topk_logprobs_TK), 0).sum(axis=1)
    beside_T = np.where(candidate_T, tail_T, tail_T - gold_T)
    wrong_T = np.where(candidate_T, np.abs(as_candidate_T - gold_T), -beside_T) > _MASS_TOLERANCE
    if wrong_T.any():
        row = int(np.argmax(wrong_T))
        raise ValueError(f"gold: in row {row} the realised token has another probability than its row leaves for it")
    return beside_T


def _padded(count_T: Int32, k: int, ids_N: Int32, rises_N: UInt16) -> tuple[Int32, Int32, Bool]:
    """Return ids, steps and mask as `_sorted` gave them."""
    there_TK = np.arange(k) < count_T[:, None]
    if there_TK.all():
        ids_TK, rises_TK = ids_N.reshape(-1, k), rises_N.reshape(-1, k).astype(np.int32)
    else:
        ids_TK = np.full(there_TK.shape, PADDING_ID, dtype=np.int32)
        rises_TK = np.zeros(there_TK.shape, dtype=np.int32)
        ids_TK[there_TK], rises_TK[there_TK] = ids_N, rises_N
    return ids_TK, np.cumsum(rises_TK, axis=1, dtype=np.int32), there_TK


def _logprobs(
    ids_TK: Int32,
    steps_TK: Int32,
    there_TK: Bool,
    token_ids_T: Int32,
    gold_T: Float32,
    tail_steps_T: UInt16,
) -> tuple[Float32, Float32]:
    """Return log-probabilities of candidates and tail: the realised token's exact, the others rescaled beside it."""
    logprobs_TK = np.where(there_TK, steps_TK * np.float32(-STEP_NATS), np.float32(-np.inf)).astype(np.float32)
    gold_TK = (ids_TK == token_ids_T[:, None]) & there_TK
    candidate_T = gold_TK.any(axis=1)
    logprobs_TK[gold_TK] = -np.inf
    tail_T = np.where(tail_steps_T == _NO_MASS, -np.inf, tail_steps_T * -STEP_NATS)
    beside_T = np.exp(logprobs_TK).sum(axis=1, dtype=np.float64) + np.exp(tail_T)
    wanted_T = -np.expm1(np.minimum(gold_T.astype(np.float64), 0.0))
    rescaled_T = (wanted_T > _LEAST_RESCALED_MASS) & (beside_T > 0)
    shift_T = np.zeros(len(gold_T))
    shift_T[rescaled_T] = np.log(wanted_T[rescaled_T] / beside_T[rescaled_T])
    logprobs_TK += shift_T[:, None].astype(np.float32)
    logprobs_TK[gold_TK] = np.broadcast_to(gold_T[:, None], gold_TK.shape)[gold_TK]
    tail_T = np.logaddexp(tail_T + shift_T, np.where(candidate_T, -np.inf, gold_T))
    return logprobs_TK, tail_T.astype(np.float32)


def _falling(ids_TK: Int32, logprobs_TK: Float32) -> tuple[Int32, Float32]:
    """Sort the rows in which the exact log-probability of the realised token passes a rounded neighbour's."""
    rows = np.flatnonzero((logprobs_TK[:, 1:] > logprobs_TK[:, :-1]).any(axis=1))
    if rows.size:
        ids_TK = ids_TK.copy()
        order = np.argsort(-logprobs_TK[rows], axis=1, kind="stable")
        ids_TK[rows] = np.take_along_axis(ids_TK[rows], order, axis=1)
        logprobs_TK[rows] = np.take_along_axis(logprobs_TK[rows], order, axis=1)
    return ids_TK, logprobs_TK


def _steps_of_mass(mass_T: Float64) -> UInt16:
    with np.errstate(divide="ignore"):
        nats_T = -np.log(np.clip(mass_T, 0.0, 1.0))
    steps_T = np.rint(np.minimum(nats_T, _MOST_STEPS * STEP_NATS) / STEP_NATS)
    return np.where(mass_T > 0, steps_T, _NO_MASS).astype(np.uint16)


def _list(values: npt.NDArray[Any]) -> pa.ListArray:
    elements = pa.array(values)
    return pa.ListArray.from_arrays(pa.array([0, len(values)], pa.int32()), elements, type=_list_of(elements.type))


def _values(table: pa.Table | pa.RecordBatch, name: str, row: int) -> Any:
    """Return the list in a row as a copied array: a read-only one is another type to compiled loops."""
    return np.require(table.column(name)[row].values.to_numpy(zero_copy_only=False), requirements="W")
