"""Malformed blocks for the decoder: refused as bad input, or valid by an oracle that shares no code with it."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import psutil
from google.protobuf.message import DecodeError

from fusion.v1 import block_pb2
from fusion_core.blocks import Block
from services.base.errors import InvalidArgumentError
from services.wire.block import decode_block, encode_block
from tests.fakes.blocks import scored_block
from tests.fuzz.mutation import EDGES_32, junk, mutated

_COLUMNS = ("text", "token_ids", "byte_ends", "topk_ids", "topk_logprobs", "tail", "gold", "mask")
_FLOATS = (math.nan, math.inf, -math.inf, 0.0, 1e-3, 0.1, -1e30, 3e38)


def fuzz_decoder(cases: int, seed: int) -> tuple[Counter[str], list[str]]:
    """Counts by outcome, and what must not have happened."""
    rng, counts, violations = random.Random(seed), Counter[str](), list[str]()
    valid = [
        encode_block(scored_block(n, k, seed=n, padded=n % 2 == 0, ends_document=n % 3 == 0), dtype)
        for n, k in ((1, 0), (1, 4), (4, 3), (6, 8), (32, 16))
        for dtype in (block_pb2.LOGPROB_DTYPE_FLOAT16, block_pb2.LOGPROB_DTYPE_FLOAT32)
    ]
    valid.append(block_pb2.TokenBlock(vocabulary="v", dtype="LOGPROB_DTYPE_FLOAT16", id_dtype="ID_DTYPE_UINT16"))
    resident = 0
    for case in range(cases):
        message = block_pb2.TokenBlock()
        message.CopyFrom(rng.choice(valid))
        how = rng.choice(_MUTATIONS)
        try:
            message = how(rng, message)
            decoded = decode_block(message)
        except InvalidArgumentError:
            counts["refused as INVALID_ARGUMENT"] += 1
        except DecodeError:
            counts["no protobuf message"] += 1
        except Exception as error:
            violations.append(f"decoder case {case} ({how.__name__}): {type(error).__name__}: {error}")
        else:
            counts["valid all the same"] += 1
            violations += [f"decoder case {case} ({how.__name__}): accepted, but {p}" for p in problems(decoded)]
        if case == cases // 10:
            resident = psutil.Process().memory_info().rss
    growth = psutil.Process().memory_info().rss - resident
    if growth > 64 * 2**20:
        violations.append(f"decoder: memory grew by {growth / 2**20:.0f} MiB")
    return counts, violations


def _wire(rng: random.Random, message: Any) -> Any:
    return block_pb2.TokenBlock.FromString(mutated(rng, message.SerializeToString()))


def _random_bytes(rng: random.Random, message: Any) -> Any:
    return block_pb2.TokenBlock.FromString(junk(rng))


def _columns(rng: random.Random, message: Any) -> Any:
    for name in rng.sample(_COLUMNS, rng.randint(1, 2)):
        setattr(message, name, mutated(rng, getattr(message, name)))
    return message


def _counts(rng: random.Random, message: Any) -> Any:
    for name in rng.sample(("num_tokens", "k"), rng.randint(1, 2)):
        setattr(message, name, rng.choice((*EDGES_32, getattr(message, name) + 1)))
    return message


def _enums(rng: random.Random, message: Any) -> Any:
    setattr(message, rng.choice(("dtype", "id_dtype")), rng.choice((0, 1, 2, 3, 4, 77, -1, 2**31 - 1, -(2**31))))
    return message


def _values(rng: random.Random, message: Any) -> Any:
    """The right lengths, and wrong numbers in them."""
    name = rng.choice(("byte_ends", "tail", "gold", "topk_logprobs"))
    half = name == "topk_logprobs" and message.dtype == block_pb2.LOGPROB_DTYPE_FLOAT16
    dtype = np.dtype("<i4" if name == "byte_ends" else "<f2" if half else "<f4")
    column = np.frombuffer(getattr(message, name), dtype=dtype).copy()
    edges = np.array(EDGES_32, dtype="<u4").astype("<i4") if name == "byte_ends" else np.array(_FLOATS, dtype="<f4")
    for _ in range(rng.randint(1, 4)):
        if column.size:
            with np.errstate(over="ignore"):
                column[rng.randrange(column.size)] = rng.choice(list(edges.astype(dtype)))
    setattr(message, name, column.tobytes())
    return message


def _wrapping_ends(rng: random.Random, message: Any) -> Any:
    """Offsets whose differences look like a rise where 32 bits wrap around."""
    ends = np.frombuffer(message.byte_ends, dtype="<i4").copy()
    if ends.size >= 4:
        at = rng.randint(0, ends.size - 4)
        ends[at : at + 3] = (2**31 - 1, -(2**31), rng.choice((-1, -5, 0)))
    message.byte_ends = ends.tobytes()
    return message


def _flags(rng: random.Random, message: Any) -> Any:
    message.ends_document = not message.ends_document
    message.vocabulary = rng.choice(("", message.vocabulary, "\x00" * 100))
    return message


_MUTATIONS: tuple[Callable[[random.Random, Any], Any], ...] = (
    *(_wire, _random_bytes, _columns, _counts, _enums, _values, _wrapping_ends, _flags),
)


def problems(block: Block) -> list[str]:
    """What is wrong with a block, entry by entry."""
    found = []
    num_tokens, num_bytes = len(block.token_ids_T), len(block.text_bytes)
    ends = [int(end) for end in block.byte_ends_T]
    if any(after < before for before, after in zip([0, *ends], ends, strict=False)):
        found.append("byte_ends fall")
    if (ends[-1] if ends else 0) != num_bytes:
        found.append("byte_ends do not end with the text")
    if {len(c) for c in (block.topk_ids_TK, block.topk_logprobs_TK, block.tail_T, block.gold_T, block.mask_T)} != {
        num_tokens
    }:
        found.append("columns differ in length")
    if any(int(token_id) < 0 for token_id in block.token_ids_T) or any(int(i) < -1 for i in block.topk_ids_TK.flat):
        found.append("an id is negative")
    for row in range(num_tokens):
        entries = [*map(float, block.topk_logprobs_TK[row]), float(block.tail_T[row])]
        if any(math.isnan(entry) or entry > 0.01 for entry in entries):
            found.append(f"row {row} holds what is no log-probability")
        elif abs(math.fsum(math.exp(entry) for entry in entries) - 1) > 0.02:
            found.append(f"row {row} does not sum to one")
        if math.isnan(block.gold_T[row]) or block.gold_T[row] > 0.01:
            found.append(f"gold of row {row} is no log-probability")
    return found
