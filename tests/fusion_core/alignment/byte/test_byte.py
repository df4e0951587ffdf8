"""The byte projection against a slow oracle in plain Python, and the gates that any projection must pass."""

from __future__ import annotations

import copy
import math
import random
import threading
from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusion_core.alignment.byte.projection import ByteConfig, ByteProjection
from fusion_core.alignment.projected_rows import ProjectedRows
from fusion_core.blocks import Block
from fusion_core.vocabulary import Vocabulary
from tests.fakes.strategies import block_of, full_rows, random_block, texts
from tests.fakes.tokenizers import CORPUS, FAMILIES, LOSSLESS, description, vocabulary, wrap
from tests.fusion_core.alignment.byte.oracle import FollowOracle, Oracle

pairs = st.sampled_from([(a, b) for a in FAMILIES for b in FAMILIES])
lossless_pairs = st.sampled_from([(a, b) for a in LOSSLESS for b in LOSSLESS])
seeds = st.integers(0, 2**32 - 1)


@cache
def projection(source: str, target: str, follow: bool = True) -> ByteProjection:
    return ByteProjection(vocabulary(source), vocabulary(target), ByteConfig(follow_tokens=follow))


def entries(rows: ProjectedRows, t: int) -> dict[int, float]:
    ids, probs = rows.ids_TM[t].tolist(), rows.probs_TM[t].tolist()
    present = {i: p for i, p in zip(ids, probs, strict=True) if i >= 0}
    assert len(present) == sum(i >= 0 for i in ids), "an id appears twice in a row"
    return present


@cache
def first_tokens_of_all(source: str, target: str) -> list[int]:
    oracle = (vocabulary(source), vocabulary(target))
    return oracle[1].first_tokens([oracle[0].token_bytes(x) for x in range(oracle[0].size)]).tolist()


def assert_equals_oracle(rows: ProjectedRows, expected_rows: Any) -> None:
    for t, expected in enumerate(expected_rows):
        assert bool(rows.mask_T[t]) == (expected is not None)
        if expected is None:
            assert entries(rows, t) == {} and rows.tail_T[t] == 1.0
            continue
        out, tail, gold = expected
        found = entries(rows, t)
        for x in {*out, *found}:
            assert found.get(x, 0.0) == pytest.approx(out.get(x, 0.0), rel=2e-3, abs=2e-6)
        assert rows.tail_T[t] == pytest.approx(tail, rel=2e-3, abs=2e-6)
        assert rows.gold_T[t] == pytest.approx(gold, rel=1e-4, abs=1e-4)


@settings(max_examples=150, deadline=None)
@given(pairs, texts(max_pieces=4), seeds, st.sampled_from([1, 4, 16]))
def test_equals_the_oracle(pair: tuple[str, str], text: bytes, seed: int, k: int) -> None:
    source, target = map(vocabulary, pair)
    text = text.decode()[:40].encode()
    encoding = target.encode(text)
    if not source.encode(text).num_tokens or not encoding.num_tokens:
        return
    block = random_block(source, text, seed, k)
    last_row = Oracle(source, target, block, encoding)
    assert_equals_oracle(
        projection(*pair, follow=False).project(block, encoding), map(last_row.row, range(encoding.num_tokens))
    )
    following = FollowOracle(source, target, block, encoding)
    assert_equals_oracle(projection(*pair).project(block, encoding), following.rows(first_tokens_of_all(*pair)))


@settings(max_examples=200, deadline=None)
@given(pairs, texts(), seeds, st.sampled_from([1, 8, 64]))
def test_rows_and_tail_sum_to_one(pair: tuple[str, str], text: bytes, seed: int, k: int) -> None:
    source, target = map(vocabulary, pair)
    encoding = target.encode(text)
    if not source.encode(text).num_tokens or not encoding.num_tokens:
        return
    rows = projection(*pair).project(random_block(source, text, seed, k), encoding)
    total_T = rows.probs_TM.sum(axis=1, dtype=np.float64) + rows.tail_T
    assert np.abs(total_T - 1.0).max() <= 1e-5
    assert np.all(rows.probs_TM >= 0) and np.all(rows.tail_T >= 0) and np.all(rows.gold_T <= 0)
    assert np.all(rows.probs_TM[rows.ids_TM < 0] == 0) and rows.ids_TM.max() < target.size
    for t in np.flatnonzero(rows.mask_T):
        assert entries(rows, t)[int(encoding.token_ids_T[t])] == pytest.approx(math.exp(rows.gold_T[t]), rel=1e-5)


@settings(max_examples=200, deadline=None)
@given(lossless_pairs, texts(lossless=True), seeds, st.sampled_from([1, 8, 64, None]))
def test_nothing_leaks_the_sum_is_the_sources_own(pair: tuple[str, str], text: bytes, seed: int, k: int | None) -> None:
    source, target = map(vocabulary, pair)
    if not text:
        return
    encoding = target.encode(text)
    block = random_block(source, text, seed, k or source.size)
    rows = projection(*pair).project(block, encoding)
    own = float(block.gold_T.sum(dtype=np.float64))
    source_prefix = source.num_virtual_bytes(block.token_ids_T, block.byte_ends_T)
    if source_prefix > target.num_virtual_bytes(encoding.token_ids_T, encoding.byte_ends_T):
        # The dummy prefix that only the source reads is given, not predicted.
        own -= Oracle(source, target, block, encoding).logprob_until(1)
    assert float(rows.gold_T.sum(dtype=np.float64)) == pytest.approx(own, rel=1e-5, abs=1e-4)
    only_prefix = encoding.byte_ends_T[0] == 0 and source_prefix == 0
    assert rows.mask_T[1:].all() and (rows.mask_T[0] or only_prefix)


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(LOSSLESS), texts(lossless=True), seeds, st.sampled_from([1, 8, 64]))
def test_same_vocabulary_gives_identical_rows(family: str, text: bytes, seed: int, k: int) -> None:
    subject = vocabulary(family)
    if not text:
        return
    block = random_block(subject, text, seed, k)
    rows = projection(family, family).project(block, subject.encode(text))
    assert np.allclose(rows.gold_T, block.gold_T, atol=1e-6)
    for t in range(rows.num_tokens):
        expected = dict(zip(block.topk_ids_TK[t].tolist(), np.exp(block.topk_logprobs_TK[t]).tolist(), strict=True))
        expected[int(block.token_ids_T[t])] = math.exp(block.gold_T[t])
        found = entries(rows, t)
        assert found.keys() == expected.keys()
        assert all(found[x] == pytest.approx(p, rel=1e-4, abs=1e-7) for x, p in expected.items())


@cache
def permuted(name: str, seed: int) -> tuple[Vocabulary, list[int]]:
    """The same tokenizer with its ids shuffled, and the new id of every old one. Unigram pieces need their order."""
    described: dict[str, Any] = copy.deepcopy(description(name))
    size = vocabulary(name).size
    new_id = list(range(size))
    random.Random(seed).shuffle(new_id)
    model = described["model"]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {piece: new_id[i] for piece, i in model["vocab"].items()}
    else:
        pieces = [None] * size
        for i, piece in enumerate(model["vocab"]):
            pieces[new_id[i]] = piece
        model["vocab"], model["unk_id"] = pieces, new_id[model["unk_id"]]
    for added in described["added_tokens"]:
        added["id"] = new_id[added["id"]]
    described["added_tokens"].sort(key=lambda added: added["id"])
    return wrap(described), new_id


PERMUTABLE = ("byte_level", "llama", "metaspace", "unigram", "unigram_prefix")


@settings(max_examples=40, deadline=None)
@given(st.permutations(PERMUTABLE), st.integers(0, 1), texts(max_pieces=5), seeds)
def test_permuting_the_ids_of_either_side_changes_nothing_else(
    names: list[str], shuffle: int, text: bytes, seed: int
) -> None:
    source, target = vocabulary(names[0]), vocabulary(names[1])
    if not text:
        return
    (new_source, of_source), (new_target, of_target) = permuted(names[0], shuffle), permuted(names[1], shuffle + 7)
    block = random_block(source, text, seed, 16)
    new_of = np.array([*of_source, -1], dtype=np.int32)
    moved = Block(
        text_bytes=text,
        token_ids_T=new_of[block.token_ids_T],
        byte_ends_T=block.byte_ends_T,
        topk_ids_TK=new_of[block.topk_ids_TK],
        topk_logprobs_TK=block.topk_logprobs_TK,
        tail_T=block.tail_T,
        gold_T=block.gold_T,
        vocabulary=new_source.fingerprint,
        mask_T=block.mask_T,
    )
    encoding, new_encoding = target.encode(text), new_target.encode(text)
    assert new_encoding.token_ids_T.tolist() == [of_target[i] for i in encoding.token_ids_T]
    rows = projection(names[0], names[1]).project(block, encoding)
    moved_rows = ByteProjection(new_source, new_target).project(moved, new_encoding)
    assert np.array_equal(rows.gold_T, moved_rows.gold_T) and np.array_equal(rows.mask_T, moved_rows.mask_T)
    assert np.allclose(rows.tail_T, moved_rows.tail_T, atol=1e-6)
    for t in range(rows.num_tokens):
        expected = {of_target[x]: p for x, p in entries(rows, t).items()}
        assert expected == pytest.approx(entries(moved_rows, t), rel=1e-5, abs=1e-9)


@settings(max_examples=40, deadline=None)
@given(pairs, texts(max_pieces=4), seeds, st.integers(1, 5), st.integers(0, 7))
def test_full_rows_in_chunks_equal_top_k_of_everything(
    pair: tuple[str, str], text: bytes, seed: int, chunk: int, padding: int
) -> None:
    source, target = map(vocabulary, pair)
    source_encoding, encoding = source.encode(text), target.encode(text)
    if not source_encoding.num_tokens or not encoding.num_tokens:
        return
    probs_TV = full_rows(source, source_encoding, seed, width=source.size + padding)
    expected = projection(*pair).project(
        block_of(source, text, source_encoding, probs_TV, source.size + padding), encoding
    )
    logprobs = np.log(probs_TV).astype(np.float32)
    chunks = [logprobs[i : i + chunk] for i in range(0, len(logprobs), chunk)]
    rows = projection(*pair).project_full(text, source_encoding, chunks, encoding)
    cut = projection(*pair).project_full(text, source_encoding, chunks, encoding, max_entries=5)
    assert np.allclose(rows.gold_T, expected.gold_T, atol=1e-4) and np.array_equal(rows.mask_T, expected.mask_T)
    assert cut.ids_TM.shape[1] <= 7 and np.allclose(cut.gold_T, rows.gold_T)
    for t in range(rows.num_tokens):
        all_of, kept = entries(rows, t), entries(cut, t)
        assert all_of == pytest.approx(entries(expected, t), rel=1e-3, abs=1e-6)
        assert kept == pytest.approx({x: all_of[x] for x in kept}, rel=1e-3, abs=1e-6)
        assert sum(kept.values()) + cut.tail_T[t] == pytest.approx(1.0, abs=1e-5)
        if rows.mask_T[t]:
            assert min(len(all_of), 5) <= len(kept) <= 6
            others = [p for x, p in all_of.items() if x != encoding.token_ids_T[t]]
            dropped = [p for x, p in all_of.items() if x not in kept]
            assert not dropped or max(dropped) <= min(p for p in sorted(others)[-4:]) + 1e-6


def test_end_of_text_goes_by_role_and_other_control_tokens_to_the_tail() -> None:
    source, target = vocabulary("byte_level"), vocabulary("unigram")
    text = b"the cat"
    encoding = source.encode(text)
    probs = np.full((encoding.num_tokens, source.size), 1e-9)
    probs[:, source.eos_id], probs[:, source.bos_id], probs[:, source.pad_id] = 0.25, 0.125, 0.0625
    probs[np.arange(encoding.num_tokens), encoding.token_ids_T] = 0.5
    probs /= probs.sum(axis=1, keepdims=True)
    rows = projection("byte_level", "unigram").project(block_of(source, text, encoding, probs, 8), target.encode(text))
    row = entries(rows, 0)
    others = 1.0 - row[int(target.encode(text).token_ids_T[0])]
    assert row[target.eos_id] / others == pytest.approx(0.25 / 0.4375, abs=0.01) or row[target.eos_id] > 0.2
    assert target.bos_id not in row and target.pad_id not in row
    assert rows.tail_T[0] > 0.15


def test_known_case_with_tokens_cut_differently() -> None:
    """Source "there" against target "the": what is behind is stripped and the rest renormalised."""
    source, target = vocabulary("byte_level"), vocabulary("unigram")
    word = next(w for w in (b" there", b" other", b" thing", b" the") if len(source.encode(w).token_ids_T) == 1)
    assert source.token_bytes(int(source.encode(word).token_ids_T[0])) == word
    pieces = target.encode(word)
    block = random_block(source, word, 1, 32)
    rows = projection("byte_level", "unigram").project(block, pieces)
    assert rows.gold_T.sum() == pytest.approx(block.gold_T.sum(), abs=1e-5)
    assert_equals_oracle(
        rows, FollowOracle(source, target, block, pieces).rows(first_tokens_of_all("byte_level", "unigram"))
    )


def test_other_blocks_and_texts_are_refused() -> None:
    source, target = vocabulary("byte_level"), vocabulary("unigram")
    block = random_block(source, b"the cat", 0, 4)
    with pytest.raises(ValueError, match="fingerprint"):
        projection("unigram", "byte_level").project(block, source.encode(b"the cat"))
    with pytest.raises(ValueError, match="target: byte_ends must rise"):
        projection("byte_level", "unigram").project(block, target.encode(b"the"))
    with pytest.raises(ValueError, match="logprob_chunks"):
        projection("byte_level", "unigram").project_full(
            b"the cat", source.encode(b"the cat"), [np.zeros((1, source.size), np.float32)], target.encode(b"the cat")
        )
    empty = projection("byte_level", "unigram").project(random_block(source, b"", 0, 4), target.encode(b""))
    assert empty.num_tokens == 0 and empty.masked_share == 0.0


def test_threads_share_one_projection() -> None:
    source, target = vocabulary("llama"), vocabulary("byte_level")
    blocks = [random_block(source, line.encode(), i, 32) for i, line in enumerate(CORPUS)]
    expected = [ByteProjection(source, target).project(b, target.encode(b.text_bytes)) for b in blocks]
    shared = ByteProjection(source, target)
    found: dict[int, ProjectedRows] = {}

    def work(offset: int) -> None:
        for i in range(offset, len(blocks), 2):
            found[i] = shared.project(blocks[i], target.encode(blocks[i].text_bytes))

    threads = [threading.Thread(target=work, args=(offset,)) for offset in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, rows in enumerate(expected):
        assert np.array_equal(rows.ids_TM, found[i].ids_TM) and np.array_equal(rows.probs_TM, found[i].probs_TM)
