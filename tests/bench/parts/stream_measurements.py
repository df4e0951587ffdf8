"""The measurements of stream.py: fan-out, ceiling, and a consumer that stalls."""

from __future__ import annotations

import asyncio
import itertools
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import grpc
import psutil

from fusion.v1 import block_pb2, fusion_pb2, fusion_pb2_grpc
from services.corpus.ledger import Corpus
from services.fusion.client import FusedWindow, FusionClient
from services.rpc.auth import call_metadata
from services.rpc.channel import open_channel
from tests.bench.parts.report import Report
from tests.bench.parts.stream_services import TOP_K, WINDOW_BYTES, Bench, Served, everything

PACE = 20_000
"""Tokens per second of a paced source."""
CREDITS = 32
"""Windows that the client keeps under way."""


@dataclass(frozen=True)
class Rate:
    """Text and tokens per second."""

    bytes: float
    tokens: float


def fused_rate(served: Served, seconds: float) -> Rate:
    """Return the rate at which the client receives and decodes, once the stream is running."""
    windows = FusionClient(served.address).stream(everything(served), prefetch_windows=CREDITS)
    try:
        for _ in itertools.islice(windows, 2 * CREDITS):
            pass
        start, num_bytes, num_tokens = time.perf_counter(), 0, 0
        while (elapsed := time.perf_counter() - start) < seconds:
            window = next(windows)
            assert isinstance(window, FusedWindow)
            block = window.block
            num_bytes, num_tokens = num_bytes + len(block.text_bytes), num_tokens + block.num_tokens
    finally:
        windows.close()  # type: ignore[attr-defined]  # a generator
    return Rate(num_bytes / elapsed, num_tokens / elapsed)


def source_rate(served: Served, source: str, seconds: float) -> Rate:
    """Return the rate of one source alone, for a client that keeps as many windows under way."""
    from services.source.client import ScoreStream
    from services.wire.passage import Passage

    passages = [Passage(text) for text in Corpus.open(served.recipe.corpus_folder).texts("train")]

    async def consume() -> Rate:
        stream = ScoreStream(served.address, source, top_k=TOP_K)
        texts, done, start = itertools.cycle(passages), [0, 0], 0.0

        async def lane() -> None:
            while not start or time.perf_counter() - start < seconds:
                block = await stream.score(next(texts))
                done[0], done[1] = done[0] + len(block.text_bytes), done[1] + block.num_tokens

        lanes = [asyncio.ensure_future(lane()) for _ in range(CREDITS)]
        await asyncio.sleep(seconds / 5)
        start, done[:] = time.perf_counter(), [0, 0]
        await asyncio.sleep(seconds)
        rate = Rate(*(amount / (time.perf_counter() - start) for amount in done))
        await asyncio.gather(*lanes)
        await stream.close()
        return rate

    return asyncio.run(consume())


def measure_fan_out(report: Report, bench: Bench) -> None:
    """Sources at a set pace, asked side by side: the stream is as fast as the slowest of them."""
    for num_sources in (2, 4):
        with bench.served(num_sources, PACE) as served:
            fused_rate(served, 1)  # everything is compiled and loaded
            alone = {s.name: source_rate(served, s.name, bench.seconds / 3) for s in served.recipe.sources}
            with _cpu_seconds(served) as used:
                fused = fused_rate(served, bench.seconds)
        slowest = min(alone, key=lambda name: alone[name].bytes)
        for name, rate in alone.items():
            report.row(table=f"{num_sources} sources", side=f"{name} alone", **_cells(rate))
        report.row(table=f"{num_sources} sources", side="fused", **_cells(fused), cores=_text(used))
        ratio = fused.bytes / alone[slowest].bytes
        report.check(f"{num_sources} sources: pace of the slowest", alone[slowest].tokens, "tokens/s", at_least=19_000)
        report.check(f"{num_sources} sources: fused over the slowest alone", ratio, "times", at_least=0.95)


def measure_ceiling(report: Report, bench: Bench) -> None:
    """Two sources without any delay: what one fusion replica makes of this machine, and of a core of its own."""
    for window_bytes in (WINDOW_BYTES, WINDOW_BYTES // 8):
        with bench.served(2, None, window_bytes) as served:
            fused_rate(served, 1)
            alone = {s.name: source_rate(served, s.name, bench.seconds / 3) for s in served.recipe.sources}
            with _cpu_seconds(served) as used:
                fused = fused_rate(served, bench.seconds)
        table = f"ceiling, windows of {window_bytes:,} bytes"
        for name, rate in alone.items():
            report.row(table=table, side=f"{name} alone", **_cells(rate))
        report.row(table=table, side="fused", **_cells(fused), cores=_text(used))
        if window_bytes == WINDOW_BYTES:
            report.check("ceiling, all on this machine", fused.tokens, "fused tokens/s", at_least=20_000)
            per_core = fused.tokens / used["fusion"]
            report.check("ceiling, per core of the replica", per_core, "fused tokens/s", at_least=40_000)


def measure_stall(report: Report, bench: Bench) -> None:
    """A consumer that grants credits, reads one frame and then nothing for a minute."""
    stall_seconds = 10 if bench.quick else 60
    with bench.served(2, None) as served:
        fused_rate(served, bench.seconds / 2)  # memory that is kept once it was needed is no sign of a leak
        time.sleep(2)
        idle = _resident(served)
        with _Granted(served, CREDITS) as stream:
            first = stream.next_frame()
            most = idle
            end = time.monotonic() + stall_seconds
            while time.monotonic() < end:
                time.sleep(0.25)
                now = _resident(served)
                most = {name: max(most[name], now[name]) for name in idle}
            frames = [first, *stream.frames_under_way()]
    blocks = [block.ByteSize() for frame in frames for block in frame.blocks]
    grown = {name: (most[name] - idle[name]) / 2**20 for name in idle}
    for name, mebibytes in grown.items():
        report.row(table="stall", process=name, idle_mib=idle[name] / 2**20, grown_mib=mebibytes)
    bound = CREDITS * max(blocks)
    in_flight = sum(blocks) - sum(block.ByteSize() for block in first.blocks)
    report.check(f"windows sent on {CREDITS} credits", len(blocks), "windows", at_most=CREDITS)
    report.check("bytes in flight while stalled", in_flight / 2**20, "MiB", at_most=bound / 2**20)
    report.check("memory above idle, all processes", sum(grown.values()), "MiB", at_most=64)


MEASUREMENTS: Sequence[Callable[[Report, Bench], None]] = (measure_fan_out, measure_ceiling, measure_stall)


class _Granted:
    """A stream that is granted so many credits, and no more."""

    def __init__(self, served: Served, credits: int) -> None:
        self._channel = open_channel(served.address)
        self._outbox: queue.SimpleQueue[fusion_pb2.StreamFusedRequest | None] = queue.SimpleQueue()
        opening = everything(served).to_proto()
        self._outbox.put(fusion_pb2.StreamFusedRequest(open=opening))
        self._outbox.put(fusion_pb2.StreamFusedRequest(credit=block_pb2.Credit(blocks=credits)))
        stub = fusion_pb2_grpc.FusionServiceStub(self._channel)
        self._call = stub.StreamFused(iter(self._outbox.get, None), metadata=call_metadata("fusion"))

    def __enter__(self) -> _Granted:
        return self

    def __exit__(self, *_: object) -> None:
        self._call.cancel()
        self._outbox.put(None)
        self._channel.close()

    def next_frame(self) -> Any:
        """The next one that is no heartbeat."""
        return next(frame for frame in self._call if frame.blocks)

    def frames_under_way(self, patience_seconds: float = 5.0) -> list[Any]:
        """Everything that comes without a further credit."""
        frames: list[Any] = []

        def read() -> None:
            try:
                frames.extend(frame for frame in self._call if frame.blocks)
            except grpc.RpcError as error:
                if error.code() is not grpc.StatusCode.CANCELLED:
                    raise

        thread = threading.Thread(target=read)
        thread.start()
        thread.join(patience_seconds)
        self._call.cancel()
        thread.join()
        return frames


@contextmanager
def _cpu_seconds(served: Served) -> Iterator[dict[str, float]]:
    """Fills the dictionary with the cores that each process kept busy, this one's as `client`."""
    used: dict[str, float] = {}
    processes = served.processes | {"client": psutil.Process()}
    before = {name: sum(process.cpu_times()[:2]) for name, process in processes.items()}
    start = time.perf_counter()
    yield used
    elapsed = time.perf_counter() - start
    used |= {name: (sum(p.cpu_times()[:2]) - before[name]) / elapsed for name, p in processes.items()}


def _resident(served: Served) -> dict[str, int]:
    return {name: process.memory_info().rss for name, process in served.processes.items()}


def _cells(rate: Rate) -> dict[str, float]:
    return {"bytes_per_second": rate.bytes, "tokens_per_second": rate.tokens}


def _text(used: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {cores:.2f}" for name, cores in sorted(used.items()))
