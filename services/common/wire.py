"""Blocks on the wire: raw little-endian columns, every length checked before anything is read.

Encoding and decoding touch whole columns only; float16 is the default for the candidates' log-probabilities.
"""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import numpy.typing as npt

from fusion.v1 import block_pb2
from fusion_core.blocks import Block, SourceShare
from services.common.errors import InvalidArgumentError

_DTYPES: dict[int, np.dtype[np.floating]] = {
    block_pb2.LOGPROB_DTYPE_FLOAT16: np.dtype("<f2"),
    block_pb2.LOGPROB_DTYPE_FLOAT32: np.dtype("<f4"),
}
_INT32 = np.dtype("<i4")
_FLOAT32 = np.dtype("<f4")
_UINT8 = np.dtype("u1")

MAX_MESSAGE_BYTES = 64 * 1024 * 1024
FRAME_BYTES = 1024 * 1024
"""Frames on a stream are filled up to this size: Serve's proxy carries only some hundred frames a second."""

Scalar = TypeVar("Scalar", bound=np.generic)


def check_dtype(dtype: int) -> int:
    """The dtype to answer in; raises InvalidArgumentError for a value that this version does not know."""
    if dtype == block_pb2.LOGPROB_DTYPE_UNSPECIFIED:
        return block_pb2.LOGPROB_DTYPE_FLOAT16
    if dtype not in _DTYPES:
        allowed = ", ".join(block_pb2.LogprobDtype.Name(value) for value in _DTYPES)
        raise InvalidArgumentError(f"dtype: {dtype} is not known; allowed are {allowed}")
    return dtype


def encode_block(
    block: Block,
    dtype: int = block_pb2.LOGPROB_DTYPE_FLOAT16,
    window: block_pb2.WindowRef | None = None,
) -> block_pb2.TokenBlock:
    """The message for a block."""
    dtype = check_dtype(dtype)
    return block_pb2.TokenBlock(
        text=block.text_bytes,
        vocabulary=block.vocabulary,
        num_tokens=block.num_tokens,
        k=block.k,
        dtype=block_pb2.LogprobDtype.Name(dtype),
        token_ids=block.token_ids_T.astype(_INT32).tobytes(),
        byte_ends=block.byte_ends_T.astype(_INT32).tobytes(),
        topk_ids=block.topk_ids_TK.astype(_INT32).tobytes(),
        topk_logprobs=_narrow(block.topk_logprobs_TK, _DTYPES[dtype]),
        tail=block.tail_T.astype(_FLOAT32).tobytes(),
        gold=block.gold_T.astype(_FLOAT32).tobytes(),
        mask=block.mask_T.astype(_UINT8).tobytes(),
        shares=[
            block_pb2.SourceShare(
                name=share.name, present=share.present, weight=share.weight, nats_per_byte=share.nats_per_byte
            )
            for share in block.shares
        ],
        covered_mass=block.covered_mass,
        window=window,
    )


def decode_block(message: block_pb2.TokenBlock) -> Block:
    """The block in a message; raises InvalidArgumentError naming the column that is wrong."""
    dtype = _DTYPES.get(message.dtype)
    if dtype is None:
        raise InvalidArgumentError(f"dtype: {message.dtype} is not known; this client is older than the service")
    num_tokens, k = message.num_tokens, message.k
    block = Block(
        text_bytes=message.text,
        token_ids_T=_column(message.token_ids, "token_ids", _INT32, num_tokens).astype(np.int32),
        byte_ends_T=_column(message.byte_ends, "byte_ends", _INT32, num_tokens).astype(np.int32),
        topk_ids_TK=_column(message.topk_ids, "topk_ids", _INT32, num_tokens * k)
        .astype(np.int32)
        .reshape(num_tokens, k),
        topk_logprobs_TK=_column(message.topk_logprobs, "topk_logprobs", dtype, num_tokens * k)
        .astype(np.float32)
        .reshape(num_tokens, k),
        tail_T=_column(message.tail, "tail", _FLOAT32, num_tokens).astype(np.float32),
        gold_T=_column(message.gold, "gold", _FLOAT32, num_tokens).astype(np.float32),
        vocabulary=message.vocabulary,
        mask_T=_column(message.mask, "mask", _UINT8, num_tokens).astype(np.bool_),
        shares=tuple(
            SourceShare(share.name, share.present, share.weight, share.nats_per_byte) for share in message.shares
        ),
        covered_mass=message.covered_mass,
    )
    try:
        block.validate()
    except ValueError as error:
        raise InvalidArgumentError(str(error)) from error
    return block


def _narrow(logprobs_TK: npt.NDArray[np.float32], dtype: np.dtype[np.floating]) -> bytes:
    with np.errstate(over="ignore"):  # below -65504 float16 has no number left, and -inf is the honest answer
        return logprobs_TK.astype(dtype).tobytes()


def _column(data: bytes, name: str, dtype: np.dtype[Scalar], length: int) -> npt.NDArray[Scalar]:
    if len(data) != length * dtype.itemsize:
        raise InvalidArgumentError(
            f"{name}: {len(data)} bytes where {length} entries of {dtype.itemsize} bytes are announced"
        )
    return np.frombuffer(data, dtype=dtype)
