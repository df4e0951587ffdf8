"""The client's side of a fused stream: frames that follow each other, no window twice, no long silence."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from typing import Any

import grpc

from fusion.v1 import block_pb2, fusion_pb2
from fusion_core.blocks import Block
from services.base.errors import FailedPreconditionError, UnavailableError
from services.wire.block import decode_block
from services.wire.cursor import Cursor
from services.wire.protocol import PROTOCOL_VERSION


@dataclass(frozen=True, slots=True)
class FusedWindow:
    """One window of the stream, where it comes from, and the cursor after it.

    `pool` is its split, where that is another one than the stream's, and `pass_number` counts the passes over it.
    """

    block: Block
    document: str
    start_byte: int
    index: int
    cursor: Cursor
    pool: str = ""
    pass_number: int = 0


@dataclass(frozen=True, slots=True)
class SkippedWindow:
    """A window that comes without distributions: `missing` names the sources that took no part, `reason` says why.

    Too few sources answered, and the service's recipe says `service.below_quorum: skip`; or the text can never be
    fused, because the target's tokenizer keeps nothing of it or too few sources take it.
    """

    missing: tuple[str, ...]
    document: str
    start_byte: int
    index: int
    cursor: Cursor
    reason: str = ""
    pool: str = ""
    pass_number: int = 0


class Frames:
    """The frames of a call, which is cancelled when a caller waits too long for the next frame.

    A service, or a proxy before it, may have stopped without closing the connection.
    """

    def __init__(self, call: Any, silence_seconds: float) -> None:
        self._call = call
        self._silence_seconds = silence_seconds
        self._waiting_since: float | None = None
        self._silent = False
        self._closed = threading.Event()
        threading.Thread(target=self._watch, name="stream-silence", daemon=True).start()

    def next(self) -> fusion_pb2.StreamFusedResponse | None:
        """Return the next frame, None behind the last.

        Raises grpc.RpcError, or UnavailableError after too long a silence.
        """
        self._waiting_since = time.monotonic()
        try:
            frame: fusion_pb2.StreamFusedResponse | None = next(self._call, None)
            return frame
        except grpc.RpcError as error:
            if self._silent:
                raise UnavailableError(f"stream: not even a heartbeat for {self._silence_seconds:g} s") from error
            raise
        finally:
            self._waiting_since = None

    def close(self) -> None:
        self._closed.set()
        self._call.cancel()

    def _watch(self) -> None:
        while not self._closed.wait(self._silence_seconds / 8):
            since = self._waiting_since
            if since is not None and time.monotonic() - since > self._silence_seconds:
                self._silent = True
                self._call.cancel()
                return


class SeenWindows:
    """The windows that have come in the present pass over each split, a bit for each."""

    def __init__(self) -> None:
        self._passes: dict[str, tuple[int, bytearray]] = {}

    def add(self, window: FusedWindow | SkippedWindow) -> None:
        """Add a window; raises FailedPreconditionError for one that has come before, or of an earlier pass."""
        number, bits = self._passes.get(window.pool, (-1, bytearray()))
        if window.pass_number != number:
            if window.pass_number < number:
                raise FailedPreconditionError(f"stream: pass {window.pass_number} comes again after pass {number}")
            bits = bytearray()
            self._passes[window.pool] = window.pass_number, bits
        byte, bit = divmod(window.index, 8)
        if byte >= len(bits):
            bits.extend(bytes(byte + 1 - len(bits) + len(bits) // 2))
        if bits[byte] >> bit & 1:
            raise FailedPreconditionError(f"stream: window {window.index} comes twice in pass {window.pass_number}")
        bits[byte] |= 1 << bit


def check_version(first: fusion_pb2.StreamFusedResponse) -> None:
    """Raise FailedPreconditionError unless the first frame of a stream names this client's protocol version."""
    version = first.protocol_version
    if version != PROTOCOL_VERSION:
        raise FailedPreconditionError(
            f"protocol_version: this client speaks {PROTOCOL_VERSION}, the service {version or 'one before 2'}"
        )


def windows_of(
    frame: fusion_pb2.StreamFusedResponse, before: Cursor | None, expected_vocabulary: str
) -> list[FusedWindow | SkippedWindow]:
    """Return a frame's windows with a cursor each, none for a heartbeat; checks that the frame follows `before`."""
    num_windows = len(frame.blocks) + len(frame.skipped)
    if num_windows == 0:
        return []
    after = Cursor.from_proto(frame.cursor)
    start = after.back(num_windows) if num_windows <= after.received else None
    if start is None or not _follows(start, before):
        raise FailedPreconditionError(f"stream: cursor {after} with {num_windows} windows does not follow {before}")
    skipped = {entry.position: entry for entry in frame.skipped}
    if len(skipped) < len(frame.skipped) or max(skipped, default=0) >= num_windows:
        raise FailedPreconditionError("stream: positions of skipped windows that are not in their frame")
    blocks, windows = iter(frame.blocks), list[FusedWindow | SkippedWindow]()
    for position in range(num_windows):
        cursor = after.back(num_windows - 1 - position)
        if position in skipped:
            entry = skipped[position]
            where = entry.window
            place = where.document, where.start_byte, where.index
            windows.append(SkippedWindow(tuple(entry.missing), *place, cursor, entry.reason, *_drawn(where)))
            continue
        message = next(blocks)
        block, where = decode_block(message), message.window
        if expected_vocabulary not in {"", block.vocabulary}:
            raise FailedPreconditionError(
                f"stream: a block in vocabulary {block.vocabulary}, expected {expected_vocabulary}"
            )
        windows.append(FusedWindow(block, where.document, where.start_byte, where.index, cursor, *_drawn(where)))
    return windows


def _drawn(where: block_pb2.WindowRef) -> tuple[str, int]:
    """Return the split that a window is drawn from, and the pass over it."""
    return where.split, getattr(where, "pass")


def _follows(start: Cursor, before: Cursor | None) -> bool:
    """Return whether a frame that begins at `start` follows `before` directly, there or in the next epoch."""
    if before is None:
        return start.received == 0
    next_epoch = (start.epoch, start.dealt, start.received) == (before.epoch + 1, 0, 0)
    return start.plan == before.plan and (start == before or next_epoch)
