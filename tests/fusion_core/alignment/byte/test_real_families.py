"""The byte projection between the tokenizers of real families, on a text full of stumbling blocks."""

from __future__ import annotations

import numpy as np
import pytest

from fusion_core.alignment.byte.projection import ByteProjection
from fusion_core.alignment.projected_rows import ProjectedRows
from fusion_core.blocks import Block
from fusion_core.vocabulary import Vocabulary
from tests.fakes.real_tokenizers import FAMILIES, NASTY, real_vocabulary

K = 6


def sparse_block(subject: Vocabulary, text: bytes, seed: int) -> Block:
    """A source's block with random candidates, every second row with the realised token among them."""
    encoding, rng = subject.encode(text), np.random.default_rng(seed)
    num_tokens = encoding.num_tokens
    ids_TK = (rng.integers(subject.size, size=(num_tokens, 1)) + 7919 * np.arange(K)) % subject.size
    probs_TK = -np.sort(-rng.dirichlet(np.full(K + 1, 0.3), num_tokens), axis=1)
    tail_T, probs_TK = probs_TK[:, K] + 1e-3, probs_TK[:, :K]
    whole_T = probs_TK.sum(axis=1) + tail_T
    probs_TK, tail_T = probs_TK / whole_T[:, None], tail_T / whole_T
    listed_T = (ids_TK == encoding.token_ids_T[:, None]).any(axis=1)
    ids_TK[::2][~listed_T[::2], 1] = encoding.token_ids_T[::2][~listed_T[::2]]
    realised_TK = ids_TK == encoding.token_ids_T[:, None]
    gold_T = np.where(realised_TK.any(axis=1), (probs_TK * realised_TK).sum(axis=1), tail_T * rng.random(num_tokens))
    with np.errstate(divide="ignore"):
        block = Block(
            text_bytes=text,
            token_ids_T=encoding.token_ids_T,
            byte_ends_T=encoding.byte_ends_T,
            topk_ids_TK=ids_TK.astype(np.int32),
            topk_logprobs_TK=np.log(probs_TK).astype(np.float32),
            tail_T=np.log(tail_T).astype(np.float32),
            gold_T=np.log(gold_T).astype(np.float32),
            vocabulary=subject.fingerprint,
            mask_T=encoding.lossless_T,
        )
    block.validate()
    return block


def assert_distributions(rows: ProjectedRows) -> None:
    total_T = rows.probs_TM.sum(axis=1, dtype=np.float64) + rows.tail_T
    assert np.abs(total_T - 1.0).max() <= 1e-5
    assert rows.probs_TM.min() >= 0.0 and rows.tail_T.min() >= 0.0


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Vocabulary:
    return real_vocabulary(request.param)


def test_onto_itself_it_is_the_identity(family: Vocabulary) -> None:
    block = sparse_block(family, NASTY.encode(), 1)
    rows = ByteProjection(family, family).project(block, family.encode(block.text_bytes))
    assert_distributions(rows)
    np.testing.assert_array_equal(rows.mask_T, block.mask_T)
    assert rows.gold_T[rows.mask_T] == pytest.approx(block.gold_T[rows.mask_T], abs=1e-5)
    assert rows.gold_T.sum(dtype=np.float64) == pytest.approx(block.gold_T.sum(dtype=np.float64), abs=1e-3)
    for t in np.flatnonzero(block.mask_T):
        expected = dict(zip(block.topk_ids_TK[t].tolist(), np.exp(block.topk_logprobs_TK[t]).tolist(), strict=True))
        expected[int(block.token_ids_T[t])] = float(np.exp(block.gold_T[t]))
        found = dict(zip(rows.ids_TM[t].tolist(), rows.probs_TM[t].tolist(), strict=True))
        found.pop(-1, None)
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-7)


def test_onto_gpt2_rows_are_distributions_and_the_sum_is_the_sources_own(family: Vocabulary) -> None:
    source, target = family, real_vocabulary("gpt2")
    block = sparse_block(source, NASTY.encode(), 2)
    encoding = target.encode(block.text_bytes)
    rows = ByteProjection(source, target).project(block, encoding)
    assert_distributions(rows)
    assert rows.masked_share < 0.1
    own = float(block.gold_T.sum(dtype=np.float64))
    if source.num_virtual_bytes(block.token_ids_T, block.byte_ends_T):  # its dummy prefix is given, not predicted
        space = source.byte_table.prefix_range(b" ")
        starting = set(source.byte_table.sorted_ids_V[slice(*space)].tolist())
        listed = {
            x: float(np.exp(p)) for x, p in zip(block.topk_ids_TK[0].tolist(), block.topk_logprobs_TK[0], strict=True)
        }
        realised, unlisted = int(block.token_ids_T[0]), float(np.exp(block.tail_T[0]))
        unlisted -= 0.0 if realised in listed else float(np.exp(block.gold_T[0]))
        listed[realised] = float(np.exp(block.gold_T[0]))
        share = unlisted * len(starting - listed.keys()) / (source.size - len(listed))
        own -= np.log(sum(p for x, p in listed.items() if x in starting) + share)
    assert float(rows.gold_T.sum(dtype=np.float64)) == pytest.approx(own, rel=1e-5, abs=1e-3)
