"""The windows of every step from the fused stream, and the time that the trainer waited for them."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

from fusion.v1 import fusion_pb2
from services.base.errors import FailedPreconditionError
from services.fusion.client import FusedWindow, SkippedWindow, StreamRequest
from services.wire.cursor import Cursor

_CLOSE_CHECK_SECONDS = 0.2
"""Time between two looks of a waiting reader whether the feed was closed."""


class FusionStream(Protocol):
    """The part of `services.fusion.client.FusionClient` that training uses."""

    def info(self) -> fusion_pb2.GetFusionInfoResponse: ...

    def stream(
        self, request: StreamRequest, *, prefetch_windows: int = 32
    ) -> Iterator[FusedWindow | SkippedWindow]: ...


class EmptyStream:
    """A stream without windows, for a run that learns from the target's own answers alone."""

    def info(self) -> fusion_pb2.GetFusionInfoResponse:
        return fusion_pb2.GetFusionInfoResponse()

    def stream(self, request: StreamRequest, *, prefetch_windows: int = 32) -> Iterator[FusedWindow | SkippedWindow]:
        return iter(())


@dataclass(slots=True)
class StepWindows:
    """A worker's share of a step: windows to train on, and those that the service left out for want of sources."""

    windows: list[FusedWindow] = field(default_factory=list)
    skipped: list[SkippedWindow] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.windows) + len(self.skipped)


class WindowFeed:
    """The windows of one rank, in batches that never cross the end of an epoch, or of a stage of the curriculum.

    So an epoch has the same number of steps whatever the number of workers, and a step consumes the same windows.
    A thread receives and decodes ahead, up to `prefetch_windows`, while the trainer computes.

    Attributes:
        wait_seconds: time spent waiting for the stream, in total.
        cursor: position after the windows that were taken.
    """

    def __init__(
        self, client: FusionStream, request: StreamRequest, *, batch_windows: int, prefetch_windows: int | None = None
    ) -> None:
        self.wait_seconds = 0.0
        self.cursor: Cursor | None = request.cursor
        self._batch_windows = batch_windows
        self._vocabulary = request.expected_vocabulary
        prefetch_windows = prefetch_windows or 2 * batch_windows
        self._ahead = _ReadAhead(client.stream(request, prefetch_windows=prefetch_windows), prefetch_windows)
        self._kept: FusedWindow | SkippedWindow | None = None

    def take(self, epoch: int, num_windows: int | None = None) -> StepWindows:
        """Return the next windows of `epoch`: `num_windows` (default a batch), or all that are left for this rank."""
        num_windows = self._batch_windows if num_windows is None else num_windows
        taken = StepWindows()
        started = time.perf_counter()
        while len(taken) < num_windows:
            window = self._kept or self._ahead.get()
            self._kept = None
            if window is None:
                break
            if window.cursor.epoch != epoch:
                self._kept = window
                break
            if isinstance(window, SkippedWindow):
                taken.skipped.append(window)
            else:
                self._check(window)
                taken.windows.append(window)
            self.cursor = window.cursor
        self.wait_seconds += time.perf_counter() - started
        return taken

    def close(self) -> None:
        """End the stream."""
        self._ahead.close()

    def _check(self, window: FusedWindow) -> None:
        if window.block.vocabulary != self._vocabulary:
            raise FailedPreconditionError(
                f"vocabulary: window {window.index} comes in {window.block.vocabulary}, the target's tokenizer is "
                f"{self._vocabulary}; the fusion service was started for another target"
            )


class _ReadAhead:
    """An iterator read in a thread, at most `depth` windows ahead; `get` raises the iterator's errors."""

    def __init__(self, stream: Iterator[FusedWindow | SkippedWindow], depth: int) -> None:
        self._queue: queue.Queue[FusedWindow | SkippedWindow | BaseException | None] = queue.Queue(depth)
        self._closed = threading.Event()
        self._ended = False
        # A daemon thread: it may hang in a call that returns only when the process ends.
        threading.Thread(target=self._read, args=(stream,), name="window-feed", daemon=True).start()

    def get(self) -> FusedWindow | SkippedWindow | None:
        """Return the next window; None behind the last one."""
        if self._ended:
            return None
        item = self._queue.get()
        if isinstance(item, BaseException):
            self._ended = True
            raise item
        self._ended = item is None
        return item

    def close(self) -> None:
        self._closed.set()

    def _read(self, stream: Iterator[FusedWindow | SkippedWindow]) -> None:
        try:
            for window in stream:
                if not self._put(window):
                    close = getattr(stream, "close", None)
                    if close is not None:
                        close()
                    return
            self._put(None)
        except BaseException as error:
            self._put(error)

    def _put(self, item: FusedWindow | SkippedWindow | BaseException | None) -> bool:
        while not self._closed.is_set():
            try:
                self._queue.put(item, timeout=_CLOSE_CHECK_SECONDS)
            except queue.Full:
                continue
            return True
        return False
