"""Client of the fusion service, used by the trainer and the command line. (Interface first; see the lead's work.)"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from fusion.v1 import fusion_pb2
from fusion_core.blocks import Block
from services.common.cursor import Cursor


@dataclass(frozen=True, slots=True)
class StreamRequest:
    """What to stream; see StreamFusedOpen in protos/fusion/v1/fusion.proto."""

    dataset: str
    split: str
    seed: int
    rank: int = 0
    world_size: int = 1
    num_epochs: int = 1
    cursor: Cursor | None = None
    k: int | None = None
    tokens_only: bool = False
    expected_vocabulary: str = ""


@dataclass(frozen=True, slots=True)
class FusedWindow:
    """One window of the stream, where it comes from, and the cursor after it."""

    block: Block
    document: str
    start_byte: int
    index: int
    cursor: Cursor


class FusionClient:
    """Synchronous client; one channel per stream."""

    def __init__(
        self, address: str, *, application: str = "fusion", token: str | None = None, timeout_seconds: float = 600.0
    ) -> None:
        raise NotImplementedError

    def info(self) -> fusion_pb2.GetFusionInfoResponse:
        raise NotImplementedError

    def fuse(self, texts: Sequence[bytes], *, k: int | None = None, sources: Sequence[str] = ()) -> list[Block]:
        raise NotImplementedError

    def stream(self, request: StreamRequest, *, prefetch_windows: int = 32) -> Iterator[FusedWindow]:
        """Yields windows with credits granted as they are consumed; reconnects from the cursor on UNAVAILABLE."""
        raise NotImplementedError
