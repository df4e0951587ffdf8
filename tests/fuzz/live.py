"""Malformed input at a live service, with a good client beside it and an eye on its memory."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import grpc

from services.fusion.client import FusionClient
from services.rpc.channel import open_channel
from tests.fuzz.calls import Outcome, call_case
from tests.fuzz.raw import raw_case

_THREADS = 6
_GROWTH_BYTES = 64 * 2**20
_OUR_CODES = {
    grpc.StatusCode.OK,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.UNAUTHENTICATED,
}
_OF_UNDECODABLE = {grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN}
"""What grpcio's server, which is Serve's proxy, makes of bytes that are no message: our code never sees them."""


@dataclass
class Report:
    """What happened, by kind and outcome, and what must not have happened."""

    counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    violations: list[str] = field(default_factory=list)
    good_calls: int = 0
    growth_bytes: dict[str, int] = field(default_factory=dict)


def fuzz_live(
    cases: int,
    seed: int,
    *,
    address: str,
    token: str,
    good: FusionClient,
    resident_bytes: Callable[[], Mapping[str, int]],
) -> Report:
    """`cases` in all, a tenth of them on the bare port; `good` calls all the while."""
    report, lock = Report(), threading.Lock()
    at_once = threading.Semaphore(2 * _THREADS)

    def run(case: int) -> None:
        rng = random.Random(f"{seed}:{case}")
        try:
            if case % 10 == 0:
                kind, outcome = "raw bytes", raw_case(rng, address, token)
                bad = f"{outcome}" if outcome == "hangs" else None
            else:
                found = call_case(rng, channel, token)
                kind, outcome = found.method, found.code.name + ("" if found.decodable else ", undecodable")
                bad = _problem(found)
        except Exception as error:
            kind, outcome, bad = "fuzzer", type(error).__name__, f"{type(error).__name__}: {error}"
        finally:
            at_once.release()
        with lock:
            report.counts[kind, outcome] += 1
            if bad:
                report.violations.append(f"live case {case}, {kind}: {bad}")

    processes = set(resident_bytes())
    with open_channel(address) as channel, ThreadPoolExecutor(_THREADS) as pool, _Good(good) as beside:
        before: Mapping[str, int] = {}
        for case in range(cases):
            if case == cases // 5:  # pools and caches are filled by then
                before = resident_bytes()
            at_once.acquire()
            pool.submit(run, case)
    report.good_calls = beside.calls
    report.violations += beside.problems
    after = resident_bytes()
    if set(after) != processes:
        report.violations.append(f"processes: {sorted(processes)} before, {sorted(after)} after")
    report.growth_bytes = {name: after[name] - before[name] for name in before if name in after}
    for name, growth in report.growth_bytes.items():
        if growth > _GROWTH_BYTES:
            report.violations.append(f"{name}: memory grew by {growth / 2**20:.0f} MiB")
    return report


def _problem(found: Outcome) -> str | None:
    if found.code in _OUR_CODES or (not found.decodable and found.code in _OF_UNDECODABLE):
        return None
    return f"{found.code.name}{'' if found.decodable else ' (undecodable)'}: {found.details[:200]}"


class _Good:
    """A client that asks for something sensible again and again, and wants the same answer every time."""

    def __init__(self, client: FusionClient) -> None:
        self._client = client
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.calls = 0
        self.problems: list[str] = []

    def __enter__(self) -> _Good:
        self._expected = self._ask()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _ask(self) -> bytes:
        [block] = self._client.fuse([b"They have been in the time of all."], sources=["one", "two"])
        return block.topk_ids_TK.tobytes() + block.topk_logprobs_TK.tobytes()

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                if self._ask() != self._expected:
                    self.problems.append("good client: another answer than before")
            except Exception as error:
                self.problems.append(f"good client: {type(error).__name__}: {error}")
            self.calls += 1
            time.sleep(0.02)
