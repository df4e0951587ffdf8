"""A real verifier without Ray: the servicer on a plain gRPC server in this process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from fusion.v1 import verify_pb2_grpc
from services.verify.config import VerifyConfig
from services.verify.servicer import VerifierServicer
from tests.fakes.services.on_thread import served


@contextmanager
def plain_verifier(config: VerifyConfig) -> Iterator[str]:
    """Serves as long as the block takes; gives the address."""
    with served(VerifierServicer, verify_pb2_grpc.add_VerifierServiceServicer_to_server, config) as running:
        yield running.address
