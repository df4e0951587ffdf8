"""Sources of engine `openai` for tests: settings, the rows of one prompt, a stream while the server is away."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

from services.base.errors import UnavailableError
from services.fusion.config import ServiceConfig, SourceEndpoint
from services.fusion.sources.remote import RemoteSource
from services.source.config import SourceConfig
from services.source.engines.base import PromptScores
from services.source.engines.load import load_engine
from services.wire.passage import Passage
from tests.fakes.services.model_server import ModelServer


def config(folder: Path, server: ModelServer, engine: dict[str, Any] | None = None, **values: Any) -> SourceConfig:
    section = {"kind": "openai", "url": server.url, "model": "tiny", "flavour": server.flavour, "retry_seconds": 0}
    keys = {"name": "there", "model": str(folder), "top_k": 8, "max_tokens": 255, "engine": section | (engine or {})}
    return SourceConfig.model_validate(keys | values)


def scored(config: SourceConfig, folder: Path, then: Callable[[], None], ids: list[int] | None = None) -> PromptScores:
    """Return one prompt's rows from an engine that was loaded before `then` happened."""

    async def run() -> PromptScores:
        engine = await load_engine(config, folder, 400)
        then()
        try:
            return await engine.score(ids or [0, 5, 6, 7], 8)
        finally:
            engine.close()

    return asyncio.run(run())


async def outage(
    source: RemoteSource, windows: list[Passage], stop: Callable[[], Any], start: Callable[[], Any]
) -> None:
    """Score windows while the server ends and comes back; assert that each arrives once, by way of an open breaker."""
    arrived: list[bytes] = []

    async def fetch(window: Passage) -> None:
        while True:
            try:
                arrived.append((await source.score(window)).block.text_bytes)
                return
            except UnavailableError as error:
                if not started.is_set() and "left out until a trial" in str(error):
                    started.set()
                await asyncio.sleep(0.1)

    started = asyncio.Event()
    fetching = [asyncio.create_task(fetch(window)) for window in windows[: len(windows) // 2]]
    await asyncio.gather(*fetching)
    await asyncio.to_thread(stop)
    fetching = [asyncio.create_task(fetch(window)) for window in windows[len(windows) // 2 :]]
    async with asyncio.timeout(60):
        await started.wait()  # the breaker is open
    assert len(arrived) == len(windows) // 2
    await asyncio.to_thread(start)
    await asyncio.gather(*fetching)
    assert sorted(arrived) == sorted(window.text for window in windows)
    assert (await source.status()).serving


def remote(address: str, folder: Path) -> RemoteSource:
    endpoint = SourceEndpoint(name="there", model=str(folder), address=address, application="there", top_k=8)
    service = ServiceConfig.model_validate({"breaker_failures": 2, "breaker_pause_seconds": 0.2, "source_attempts": 1})
    return RemoteSource(endpoint, service)
