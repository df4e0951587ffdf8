"""Blocks on the wire: raw little-endian columns, every length checked before anything is read.

Encoding and decoding touch whole columns only; float16 is the default for the candidates' log-probabilities, and ids
take 2, 3 or 4 bytes, as many as the block's largest id needs.
"""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import numpy.typing as npt

from fusion.v1 import block_pb2
from fusion_core.arrays import Bool, Float32, Int32
from fusion_core.blocks import PADDING_ID, Block, SourceShare
from services.base.errors import InvalidArgumentError

_DTYPES: dict[int, np.dtype[np.floating]] = {
    block_pb2.LOGPROB_DTYPE_FLOAT16: np.dtype("<f2"),
    block_pb2.LOGPROB_DTYPE_FLOAT32: np.dtype("<f4"),
}
_ID_BYTES: dict[int, int] = {
    block_pb2.ID_DTYPE_UINT16: 2,
    block_pb2.ID_DTYPE_UINT24: 3,
    block_pb2.ID_DTYPE_UINT32: 4,
}
_BESIDE_ROWS_BYTES = 16_384
"""Bytes that fingerprint, document name and shares of a block may take."""
_INT32 = np.dtype("<i4")
_FLOAT32 = np.dtype("<f4")
_UINT8 = np.dtype("u1")


Scalar = TypeVar("Scalar", bound=np.generic)


def check_dtype(dtype: int) -> int:
    """Return the dtype to answer in; raises InvalidArgumentError for a value that this version does not know."""
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
    """Return the message for a block."""
    dtype = check_dtype(dtype)
    id_dtype = _narrowest(block)
    return block_pb2.TokenBlock(
        text=block.text_bytes,
        vocabulary=block.vocabulary,
        num_tokens=block.num_tokens,
        k=block.k,
        dtype=block_pb2.LogprobDtype.Name(dtype),
        id_dtype=block_pb2.IdDtype.Name(id_dtype),
        token_ids=_pack_ids(block.token_ids_T, id_dtype),
        byte_ends=block.byte_ends_T.astype(_INT32).tobytes(),
        topk_ids=_pack_ids(block.topk_ids_TK, id_dtype),
        topk_logprobs=_narrow(block.topk_logprobs_TK, _DTYPES[dtype]),
        tail=block.tail_T.astype(_FLOAT32).tobytes(),
        gold=block.gold_T.astype(_FLOAT32).tobytes(),
        mask=b"" if block.mask_T.all() else block.mask_T.astype(_UINT8).tobytes(),
        shares=[
            block_pb2.SourceShare(
                name=share.name, present=share.present, weight=share.weight, nats_per_byte=share.nats_per_byte
            )
            for share in block.shares
        ],
        covered_mass=block.covered_mass,
        window=window,
        ends_document=block.ends_document,
        context_ids=_pack_ids(block.context_ids_C, id_dtype),
        first_id=block.first_id,
    )


def most_block_bytes(num_text_bytes: int, num_tokens: int, k: int, dtype: int, *, num_context_tokens: int = 0) -> int:
    """Return the most bytes that the message for a block can take, whatever its ids.

    `k` is the number of candidates a row, `dtype` their encoding as `check_dtype` returns it, `num_context_tokens` the
    number of tokens before the rows.
    """
    ids, ends_tail_gold, mask = 4, 12, 1
    bytes_per_row = ids + ends_tail_gold + mask + k * (ids + _DTYPES[dtype].itemsize)
    return _BESIDE_ROWS_BYTES + num_text_bytes + num_context_tokens * ids + num_tokens * bytes_per_row


def decode_block(message: block_pb2.TokenBlock) -> Block:
    """Return the block in a message; raises InvalidArgumentError naming the column that is wrong."""
    dtype = _DTYPES.get(message.dtype)
    if dtype is None:
        raise InvalidArgumentError(f"dtype: {message.dtype} is not known; this client is older than the service")
    if message.id_dtype not in _ID_BYTES:
        raise InvalidArgumentError(f"id_dtype: {message.id_dtype} is not known; this client is older than the service")
    num_tokens, k = message.num_tokens, message.k
    try:
        message.text.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidArgumentError(f"text: not UTF-8 at byte {error.start}") from error
    block = Block(
        text_bytes=message.text,
        token_ids_T=_unpack_ids(message.token_ids, "token_ids", message.id_dtype, num_tokens),
        byte_ends_T=_column(message.byte_ends, "byte_ends", _INT32, num_tokens).astype(np.int32),
        topk_ids_TK=_unpack_ids(message.topk_ids, "topk_ids", message.id_dtype, num_tokens * k).reshape(num_tokens, k),
        topk_logprobs_TK=_column(message.topk_logprobs, "topk_logprobs", dtype, num_tokens * k)
        .astype(np.float32)
        .reshape(num_tokens, k),
        tail_T=_column(message.tail, "tail", _FLOAT32, num_tokens).astype(np.float32),
        gold_T=_column(message.gold, "gold", _FLOAT32, num_tokens).astype(np.float32),
        vocabulary=message.vocabulary,
        mask_T=_mask(message.mask, num_tokens),
        shares=tuple(
            SourceShare(share.name, share.present, share.weight, share.nats_per_byte) for share in message.shares
        ),
        covered_mass=message.covered_mass,
        ends_document=message.ends_document,
        context_ids_C=_context(message),
        first_id=message.first_id if message.HasField("first_id") else None,
    )
    try:
        block.validate()
    except ValueError as error:
        raise InvalidArgumentError(str(error)) from error
    return block


def _narrow(logprobs_TK: Float32, dtype: np.dtype[np.floating]) -> bytes:
    with np.errstate(over="ignore"):  # float16 has no number below -65504: such log-probabilities travel as -inf
        return logprobs_TK.astype(dtype).tobytes()


def _narrowest(block: Block) -> int:
    """Return the narrowest encoding whose padding value is above every id of the block."""
    largest = max(ids.max(initial=0) for ids in (block.topk_ids_TK, block.token_ids_T, block.context_ids_C))
    return next(id_dtype for id_dtype, num_bytes in _ID_BYTES.items() if largest < 256**num_bytes - 1)


def _pack_ids(ids: Int32, id_dtype: int) -> bytes:
    """Return the low bytes of every id: those of -1 (padding) are all ones."""
    if id_dtype == block_pb2.ID_DTYPE_UINT16:
        return ids.astype("<u2").tobytes()
    if id_dtype == block_pb2.ID_DTYPE_UINT32:
        return ids.astype(_INT32).tobytes()
    packed = np.empty(3 * ids.size, dtype=_UINT8)
    flat = ids.reshape(-1)
    np.ndarray((ids.size,), dtype="<u2", buffer=packed, strides=(3,))[:] = flat & 0xFFFF
    packed[2::3] = (flat >> 16) & 0xFF
    return packed.tobytes()


def _unpack_ids(data: bytes, name: str, id_dtype: int, length: int) -> Int32:
    num_bytes = _ID_BYTES[id_dtype]
    _column(data, name, np.dtype((_UINT8, num_bytes)), length)
    # Four bytes are read for every id, and those of the next id masked out.
    overlapping = np.ndarray((length,), dtype="<u4", buffer=data + bytes(4 - num_bytes), strides=(num_bytes,))
    largest = 256**num_bytes - 1
    ids = (overlapping & np.uint32(largest)).view(np.int32)
    ids[ids == np.uint32(largest).view(np.int32)] = PADDING_ID
    return ids


def _context(message: block_pb2.TokenBlock) -> Int32:
    num_ids, rest = divmod(len(message.context_ids), _ID_BYTES[message.id_dtype])
    if rest:
        raise InvalidArgumentError(
            f"context_ids: {len(message.context_ids)} bytes are no multiple of {_ID_BYTES[message.id_dtype]}, an id's"
        )
    return _unpack_ids(message.context_ids, "context_ids", message.id_dtype, num_ids)


def _mask(data: bytes, num_tokens: int) -> Bool:
    if not data:
        return np.ones(num_tokens, dtype=np.bool_)
    mask_T = _column(data, "mask", _UINT8, num_tokens)
    if mask_T.max(initial=0) > 1:
        raise InvalidArgumentError("mask: values must be 0 or 1")
    return mask_T.astype(np.bool_)


def _column(data: bytes, name: str, dtype: np.dtype[Scalar], length: int) -> npt.NDArray[Scalar]:
    if len(data) != length * dtype.itemsize:
        raise InvalidArgumentError(
            f"{name}: {len(data)} bytes where {length} entries of {dtype.itemsize} bytes are announced"
        )
    return np.frombuffer(data, dtype=dtype)
