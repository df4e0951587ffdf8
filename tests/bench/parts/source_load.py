"""Consumers that load a source over gRPC and do next to nothing with what they get."""

from __future__ import annotations

import itertools
import queue
import threading
import time
from collections.abc import Sequence

import grpc
import psutil

from fusion.v1 import block_pb2, source_pb2, source_pb2_grpc
from services.rpc.auth import call_metadata
from services.rpc.channel import open_channel

_IN_FLIGHT = 64


class Consumer:
    """One stream on a thread of its own; grants a credit for every block that it read.

    Attributes:
        received: tokens and bytes so far.
        longest_pause_seconds: how long it read nothing because it was told to.
    """

    def __init__(self, address: str, application: str, texts: Sequence[bytes], top_k: int) -> None:
        self.received = (0, 0)
        self.longest_pause_seconds = 0.0
        self._stall_seconds: float | None = None
        self._texts = itertools.cycle(texts)
        self._outbox: queue.SimpleQueue[source_pb2.StreamScoresRequest | None] = queue.SimpleQueue()
        self._outbox.put(source_pb2.StreamScoresRequest(open=source_pb2.StreamScoresOpen(top_k=top_k)))
        self._ask_for(_IN_FLIGHT)
        self._channel = open_channel(address)
        self._call = source_pb2_grpc.SourceServiceStub(self._channel).StreamScores(
            iter(self._outbox.get, None), metadata=call_metadata(application)
        )
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def stall(self, seconds: float) -> None:
        """Stops reading for that long, the first time it is called."""
        if self._stall_seconds is None:
            self._stall_seconds = seconds

    def stop(self) -> None:
        self._call.cancel()
        self._outbox.put(None)
        self._thread.join()
        self._channel.close()

    def _read(self) -> None:
        try:
            for frame in self._call:
                tokens, wire_bytes = self.received
                self.received = (tokens + sum(b.num_tokens for b in frame.blocks), wire_bytes + frame.ByteSize())
                if self._stall_seconds and not self.longest_pause_seconds:
                    time.sleep(self._stall_seconds)
                    self.longest_pause_seconds = self._stall_seconds
                if frame.blocks:  # the first frame, and those that say that the service lives, hold none
                    self._ask_for(len(frame.blocks))
        except grpc.RpcError as error:
            if error.code() is not grpc.StatusCode.CANCELLED:
                raise

    def _ask_for(self, count: int) -> None:
        texts = source_pb2.ScoreTexts(texts=list(itertools.islice(self._texts, count)))
        self._outbox.put(source_pb2.StreamScoresRequest(texts=texts))
        self._outbox.put(source_pb2.StreamScoresRequest(credit=block_pb2.Credit(blocks=count)))


def replica_of(application: str) -> psutil.Process:
    """The process of the one replica that serves the application on this process's cluster."""
    processes = psutil.Process().children(recursive=True)
    [replica] = [p for p in processes if f"ServeReplica:{application}:" in " ".join(p.cmdline())]
    return replica
