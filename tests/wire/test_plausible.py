"""Rows of a working model pass, whatever the model; rows that no working model gives do not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusion.v1 import block_pb2
from fusion_core.blocks import PADDING_ID, Block
from services.wire.block import decode_block, encode_block
from services.wire.plausible import implausible
from tests.fakes.blocks import scored_block

VOCABULARY_SIZE = 1000


def look(block: Block, k: int | None = None) -> str | None:
    return implausible(block, vocabulary_size=VOCABULARY_SIZE, k=block.k if k is None else k)


@given(
    num_tokens=st.integers(2, 30),
    k=st.integers(1, 40),
    seed=st.integers(0, 999),
    sharpness=st.sampled_from([0.3, 1.0, 5.0, 30.0, 1000.0, 20_000.0]),
    padded=st.booleans(),
    half=st.booleans(),
)
def test_what_a_softmax_gives_passes(
    num_tokens: int, k: int, seed: int, sharpness: float, padded: bool, half: bool
) -> None:
    """Before and after the wire: float16 rounds, and turns the smallest candidates into -inf."""
    block = scored_block(num_tokens, k, seed, sharpness=sharpness, padded=padded)
    assert look(block) is None
    dtype = block_pb2.LOGPROB_DTYPE_FLOAT16 if half else block_pb2.LOGPROB_DTYPE_FLOAT32
    assert look(decode_block(encode_block(block, dtype))) is None


def sound() -> Block:
    block = scored_block(6, 8, seed=1)
    block.token_ids_T[2] = block.topk_ids_TK[2, 5]
    block.gold_T[2] = block.topk_logprobs_TK[2, 5]
    assert look(block) is None
    return block


def swap(block: Block) -> None:
    block.topk_logprobs_TK[3, 4:6] = block.topk_logprobs_TK[3, 5:3:-1].copy()


def swap_beside_padding(block: Block) -> None:
    block.topk_ids_TK[3, 5], block.topk_logprobs_TK[3, 5] = PADDING_ID, -np.inf
    block.topk_logprobs_TK[3, 6] = block.topk_logprobs_TK[3, 4] + 1e-3


def repeat(block: Block) -> None:
    block.topk_ids_TK[3, 7] = block.topk_ids_TK[3, 0]


def pad_with_mass(block: Block) -> None:
    block.topk_ids_TK[3, 7] = PADDING_ID


def empty_row(block: Block) -> None:
    block.topk_ids_TK[3], block.topk_logprobs_TK[3] = PADDING_ID, -np.inf


def excess(block: Block) -> None:
    block.topk_logprobs_TK[3, :2] = np.log(0.6)


def other_gold(block: Block) -> None:
    block.gold_T[2] -= 0.1


def likelier_than_the_best(block: Block) -> None:
    block.token_ids_T[3] = next(n for n in range(VOCABULARY_SIZE) if n not in block.topk_ids_TK[3])
    block.gold_T[3] = block.topk_logprobs_TK[3, 0]


def uniform(block: Block) -> None:
    block.topk_logprobs_TK[:] = block.gold_T[:] = -np.log(VOCABULARY_SIZE)


def beyond(column: str) -> Callable[[Block], None]:
    def change(block: Block) -> None:
        getattr(block, column)[3:4] = VOCABULARY_SIZE

    return change


def value_in(column: str, value: float) -> Callable[[Block], None]:
    def change(block: Block) -> None:
        getattr(block, column)[3] = value

    return change


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (beyond("topk_ids_TK"), "token id 1000 is beyond the vocabulary of 1000"),
        (beyond("token_ids_T"), "token id 1000 is beyond the vocabulary of 1000"),
        (swap, "not in order of falling probability"),
        (swap_beside_padding, "not in order of falling probability"),
        (repeat, "the same candidate twice"),
        (pad_with_mass, "padding among the candidates has probability"),
        (empty_row, "NaN or infinite"),
        (excess, "probabilities sum to 1.2"),
        (other_gold, "contradict the candidates"),
        (likelier_than_the_best, "contradict the candidates"),
        (uniform, "its weights are lost"),
        *(
            (value_in(column, value), "NaN or infinite")
            for column in ("gold_T", "topk_logprobs_TK")
            for value in (np.nan, np.inf, -np.inf)
            if not (column == "gold_T" and value == np.inf)
        ),
        (value_in("gold_T", np.inf), "more than one"),
        (value_in("gold_T", 0.1), "more than one"),
        (value_in("topk_logprobs_TK", 0.0), "probabilities sum to 8"),
    ],
)
def test_one_wrong_row_is_enough(change: Callable[[Block], None], reason: str) -> None:
    block = sound()
    change(block)
    found = look(block)
    assert found is not None
    assert reason in found


@pytest.mark.parametrize("k", [0, 7, 9])
def test_as_many_candidates_as_were_asked_for(k: int) -> None:
    assert look(sound(), k) == f"the rows have 8 candidates instead of {k}"


def test_rows_without_candidates_are_not_what_was_asked_for() -> None:
    block = sound()
    none = replace(
        block, topk_ids_TK=block.topk_ids_TK[:, :0], topk_logprobs_TK=block.topk_logprobs_TK[:, :0], tail_T=block.tail_T
    )
    assert look(none, 8) == "the rows have 0 candidates instead of 8"
