"""Rows of the store: what a block loses in them is bounded, and what is damaged is never taken for a block."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusion_core.blocks import PADDING_ID, Block
from services.base.files import Files
from services.store.rows import STEP_NATS, decode_row, encode_row
from services.store.shard import UNREADABLE, OpenShard, check_shard, write_shard
from services.wire.block import decode_block, encode_block
from services.wire.plausible import implausible
from tests.fakes.blocks import scored_block

KEY = b"0123456789abcdef"


def divergences(original: Block, decoded: Block) -> list[float]:
    """Kullback-Leibler divergence of every decoded row to the original, over candidates and tail."""
    found = []
    for row in range(original.num_tokens):
        p, q = (
            {
                int(i): float(lp)
                for i, lp in zip(block.topk_ids_TK[row], block.topk_logprobs_TK[row], strict=True)
                if i != PADDING_ID
            }
            | {PADDING_ID: float(block.tail_T[row])}
            for block in (original, decoded)
        )
        assert p.keys() == q.keys()
        mass = sum(np.exp(lp) for lp in p.values())
        terms = (np.exp(lp) / mass * (lp - np.log(mass) - q[i]) for i, lp in p.items() if lp > -80)
        found.append(float(sum(terms)))
    return found


@given(
    num_tokens=st.integers(1, 30),
    k=st.integers(1, 40),
    seed=st.integers(0, 9999),
    sharpness=st.sampled_from([0.01, 1.0, 3.0, 10.0, 40.0]),
    padded=st.booleans(),
    ends_document=st.booleans(),
    half=st.booleans(),
)
def test_round_trip_keeps_all_but_a_bounded_divergence(
    num_tokens: int, k: int, seed: int, sharpness: float, padded: bool, ends_document: bool, half: bool
) -> None:
    block = scored_block(num_tokens + 1, k, seed, sharpness=sharpness, padded=padded, ends_document=ends_document)
    if half:  # as it comes from a source
        block = decode_block(encode_block(block))
    back = decode_row(encode_row(KEY, block), 0, "v")
    for name in ("token_ids_T", "byte_ends_T", "gold_T", "mask_T"):
        np.testing.assert_array_equal(getattr(back, name), getattr(block, name))
    assert (back.text_bytes, back.vocabulary, back.k, back.ends_document) == (block.text_bytes, "v", k, ends_document)
    # Hoeffding's bound, and what float16 on the wire takes from the sum of a row.
    assert max(divergences(block, back)) <= STEP_NATS**2 / 8 + (2e-4 if half else 1e-5)
    mass_T = np.exp(back.topk_logprobs_TK.astype(np.float64)).sum(axis=1) + np.exp(back.tail_T.astype(np.float64))
    np.testing.assert_allclose(mass_T, 1.0, atol=1e-5)
    assert np.all(back.topk_logprobs_TK[:, 1:] <= back.topk_logprobs_TK[:, :-1])
    realised_TK = back.topk_ids_TK == block.token_ids_T[:, None]
    exact_TK = np.broadcast_to(block.gold_T[:, None], realised_TK.shape)
    np.testing.assert_array_equal(back.topk_logprobs_TK[realised_TK], exact_TK[realised_TK])


def test_candidates_of_no_probability_become_padding() -> None:
    block = scored_block(3, 4)
    block.topk_logprobs_TK[1, 3] = -np.inf
    block.tail_T[1] = np.log1p(-np.exp(block.topk_logprobs_TK[1, :3]).sum())
    back = decode_row(encode_row(KEY, block), 0, "v")
    assert back.topk_ids_TK[1].tolist() == [*block.topk_ids_TK[1, :3].tolist(), PADDING_ID]


@pytest.mark.parametrize("candidate", [True, False])
def test_rows_that_contradict_the_realised_token_are_refused(candidate: bool) -> None:
    block = scored_block(2, 4, sharpness=10.0)
    block.token_ids_T[1] = block.topk_ids_TK[1, 2] if candidate else 1001
    block.gold_T[1] = np.log(0.99)
    with pytest.raises(ValueError, match="gold: in row 1"):
        encode_row(KEY, block)


def test_the_same_rows_give_the_same_file(tmp_path: Path) -> None:
    files = Files(str(tmp_path))
    for name in ("a", "b"):
        write_shard(files, name, [encode_row(bytes([n]) * 16, scored_block(40, 16, n)) for n in range(9)])
    assert files.read("a.parquet") == files.read("b.parquet")


def test_rows_read_from_a_file_are_written_as_the_same_bytes(tmp_path: Path) -> None:
    files = Files(str(tmp_path))
    write_shard(files, "a", [encode_row(bytes([n]) * 16, scored_block(700, 8, n)) for n in range(8)])
    shard = OpenShard(files, "a")
    write_shard(files, "b", [shard.row(n) for n in range(shard.num_rows)])
    assert files.read("a.parquet") == files.read("b.parquet")


@given(at=st.integers(0, 10**6), bit=st.integers(0, 7), cut=st.booleans())
def test_any_damage_is_named_and_never_read_as_another_row(
    at: int, bit: int, cut: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    files = Files(str(tmp_path_factory.mktemp("shard")))
    blocks = [scored_block(6, 4, seed) for seed in range(3)]
    write_shard(files, "a", [encode_row(bytes([n]) * 16, block) for n, block in enumerate(blocks)])
    check_shard(files, "a", vocabulary="v")
    data = bytearray(files.read("a.parquet") or b"")
    at %= len(data)
    if cut:
        del data[at:]
    else:
        data[at] ^= 1 << bit
    files.write("a.parquet", bytes(data))
    with pytest.raises(ValueError, match="truncated" if cut else "corrupt"):
        check_shard(files, "a")
    try:
        rows = [OpenShard(files, "a").row(number) for number in range(3)]
        found = [decode_row(row, 0, "v") for row in rows]
    except (*UNREADABLE, IndexError):
        return
    for block, back in zip(blocks, found, strict=True):  # where nothing depends on the bit that was flipped
        np.testing.assert_array_equal(back.gold_T, block.gold_T)
        assert max(divergences(block, back)) <= STEP_NATS**2 / 8 + 1e-5


def test_a_damaged_record_is_named(tmp_path: Path) -> None:
    files = Files(str(tmp_path))
    write_shard(files, "a", [encode_row(KEY, scored_block())])
    for record, message in ((b"{}", "damaged record"), (b"\xff", "damaged record"), (None, "record is missing")):
        files.delete("a.json")
        if record is not None:
            files.write("a.json", record)
        with pytest.raises(ValueError, match=message):
            check_shard(files, "a")


@given(num_tokens=st.integers(1, 40), k=st.integers(1, 16), seed=st.integers(0, 10_000))
def test_a_realised_token_just_below_the_candidates_stays_plausible(num_tokens: int, k: int, seed: int) -> None:
    """The smallest candidate may be rounded to less than it, by half a step, and the row rescaled by as much."""
    block = scored_block(num_tokens, k, seed)
    outside_T = ~(block.topk_ids_TK == block.token_ids_T[:, None]).any(axis=1)
    block.gold_T[outside_T] = block.topk_logprobs_TK[outside_T, -1] - 1e-3
    read = decode_row(encode_row(bytes(16), block), 0, "v")
    assert implausible(block, vocabulary_size=1000, k=k) is None
    assert implausible(read, vocabulary_size=1000, k=k, rounded_nats=STEP_NATS) is None
