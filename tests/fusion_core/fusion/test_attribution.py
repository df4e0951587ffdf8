"""Who said what, against rows written out by hand and a mixture computed entry by entry."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from fusion_core.alignment.byte.projection import ByteProjection
from fusion_core.alignment.projected_rows import ProjectedRows
from fusion_core.blocks import Block
from fusion_core.fusion import FusionConfig, fuse
from fusion_core.fusion import attribution as at
from fusion_core.fusion.attribution import Attribution, attribute
from fusion_core.vocabulary import Encoding, Vocabulary
from tests.fakes.tokenizers import vocabulary

TEXT = "The cat sat on the mat, 12 * 12 = 144. 日本語 🎉".encode()


def block_of(source: Vocabulary, text: bytes, seed: int, k: int = 8, *, end: bool = True) -> Block:
    """A source's block over a text: random rows, each with the realised token among its candidates."""
    rng = np.random.default_rng(seed)
    encoding = source.encode(text)
    if end and source.eos_id is not None:
        encoding = encoding.with_end(source.eos_id)
    num_tokens = encoding.num_tokens
    ids_TK = np.stack([rng.permutation(source.size)[:k] for _ in range(num_tokens)]).astype(np.int32)
    missing_T = ~(ids_TK == encoding.token_ids_T[:, None]).any(axis=1)
    ids_TK[missing_T, 0] = encoding.token_ids_T[missing_T]
    probs_TK = -np.sort(-rng.dirichlet(np.ones(k + 1), size=num_tokens)[:, :k])
    gold_T = probs_TK[np.arange(num_tokens), (ids_TK == encoding.token_ids_T[:, None]).argmax(axis=1)]
    return Block(
        text_bytes=text,
        token_ids_T=encoding.token_ids_T,
        byte_ends_T=encoding.byte_ends_T,
        topk_ids_TK=ids_TK,
        topk_logprobs_TK=np.log(probs_TK).astype(np.float32),
        tail_T=np.log1p(-probs_TK.sum(axis=1)).astype(np.float32),
        gold_T=np.log(gold_T).astype(np.float32),
        vocabulary=source.fingerprint,
        mask_T=encoding.lossless_T,
        ends_document=encoding.ends_document,
    )


def attributed(
    names: tuple[str, ...], config: FusionConfig, *, text: bytes = TEXT, ends: tuple[bool, ...] = (True, True)
) -> tuple[Attribution, Block, dict[str, ProjectedRows | None], dict[str, Block | None], Encoding]:
    target = vocabulary("llama3")
    encoding = target.encode(text).with_end(target.eos_id or 0)
    sources = {name: vocabulary(name) for name in names}
    blocks: dict[str, Block | None] = {
        name: block_of(source, text, seed, end=ends[seed]) for seed, (name, source) in enumerate(sources.items())
    }
    rows: dict[str, ProjectedRows | None] = {}
    for name, block in blocks.items():
        assert block is not None
        rows[name] = ByteProjection(sources[name], target).project(block, encoding)
    fused = fuse(text, encoding, rows, config, target.fingerprint)
    return attribute(blocks, rows, encoding, fused, config), fused, rows, blocks, encoding


def test_winner_weights_and_loss_are_those_of_the_rows() -> None:
    config = FusionConfig(strategy="fixed", weights={"byte_level": 0.75, "gemma": 0.25})
    found, fused, rows, _, _ = attributed(("byte_level", "gemma"), config)
    for t in range(fused.num_tokens):
        golds = [float(np.exp(of_source.gold_T[t])) for of_source in rows.values() if of_source is not None]
        assert found.winner_T[t] == int(np.argmax(golds))
        assert found.weight_ST[:, t].tolist() == pytest.approx([0.75, 0.25])
        assert np.exp(-found.loss_T[t]) == pytest.approx(0.75 * golds[0] + 0.25 * golds[1], rel=1e-4)
    assert not any(reason for of_source in found.reasons_ST for reason in of_source)


def test_disagreement_and_entropy_against_a_dictionary_of_the_mixture() -> None:
    found, fused, rows, _, _ = attributed(("byte_level", "gemma"), FusionConfig(k_out=200))

    def entropy(row: dict[int, float]) -> float:
        return -sum(p * np.log(p) for p in row.values() if p > 0)

    for t in range(fused.num_tokens):
        own, mixed = [], dict[int, float]()
        for of_source, weight in zip(rows.values(), found.weight_ST[:, t], strict=True):
            assert of_source is not None
            row = {int(i): float(p) for i, p in zip(of_source.ids_TM[t], of_source.probs_TM[t], strict=True) if i >= 0}
            row[-1] = float(of_source.tail_T[t])
            own.append(weight * entropy(row))
            for token, p in row.items():
                mixed[token] = mixed.get(token, 0.0) + weight * p
        assert found.disagreement_T[t] == pytest.approx(entropy(mixed) - sum(own), abs=1e-5)
        assert found.entropy_T[t] == pytest.approx(entropy(mixed), abs=1e-4)


def test_sources_that_say_the_same_do_not_disagree() -> None:
    rows = attributed(("byte_level", "gemma"), FusionConfig())[2]["gemma"]
    *_, blocks, encoding = attributed(("byte_level", "gemma"), FusionConfig())
    same: dict[str, ProjectedRows | None] = {"a": rows, "b": rows}
    block = blocks["gemma"]
    fused = fuse(TEXT, encoding, same, FusionConfig(), "v")
    found = attribute({"a": block, "b": block}, same, encoding, fused, FusionConfig())
    assert found.disagreement_T == pytest.approx(np.zeros(encoding.num_tokens), abs=1e-5)


def test_a_source_s_own_row_is_the_one_open_at_the_start_of_the_token() -> None:
    found, fused, _, blocks, encoding = attributed(("gemma", "llama"), FusionConfig())
    starts = [0, *encoding.byte_ends_T[:-1].tolist()]
    for name, own_T in zip(found.names, found.own_row_ST, strict=True):
        block = blocks[name]
        assert block is not None
        spans = list(pairwise([0, *block.byte_ends_T.tolist()]))
        for t, start in enumerate(starts[:-1]):
            first, end = spans[own_T[t]]
            assert first <= start < end
        assert own_T[-1] == block.num_tokens - 1 and fused.ends_document


def test_each_kind_of_mask_has_its_reason() -> None:
    text = "ﬁ ² e\u0301 cat".encode()
    found, _, rows, _, _ = attributed(("unigram_nfkc", "gemma"), FusionConfig(), text=text, ends=(True, False))
    lossy, gemma = found.reasons_ST
    masked = rows["unigram_nfkc"]
    assert masked is not None and not masked.mask_T.all()
    assert [bool(reason) for reason in lossy] == (~masked.mask_T).tolist()
    assert at.SOURCE_SPELLS_OTHERWISE in lossy
    assert gemma[-1] == at.NO_END_ROW and set(gemma[:-1]) == {""}
    assert np.isnan(found.realised_ST[1, -1]) and found.weight_ST[1, -1] == 0


def test_a_target_that_spells_otherwise_is_told_from_a_source_that_does() -> None:
    text = b"cat \xc2\xb2"
    target, source = vocabulary("qwen"), vocabulary("gemma")
    encoding = target.encode(text)
    block = block_of(source, text, 0, end=False)
    lossy = Encoding(encoding.token_ids_T, encoding.byte_ends_T, np.arange(encoding.num_tokens) > 0)
    rows = ByteProjection(source, target).project(block, lossy)
    fused = fuse(text, lossy, {"gemma": rows}, FusionConfig(), target.fingerprint)
    found = attribute({"gemma": block}, {"gemma": rows}, lossy, fused, FusionConfig())
    assert found.reasons_ST[0][0] == at.TARGET_SPELLS_OTHERWISE
    assert found.winner_T[0] == -1 and np.isnan([found.loss_T[0], found.entropy_T[0]]).all()
