"""Stream, back-fill, capture and store over a corpus of many shards, in a folder and in an object store."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from services.cli.app import app
from services.corpus.ledger import TRAIN, Corpus
from services.fusion.client import FusedWindow, SkippedWindow, StreamRequest
from tests.fakes.files.many_shards import many_shards
from tests.fakes.services.places import PLACES, Place, place_in
from tests.fakes.services.plain_fusion import plain_fusion


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    with place_in(request.param, tmp_path, monkeypatch) as opened:
        yield opened


def run(command: str, recipe: Path) -> str:
    done = CliRunner().invoke(app, [command, str(recipe)], terminal_width=400)
    assert done.exit_code == 0, done.output
    return done.stdout


def test_many_shards_serve_streams_backfill_and_capture(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.fusion.parts.MANY_WINDOWS", 20)  # so that the stream is drawn group by group
    settings: dict[str, Any] = {
        "windows": {"folder": place("corpus")},
        "store": place("store"),
        "min_sources": 2,
        "below_quorum": "skip",
        "source_timeout_seconds": 0.5,
    }
    request = StreamRequest("words", TRAIN, seed=1)
    with many_shards(1500), plain_fusion(tmp_path, **settings) as fusion:
        recipe = tmp_path / "saved.yaml"
        fusion.recipe.save(recipe)
        corpus = Corpus.open(place("corpus"))
        assert len(corpus.record["splits"][TRAIN]["shards"]) > 2
        stream = fusion.client().stream(request, prefetch_windows=4)
        windows = [*islice(stream, 5)]
        fusion.sources[1].hold_after = fusion.sources[1].scored
        windows += stream
        fusion.sources[1].hold_after = None
        skipped = [window for window in windows if isinstance(window, SkippedWindow)]
        assert skipped and len(skipped) < len(windows)
        assert f"{len(skipped)} windows complete" in run("backfill", recipe)
        run("capture", recipe)
        scored = [source.scored for source in fusion.sources]
        run("capture", recipe)
        assert [source.scored for source in fusion.sources] == scored
    with many_shards(1500), plain_fusion(tmp_path, **settings) as fusion:  # the next run
        whole = list(fusion.client().stream(request))
        assert [source.scored for source in fusion.sources] == [0, 0]
    assert [window.index for window in whole] == [window.index for window in windows]
    assert sorted(window.index for window in whole) == list(range(corpus.num_windows(TRAIN)))
    for window in whole:
        assert isinstance(window, FusedWindow)
        assert window.block.text_bytes == corpus.window(TRAIN, window.index).text
