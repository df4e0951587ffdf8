"""The splitter against all possible splits, and the text against its blocks."""

from __future__ import annotations

import random
import re
from itertools import combinations, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusion_core.recall.split import BLOCK_COST, CLAUSE, INSIDE_WORD, NEWLINE, SENTENCE, WORD, Span, split

PIECES = ["a", "Bo", "see ", ". ", ", ", "\n", "x.", "3.5", "? ", "！", "，", "木", "木。", '."', " ", "...", "ing"]


def word_ends(text: str) -> list[int]:
    """Return ends of tokens as WordPiece sets them: words in pieces of two letters, marks alone, no spaces."""
    return [match.end() for match in re.finditer(r"[a-zA-Z0-9]{1,2}|[^\sa-zA-Z0-9]", text)]


def cost_after(text: str, end: int) -> int:
    """Return the cost of a cut behind the token that ends at `end`, character by character."""
    gap = re.match(r"\s*", text[end:])
    assert gap is not None
    after = text[end + gap.end() :]
    if "\n" in gap.group():
        return NEWLINE
    spaced = bool(gap.group()) or not after
    bare = re.sub(r"[\s\"]+$", "", text[:end])
    for marks, cost in ((".?!", SENTENCE), (",", CLAUSE)):
        if bare and bare[-1] in marks and spaced:
            return cost
    for marks, cost in (("！。", SENTENCE), ("，", CLAUSE)):
        if bare and bare[-1] in marks:
            return cost
    within = (
        not spaced and text[end - 1].isascii() and text[end - 1].isalnum() and after[0].isascii() and after[0].isalnum()
    )
    return INSIDE_WORD if within else WORD


def cheapest(text: str, ends: list[int], max_tokens: int) -> int:
    """Return the lowest cost of all ways to cut, one after the other."""
    costs = []
    inner = range(1, len(ends))
    for number in range(len(ends)):
        for cuts in combinations(inner, number):
            bounds = [0, *cuts, len(ends)]
            if max(b - a for a, b in pairwise(bounds)) <= max_tokens:
                costs.append(BLOCK_COST * (number + 1) + sum(cost_after(text, ends[cut - 1]) for cut in cuts))
    return min(costs)


def test_no_other_split_is_cheaper_on_300_small_documents() -> None:
    draw, tried = random.Random(5), 0
    while tried < 300:
        text = "".join(draw.choices(PIECES, k=draw.randint(2, 9)))
        ends, max_tokens = word_ends(text), draw.randint(1, 5)
        if not 2 <= len(ends) <= 11:
            continue
        blocks = split(text, ends, max_tokens)
        assert max(block.tokens for block in blocks) <= max_tokens
        last = np.cumsum([block.tokens for block in blocks])[:-1]
        cost = BLOCK_COST * len(blocks) + sum(cost_after(text, ends[token - 1]) for token in last)
        assert cost == cheapest(text, ends, max_tokens), (text, ends, max_tokens, blocks)
        tried += 1


@settings(max_examples=500, deadline=None)
@given(st.text(), st.randoms(use_true_random=False), st.integers(1, 9))
def test_the_blocks_joined_are_the_text(text: str, draw: random.Random, max_tokens: int) -> None:
    ends = sorted(draw.sample(range(1, len(text) + 1), draw.randint(0, len(text)))) if text else []
    blocks = split(text, ends, max_tokens)
    assert "".join(text[block.start : block.end] for block in blocks) == text
    assert all(block.end > block.start and block.tokens <= max_tokens for block in blocks)
    assert sum(block.tokens for block in blocks) == len(ends)
    starts = np.cumsum([0, *(block.tokens for block in blocks)])
    for block, first, last in zip(blocks, starts, starts[1:], strict=False):
        if block.tokens:  # tokens lie in the block that counts them
            assert first == 0 or ends[first - 1] <= block.start
            assert ends[last - 1] <= block.end


@pytest.mark.parametrize(
    ("text", "max_tokens", "pieces"),
    [
        ("One two. Three four, five six. Seven.", 8, ["One two. ", "Three four, five six. Seven."]),
        ("東京は首都。大阪は，西の町！京都は古い。", 8, ["東京は首都。", "大阪は，西の町！", "京都は古い。"]),
        ("It costs 3.5 now. Yes", 9, ["It costs 3.5 now. Yes"]),
        ("a\n\nb", 1, ["a\n\n", "b"]),
    ],
)
def test_cuts_lie_behind_sentences(text: str, max_tokens: int, pieces: list[str]) -> None:
    ends = [match.end() for match in re.finditer(r"[a-zA-Z0-9]+|[^\sa-zA-Z0-9]", text)]
    assert [text[block.start : block.end] for block in split(text, ends, max_tokens)] == pieces


def test_a_character_of_several_tokens_is_never_cut() -> None:
    assert split("🦊🦊", [1, 1, 1, 2, 2], 3) == [Span(0, 1, 3), Span(1, 2, 2)]
    with pytest.raises(ValueError, match="max_tokens: one character of the text has more than 2 tokens"):
        split("🦊🦊", [1, 1, 1, 2, 2], 2)


def test_a_text_without_tokens_is_one_block_and_the_empty_text_none() -> None:
    assert split("   ", [], 3) == [Span(0, 3, 0)]
    assert split("", [], 3) == []


@pytest.mark.parametrize("ends", [[2, 1], [1, 9], [-1, 1]])
def test_ends_that_are_no_offsets_are_refused(ends: list[int]) -> None:
    with pytest.raises(ValueError, match="token_ends: must ascend from 0 to at most the 3 characters"):
        split("abc", ends, 3)
