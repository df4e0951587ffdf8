"""The byte projection against a slow oracle in plain Python, and the gates that any projection must pass."""

from __future__ import annotations

import copy
import itertools
import math
import random
import threading
import tracemalloc
from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusion_core.alignment.byte import ByteConfig, ByteProjection
from fusion_core.alignment.projected import ProjectedRows
from fusion_core.blocks import Block
from fusion_core.vocabulary import Encoding, Vocabulary
from tests.fusion_core.strategies import block_of, full_rows, random_block, texts
from tests.fusion_core.tokenizers import CORPUS, FAMILIES, LOSSLESS, description, vocabulary, wrap

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


class Oracle:
    """The projection from the last source boundary alone, written down with dictionaries, one row at a time."""

    def __init__(self, source: Vocabulary, target: Vocabulary, block: Block, encoding: Encoding) -> None:
        self.source, self.target, self.block, self.encoding = source, target, block, encoding
        self.same = source.fingerprint == target.fingerprint
        tokens = [source.token_bytes(int(i)) for i in block.token_ids_T]
        targets = [target.token_bytes(int(i)) for i in encoding.token_ids_T]
        source_prefix = self.dummy(tokens, block.byte_ends_T)
        target_prefix = self.dummy(targets, encoding.byte_ends_T)
        self.text = b" " * source_prefix + block.text_bytes
        ends = [int(end) + source_prefix for end in block.byte_ends_T]
        self.starts = [0, *ends[:-1]]
        self.good = [
            self.text[a:b] == token and b > a and bool(ok)
            for a, b, token, ok in zip(self.starts, ends, tokens, block.mask_T, strict=True)
        ]
        target_ends = [int(end) + source_prefix for end in encoding.byte_ends_T]
        self.spans = list(zip([max(0, source_prefix - target_prefix), *target_ends[:-1]], target_ends, strict=True))
        self.prepend = target_prefix > source_prefix

    @staticmethod
    def dummy(tokens: list[bytes], ends: np.ndarray) -> int:
        return int(bool(tokens) and tokens[0][:1] == b" " and len(tokens[0]) == ends[0] + 1)

    def row_at(self, position: int) -> int:
        return max(i for i, start in enumerate(self.starts) if start <= position)

    def known(self, i: int) -> tuple[dict[int, float], float]:
        """(probability of every known id, mass of the unknown ones), scaled to sum to one."""
        ids, logprobs = self.block.topk_ids_TK[i].tolist(), self.block.topk_logprobs_TK[i].tolist()
        known = {x: math.exp(p) for x, p in zip(ids, logprobs, strict=True) if x >= 0}
        unseen = math.exp(self.block.tail_T[i])
        realised, gold = int(self.block.token_ids_T[i]), math.exp(self.block.gold_T[i])
        if realised not in known:
            unseen = max(0.0, unseen - gold)
        known[realised] = gold
        total = sum(known.values()) + unseen
        return {x: p / total for x, p in known.items()}, unseen / total

    def prefix_mass(self, i: int, prefix: bytes) -> tuple[float, float]:
        """(mass of all ids that start with the prefix, the part of it that belongs to unknown ids)."""
        if not prefix:
            return 1.0, self.known(i)[1]
        known, unseen = self.known(i)
        others = [x for x in range(self.source.size) if x not in known]
        starting = sum(self.source.token_bytes(x).startswith(prefix) for x in others)
        share = unseen * starting / len(others) if others else 0.0
        return sum(p for x, p in known.items() if self.source.token_bytes(x).startswith(prefix)) + share, share

    def first_token(self, x: int, behind: bytes, prepend: bool) -> int:
        if not behind and self.same:
            return x if x < self.source.size else -1
        if not behind and x == self.source.eos_id:
            return -1 if self.target.eos_id is None else self.target.eos_id
        rest = self.source.token_bytes(x)[len(behind) :]
        return int(self.target.first_tokens([b" " * prepend + rest])[0]) if rest else -1

    def logprob_until(self, position: int) -> float:
        """Log-probability of the text before `position` on the realised path."""
        golds = [float(g) for g in self.block.gold_T]
        if position >= len(self.text):
            return sum(golds)
        i = self.row_at(position)
        inside = self.text[self.starts[i] : position]
        if not inside:
            return sum(golds[:i])
        return sum(golds[:i]) + (math.log(self.prefix_mass(i, inside)[0]) if self.good[i] else golds[i])

    def row(self, t: int) -> tuple[dict[int, float], float, float] | None:
        """(entries, tail, log-probability of the realised token); None where the row is masked."""
        start, end = self.spans[t]
        i = self.row_at(start)
        covering = [self.good[j] for j in range(i, len(self.starts)) if j == i or self.starts[j] < end]
        if not self.encoding.lossless_T[t] or start == end or not all(covering):
            return None
        behind = self.text[self.starts[i] : start]
        mass, tail = self.prefix_mass(i, behind)
        out: dict[int, float] = {}
        tail /= mass
        for x, p in self.known(i)[0].items():
            if self.source.token_bytes(x).startswith(behind):
                first = self.first_token(x, behind, self.prepend and t == 0)
                if first < 0:
                    tail += p / mass
                else:
                    out[first] = out.get(first, 0.0) + p / mass
        gold = min(0.0, self.logprob_until(end) - self.logprob_until(start))
        realised = int(self.encoding.token_ids_T[t])
        rest = 1.0 - out.pop(realised, 0.0)
        scale = (1.0 - math.exp(gold)) / rest if rest > 1e-12 else 0.0
        out = {x: p * scale for x, p in out.items()}
        out[realised] = math.exp(gold)
        return out, (tail * scale if rest > 1e-12 else 1.0 - math.exp(gold)), gold


@cache
def first_tokens_of_all(source: str, target: str) -> list[int]:
    oracle = (vocabulary(source), vocabulary(target))
    return oracle[1].first_tokens([oracle[0].token_bytes(x) for x in range(oracle[0].size)]).tolist()


class FollowOracle(Oracle):
    """The projection that follows source tokens: the same, with all hypotheses (id, row) in a dictionary of masses.

    Masses are of the whole text so far; an id is unknown when it is neither a candidate nor realised.
    """

    def rows(self, firsts_of_all: list[int]) -> list[tuple[dict[int, float], float, float] | None]:
        return list(self._rows(firsts_of_all, len(self.spans) - 1))

    def _rows(self, firsts_of_all: list[int], last: int) -> Any:
        state: tuple[dict[tuple[int, int], float], int, float] | None = None
        for t, (start, end) in enumerate(self.spans):
            i = self.row_at(start)
            covering = [self.good[j] for j in range(i, len(self.starts)) if j == i or self.starts[j] < end]
            if not self.encoding.lossless_T[t] or start == end or not all(covering):
                state = None
                yield None
                continue
            masses, unknown = self.at(start, state)
            total = sum(masses.values()) + unknown[0] * unknown[1]
            firsts = {
                (x, r): self.first_token(x, self.text[self.starts[r] : start], self.prepend and t == 0)
                for x, r in masses
            }
            out: dict[int, float] = {}
            for hypothesis, mass in masses.items():
                out[firsts[hypothesis]] = out.get(firsts[hypothesis], 0.0) + mass / total
            tail = out.pop(-1, 0.0) + unknown[0] * unknown[1] / total
            realised_id = int(self.encoding.token_ids_T[t])
            state, kept, moved = self.advance(t, i, masses, firsts, unknown, firsts_of_all)
            if t == last:
                kept = math.exp(sum(float(g) for g in self.block.gold_T))
            realised = kept / total
            needed = realised - out.get(realised_id, 0.0)
            moved_from = firsts.get((int(self.block.token_ids_T[i]), i), -1)
            if needed > 0 and moved_from >= 0 and moved_from != realised_id:
                taken = min(needed, moved / total, out[moved_from])
                out[moved_from] -= taken
                needed -= taken
            tail -= min(needed, tail)
            out[realised_id] = realised
            yield out, tail, math.log(realised)

    def path(self, row: int) -> float:
        return math.exp(sum(float(g) for g in self.block.gold_T[:row]))

    def reaching(self, row: int, position: int) -> tuple[dict[tuple[int, int], float], int, float]:
        """Known ids of a row that go on with the text up to the position; number and mass of the unknown ones."""
        known, unseen = self.known(row)
        done = self.text[self.starts[row] : position]
        path = self.path(row)
        found = {
            (x, row): path * p
            for x, p in known.items()
            if not done or (x < self.source.size and self.source.token_bytes(x).startswith(done))
        }
        others = [x for x in range(self.source.size) if x not in known]
        each = path * unseen / len(others) if others else 0.0
        return found, sum(self.source.token_bytes(x).startswith(done) for x in others), each

    def at(self, position: int, state: Any) -> tuple[dict[tuple[int, int], float], tuple[int, float]]:
        row = self.row_at(position)
        if state is None:
            masses, number, each = self.reaching(row, position)
            return masses, (number, each)
        masses, number, each = state
        if self.starts[row] == position:
            opened, number, each = self.reaching(row, position)
            masses = {**masses, **opened}
        return masses, (number, each)

    def advance(
        self, t: int, i: int, masses: Any, firsts: Any, unknown: tuple[int, float], firsts_of_all: list[int]
    ) -> Any:
        start, end = self.spans[t]
        realised_id = int(self.encoding.token_ids_T[t])
        row = max(j for j, begin in enumerate(self.starts) if begin < end)
        ends = [*self.starts[1:], len(self.text)]
        real = (int(self.block.token_ids_T[i]), i)
        kept = {h: m for h, m in masses.items() if firsts[h] == realised_id and h != real}
        moved = 0.0
        if row == i:
            kept[real] = masses[real]
            moved = masses[real] if firsts[real] != realised_id else 0.0
        for j in range(i + 1, row + 1):
            found, number, each = self.reaching(j, end)
            kept |= found
            moved += sum(found.values())
        number, each = 0, 0.0
        if end < ends[row]:
            _, number, each = self.reaching(row, end)
            if row == i:
                number = min(number, unknown[0])
                if self.starts[i] == start and not (self.prepend and t == 0):
                    known = self.known(i)[0]
                    number = min(number, sum(f == realised_id for x, f in enumerate(firsts_of_all) if x not in known))
            else:
                moved += number * each
        mass = sum(kept.values()) + number * each
        if end == ends[row]:
            kept.pop((int(self.block.token_ids_T[row]), row), None)  # it goes on as the row that opens there
        return (kept, number, each), mass, moved


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


def large_vocabulary(size: int, salt: str) -> Vocabulary:
    """Byte-level BPE with many ids that no merge reaches, so that V is large without training."""
    described = copy.deepcopy(description("byte_level"))
    vocab = described["model"]["vocab"]
    words = ("".join(letters) for letters in itertools.product("abcdefghijklmnop", repeat=4))
    for word in itertools.islice(words, size - len(vocab)):
        vocab[salt + word] = len(vocab)
    return wrap(described)


def test_top_k_paths_allocate_nothing_of_tokens_times_vocabulary() -> None:
    source, target = large_vocabulary(40_000, "x"), large_vocabulary(40_000, "y")
    text = (" ".join(CORPUS[:4]) * 12).encode()
    encoding, k = source.encode(text), 16
    num_tokens = encoding.num_tokens
    rng = np.random.default_rng(0)
    topk_ids = np.stack([rng.permutation(source.size)[:k] for _ in range(num_tokens)]).astype(np.int32)
    logprobs = np.full((num_tokens, k), math.log(0.5 / k), dtype=np.float32)
    half = np.full(num_tokens, math.log(0.5), dtype=np.float32)
    block = Block(
        text, encoding.token_ids_T, encoding.byte_ends_T, topk_ids, logprobs, half, half - 20, source.fingerprint,
        encoding.lossless_T,
    )  # fmt: skip
    target_encoding = target.encode(text)
    subject = ByteProjection(source, target)
    subject.project(block, target_encoding)
    tracemalloc.start()
    rows = subject.project(block, target_encoding)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert rows.mask_T.all() and num_tokens > 1000
    dense = num_tokens * target.size * 4
    assert peak < dense / 50, f"{peak} bytes for {num_tokens} tokens, a dense table has {dense}"
