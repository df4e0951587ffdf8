"""Texts that a source, all of them, or the target cannot take: nobody's stream ends because of them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from fusion.v1 import fusion_pb2
from services.base.errors import InvalidArgumentError
from services.base.files import Files
from services.corpus.ledger import Corpus
from services.fusion.client import FusedWindow, SkippedWindow, StreamRequest
from services.store.backfill_list import BackfillList
from tests.fakes.services.plain_fusion import PlainFusion, plain_fusion
from tests.fakes.tiny_model import make_tiny_model, sentences

NOTHING = "§"
"""A character that the first source's tokenizer, and the target's, drop."""


def has_zebra(text: bytes) -> bool:
    return b"zebra" in text


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("refused")
    tokenizer = make_tiny_model(folder / "model-0", vocabulary_size=400, seed=0) / "tokenizer.json"
    described = json.loads(tokenizer.read_text())
    described["normalizer"] = {"type": "Replace", "pattern": {"String": NOTHING}, "content": ""}
    tokenizer.write_text(json.dumps(described))
    return folder


@pytest.fixture(scope="module")
def fusion(folder: Path) -> Iterator[PlainFusion]:
    documents = [sentences(300, seed=number) + " zebra " + sentences(300, seed=100 + number) for number in range(6)]
    documents += [20 * NOTHING, 30 * NOTHING, 40 * NOTHING, 50 * NOTHING]
    with plain_fusion(folder, documents=documents, native=True, store=str(folder / "store")) as running:
        yield running


def windows(fusion: PlainFusion, **request: object) -> list[FusedWindow | SkippedWindow]:
    """All windows of an epoch, each once."""
    asked = StreamRequest("words", "train", seed=1, **request)  # type: ignore[arg-type]
    found = list(fusion.client().stream(asked, prefetch_windows=8))
    assert sorted(window.index for window in found) == list(range(fusion.num_windows))
    return found


def text_of(fusion: PlainFusion, window: FusedWindow | SkippedWindow) -> bytes:
    return Corpus.open(fusion.recipe.corpus_folder).window("train", window.index).text


def test_what_cannot_be_fused_is_left_out_window_by_window(fusion: PlainFusion) -> None:
    """The second source refuses some windows, and of one kind the target's tokenizer keeps nothing."""
    fusion.sources[1].refuses = has_zebra
    kinds = set()
    for window in windows(fusion):
        text = text_of(fusion, window)
        if not text.decode().strip(NOTHING):
            assert isinstance(window, SkippedWindow)
            assert (window.missing, "keeps nothing" in window.reason) == ((), True)
            kinds.add("nothing")
            continue
        assert isinstance(window, FusedWindow)
        assert [share.present for share in window.block.shares] == [True, not has_zebra(text)]
        kinds.add("refused" if has_zebra(text) else "whole")
    assert kinds == {"nothing", "refused", "whole"}
    status = fusion.client().info().sources[1]
    assert (status.serving, status.breaker) == (True, fusion_pb2.BREAKER_STATE_CLOSED)
    # Nobody is asked to fill in what the source will never give.
    fingerprint = Corpus.open(fusion.recipe.corpus_folder).fingerprint("train")
    assert list(BackfillList(Files(str(fusion.recipe.store))).parts(fingerprint)) == []
    fusion.sources[1].refuses = lambda text: False


def test_a_window_that_all_refuse_is_skipped_with_the_reason(fusion: PlainFusion) -> None:
    """Although the service waits for sources that are down: this one will never answer."""
    fusion.sources[1].refuses = has_zebra
    skipped = [window for window in windows(fusion, sources=("source-1",)) if isinstance(window, SkippedWindow)]
    refused = [window for window in skipped if has_zebra(text_of(fusion, window))]
    assert refused
    for window in refused:
        assert window.missing == ("source-1",)
        assert "source-1" in window.reason
    with pytest.raises(InvalidArgumentError, match=r"source-1: .*0 tokens"):
        fusion.client().fuse([b"no zebra anywhere"], sources=["source-1"])
    fusion.sources[1].refuses = lambda text: False


def test_a_call_goes_on_with_the_sources_that_take_the_text(fusion: PlainFusion) -> None:
    fusion.sources[1].refuses = has_zebra
    blocks = fusion.client().fuse([b"a zebra said so", b"the man said so"])
    assert [[share.present for share in block.shares] for block in blocks] == [[True, False], [True, True]]
    fusion.sources[1].refuses = lambda text: False
    with pytest.raises(InvalidArgumentError, match="keeps nothing"):
        fusion.client().fuse([b"the man", NOTHING.encode()])


def test_streams_without_distributions_skip_what_the_target_drops(fusion: PlainFusion) -> None:
    found = windows(fusion, tokens_only=True)
    skipped = [window for window in found if isinstance(window, SkippedWindow)]
    assert skipped
    assert all(not text_of(fusion, window).decode().strip(NOTHING) for window in skipped)
