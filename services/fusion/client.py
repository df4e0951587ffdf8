"""Client of the fusion service, used by the trainer and the command line."""

from __future__ import annotations

import logging
import queue
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import grpc

from fusion.v1 import block_pb2, fusion_pb2, fusion_pb2_grpc
from fusion_core.blocks import Block
from services.base.errors import DeadlineExceededError, ResourceExhaustedError, UnavailableError
from services.fusion.frames import Frames, FusedWindow, SeenWindows, SkippedWindow, check_version, windows_of
from services.rpc.auth import call_metadata
from services.rpc.channel import open_channel
from services.rpc.deadline import timeout_metadata
from services.rpc.status import error_of_call
from services.rpc.tracing import client_span
from services.wire.block import decode_block
from services.wire.cursor import Cursor
from services.wire.passage import Passage, contexts_of
from services.wire.protocol import PROTOCOL_VERSION

__all__ = ["FusedWindow", "FusionClient", "SkippedWindow", "StreamRequest"]

logger = logging.getLogger(__name__)

_LONGEST_PAUSE_SECONDS = 5.0
_INFO_SECONDS = 30.0


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
    sources: tuple[str, ...] = ()

    def to_proto(self) -> fusion_pb2.StreamFusedOpen:
        return fusion_pb2.StreamFusedOpen(
            dataset=self.dataset,
            split=self.split,
            seed=self.seed,
            rank=self.rank,
            world_size=self.world_size,
            num_epochs=self.num_epochs,
            cursor=self.cursor.to_proto() if self.cursor else None,
            k=self.k,
            tokens_only=self.tokens_only,
            expected_vocabulary=self.expected_vocabulary,
            protocol_version=PROTOCOL_VERSION,
            sources=self.sources,
        )


class FusionClient:
    """Blocking client. Every stream has a channel of its own.

    Args:
        address: host:port of the gRPC proxy.
        application: name of the Serve application.
        token: bearer token; default the one in the environment, see services/rpc/auth.py.
        timeout_seconds: deadline of a unary call.
        patience_seconds: how long a broken stream is retried without one new window before the error is raised.
        silence_seconds: a stream on which not even a heartbeat came for so long is broken. Services send one at least
            every ten seconds, however long they wait for sources or credits.
    """

    def __init__(
        self,
        address: str,
        *,
        application: str = "fusion",
        token: str | None = None,
        timeout_seconds: float = 600.0,
        patience_seconds: float = 300.0,
        silence_seconds: float = 30.0,
    ) -> None:
        self.address = address
        self.application = application
        self._token = token
        self._timeout_seconds = timeout_seconds
        self._patience_seconds = patience_seconds
        self._silence_seconds = silence_seconds

    def info(self) -> fusion_pb2.GetFusionInfoResponse:
        """Target vocabulary, sources and limits; raises ServiceError."""
        timeout = min(_INFO_SECONDS, self._timeout_seconds)
        with open_channel(self.address) as channel:
            stub = fusion_pb2_grpc.FusionServiceStub(channel)
            response: fusion_pb2.GetFusionInfoResponse = self._call(
                lambda: stub.GetFusionInfo(
                    fusion_pb2.GetFusionInfoRequest(), metadata=self._metadata(timeout), timeout=timeout
                )
            )
        return response

    def fuse(
        self, texts: Sequence[bytes | Passage], *, k: int | None = None, sources: Sequence[str] = ()
    ) -> list[Block]:
        """Fused blocks for a few texts, in order; raises ServiceError."""
        passages = [text if isinstance(text, Passage) else Passage(text) for text in texts]
        request = fusion_pb2.FuseRequest(
            texts=[passage.text for passage in passages],
            contexts=contexts_of(passages),
            k=k,
            sources=sources,
            dtype=block_pb2.LOGPROB_DTYPE_FLOAT32,
        )
        with open_channel(self.address) as channel, client_span("FusionClient.fuse"):
            stub = fusion_pb2_grpc.FusionServiceStub(channel)
            timeout = self._timeout_seconds
            response = self._call(lambda: stub.Fuse(request, metadata=self._metadata(timeout), timeout=timeout))
        return [decode_block(message) for message in response.blocks]

    def stream(self, request: StreamRequest, *, prefetch_windows: int = 32) -> Iterator[FusedWindow | SkippedWindow]:
        """Yields every window of the stream once, at most `prefetch_windows` ahead of the caller.

        A stream that breaks with a retryable status goes on from the last window that the caller has received. Raises
        ServiceError when it cannot be mended, FailedPreconditionError when the service breaks its word: a block in
        another vocabulary, a window for the second time, or a cursor that does not follow the one before.
        """
        at, quiet_since, pause, seen = request.cursor, time.monotonic(), 0.5, SeenWindows()
        while True:
            try:
                for window in self._stream_once(replace(request, cursor=at), prefetch_windows):
                    seen.add(window)
                    at = window.cursor
                    yield window
                    quiet_since, pause = time.monotonic(), 0.5  # the caller's own time does not count
            except (UnavailableError, DeadlineExceededError) as error:
                if time.monotonic() - quiet_since > self._patience_seconds:
                    raise
                logger.warning("stream broke, resuming in %.1f s: %s", pause, error)
            else:
                return
            time.sleep(pause * random.uniform(0.5, 1.5))
            pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)

    def _stream_once(self, request: StreamRequest, prefetch_windows: int) -> Iterator[FusedWindow | SkippedWindow]:
        outbox: queue.SimpleQueue[fusion_pb2.StreamFusedRequest | None] = queue.SimpleQueue()
        outbox.put(fusion_pb2.StreamFusedRequest(open=request.to_proto()))
        outbox.put(_credit(prefetch_windows))
        grain = max(1, prefetch_windows // 4)
        with open_channel(self.address) as channel:
            with client_span("FusionClient.stream"):  # of the opening: the stream itself is the service's span
                call = fusion_pb2_grpc.FusionServiceStub(channel).StreamFused(
                    iter(outbox.get, None), metadata=self._metadata()
                )
            frames = Frames(call, self._silence_seconds)
            try:
                at, owed = request.cursor, 0
                if (first := self._call(frames.next)) is not None:
                    check_version(first)
                while (frame := self._call(frames.next)) is not None:
                    windows = windows_of(frame, at, request.expected_vocabulary)
                    if not windows:
                        continue  # a heartbeat
                    at = windows[-1].cursor
                    for window in windows:
                        yield window
                        owed += 1
                        if owed >= grain:
                            outbox.put(_credit(owed))
                            owed = 0
            finally:
                outbox.put(None)
                frames.close()

    def _call(self, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except grpc.RpcError as error:
            problem = error_of_call(error, f"{self.application} at {self.address}")
            if isinstance(problem, ResourceExhaustedError):
                raise UnavailableError(str(problem)) from error
            raise problem from error

    def _metadata(self, timeout_seconds: float | None = None) -> tuple[tuple[str, str], ...]:
        metadata = call_metadata(self.application, self._token)
        return metadata if timeout_seconds is None else (*metadata, *timeout_metadata(timeout_seconds))


def _credit(windows: int) -> fusion_pb2.StreamFusedRequest:
    return fusion_pb2.StreamFusedRequest(credit=block_pb2.Credit(blocks=windows))
