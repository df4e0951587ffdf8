"""Client of the fusion service, used by the trainer and the command line."""

from __future__ import annotations

import logging
import queue
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from fusion.v1 import block_pb2, fusion_pb2, fusion_pb2_grpc
from fusion_core.blocks import Block
from services.base.errors import (
    DeadlineExceededError,
    NotFoundError,
    NotServedError,
    ResourceExhaustedError,
    ServiceError,
    UnavailableError,
)
from services.base.retry import Backoff
from services.fusion.frames import Frames, FusedWindow, SeenWindows, SkippedWindow, check_version, windows_of
from services.rpc.auth import call_metadata
from services.rpc.channel import open_channel
from services.rpc.deadline import timeout_metadata
from services.rpc.health import LIVENESS
from services.rpc.status import error_of_call
from services.rpc.tracing import client_span
from services.wire.block import decode_block
from services.wire.cursor import Cursor
from services.wire.passage import Passage, contexts_of
from services.wire.protocol import PROTOCOL_VERSION

__all__ = ["FusedWindow", "FusionClient", "SkippedWindow", "StreamPart", "StreamRequest"]

logger = logging.getLogger(__name__)

_INFO_SECONDS = 30.0
"""Deadline of calls for the service's description or health."""


@dataclass(frozen=True, slots=True)
class StreamPart:
    """A number of windows, of all ranks together, from several splits: pairs of a split's name and its weight."""

    num_windows: int
    weights: tuple[tuple[str, int], ...]

    def to_proto(self) -> fusion_pb2.StreamPart:
        pools = [fusion_pb2.PoolShare(split=split, weight=weight) for split, weight in self.weights]
        return fusion_pb2.StreamPart(num_windows=self.num_windows, pools=pools)


@dataclass(frozen=True, slots=True)
class StreamRequest:
    """A request for a stream; see StreamFusedOpen in protos/fusion/v1/fusion.proto.

    With `parts` there are no epochs, and `num_epochs` is not used.
    """

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
    parts: tuple[StreamPart, ...] = ()

    def to_proto(self) -> fusion_pb2.StreamFusedOpen:
        return fusion_pb2.StreamFusedOpen(
            dataset=self.dataset,
            split=self.split,
            seed=self.seed,
            rank=self.rank,
            world_size=self.world_size,
            num_epochs=None if self.parts else self.num_epochs,
            cursor=self.cursor.to_proto() if self.cursor else None,
            k=self.k,
            tokens_only=self.tokens_only,
            expected_vocabulary=self.expected_vocabulary,
            protocol_version=PROTOCOL_VERSION,
            sources=self.sources,
            parts=[part.to_proto() for part in self.parts],
        )


class FusionClient:
    """Blocking client of a fusion service. Every stream has a channel of its own.

    Args:
        address: host:port of the gRPC proxy.
        application: name of the Serve application.
        token: bearer token; default the one in the environment, see services/rpc/auth.py.
        timeout_seconds: deadline of a unary call.
        patience_seconds: time for which a broken stream is retried without one new window, and a service that is still
            starting is waited for, before the error is raised.
        silence_seconds: time without any frame after which a stream counts as broken. Services send a heartbeat at
            least every ten seconds, however long they wait for sources or credits.
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
        """Return target vocabulary, sources and limits; raises ServiceError.

        Waits within the client's patience for a service that does not answer yet.
        """
        timeout = min(_INFO_SECONDS, self._timeout_seconds)
        request = fusion_pb2.GetFusionInfoRequest()
        response: fusion_pb2.GetFusionInfoResponse = self._unary("GetFusionInfo", request, timeout, UnavailableError)
        return response

    def fuse(
        self, texts: Sequence[bytes | Passage], *, k: int | None = None, sources: Sequence[str] = ()
    ) -> list[Block]:
        """Return fused blocks for a few texts, in order.

        Waits within the client's patience for a service that is not there yet. Raises ServiceError: UnavailableError
        when too few sources answer.
        """
        passages = [text if isinstance(text, Passage) else Passage(text) for text in texts]
        request = fusion_pb2.FuseRequest(
            texts=[passage.text for passage in passages],
            contexts=contexts_of(passages),
            k=k,
            sources=sources,
            dtype=block_pb2.LOGPROB_DTYPE_FLOAT32,
        )
        with client_span("FusionClient.fuse"):
            response = self._unary("Fuse", request, self._timeout_seconds, NotServedError)
        return [decode_block(message) for message in response.blocks]

    def stream(self, request: StreamRequest, *, prefetch_windows: int = 32) -> Iterator[FusedWindow | SkippedWindow]:
        """Yield every window of the stream once, at most `prefetch_windows` ahead of the caller.

        A stream that breaks with a retryable status goes on from the last window that the caller has received. Raises
        ServiceError when that fails, FailedPreconditionError when the service breaks the protocol: a block in another
        vocabulary, a window for the second time, or a cursor that does not follow the one before.
        """
        at, seen, backoff = request.cursor, SeenWindows(), self._backoff()
        while True:
            try:
                for window in self._stream_once(replace(request, cursor=at), prefetch_windows):
                    seen.add(window)
                    at = window.cursor
                    yield window
                    backoff.reset()  # behind the yield: the caller's own time does not count
            except (UnavailableError, DeadlineExceededError) as error:
                self._wait(backoff, error)
            else:
                return

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
                if (first := self._call(channel, frames.next)) is not None:
                    check_version(first)
                while (frame := self._call(channel, frames.next)) is not None:
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

    def _unary(self, method: str, request: Any, timeout_seconds: float, waits_for: type[UnavailableError]) -> Any:
        """Make a call, again within the client's patience as long as it ends with `waits_for`; return the answer."""
        backoff = self._backoff()
        while True:
            try:
                with open_channel(self.address) as channel:
                    call = getattr(fusion_pb2_grpc.FusionServiceStub(channel), method)
                    metadata = self._metadata(timeout_seconds)
                    return self._call(channel, partial(call, request, metadata=metadata, timeout=timeout_seconds))
            except waits_for as error:
                self._wait(backoff, error)

    def _backoff(self) -> Backoff:
        return Backoff(0.5, longest_seconds=5.0, patience_seconds=self._patience_seconds)

    def _wait(self, backoff: Backoff, error: ServiceError) -> None:
        """Sleep before the next attempt; raises the error when patience has come to its end."""
        if backoff.exhausted:
            raise error
        pause = backoff.next_pause()
        logger.warning("%s is asked again in %.1f s: %s", self.application, pause, error)
        time.sleep(pause)

    def _call(self, channel: grpc.Channel, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except grpc.RpcError as error:
            problem = error_of_call(error, f"{self.application} at {self.address}")
            if isinstance(problem, ResourceExhaustedError):
                raise UnavailableError(str(problem)) from error
            if isinstance(problem, NotServedError) and self._is_served(channel):
                raise NotFoundError(str(problem)) from error
            raise problem from error

    def _is_served(self, channel: grpc.Channel) -> bool:
        """Return whether the application answers a health check: then NOT_FOUND came from itself, not from a proxy."""
        request = health_pb2.HealthCheckRequest(service=LIVENESS)
        try:
            health_pb2_grpc.HealthStub(channel).Check(request, metadata=self._metadata(), timeout=_INFO_SECONDS)
        except grpc.RpcError:
            return False
        return True

    def _metadata(self, timeout_seconds: float | None = None) -> tuple[tuple[str, str], ...]:
        metadata = call_metadata(self.application, self._token)
        return metadata if timeout_seconds is None else (*metadata, *timeout_metadata(timeout_seconds))


def _credit(windows: int) -> fusion_pb2.StreamFusedRequest:
    return fusion_pb2.StreamFusedRequest(credit=block_pb2.Credit(blocks=windows))
