"""Edit distances and the nearest piece, against the library `editdistance`."""

from __future__ import annotations

import editdistance
import numpy as np
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fusion_core.alignment.published.distance_table import distance_table
from fusion_core.alignment.published.edit_distance import NearestPieces, candidate_distances
from fusion_core.alignment.published.pieces import Pieces, common_alphabet, decode_pieces
from tests.fusion_core.alignment.published.papers import nearest, spelled

few_symbols = st.text("ab ", max_size=8).map(str.encode)
long_runs = st.builds(
    lambda a, b, c: a * b + c, st.sampled_from([b"a", b"ab", b"\xe2"]), st.integers(0, 150), few_symbols
)
pieces = st.one_of(
    few_symbols, st.binary(max_size=6), st.text(max_size=6).map(lambda s: s.encode("utf-8", "ignore")), long_runs
)


def as_pieces(strings: list[bytes], without_spaces: bool = False) -> Pieces:
    offsets = np.concatenate([[0], np.cumsum([len(s) for s in strings])]).astype(np.int64)
    return decode_pieces(np.frombuffer(b"".join(strings), np.uint8), offsets, without_spaces=without_spaces)


@settings(deadline=None)
@given(st.lists(pieces, max_size=20), st.booleans())
@example([b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xc0\x80", b"\xe2\x82", b"\xf0\x9f\x91\x8d", b"\xe2\x82\xac"], False)
def test_pieces_are_decoded_as_python_does(strings: list[bytes], without_spaces: bool) -> None:
    decoded = as_pieces(strings, without_spaces)
    for i, string in enumerate(strings):
        expected = spelled(string).replace(" ", "") if without_spaces else spelled(string)
        assert "".join(map(chr, decoded.symbols[decoded.offsets[i] : decoded.offsets[i + 1]])) == expected


@settings(deadline=None)
@given(st.lists(pieces, min_size=1, max_size=12), st.lists(pieces, min_size=1, max_size=80))
def test_distances_of_all_pairs(left: list[bytes], right: list[bytes]) -> None:
    (a, b), size = common_alphabet(as_pieces(left), as_pieces(right))
    rows, columns = np.arange(len(left), dtype=np.int32)[::-1].copy(), np.arange(len(right), dtype=np.int32)
    expected = [[editdistance.eval(spelled(left[i]), spelled(right[j])) for j in columns] for i in rows]
    np.testing.assert_array_equal(distance_table(a, rows, b, columns, size), expected)
    both = candidate_distances(a, rows[None], b, columns[None], size)
    np.testing.assert_array_equal(both[0], expected)


def test_places_without_a_candidate_cost_nothing() -> None:
    (a, b), size = common_alphabet(as_pieces([b"cat"]), as_pieces([b"dog", b"cut"]))
    costs = candidate_distances(a, np.array([[0, -1]], np.int32), b, np.array([[1, -1, 0]], np.int32), size)
    np.testing.assert_array_equal(costs, [[[1, 0, 3], [0, 0, 0]]])


@settings(deadline=None)
@given(st.lists(pieces, min_size=1, max_size=12), st.lists(pieces, min_size=1, max_size=200))
def test_nearest_piece(patterns: list[bytes], texts: list[bytes]) -> None:
    (a, b), size = common_alphabet(as_pieces(patterns), as_pieces(texts))
    search = NearestPieces(b, size)
    first, distances = search.first(a)
    for x, pattern in enumerate(patterns):
        place, distance = nearest(spelled(pattern), [spelled(text) for text in texts])
        assert (first[x], distances[x]) == (place, distance)
        tied = [y for y, text in enumerate(texts) if editdistance.eval(spelled(pattern), spelled(text)) == distance]
        assert search.all_at(a.symbols[a.offsets[x] : a.offsets[x + 1]], distance).tolist() == tied


@settings(deadline=None, max_examples=3)
@given(st.randoms(use_true_random=False))
def test_nearest_among_many(random: object) -> None:
    """Enough texts for both kinds of features: frequent symbols as rows of bytes, rare ones as lists."""
    draw = np.random.default_rng(random.getrandbits(32))  # type: ignore[attr-defined]
    letters = np.array(list("etaoinshrdlu ") + [chr(0x4E00 + i) for i in range(300)])
    weights = 1 / np.arange(1, len(letters) + 1)
    words = {"".join(draw.choice(letters, draw.integers(1, 12), p=weights / weights.sum())) for _ in range(3000)}
    texts, patterns = sorted(words)[:-40], sorted(words)[-40:]
    draw.shuffle(texts)
    (a, b), size = common_alphabet(as_pieces([p.encode() for p in patterns]), as_pieces([t.encode() for t in texts]))
    first, distances = NearestPieces(b, size).first(a)
    assert [nearest(pattern, texts) for pattern in patterns] == list(zip(first, distances, strict=True))
