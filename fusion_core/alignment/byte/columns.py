"""The columns that the compiled loop of the byte projection reads and writes.

Shape legend: R rows of the source that the caller holds, S source tokens, K candidates of a row, T target tokens of
the part at hand, M entries of a target row, V source ids, U target ids, B bytes of all source ids together, N bytes of
the text.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fusion_core.arrays import Float32, Float64, Int32, Int64, UInt8

Record = Any
"""One record of a structured array: compiled code hands it on by reference and reads its fields by name."""
Records = npt.NDArray[np.void]


class SourceTables(NamedTuple):
    """The bytes of the source's ids (`ByteTable`) and the first target tokens of their remainders (`FirstTokenTable`).

    `num_first_U` counts the source ids whose target tokenisation begins with each target id.
    """

    bytes_B: UInt8
    offsets_V1: Int64
    prefix_low_B: Int32
    prefix_high_B: Int32
    rank_V: Int32
    first_token: Int32
    num_first_U: Int32


class SourceRows(NamedTuple):
    """The candidates of consecutive source rows as probabilities; the first one is row `first_row` of the window."""

    ids_RK: Int32
    probs_RK: Float32
    first_row: int


SOURCE_TOKEN = np.dtype(
    [
        ("id", np.int64),
        ("start", np.int64),
        ("end", np.int64),
        ("readable", np.bool_),
        ("tail", np.float64),
        ("gold", np.float64),
        ("log_gold", np.float64),
    ],
    align=True,
)
"""A source token and its row: the token's start and end, and whether its bytes are those of the text; the probability
outside the row's candidates, and that of the token itself, also in nats (finite)."""

TARGET_TOKEN = np.dtype(
    [
        ("id", np.int64),
        ("start", np.int64),
        ("end", np.int64),
        ("row", np.int64),
        ("last_row", np.int64),
        ("at_start", np.bool_),
        ("wanted", np.bool_),
    ],
    align=True,
)
"""A target token: its start and end, in bytes of the source's text; `row` is the last source token that starts at or
before it, `last_row` the last one that starts before its end; `at_start` is true when it holds a dummy prefix which
the source does not read; unless `wanted`, its row stays empty."""


class TextInBoth(NamedTuple):
    """The window's text and its tokens on both sides, in the source's byte positions."""

    text_N: UInt8
    sources_S: Records
    targets_T: Records


class MappedRows(NamedTuple):
    """Rows of consecutive target tokens; every row has a free place behind its entries.

    `log_mass_T` is the log of the mass of all hypotheses where the token starts, relative to the realised source tokens
    before the row at hand; `covered_T` is the mass that reached an entry before the realised token got its exact
    probability.
    """

    ids_TM: Int32
    probs_TM: Float32
    tail_T: Float64
    log_mass_T: Float64
    covered_T: Float32
