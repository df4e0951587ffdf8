"""Blocks survive the wire; whatever is not a block is refused with the column named."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusion.v1 import block_pb2
from fusion_core.blocks import PADDING_ID
from services.base.errors import InvalidArgumentError
from services.wire.block import check_dtype, decode_block, encode_block
from tests.fakes.blocks import random_block

COLUMNS = ("token_ids", "byte_ends", "topk_ids", "topk_logprobs", "tail", "gold", "mask", "context_ids")


LARGEST_IDS = {2: 2**16 - 2, 3: 2**24 - 2, 4: 2**31 - 1}
"""By the bytes that an id then takes: one more would be taken for padding or not fit."""


@given(
    num_tokens=st.integers(1, 40),
    k=st.integers(0, 20),
    seed=st.integers(0, 999),
    half=st.booleans(),
    id_bytes=st.sampled_from([2, 3, 4]),
    all_kept=st.booleans(),
    num_context=st.integers(0, 9),
)
@settings(deadline=None)
def test_round_trip(
    num_tokens: int, k: int, seed: int, half: bool, id_bytes: int, all_kept: bool, num_context: int
) -> None:
    block = random_block(num_tokens, k, seed, num_context=num_context)
    (block.context_ids_C if num_context else block.token_ids_T)[-1] = LARGEST_IDS[id_bytes]
    block.topk_ids_TK[0, : k // 2] = PADDING_ID
    if all_kept:
        block.mask_T[:] = True
    dtype = block_pb2.LOGPROB_DTYPE_FLOAT16 if half else block_pb2.LOGPROB_DTYPE_FLOAT32
    message = encode_block(block, dtype, block_pb2.WindowRef(document="d", start_byte=7, index=3))
    assert len(message.topk_ids) == id_bytes * num_tokens * k
    assert len(message.mask) == (0 if block.mask_T.all() else num_tokens)
    back = decode_block(block_pb2.TokenBlock.FromString(message.SerializeToString()))
    assert len(message.context_ids) == id_bytes * num_context
    for name in ("token_ids_T", "byte_ends_T", "topk_ids_TK", "tail_T", "gold_T", "mask_T", "context_ids_C"):
        np.testing.assert_array_equal(getattr(back, name), getattr(block, name))
    # Half precision keeps 11 significant bits.
    tolerance = 2.0**-11 if half else 0
    np.testing.assert_allclose(back.topk_logprobs_TK, block.topk_logprobs_TK, rtol=tolerance, atol=1e-7)
    assert (back.text_bytes, back.vocabulary) == (block.text_bytes, block.vocabulary)
    assert back.shares[0] == block.shares[0]
    assert back.shares[1].name == "b"
    assert back.first_id == block.first_id == (7 if num_context else None)
    assert math.isnan(back.shares[1].nats_per_byte)


def test_half_precision_keeps_impossible_candidates_impossible() -> None:
    block = random_block(1, 3)
    block.topk_logprobs_TK[0, 2] = -np.inf
    block.tail_T[0] = np.log1p(-np.exp(block.topk_logprobs_TK[0, :2]).sum())
    assert decode_block(encode_block(block)).topk_logprobs_TK[0, 2] == -np.inf


@pytest.mark.parametrize("column", COLUMNS)
@given(cut=st.integers(1, 3), longer=st.booleans())
@settings(deadline=None, max_examples=10)
def test_wrong_length_is_refused(column: str, cut: int, longer: bool) -> None:
    block = random_block(num_context=3)
    block.token_ids_T[0] = LARGEST_IDS[4]  # ids of 4 bytes: no cut leaves whole ones
    message = encode_block(block)
    data = getattr(message, column)
    setattr(message, column, data + b"x" * cut if longer else data[:-cut])
    with pytest.raises(InvalidArgumentError, match=rf"^{column}: "):
        decode_block(message)


@given(column=st.sampled_from(COLUMNS), at=st.integers(0, 10_000), value=st.integers(0, 255))
@settings(deadline=None, max_examples=300)
def test_any_flipped_byte_gives_a_block_or_a_clear_error(column: str, at: int, value: int) -> None:
    message = encode_block(random_block(num_context=3))
    data = bytearray(getattr(message, column))
    data[at % len(data)] = value
    setattr(message, column, bytes(data))
    try:
        decode_block(message).validate()
    except InvalidArgumentError as error:
        assert ":" in str(error)


@pytest.mark.parametrize(("id_bytes", "largest"), LARGEST_IDS.items())
def test_ids_take_as_many_bytes_as_the_largest_needs(id_bytes: int, largest: int) -> None:
    block = random_block(2, 3)
    block.topk_ids_TK[1, 2] = largest
    assert len(encode_block(block).topk_ids) == id_bytes * block.topk_ids_TK.size
    if id_bytes < 4:
        block.topk_ids_TK[1, 2] += 1
        assert len(encode_block(block).topk_ids) == (id_bytes + 1) * block.topk_ids_TK.size


def test_64_candidates_take_at_most_400_bytes_a_token() -> None:
    """Whatever the vocabulary: 2^24 ids are more than any tokenizer has."""
    block = random_block(512, 64)
    block.topk_ids_TK[0, 0] = 2**24 - 2
    assert encode_block(block).ByteSize() <= 400 * 512


def test_nan_is_refused() -> None:
    message = encode_block(random_block(), block_pb2.LOGPROB_DTYPE_FLOAT32)
    message.gold = np.full(message.num_tokens, np.nan, dtype="<f4").tobytes()
    with pytest.raises(InvalidArgumentError, match="gold: contains NaN"):
        decode_block(message)


@pytest.mark.parametrize(
    ("column", "data", "reason"),
    [
        ("text", b"ab\xffdefghijklmno", "text: not UTF-8 at byte 2"),
        ("mask", b"\1\1\2\0\1", "mask: values must be 0 or 1"),
    ],
)
def test_what_no_encoder_writes_is_refused(column: str, data: bytes, reason: str) -> None:
    message = encode_block(random_block())
    setattr(message, column, data)
    with pytest.raises(InvalidArgumentError, match=reason):
        decode_block(message)


def test_unknown_dtype_is_refused() -> None:
    message = encode_block(random_block())
    message.dtype = 77  # type: ignore[assignment]
    with pytest.raises(InvalidArgumentError, match=r"^dtype: 77"):
        decode_block(message)
    for unknown in (0, 77):
        message = encode_block(random_block())
        message.id_dtype = unknown  # type: ignore[assignment]
        with pytest.raises(InvalidArgumentError, match=rf"^id_dtype: {unknown}"):
            decode_block(message)
    with pytest.raises(InvalidArgumentError, match="LOGPROB_DTYPE_FLOAT16"):
        check_dtype(77)
