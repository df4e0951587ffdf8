"""One guarded deployment and one gateway before it for all tests here."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent import futures

import grpc
import pytest
from grpc_health.v1 import health_pb2_grpc

from fusion.v1 import fusion_pb2_grpc
from tests.security.certificates import Pair
from tests.security.deployment import Guarded, guarded_deployment
from tests.security.firehose import Firehose
from tests.security.gateway import Gateway, gateway, use


@pytest.fixture(scope="package")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    with guarded_deployment(tmp_path_factory.mktemp("guarded")) as up:
        yield up


@pytest.fixture(scope="package")
def door(guarded: Guarded, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    with gateway(tmp_path_factory.mktemp("gateway"), guarded.address) as running:
        yield running


@pytest.fixture
def certified(door: Gateway, monkeypatch: pytest.MonkeyPatch) -> Pair:
    """The environment of a client with a good certificate."""
    pair = door.authority.client("trainer")
    use(monkeypatch, door.authority, pair)
    return pair


@pytest.fixture
def firehose() -> Iterator[Firehose]:
    server = grpc.server(futures.ThreadPoolExecutor(max_workers=4))
    servicer = Firehose(f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}")
    fusion_pb2_grpc.add_FusionServiceServicer_to_server(servicer, server)
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    server.start()
    yield servicer
    server.stop(None)
