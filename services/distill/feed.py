"""Batches of windows from the fused stream, epoch by epoch, with the time that the trainer waited for them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Protocol

from fusion.v1 import fusion_pb2
from services.common.cursor import Cursor
from services.common.errors import FailedPreconditionError
from services.fusion.client import FusedWindow, StreamRequest


class FusionStream(Protocol):
    """What training needs of `services.fusion.client.FusionClient`."""

    def info(self) -> fusion_pb2.GetFusionInfoResponse: ...

    def stream(self, request: StreamRequest, *, prefetch_windows: int = 32) -> Iterator[FusedWindow]: ...


class WindowFeed:
    """Deals the windows of one rank in batches that never cross the end of an epoch.

    So the same number of steps makes up an epoch whatever the number of workers, and a step consumes the same windows.

    Attributes:
        wait_seconds: time spent waiting for the stream, in total.
        cursor: position after the windows that were taken; what a checkpoint stores.
    """

    def __init__(
        self, client: FusionStream, request: StreamRequest, *, batch_windows: int, prefetch_windows: int | None = None
    ) -> None:
        self.wait_seconds = 0.0
        self.cursor: Cursor | None = request.cursor
        self._batch_windows = batch_windows
        self._vocabulary = request.expected_vocabulary
        self._stream = client.stream(request, prefetch_windows=prefetch_windows or 2 * batch_windows)
        self._ahead: FusedWindow | None = None

    def take(self, epoch: int) -> list[FusedWindow]:
        """The next windows of `epoch`, as many as make a batch or are left; none once this rank has had its share."""
        windows: list[FusedWindow] = []
        started = time.perf_counter()
        while len(windows) < self._batch_windows:
            window = self._ahead or next(self._stream, None)
            self._ahead = None
            if window is None:
                break
            if window.cursor.epoch != epoch:
                self._ahead = window
                break
            self._check(window)
            windows.append(window)
            self.cursor = window.cursor
        self.wait_seconds += time.perf_counter() - started
        return windows

    def close(self) -> None:
        """Ends the stream."""
        close = getattr(self._stream, "close", None)
        if close is not None:
            close()

    def _check(self, window: FusedWindow) -> None:
        if window.block.vocabulary != self._vocabulary:
            raise FailedPreconditionError(
                f"vocabulary: window {window.index} comes in {window.block.vocabulary}, the target's tokenizer is "
                f"{self._vocabulary}; the fusion service was started for another target"
            )
