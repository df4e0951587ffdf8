"""Documents to cut, and a corpus put together again."""

from __future__ import annotations

from pathlib import Path

from services.corpus.config import CorpusConfig
from services.corpus.ledger import Corpus
from services.corpus.prepare import plan_corpus, read_text


def prepare_corpus(config: CorpusConfig, folder: Path) -> Corpus:
    """A corpus whose windows only white space decides."""
    return plan_corpus(read_text(config, folder))


def story(number: int, num_words: int = 60) -> str:
    """A document that has no run of text in common with another number's."""
    return " ".join(f"word{number}x{index}" for index in range(num_words)) + ".\n"


def write_stories(folder: Path, count: int = 20) -> None:
    folder.mkdir(exist_ok=True)
    for number in range(count):
        (folder / f"{number:03}.txt").write_text(story(number))


def documents_of(corpus: Corpus, split: str) -> dict[str, bytes]:
    """The documents put together again from their windows, whose places are checked on the way."""
    found: dict[str, bytes] = {}
    for index in range(corpus.num_windows(split)):
        window = corpus.window(split, index)
        assert window.index == index
        assert window.start_byte == len(found.get(window.document, b""))
        found[window.document] = found.get(window.document, b"") + window.text
    return found
