"""vLLM's engine process is killed during a stream: retryable errors, a new replica, every window exactly once."""

from __future__ import annotations

import asyncio

import psutil
import pytest

from fusion_core.blocks import Block
from services.base.errors import UnavailableError
from services.fusion.sources.remote import RemoteSource
from services.source.client import ScoreStream
from services.wire.passage import Passage
from tests.fakes.live import Live
from tests.fakes.tiny_model import sentences

pytestmark = [pytest.mark.drill, pytest.mark.timeout(900)]

NUM_WINDOWS = 24


def engine_process(live: Live) -> psutil.Process:
    """The process that vLLM computes in; the deployment has one vLLM source."""
    children = psutil.Process(live.deployment.pid).children(recursive=True)
    [engine] = [process for process in children if "EngineCor" in process.name()]  # Linux cuts names off
    return engine


def test_every_window_arrives_once_although_the_engine_is_killed(live: Live) -> None:
    config = live.recipe.fusion_service()
    endpoint = next(endpoint for endpoint in config.sources if endpoint.name == "smollm2")
    windows = [Passage(sentences(200, seed=1000 + number).encode()) for number in range(NUM_WINDOWS)]
    before = engine_process(live)

    async def run() -> None:
        source = RemoteSource(endpoint, config.service)
        arrived: list[Block] = []

        async def fetch(window: Passage) -> None:
            while True:
                try:
                    arrived.append((await source.score(window)).block)
                    return
                except UnavailableError:  # left out until the replica is back
                    await asyncio.sleep(0.5)

        impatient = ScoreStream(endpoint.address, endpoint.application, top_k=endpoint.top_k)
        fetching = [asyncio.create_task(fetch(window)) for window in windows]
        await asyncio.wait(fetching, return_when=asyncio.FIRST_COMPLETED)
        waiting = asyncio.create_task(impatient.score(windows[0]))
        before.kill()
        with pytest.raises(UnavailableError):
            await waiting
        assert len(arrived) < NUM_WINDOWS  # killed under way
        await asyncio.gather(*fetching)
        await impatient.close()
        await source.close()
        assert sorted(block.text_bytes for block in arrived) == sorted(window.text for window in windows)
        for block in arrived:
            block.validate()

    asyncio.run(run())
    assert engine_process(live).pid != before.pid
