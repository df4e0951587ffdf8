"""One fused stream keeps every replica of a source busy, also those that come while it runs."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from services.commands.prepare import prepare
from services.deploy.local_ray import enable_ray_authentication, free_port
from services.deploy.serve_config import serve_config
from services.fusion.client import FusedWindow, FusionClient, StreamRequest
from services.recipes.recipe import Recipe
from tests.fakes.tiny_model import make_tiny_model, sentences

pytestmark = [pytest.mark.drill, pytest.mark.timeout(600)]

TOKENS_PER_SECOND = 600
MEASURED_WINDOWS = 200
GAIN = 1.9


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    documents = tmp_path / "documents"
    documents.mkdir()
    for number in range(40):
        (documents / f"{number:02}.txt").write_text(sentences(600, seed=number), encoding="utf-8")
    model = make_tiny_model(tmp_path / "model", vocabulary_size=400, seed=1)
    source = {"name": "paced", "model": str(model), "engine": "synthetic", "top_k": 8, "max_tokens": 400}
    return Recipe.model_validate(
        {
            "name": "spread",
            "output_dir": str(tmp_path / "runs"),
            "corpus": {"name": "words", "files": [f"{documents}/*.txt"], "window_bytes": 128, "context_bytes": 0},
            "sources": [source | {"synthetic": {"tokens_per_second": TOKENS_PER_SECOND}}],
            "target": {
                "config": {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "intermediate_size": 64},
                "tokenizer": {"train": {"vocabulary_size": 300}},
            },
            "fusion": {"k_out": 8},
            "service": {"grpc_port": free_port(), "http_port": free_port(), "store": None},
        }
    )


def with_replicas(recipe: Recipe, num_replicas: int) -> dict[str, Any]:
    [source] = recipe.sources
    return serve_config(
        recipe.model_copy(update={"sources": (source.model_copy(update={"num_replicas": num_replicas}),)})
    )


class Reader:
    """Takes the windows of one endless stream in a thread."""

    def __init__(self, address: str) -> None:
        self.windows: list[FusedWindow] = []
        self._more, self._ended = threading.Condition(), False
        request = StreamRequest("words", "train", seed=1, num_epochs=10_000)
        stream = FusionClient(address, patience_seconds=60).stream(request, prefetch_windows=32)
        self._thread = threading.Thread(target=self._read, args=(stream,))
        self._thread.start()

    def _read(self, stream: Iterator[Any]) -> None:
        for window in stream:
            with self._more:
                self.windows.append(window)
                self._more.notify_all()
                if self._ended:
                    return

    def take(self, num_windows: int) -> float:
        """Waits for so many more windows; returns how many came in a second."""
        started, wanted = time.monotonic(), len(self.windows) + num_windows
        with self._more:
            assert self._more.wait_for(lambda: len(self.windows) >= wanted, timeout=120)
        return num_windows / (time.monotonic() - started)

    def close(self) -> None:
        self._ended = True
        self._thread.join(60)


def test_a_second_replica_gives_one_stream_almost_twice_the_texts(recipe: Recipe) -> None:
    enable_ray_authentication()
    from tests.fakes.services.local_serve import apply, local_serve

    prepare(recipe)
    with local_serve(with_replicas(recipe, 1)):
        reader = Reader(f"127.0.0.1:{recipe.service.grpc_port}")
        try:
            reader.take(50)
            alone = reader.take(MEASURED_WINDOWS)
            apply(with_replicas(recipe, 2))
            reader.take(MEASURED_WINDOWS)  # the pool looks around meanwhile
            together = reader.take(2 * MEASURED_WINDOWS)
        finally:
            reader.close()
    assert together >= GAIN * alone, f"{alone:.1f} windows a second, then {together:.1f}"
    received = Counter((window.cursor.epoch, window.index) for window in reader.windows)
    assert max(received.values()) == 1
    last = reader.windows[-1].cursor
    order = [(window.cursor.epoch, window.cursor.received) for window in reader.windows]
    assert order == sorted(order)
    assert len(reader.windows) == sum(epoch < last.epoch for epoch, _ in received) + last.received
