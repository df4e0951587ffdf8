"""The vocabulary map against brute force over all pairs of pieces, its cache and its settings."""

from __future__ import annotations

import logging
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from fusion_core.alignment.published.co_occurrence import CoOccurrence, most_similar
from fusion_core.alignment.published.vocabulary_map import VocabularyMap, VocabularyMapConfig
from tests.fakes.tokenizers import CORPUS, vocabulary
from tests.fusion_core.alignment.published.papers import build_map, co_occurrences, cosine

PAIRS = [("byte_level", "gemma"), ("gemma", "byte_level"), ("llama", "unigram"), ("unigram_nfkc", "byte_level_prefix")]


@pytest.mark.parametrize(("source", "target"), PAIRS)
@pytest.mark.parametrize("strategy", ["exact", "min_edit"])
def test_equals_brute_force(source: str, target: str, strategy: str) -> None:
    config = VocabularyMapConfig(strategy=strategy, cache_dir=None)
    built = VocabularyMap.load_or_build(vocabulary(source), vocabulary(target, 400), config)
    assert built.target_ids_V.tolist() == build_map(vocabulary(source), vocabulary(target, 400), strategy)
    assert built.target_ids_V.dtype == np.int32


@pytest.mark.parametrize(("source", "target"), PAIRS[:2])
def test_co_occurrence_equals_brute_force(source: str, target: str, tmp_path: Path) -> None:
    documents = [line.replace("\n", " ") for line in CORPUS] + ["the thing that is there: the other theory"]
    path = tmp_path / "corpus.txt"
    path.write_bytes("\n".join(documents).encode())
    config = VocabularyMapConfig(strategy="co_occurrence", corpus=path, window=3, cache_dir=None)
    # The two are trained on the same lines: only a smaller target leaves pieces without an exact match.
    built = VocabularyMap.load_or_build(vocabulary(source), vocabulary(target, 300), config)
    corpus = [document for line in documents for document in line.encode().splitlines()]
    expected = build_map(vocabulary(source), vocabulary(target, 300), "co_occurrence", corpus, window=3)
    assert built.target_ids_V.tolist() == expected
    by_distance = VocabularyMap.build(vocabulary(source), vocabulary(target, 300), VocabularyMapConfig(cache_dir=None))
    assert (built.target_ids_V != by_distance.target_ids_V).any(), "the company of no token mattered"


@settings(deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 9), max_size=12), min_size=1, max_size=4),
    st.lists(st.lists(st.integers(0, 9), max_size=12), min_size=1, max_size=4),
    st.lists(st.integers(-1, 9), min_size=10, max_size=10),
    st.integers(1, 6),
    st.lists(st.integers(0, 9), min_size=1, max_size=5, unique=True),
    st.integers(0, 9),
)
def test_most_similar_by_counts(
    left: list[list[int]], right: list[list[int]], contexts: list[int], window: int, tied: list[int], token: int
) -> None:
    def sparse(documents: list[list[int]], context_of: list[int]) -> CoOccurrence:
        ids = [np.array(document, np.int32) for document in documents]
        return CoOccurrence.count(ids, np.array(context_of, np.int32), window)

    source, target = sparse(left, contexts), sparse(right, list(range(10)))
    of_source, of_target = co_occurrences(left, window), co_occurrences(right, window)
    counted: Counter[int] = Counter()
    for context, n in of_source.get(token, {}).items():
        if contexts[context] != -1:
            counted[contexts[context]] += n
    assert source.has(token) == bool(counted)
    similarities = [round(cosine(counted, of_target.get(j, Counter())), 9) for j in tied]
    assert most_similar(source, token, target, tied) == similarities.index(max(similarities))


def test_roles_go_before_bytes() -> None:
    source, target = vocabulary("gemma"), vocabulary("byte_level")
    mapped = VocabularyMap.build(source, target, VocabularyMapConfig(strategy="exact", cache_dir=None)).target_ids_V
    assert mapped[source.eos_id] == target.eos_id
    assert mapped[source.bos_id] == target.bos_id
    (unknown,) = source.special_ids - {source.eos_id, source.bos_id, source.pad_id}
    assert mapped[unknown] == -1


def test_a_byte_piece_is_the_character_it_spells() -> None:
    source, target = vocabulary("byte_level"), vocabulary("gemma")
    mapped = VocabularyMap.build(source, target, VocabularyMapConfig(strategy="exact", cache_dir=None)).target_ids_V
    for text in (b"a", b"\n", b" the", "é".encode()[:1]):
        token = next(i for i in range(source.size) if source.token_bytes(i) == text)
        assert target.token_bytes(int(mapped[token])) == text
    (produced,) = target.encode(b"a").token_ids_T
    assert mapped[next(i for i in range(source.size) if source.token_bytes(i) == b"a")] == produced


def test_the_same_vocabulary_maps_to_itself() -> None:
    same = vocabulary("gemma")
    mapped = VocabularyMap.build(same, same, VocabularyMapConfig(cache_dir=None)).target_ids_V
    np.testing.assert_array_equal(mapped, np.arange(same.size))


def test_cached_by_vocabularies_and_strategy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, target = vocabulary("byte_level"), vocabulary("gemma")
    config = VocabularyMapConfig(cache_dir=tmp_path / "maps")
    built = VocabularyMap.load_or_build(source, target, config)
    VocabularyMap.load_or_build(source, target, VocabularyMapConfig(strategy="exact", cache_dir=tmp_path / "maps"))
    assert len(list((tmp_path / "maps").iterdir())) == 2

    def refuse(*_: object) -> None:
        raise AssertionError("built again")

    monkeypatch.setattr(VocabularyMap, "build", refuse)
    loaded = VocabularyMap.load_or_build(source, target, config)
    np.testing.assert_array_equal(loaded.target_ids_V, built.target_ids_V)
    assert (loaded.source, loaded.target) == (source.fingerprint, target.fingerprint)
    with pytest.raises(AssertionError, match="built again"):
        VocabularyMap.load_or_build(target, source, config)


@pytest.mark.parametrize("damage", [b"", b"not an array", "truncate"])
def test_a_damaged_cache_is_built_again(tmp_path: Path, damage: bytes | str, caplog: pytest.LogCaptureFixture) -> None:
    source, target = vocabulary("byte_level"), vocabulary("gemma")
    config = VocabularyMapConfig(strategy="exact", cache_dir=tmp_path)
    built = VocabularyMap.load_or_build(source, target, config)
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:200] if isinstance(damage, str) else damage)
    with caplog.at_level(logging.WARNING):
        again = VocabularyMap.load_or_build(source, target, config)
    np.testing.assert_array_equal(again.target_ids_V, built.target_ids_V)
    assert path.name in caplog.text
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    np.testing.assert_array_equal(np.load(path), built.target_ids_V)


def test_a_cache_that_cannot_be_written_is_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    config = VocabularyMapConfig(strategy="exact", cache_dir=blocked)
    with caplog.at_level(logging.WARNING):
        VocabularyMap.load_or_build(vocabulary("byte_level"), vocabulary("gemma"), config)
    assert "cache_dir" in caplog.text


@pytest.mark.parametrize(
    ("given_settings", "message"),
    [
        ({"strategy": "minimum"}, "'exact', 'min_edit' or 'co_occurrence'"),
        ({"stratergy": "exact"}, "stratergy"),
        ({"strategy": "co_occurrence"}, "corpus: required with strategy co_occurrence"),
        ({"corpus": "x.txt"}, "corpus: required with strategy co_occurrence"),
        ({"window": 0}, "greater than or equal to 1"),
    ],
)
def test_settings_are_checked(given_settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        VocabularyMapConfig.model_validate(given_settings)


def test_a_missing_corpus_is_named(tmp_path: Path) -> None:
    config = VocabularyMapConfig(strategy="co_occurrence", corpus=tmp_path / "none.txt", cache_dir=None)
    with pytest.raises(ValueError, match=r"corpus: cannot read .*none\.txt"):
        VocabularyMap.load_or_build(vocabulary("byte_level"), vocabulary("gemma"), config)
