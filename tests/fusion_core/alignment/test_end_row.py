"""The end row, from a source's block through every projection into the fused block."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from fusion_core.alignment.byte.projection import ByteConfig, ByteProjection
from fusion_core.alignment.projected_rows import ProjectedRows
from fusion_core.alignment.published.min_edit import MinEditConfig, MinEditProjection
from fusion_core.alignment.published.transport import TransportConfig, TransportProjection
from fusion_core.alignment.published.vocabulary_map import VocabularyMapConfig
from fusion_core.blocks import Block
from fusion_core.fusion import FusionConfig, fuse
from fusion_core.vocabulary import Encoding, Vocabulary
from tests.fakes.strategies import random_block, texts
from tests.fakes.tokenizers import FAMILIES, train, vocabulary

TEXT = "The other thing is there. Die Würde 日本語 12 * 12 = 144\n\tdef add(a, b):\r\n  the end".encode()
MAP = VocabularyMapConfig(cache_dir=None)
METHODS = ("byte", "last_row", "min_edit", "transport")
seeds = st.integers(0, 2**32 - 1)


@cache
def projection(method: str, source: str, target: str) -> ByteProjection | MinEditProjection | TransportProjection:
    pair = vocabulary(source), vocabulary(target)
    if method == "min_edit":
        return MinEditProjection(*pair, MinEditConfig(vocabulary_map=MAP))
    if method == "transport":
        return TransportProjection(*pair, TransportConfig(vocabulary_map=MAP))
    return ByteProjection(*pair, ByteConfig(follow_tokens=method == "byte"))


def project(method: str, source: str, target: str, block: Block, encoding: Encoding) -> ProjectedRows:
    subject = projection(method, source, target)
    if isinstance(subject, TransportProjection):
        own = random_block(subject.target, block.text_bytes, 1, 16, ends=True)
        return subject.project(block, encoding, own)
    return subject.project(block, encoding)


def ending(subject: Vocabulary, text: bytes) -> Encoding:
    assert subject.eos_id is not None
    return subject.encode(text).with_end(subject.eos_id)


def entries(rows: ProjectedRows, t: int) -> dict[int, float]:
    return {x: p for x, p in zip(rows.ids_TM[t].tolist(), rows.probs_TM[t].tolist(), strict=True) if x >= 0}


@given(st.sampled_from(FAMILIES), st.sampled_from(FAMILIES), texts(max_pieces=4), seeds, st.sampled_from([1, 4, 64]))
def test_byte_maps_the_candidates_by_their_first_token_and_eos_exactly(
    source_name: str, target_name: str, text: bytes, seed: int, k: int
) -> None:
    source, target = vocabulary(source_name), vocabulary(target_name)
    if not source.encode(text).num_tokens or not target.encode(text).num_tokens:
        return
    block = random_block(source, text, seed, k, ends=True)
    rows = project("byte", source_name, target_name, block, ending(target, text))

    known = dict(zip(block.topk_ids_TK[-1].tolist(), np.exp(block.topk_logprobs_TK[-1]).tolist(), strict=True))
    gold = math.exp(block.gold_T[-1])
    tail = math.exp(block.tail_T[-1]) - (0.0 if source.eos_id in known else gold)
    known.pop(source.eos_id, None)
    expected = {target.eos_id: gold}
    for x, p in known.items():
        first = x if source_name == target_name else int(target.first_tokens([source.token_bytes(x)])[0])
        if source.token_bytes(x) == b"" and source_name != target_name:
            first = -1
        if first < 0:
            tail += p
        else:
            expected[first] = expected.get(first, 0.0) + p
    found = entries(rows, -1)
    assert found.keys() == expected.keys()
    assert all(found[x] == pytest.approx(p, rel=1e-3, abs=1e-6) for x, p in expected.items())
    assert rows.tail_T[-1] == pytest.approx(tail, rel=1e-3, abs=1e-5)
    assert rows.gold_T[-1] == block.gold_T[-1] and rows.mask_T[-1]
    assert sum(found.values()) + rows.tail_T[-1] == pytest.approx(1.0, abs=1e-5)

    alone = project("byte", source_name, target_name, block.without_end(), target.encode(text))
    assert np.array_equal(rows.gold_T[:-1], alone.gold_T) and np.array_equal(rows.mask_T[:-1], alone.mask_T)
    assert all(entries(rows, t) == entries(alone, t) for t in range(alone.num_tokens))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["llama", "unigram"])
def test_same_vocabulary_gives_identical_rows(method: str, name: str) -> None:
    subject = vocabulary(name)
    block = random_block(subject, TEXT, 3, subject.size if method == "min_edit" else 10, ends=True)
    projected = projection(method, name, name)
    encoding = ending(subject, TEXT)
    if isinstance(projected, TransportProjection):
        rows = projected.project(block, encoding, block)
    else:
        rows = projected.project(block, encoding)
    assert rows.num_tokens == block.num_tokens
    assert np.allclose(rows.gold_T, block.gold_T, atol=1e-6)
    expected = dict(zip(block.topk_ids_TK[-1].tolist(), np.exp(block.topk_logprobs_TK[-1]).tolist(), strict=True))
    expected[int(block.token_ids_T[-1])] = math.exp(block.gold_T[-1])
    found = entries(rows, -1)
    if method == "transport":  # control tokens cannot be compared and join the tail, EOS apart
        special = subject.special_ids - {subject.eos_id}
        expected = {x: p for x, p in expected.items() if x not in special}
    assert {x for x, p in found.items() if p > 0} == set(expected)
    tolerance = 0.05 if method == "transport" else 1e-4  # what the entropic plan misses
    assert all(found[x] == pytest.approx(p, rel=tolerance, abs=1e-6) for x, p in expected.items())


@pytest.mark.parametrize("method", METHODS)
@given(text=texts(max_pieces=4), seed=seeds, k=st.sampled_from([1, 8]))
def test_rows_sum_to_one_and_eos_is_never_lost(method: str, text: bytes, seed: int, k: int) -> None:
    source, target = vocabulary("gemma"), vocabulary("byte_level")
    if not text:
        return
    block = random_block(source, text, seed, k, ends=True)
    rows = project(method, "gemma", "byte_level", block, ending(target, text))
    total_T = rows.probs_TM.sum(axis=1, dtype=np.float64) + rows.tail_T
    assert np.abs(total_T - 1.0).max() <= 1e-5
    assert rows.mask_T[-1] and rows.gold_T[-1] == pytest.approx(float(block.gold_T[-1]), abs=1e-6)
    assert target.eos_id is not None
    assert entries(rows, -1)[target.eos_id] == pytest.approx(math.exp(block.gold_T[-1]), rel=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_an_end_that_only_one_side_has(method: str) -> None:
    source, target = vocabulary("gemma"), vocabulary("unigram")
    block = random_block(source, TEXT, 5, 16, ends=True)
    both = project(method, "gemma", "unigram", block, ending(target, TEXT))
    dropped = project(method, "gemma", "unigram", block, target.encode(TEXT))
    masked = project(method, "gemma", "unigram", block.without_end(), ending(target, TEXT))
    assert dropped.num_tokens == both.num_tokens - 1 == masked.num_tokens - 1
    for rows in (dropped, masked):
        num = dropped.num_tokens
        assert np.array_equal(rows.gold_T[:num], both.gold_T[:num])
        assert all(entries(rows, t) == entries(both, t) for t in range(num))
    assert not masked.mask_T[-1] and entries(masked, -1) == {} and masked.tail_T[-1] == 1.0 and masked.gold_T[-1] == 0.0


def test_the_token_named_as_eos_ends_documents_and_the_tokenizers_own_does_not() -> None:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=train("byte_level", 640), bos_token="<bos>", eos_token="<eos>", pad_token="<pad>"
    )
    plain, other = Vocabulary.from_tokenizer(tokenizer), Vocabulary.from_tokenizer(tokenizer, eos_token="<pad>")
    assert other.eos_id == plain.pad_id and other.fingerprint != plain.fingerprint
    with pytest.raises(ValueError, match=r"eos_token: 'the' is no special token of the tokenizer; it has .*<eos>"):
        Vocabulary.from_tokenizer(tokenizer, eos_token="the")
    target = vocabulary("gemma")
    block = random_block(other, TEXT, 1, other.size, ends=True)
    rows = ByteProjection(other, target).project(block, ending(target, TEXT))
    probs = dict(zip(block.topk_ids_TK[0].tolist(), np.exp(block.topk_logprobs_TK[0]).tolist(), strict=True))
    assert target.eos_id is not None
    assert entries(rows, 0)[target.eos_id] == pytest.approx(probs[plain.pad_id], rel=1e-3)
    assert entries(rows, -1)[target.eos_id] == pytest.approx(math.exp(block.gold_T[-1]), rel=1e-5)


@pytest.mark.parametrize("config", [FusionConfig(k_out=12), FusionConfig(k_out=12, scope="span", span_tokens=5)])
def test_the_end_row_is_fused_and_moves_no_weight(config: FusionConfig) -> None:
    target = vocabulary("unigram_prefix")
    names = ("byte_level", "gemma")
    blocks = {name: random_block(vocabulary(name), TEXT, seed, 16, ends=True) for seed, name in enumerate(names)}
    # An end that one source finds impossible would decide everything if it counted.
    blocks["gemma"].gold_T[-1] = -80.0
    blocks["gemma"].topk_ids_TK[-1][blocks["gemma"].topk_ids_TK[-1] == vocabulary("gemma").eos_id] = -1
    encoding = ending(target, TEXT)
    rows = {name: project("byte", name, "unigram_prefix", blocks[name], encoding) for name in names}
    alone = {name: project("byte", name, "unigram_prefix", blocks[name], encoding.without_end()) for name in names}
    fused = fuse(TEXT, encoding, rows, config, target.fingerprint)
    without = fuse(TEXT, encoding.without_end(), alone, config, target.fingerprint)
    fused.validate()
    assert fused.ends_document and not without.ends_document
    assert fused.nats_per_byte == without.nats_per_byte == fused.without_end().nats_per_byte
    assert [share.nats_per_byte for share in fused.shares] == [share.nats_per_byte for share in without.shares]
    np.testing.assert_array_equal(fused.topk_ids_TK[:-1], without.topk_ids_TK)
    np.testing.assert_array_equal(fused.topk_logprobs_TK[:-1], without.topk_logprobs_TK)
    assert fused.token_ids_T[-1] == target.eos_id and fused.mask_T[-1]
    if config.scope == "window":
        weights = {share.name: share.weight for share in without.shares}
        expected = sum(weights[name] * math.exp(rows[name].gold_T[-1]) for name in names)
        assert math.exp(fused.gold_T[-1]) == pytest.approx(expected, rel=1e-4)

    rows["gemma"] = project("byte", "gemma", "unigram_prefix", blocks["gemma"].without_end(), encoding)
    one = fuse(TEXT, encoding, rows, config, target.fingerprint)
    assert one.mask_T[-1] and one.gold_T[-1] == pytest.approx(float(rows["byte_level"].gold_T[-1]), abs=1e-5)


def test_blocks_keep_the_rule_of_the_end_row() -> None:
    block = random_block(vocabulary("gemma"), TEXT, 0, 4, ends=True)
    block.validate()
    assert block.num_text_tokens == block.num_tokens - 1
    bare = block.without_end()
    bare.validate()
    assert bare.without_end() is bare and bare.nats_per_byte == block.nats_per_byte
    with pytest.raises(ValueError, match="byte_ends: the end row must cover no bytes, it covers 1"):
        replace(bare, ends_document=True).validate()
    columns = ("token_ids_T", "byte_ends_T", "topk_ids_TK", "topk_logprobs_TK", "tail_T", "gold_T", "mask_T")
    only_end = {name: getattr(block, name)[-1:] for name in columns}
    with pytest.raises(ValueError, match="byte_ends: no rows for a text that is not empty"):
        replace(block, **only_end).validate()
