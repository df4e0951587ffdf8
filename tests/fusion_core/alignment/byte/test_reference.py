"""The exact reference against complete enumeration of small languages, and the projection against the reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusion_core.alignment.byte.projection import ByteConfig, ByteProjection
from fusion_core.alignment.projected_rows import ProjectedRows
from fusion_core.vocabulary import Vocabulary
from tests.fakes.strategies import block_of
from tests.fakes.tokenizers import CORPUS, vocabulary
from tests.fusion_core.alignment.byte.reference import ReferenceEnumerator

FAMILIES = ("byte_level", "gemma", "unigram", "metaspace")
pairs = st.sampled_from([(a, b) for a in FAMILIES for b in FAMILIES if a != b])
seeds = st.integers(0, 2**32 - 1)
unprefixed = st.sampled_from([(a, b) for a in FAMILIES[:3] for b in FAMILIES[:3] if a != b])
NextTokenProbs = Callable[[Sequence[tuple[int, ...]]], np.ndarray]


@cache
def letters(name: str) -> list[int]:
    """Some short tokens of a vocabulary that combine to longer ones."""
    subject = vocabulary(name)
    wanted = [b"t", b"h", b"e", b"th", b"the", b" ", b" t", b" the", b"re", b"\n", "é".encode()[:1], "é".encode()[1:]]
    return [i for i in range(subject.size) if subject.token_bytes(i) in wanted]


def tiny_language(source: Vocabulary, ids: list[int], seed: int, length: int) -> NextTokenProbs:
    """Texts of at most `length` tokens over a few ids; the probabilities depend on the whole prefix."""

    def next_token(prefixes: Sequence[tuple[int, ...]]) -> np.ndarray:
        rows = np.zeros((len(prefixes), source.size))
        for row, prefix in zip(rows, prefixes, strict=True):
            rng = np.random.default_rng([seed, *prefix])
            row[source.eos_id] = 1.0
            if len(prefix) < length:
                row[ids] = np.exp(rng.normal(0, 2, len(ids)))
                row[source.eos_id] = 0.2
        return rows / rows.sum(axis=1, keepdims=True)

    return next_token


def everything(source: Vocabulary, next_token: NextTokenProbs, behind: bytes) -> list[tuple[bytes, float, int]]:
    """(text after `behind`, probability, first id) of every complete text whose first token starts with `behind`."""
    found: list[tuple[bytes, float, int]] = []

    def walk(prefix: tuple[int, ...], mass: float, text: bytes) -> None:
        row = next_token([prefix])[0]
        for x in np.flatnonzero(row):
            token = source.token_bytes(int(x))
            if not prefix and behind and not token.startswith(behind):
                continue
            if x == source.eos_id:
                found.append((text, mass * row[x], prefix[0] if prefix else -1))
            else:
                walk((*prefix, int(x)), mass * row[x], text + token)

    walk((), 1.0, b"")
    total = sum(mass for _, mass, _ in found)
    return [(text[len(behind) :], mass / total, first) for text, mass, first in found]


def truth(target: Vocabulary, texts: list[tuple[bytes, float, int]]) -> np.ndarray:
    probs_U = np.zeros(target.size + 1)  # the last place: no target token
    firsts = target.first_tokens([text for text, _, _ in texts])
    for (text, mass, _), first in zip(texts, firsts, strict=True):
        probs_U[target.eos_id if not text else first] += mass
    return probs_U


@settings(max_examples=25, deadline=None)
@given(pairs, seeds, st.sampled_from([b"", b"", b"t", b" ", b"th"]))
def test_equals_complete_enumeration(pair: tuple[str, str], seed: int, behind: bytes) -> None:
    source, target = map(vocabulary, pair)
    ids = letters(pair[0])
    if not any(source.token_bytes(i).startswith(behind) for i in ids):
        return
    next_token = tiny_language(source, ids, seed, length=3)
    expected = truth(target, everything(source, next_token, behind))
    found = ReferenceEnumerator(source, target).first_token(next_token, (), behind)
    assert found.undecided == pytest.approx(0.0, abs=1e-12)
    assert np.allclose(found.probs_U, expected[:-1], atol=1e-9)
    assert found.outside == pytest.approx(expected[-1], abs=1e-9)


@settings(max_examples=25, deadline=None)
@given(unprefixed, st.lists(st.integers(0, 11), min_size=1, max_size=3), seeds)
def test_given_target_tokens_condition_on_all_ways_to_write_them(
    pair: tuple[str, str], words: list[int], seed: int
) -> None:
    source, target = map(vocabulary, pair)
    ids = letters(pair[0])
    text = b"".join(source.token_bytes(ids[word % len(ids)]) for word in words).decode("utf-8", "ignore").encode()
    encoding, target_encoding = source.encode(text), target.encode(text)
    realised = tuple(encoding.token_ids_T.tolist())
    next_token = tiny_language(source, sorted({*ids, *realised}), seed, length=3)
    everything_written = everything(source, next_token, b"")
    enumerator = ReferenceEnumerator(source, target)
    for n in range(target_encoding.num_tokens):
        before = tuple(target_encoding.token_ids_T[:n].tolist())
        rows = target.leading_tokens([written for written, _, _ in everything_written], n + 1)
        expected = np.zeros(target.size + 1)
        for (written, mass, _), row in zip(everything_written, rows, strict=True):
            if tuple(row[:n]) == before:
                ends_here = len(written) == sum(len(target.token_bytes(token)) for token in before)
                expected[target.eos_id if ends_here else row[n]] += mass
        if expected.sum() == 0.0:
            continue
        found = enumerator.first_token(next_token, (), given=before, path=realised)
        assert found.undecided == pytest.approx(0.0, abs=1e-12)
        assert np.allclose(found.probs_U, expected[:-1] / expected.sum(), atol=1e-9)


@settings(max_examples=25, deadline=None)
@given(pairs, seeds, st.integers(1, 40), st.integers(1, 3), st.sampled_from([0.0, 0.01, 0.1]))
def test_what_is_cut_off_is_reported(
    pair: tuple[str, str], seed: int, max_calls: int, max_tokens: int, min_mass: float
) -> None:
    source, target = map(vocabulary, pair)
    next_token = tiny_language(source, letters(pair[0]), seed, length=3)
    enumerator = ReferenceEnumerator(source, target)
    exact = enumerator.first_token(next_token, ())
    part = enumerator.first_token(
        next_token, (), min_mass=min_mass, max_tokens=max_tokens, max_calls=max_calls, batch_size=3
    )
    assert part.num_calls <= max_calls
    assert part.probs_U.sum() + part.outside + part.undecided == pytest.approx(1.0, abs=1e-9)
    assert np.all(part.probs_U <= exact.probs_U + 1e-9)
    assert part.undecided_after_one == pytest.approx(exact.undecided_after_one)
    assert exact.total_variation(part.probs_U) <= part.undecided + 1e-9


def undecided_and_off(pair: tuple[str, str], words: list[int], seed: int) -> list[tuple[float, float]]:
    """Per target token of a short text: undecided mass after one source token, total variation of the mapping."""
    source, target = map(vocabulary, pair)
    some = [int(i) for i in np.random.default_rng(seed).choice(letters(pair[0]), 6, replace=False)]
    text = b"".join(source.token_bytes(some[word]) for word in words).decode("utf-8", "ignore").encode()
    encoding, target_encoding = source.encode(text), target.encode(text)
    realised = tuple(encoding.token_ids_T.tolist())
    next_token = tiny_language(source, sorted({*some, *realised}), seed, length=len(realised))
    rows = next_token([realised[:i] for i in range(len(realised))])
    block = block_of(source, text, encoding, np.maximum(rows, 1e-30), source.size)
    mapped = ByteProjection(source, target, LAST_ROW).project(block, target_encoding)
    followed = ByteProjection(source, target).project(block, target_encoding)
    enumerator = ReferenceEnumerator(source, target)
    starts = [0, *encoding.byte_ends_T.tolist()]
    found = []
    for t in range(target_encoding.num_tokens):
        begin = int(target_encoding.byte_ends_T[t - 1]) if t else 0
        row = max(i for i, start in enumerate(starts[:-1]) if start <= begin)
        exact = enumerator.first_token(next_token, realised[:row], text[starts[row] : begin])
        assert exact.undecided == pytest.approx(0.0, abs=1e-12)
        found.append((exact.undecided_after_one, exact.total_variation(dense(mapped, t, target))))
        before = target_encoding.token_ids_T[:t].tolist()
        exact = enumerator.first_token(next_token, (), given=before, path=realised)
        assert exact.undecided == pytest.approx(0.0, abs=1e-12)
        if t + 1 < target_encoding.num_tokens:  # the last token's probability is what the window's sum leaves for it
            found.append((exact.undecided_after_one, exact.total_variation(dense(followed, t, target))))
    return found


LAST_ROW = ByteConfig(follow_tokens=False, carry_realised=False)


def dense(rows: ProjectedRows, t: int, target: Vocabulary) -> np.ndarray:
    probs_U = np.zeros(target.size)
    present = rows.ids_TM[t] >= 0
    probs_U[rows.ids_TM[t][present]] = rows.probs_TM[t][present]
    return probs_U


@settings(max_examples=30, deadline=None)
@given(unprefixed, st.lists(st.integers(0, 5), min_size=1, max_size=2), seeds)
def test_projection_is_as_close_as_one_source_token_can_tell(
    pair: tuple[str, str], words: list[int], seed: int
) -> None:
    """Total variation from the truth is at most the mass of source tokens that end before the bytes decide."""
    for undecided, off in undecided_and_off(pair, words, seed):
        assert off <= undecided + 1e-5


def test_masses_must_exist() -> None:
    source = vocabulary("byte_level")
    never = tiny_language(source, letters("byte_level"), 0, length=0)
    with pytest.raises(ValueError, match="behind: the source gives no mass"):
        ReferenceEnumerator(source, vocabulary("gemma")).first_token(never, (), b"t")


def prefix_counts(vocabulary_: Vocabulary, texts: list[bytes]) -> dict[tuple[int, ...], dict[int, float]]:
    """Of a language of equally likely texts: next-token probabilities after every prefix of tokens."""
    counts: dict[tuple[int, ...], dict[int, float]] = {}
    for encoding in vocabulary_.encode_batch(texts):
        ids = (*encoding.token_ids_T.tolist(), vocabulary_.eos_id)
        for i, token in enumerate(ids):
            after = counts.setdefault(ids[:i], {})
            after[token] = after.get(token, 0.0) + 1.0
    return {p: {x: n / sum(after.values()) for x, n in after.items()} for p, after in counts.items()}


@pytest.mark.parametrize(("source_name", "target_name"), [("byte_level", "unigram"), ("gemma", "byte_level")])
def test_rows_are_close_to_the_truth_where_the_source_token_is_the_longer_one(
    source_name: str, target_name: str
) -> None:
    """The truth of a language of 4,000 texts, in both vocabularies; its source model writes as its tokenizer splits."""
    source, target = vocabulary(source_name, 1200), vocabulary(target_name, 420)
    rng = np.random.default_rng(7)
    words = " ".join(CORPUS).split()
    chosen = rng.zipf(1.3, size=(4000, 3)) % len(words)
    texts = [" ".join(words[i] for i in row).encode() for row in chosen]
    of_source, of_target = prefix_counts(source, texts), prefix_counts(target, texts)
    projections = {
        True: ByteProjection(source, target),
        False: ByteProjection(source, target, ByteConfig(follow_tokens=False)),
    }
    off: dict[bool, list[float]] = {True: [], False: []}
    for text in texts[:150]:
        encoding, target_encoding = source.encode(text), target.encode(text)
        realised, wanted = encoding.token_ids_T.tolist(), target_encoding.token_ids_T.tolist()
        rows = np.full((len(realised), source.size), 1e-12)
        for i in range(len(realised)):
            for x, p in of_source[tuple(realised[:i])].items():
                rows[i, x] = p
        block = block_of(source, text, encoding, rows, 64)
        projected = {follow: p.project(block, target_encoding) for follow, p in projections.items()}
        ends = [0, *encoding.byte_ends_T.tolist()]
        for t, end in enumerate(target_encoding.byte_ends_T.tolist()):
            begin = int(target_encoding.byte_ends_T[t - 1]) if t else 0
            truth_of = of_target[tuple(wanted[:t])]
            if len(truth_of) < 2 or end > min(e for e in ends if e > begin):
                continue
            for follow, its_rows in projected.items():
                found_U = dense(its_rows, t, target)
                truth_U = np.zeros(target.size)
                truth_U[list(truth_of)] = list(truth_of.values())
                off[follow].append(float(np.abs(found_U - truth_U).sum()) / 2)
    assert len(off[True]) > 100
    assert float(np.median(off[True])) < 0.02
    # The last row alone tells what follows a token from the realised source tokens, which are not all that can be.
    assert float(np.mean(off[True])) < 0.6 * float(np.mean(off[False]))
