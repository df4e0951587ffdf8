"""A real recall service without Ray: the servicer on a plain gRPC server in this process, with a scripted judge."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import grpc
import numpy as np
from grpc_health.v1 import health_pb2_grpc

from fusion.v1 import recall_pb2_grpc
from fusion_core.recall.split import Span
from services.recall.config import RecallConfig
from services.recall.judge import Document
from services.recall.selector import BlockJudge
from services.recall.servicer import RecallServicer


class ScriptedJudge:
    """A judge whose blocks are lines and whose tokens are characters; a block's score is the share of the question's
    letters in it.

    Attributes:
        window_tokens: as `judge.Judge` has it.
        before: called before windows are scored, with their number.
        scored: the number of windows that were scored.
    """

    window_tokens = 200

    def __init__(self, before: Callable[[int], None] = lambda num_windows: None) -> None:
        self.before, self.scored = before, 0

    def read(self, text: str, block_tokens: int, /) -> Document:
        lines, start, spans = text.splitlines(keepends=True), 0, []
        for line in lines:
            spans.append(Span(start, start + len(line), len(line)))
            start += len(line)
        return Document(text, spans, [[1] * len(line) for line in lines])

    def question(self, question: str, /) -> list[int]:
        return [ord(letter) for letter in question]

    def scorer(self, start: list[int], document: Document, /) -> Callable[[Sequence[Sequence[int]]], list[Any]]:
        wanted = set(map(chr, start))

        def score(windows: Sequence[Sequence[int]]) -> list[Any]:
            self.before(len(windows))
            self.scored += len(windows)
            shares = [[len(wanted & set(document.blocks[b])) / len(wanted) for b in window] for window in windows]
            return [np.array(share) for share in shares]

        return score


@contextmanager
def plain_recall(config: RecallConfig, judge: BlockJudge | None = None, *, port: int = 0) -> Iterator[str]:
    """Serves as long as the block takes; gives the address."""
    ready, end, loop = threading.Event(), asyncio.Event(), asyncio.new_event_loop()
    address: list[str] = []

    async def serve() -> None:
        servicer = RecallServicer.__new__(RecallServicer)
        await servicer.__init__(config, judge)  # type: ignore[misc]
        server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        recall_pb2_grpc.add_RecallServiceServicer_to_server(servicer, server)
        health = health_pb2_grpc.HealthServicer()
        health.Check = servicer.Check
        health_pb2_grpc.add_HealthServicer_to_server(health, server)
        address.append(f"127.0.0.1:{server.add_insecure_port(f'127.0.0.1:{port}')}")
        await server.start()
        ready.set()
        await end.wait()
        await server.stop(None)
        await servicer.close()

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),), daemon=True)
    thread.start()
    assert ready.wait(120)
    try:
        yield address[0]
    finally:
        loop.call_soon_threadsafe(end.set)
        thread.join(60)
