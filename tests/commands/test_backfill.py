"""Windows below the quorum are skipped, listed and completed later; so are the passes that degraded windows lack."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from services.base.errors import UnavailableError
from services.cli.app import app
from services.commands.backfill import Backfill
from services.corpus.config import PoolConfig
from services.fusion.client import FusedWindow, SkippedWindow, StreamRequest
from services.recipes.recipe import Recipe
from tests.fakes.services.plain_fusion import PlainFusion, plain_fusion

REQUEST = StreamRequest("words", "train", seed=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("backfill")


def stream_with_an_outage(fusion: PlainFusion) -> list[FusedWindow | SkippedWindow]:
    stream = fusion.client().stream(REQUEST, prefetch_windows=4)
    windows = [*islice(stream, 5)]
    fusion.sources[1].hold_after = fusion.sources[1].scored
    windows += stream
    fusion.sources[1].hold_after = None
    assert sorted(window.index for window in windows) == list(range(fusion.num_windows))
    return windows


def backfill(recipe: Recipe, folder: Path) -> Any:
    path = folder / "saved.yaml"
    recipe.save(path)
    return CliRunner().invoke(app, ["backfill", str(path)], terminal_width=400)


def whole(windows: list[FusedWindow | SkippedWindow]) -> bool:
    return all(isinstance(w, FusedWindow) and all(s.present for s in w.block.shares) for w in windows)


@pytest.mark.parametrize("store", ["store-skip", "memory://skip"])
def test_skipped_windows_are_told_listed_and_completed(store: str, folder: Path) -> None:
    settings: dict[str, Any] = {"min_sources": 2, "below_quorum": "skip", "store": store, "source_timeout_seconds": 0.5}
    with plain_fusion(folder, **settings) as fusion:
        windows = stream_with_an_outage(fusion)
        skipped = [window for window in windows if isinstance(window, SkippedWindow)]
        assert skipped
        assert {window.missing for window in skipped} == {("source-1",)}
        assert whole([window for window in windows if not isinstance(window, SkippedWindow)])
        info = fusion.client().info()
        assert (info.below_quorum, info.counts.skipped, info.counts.degraded) == ("skip", len(skipped), 0)
        # A replica that dies takes nothing of the list with it, and one that sends a frame again adds nothing to it.
        listed = {w.index for _, part in Backfill(fusion.recipe).parts() for w in part.windows}
        assert listed == {window.index for window in skipped}
        scored = [source.scored for source in fusion.sources]
        done = backfill(fusion.recipe, folder)
        assert done.exit_code == 0, done.output
        assert f"{len(skipped)} windows complete, {len(skipped)} answers" in done.stdout
        assert fusion.sources[0].scored == scored[0]
        assert list(Backfill(fusion.recipe).parts()) == []
        assert "0 windows complete" in backfill(fusion.recipe, folder).stdout
    with plain_fusion(folder, **settings) as fusion:  # the next run
        windows = list(fusion.client().stream(REQUEST))
        assert len(windows) == fusion.num_windows
        assert whole(windows)
        assert [source.scored for source in fusion.sources] == [0, 0]


def test_degraded_windows_get_the_passes_that_they_lack(folder: Path) -> None:
    with plain_fusion(folder, store="store-degraded", source_timeout_seconds=0.5) as fusion:
        windows = stream_with_an_outage(fusion)
        degraded = sum(not whole([window]) for window in windows)
        assert 0 < degraded < len(windows)
        assert fusion.client().info().counts.degraded == degraded
        listed = [window for _, part in Backfill(fusion.recipe).parts() for window in part.windows]
        config = fusion.recipe.corpus.model_copy(update={"pools": {"whole": PoolConfig()}, "folder": "pooled"})
        pooled = Backfill(fusion.recipe.model_copy(update={"corpus": config}))  # the pool has the windows of the split
        assert [window for _, part in pooled.parts() for window in part.windows] == listed
        done = backfill(fusion.recipe, folder)
        assert (done.exit_code, f"{degraded} windows complete" in done.stdout) == (0, True), done.output
    with plain_fusion(folder, store="store-degraded") as fusion:
        assert whole(list(fusion.client().stream(REQUEST)))
        assert [source.scored for source in fusion.sources] == [0, 0]


def test_a_source_that_fails_leaves_the_list_for_the_next_time(folder: Path) -> None:
    settings: dict[str, Any] = {"store": "store-fails", "source_timeout_seconds": 0.5, "source_attempts": 1}
    with plain_fusion(folder, **settings) as fusion:
        stream_with_an_outage(fusion)
        listed = list(Backfill(fusion.recipe).parts())
        assert listed
        fusion.sources[1].hold_after = fusion.sources[1].scored + 1
        done = backfill(fusion.recipe, folder)
        fusion.sources[1].hold_after = None
        assert done.exit_code == 1
        assert "the same command goes on from there" in done.stderr
        assert list(Backfill(fusion.recipe).parts()) == listed
        assert backfill(fusion.recipe, folder).exit_code == 0


def test_skipping_needs_a_list(folder: Path) -> None:
    with pytest.raises(ValueError, match="below_quorum: skip needs a store"), plain_fusion(folder, below_quorum="skip"):
        pass


def test_a_window_is_not_skipped_when_it_cannot_be_listed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("services.store.backfill_list.BackfillList.add", full)
    settings: dict[str, Any] = {"min_sources": 2, "below_quorum": "skip", "source_timeout_seconds": 0.5}
    with plain_fusion(folder, store="store-full", **settings) as fusion:
        fusion.sources[1].hold_after = 0
        with pytest.raises(UnavailableError, match="back-fill list cannot be written: no space left"):
            next(fusion.client(patience_seconds=0).stream(REQUEST))
