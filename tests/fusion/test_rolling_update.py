"""A rolling update of the fusion service under a stream: replicas hand over, and no window is lost or doubled."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from typing import Any

import pytest

from services.corpus.ledger import Corpus
from services.deploy.serve_config import serve_config
from services.deploy.up import deploy
from services.fusion.client import StreamRequest
from services.recipes.recipe import Recipe
from tests.fakes.live import Live

pytestmark = [pytest.mark.drill, pytest.mark.timeout(900)]

EPOCHS = 1000


def updated(recipe: Recipe, **service: Any) -> dict[str, Any]:
    """The Serve config with other arguments for the fusion service: Serve replaces its replicas."""
    return serve_config(recipe.model_copy(update={"service": recipe.service.model_copy(update=service)}))


def test_a_rolling_update_loses_and_doubles_nothing(live: Live, caplog: pytest.LogCaptureFixture) -> None:
    corpus = Corpus.open(live.recipe.corpus_folder)
    everything = set(range(corpus.num_windows("train")))
    dashboard = live.deployment.dashboard

    def update(config: dict[str, Any]) -> None:
        deploy(config, dashboard, lambda states: None, timeout_seconds=600)

    list(live.client.stream(StreamRequest("sentences", "train", seed=5)))  # into the store: what follows is fast
    stream = live.client.stream(StreamRequest("sentences", "train", seed=5, num_epochs=EPOCHS), prefetch_windows=8)
    windows = [next(stream)]
    updating = threading.Thread(target=update, args=(updated(live.recipe, num_replicas=2, heartbeat_seconds=4),))
    try:
        with caplog.at_level(logging.WARNING, logger="services.fusion.client"):
            updating.start()
            deadline = time.monotonic() + 600
            while updating.is_alive() or not handed_over(caplog):
                windows.append(next(stream))
                assert time.monotonic() < deadline
            windows += (next(stream) for _ in everything)
        stream.close()  # type: ignore[attr-defined]
    finally:
        updating.join()
        update(serve_config(live.recipe))
    received = Counter((window.cursor.epoch, window.index) for window in windows)
    assert max(received.values()) == 1
    last = windows[-1].cursor
    assert len(windows) == last.epoch * len(everything) + last.received
    for epoch in range(last.epoch):
        assert {index for at, index in received if at == epoch} == everything


def handed_over(caplog: pytest.LogCaptureFixture) -> bool:
    return any("draining: this replica is being stopped" in record.getMessage() for record in caplog.records)
