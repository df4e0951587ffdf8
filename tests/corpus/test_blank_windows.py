"""White space and characters of zero width: no windows of their own, and nothing else gets lost by that."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.corpus.config import CorpusConfig
from services.corpus.ledger import HELD_OUT, TRAIN
from services.corpus.prepare import WindowTokenizer, plan_corpus, read_text
from services.corpus.windows import PlannedWindow, plan_windows
from services.models.prompt import encode_passages
from services.wire.passage import Passage
from tests.corpus.test_windows import pieces, readers
from tests.fakes.tokenizers import FAMILIES, LOSSLESS, vocabulary

WINDOW_BYTES = 24
words = st.text(st.sampled_from("abcdé"), min_size=1, max_size=6)
gaps = st.text(st.sampled_from(" \n\t\u200b\u00ad\u3000"), min_size=1, max_size=60)


@given(st.lists(words | gaps, min_size=1, max_size=8), st.sampled_from(FAMILIES))
def test_only_long_gaps_are_blank_and_the_text_stays_whole(parts: list[str], family: str) -> None:
    text = "".join(parts).encode()
    [windows] = plan_windows([text], WINDOW_BYTES, 50, readers(family))
    assert b"".join(pieces(text, windows)) == text
    blank_until = 0
    for window in windows:
        inside = text[window.start : window.end].decode()
        assert window.blank == (not inside.strip(" \n\t\u200b\u00ad\u3000"))
        assert window.context_start >= blank_until
        blank_until = window.end if window.blank else blank_until
    for first, second in pairwise(windows):
        if first.blank or second.blank:
            assert second.end - first.start > WINDOW_BYTES


@given(st.lists(words | gaps, min_size=1, max_size=8).map("".join), st.sampled_from(LOSSLESS))
def test_every_window_that_is_not_blank_has_a_token(text: str, family: str) -> None:
    [windows] = plan_windows([text.encode()], WINDOW_BYTES, 0, readers(family))
    for piece, window in zip(pieces(text.encode(), windows), windows, strict=True):
        if not window.blank:
            [prompt] = encode_passages(vocabulary(family), [Passage(piece)])
            assert prompt.encoding.num_tokens > 0


@pytest.mark.parametrize("text", [b"a" * 20 + b" " * 6, b" " * 6 + b"a" * 20, b" " * 26])
def test_white_space_that_fits_beside_text_goes_with_it(text: bytes) -> None:
    [windows] = plan_windows([text], 26, 0, readers("byte_level"))
    assert b"".join(pieces(text, windows)) == text
    assert [window.blank for window in windows] == [not text.strip()]


def test_what_one_tokenizer_drops_is_joined_to_text_that_it_keeps() -> None:
    """`unigram_nfkc` removes characters of zero width; a limit of tokens would cut them off on their own."""
    text = b"word " + "\u200b".encode() * 4 + b" other words follow here"
    limited = [*readers("unigram_nfkc"), *readers("byte_level", max_tokens=14)]
    [windows] = plan_windows([text], 40, 0, limited)
    assert not any(window.blank for window in windows)
    for piece in pieces(text, windows):
        assert vocabulary("unigram_nfkc").encode(piece).num_tokens > 0


def stories(folder: Path) -> CorpusConfig:
    folder.mkdir()
    for number in range(10):
        text = f"story {number} begins" + "\n" * 300 + f"and {number} goes on" + " " * 200
        (folder / f"{number}.txt").write_text(text)
    return CorpusConfig(files=(str(folder / "*.txt"),), window_bytes=64, context_bytes=64, shared_run_bytes=None)


def test_a_prepared_corpus_has_no_blank_windows(tmp_path: Path) -> None:
    config = stories(tmp_path / "in")
    tokenizer = WindowTokenizer("byte_level", "byte_level", lambda: vocabulary("byte_level"))
    corpus = plan_corpus(read_text(config, tmp_path / "out"), [tokenizer])
    for split in (TRAIN, HELD_OUT):
        windows = [corpus.window(split, index) for index in range(corpus.num_windows(split))]
        for window in windows:
            assert window.text.strip()
            document = (tmp_path / "in" / window.document).read_bytes()
            assert document[window.start_byte :].startswith(window.text)
            before = document[: window.start_byte]
            assert before.endswith(window.context)
        for name in {window.document for window in windows}:
            of_document = [window for window in windows if window.document == name]
            assert [window.ends_document for window in of_document] == [False] * (len(of_document) - 1) + [True]
            text = b"".join(window.text for window in of_document)
            assert text.split() == (tmp_path / "in" / name).read_bytes().split()


def test_a_window_says_whether_it_is_blank() -> None:
    [windows] = plan_windows([b" " * 64 + b"x"], 16)
    assert windows[0] == PlannedWindow(0, 13, 0, at_boundary=True, shortened=False, blank=True)
    assert [window.blank for window in windows] == [True] * 4 + [False]
