"""TLS and client certificates at the gateway that ships, on a real Envoy in front of a real service."""

from __future__ import annotations

import queue
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from fusion.v1 import block_pb2, fusion_pb2, fusion_pb2_grpc, source_pb2, source_pb2_grpc
from services.base.errors import UnauthenticatedError, UnavailableError
from services.corpus.ledger import Corpus
from services.fusion.client import FusionClient, StreamRequest
from services.rpc.auth import call_metadata
from services.rpc.channel import open_aio_channel, open_channel
from services.wire.protocol import MAX_MESSAGE_BYTES
from tests.fuzz.raw import opened_call
from tests.security.certificates import Authority, Pair
from tests.security.deployment import BLOCKS, TOKEN, Guarded
from tests.security.gateway import Gateway, envoy, gateway, image_version, put_secret

pytestmark = pytest.mark.timeout(900)
Code = grpc.StatusCode
METADATA = call_metadata("fusion", TOKEN)
TEXT = b"The first of these is that they have been in the time of all."


@pytest.fixture(scope="module")
def door(guarded: Guarded, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    with gateway(tmp_path_factory.mktemp("gateway"), guarded.address) as running:
        yield running


@pytest.fixture
def certified(door: Gateway, monkeypatch: pytest.MonkeyPatch) -> Pair:
    """The environment of a client with a good certificate."""
    pair = door.authority.client("trainer")
    use(monkeypatch, door.authority, pair)
    return pair


def use(monkeypatch: pytest.MonkeyPatch, trusted: Authority, pair: Pair | None) -> None:
    monkeypatch.setenv("FUSION_TLS_CA", str(trusted.cert))
    for name, file in (("FUSION_TLS_CERT", pair and pair.cert), ("FUSION_TLS_KEY", pair and pair.key)):
        if file:
            monkeypatch.setenv(name, str(file))
        else:
            monkeypatch.delenv(name, raising=False)


def client(door: Gateway, token: str = TOKEN) -> FusionClient:
    return FusionClient(door.address, token=token, timeout_seconds=60, patience_seconds=1)


def test_the_envoy_that_is_tested_is_the_one_that_ships() -> None:
    version = subprocess.run([envoy(), "--version"], capture_output=True, text=True, check=True).stdout
    assert f"/{image_version()}/" in version


@pytest.mark.usefixtures("certified")
def test_calls_and_streams_are_the_same_as_without_the_gateway(door: Gateway, guarded: Guarded) -> None:
    [there], [here] = client(door).fuse([TEXT]), guarded.client().fuse([TEXT])
    np.testing.assert_array_equal(there.topk_ids_TK, here.topk_ids_TK)
    np.testing.assert_allclose(there.topk_logprobs_TK, here.topk_logprobs_TK, rtol=1e-6)
    corpus = Corpus.open(guarded.recipe.corpus_folder)
    request = StreamRequest("sentences", "train", seed=3, num_epochs=2)
    windows = list(client(door).stream(request, prefetch_windows=BLOCKS))
    assert sorted(w.index for w in windows) == sorted(2 * list(range(corpus.num_windows("train"))))
    assert all(w.block.text_bytes == corpus.window("train", w.index).text for w in windows)


@pytest.mark.usefixtures("certified")
def test_frames_come_one_by_one_as_they_are_granted(door: Gateway) -> None:
    """Both directions of a stream stay open and nothing is gathered: each grant is answered before the next is made."""
    outbox: queue.SimpleQueue[fusion_pb2.StreamFusedRequest | None] = queue.SimpleQueue()
    opening = fusion_pb2.StreamFusedOpen(dataset="sentences", split="train", world_size=1, tokens_only=True)
    outbox.put(fusion_pb2.StreamFusedRequest(open=opening))
    with open_channel(door.address) as channel:
        stub = fusion_pb2_grpc.FusionServiceStub(channel)
        answers = stub.StreamFused(iter(outbox.get, None), metadata=METADATA, timeout=120)
        frames = (answer for answer in answers if answer.blocks)  # without the greeting and heartbeats
        for received in range(1, 6):
            outbox.put(fusion_pb2.StreamFusedRequest(credit=block_pb2.Credit(blocks=1)))
            frame = next(frames)
            assert (len(frame.blocks), frame.cursor.received) == (1, received)
        outbox.put(None)
        assert list(frames) == []


class Firehose(fusion_pb2_grpc.FusionServiceServicer, health_pb2_grpc.HealthServicer):
    """Sends frames of 1 MiB as fast as they are taken, whatever was granted."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.sent = 0

    def StreamFused(self, request_iterator: Any, context: grpc.ServicerContext) -> Iterator[Any]:  # noqa: N802
        frame = fusion_pb2.StreamFusedResponse(blocks=[block_pb2.TokenBlock(text=bytes(2**20))])
        for _ in range(400):
            self.sent += 1
            yield frame

    def Check(self, request: Any, context: grpc.ServicerContext) -> Any:  # noqa: N802
        return health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.SERVING)


@pytest.fixture
def firehose() -> Iterator[Firehose]:
    server = grpc.server(futures.ThreadPoolExecutor(max_workers=4))
    servicer = Firehose(f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}")
    fusion_pb2_grpc.add_FusionServiceServicer_to_server(servicer, server)
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    server.start()
    yield servicer
    server.stop(None)


def test_a_client_that_does_not_read_holds_up_the_service_and_fills_no_memory(
    firehose: Firehose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with gateway(tmp_path, firehose.address) as running:
        use(monkeypatch, running.authority, running.authority.client("slow"))
        with open_channel(running.address) as channel:
            frames = fusion_pb2_grpc.FusionServiceStub(channel).StreamFused(iter(()), timeout=120)
            assert len(next(frames).blocks[0].text) == 2**20
            before = running.process.memory_info().rss
            assert settled(firehose) < 40  # of 400: in sockets, flow-control windows and gRPC's own buffers
            assert running.process.memory_info().rss - before < 32 * 2**20
            assert sum(1 for _ in frames) == 399


def settled(firehose: Firehose) -> int:
    """What it has sent once that has not changed for two seconds."""
    deadline, sent, since = time.monotonic() + 60, -1, time.monotonic()
    while time.monotonic() - since < 2:
        assert time.monotonic() < deadline
        if firehose.sent != sent:
            sent, since = firehose.sent, time.monotonic()
        time.sleep(0.05)
    return sent


@pytest.mark.usefixtures("certified")
def test_health_and_reflection_pass_and_nothing_else_does(door: Gateway) -> None:
    with open_channel(door.address) as channel:
        answer = health_pb2_grpc.HealthStub(channel).Check(
            health_pb2.HealthCheckRequest(), metadata=(("application", "fusion"),), timeout=60
        )
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
        asked = reflection_pb2.ServerReflectionRequest(list_services="")
        [listed] = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(iter([asked]), timeout=120)
        assert "fusion.v1.FusionService" in {s.name for s in listed.list_services_response.service}
        sources = source_pb2_grpc.SourceServiceStub(channel)
        with pytest.raises(grpc.RpcError) as caught:
            sources.GetSourceInfo(source_pb2.GetSourceInfoRequest(), metadata=METADATA, timeout=120)
        assert caught.value.code() == Code.UNIMPLEMENTED
        serve = channel.unary_unary("/ray.serve.RayServeAPIService/ListApplications")
        with pytest.raises(grpc.RpcError) as caught:
            serve(b"", timeout=120)
        assert caught.value.code() == Code.UNIMPLEMENTED


def test_a_path_that_is_no_text_does_not_pass(door: Gateway, certified: Pair, guarded: Guarded) -> None:
    """Serve's proxy would crash on it."""
    serving = guarded.processes()
    context = ssl.create_default_context(cafile=str(door.authority.cert))
    context.check_hostname = False
    context.load_cert_chain(certified.cert, certified.key)
    context.set_alpn_protocols(["h2"])
    host, _, port = door.address.removeprefix("grpcs://").rpartition(":")
    for ending in (b"\xe4", b"Fuse?\xe4"):
        with socket.create_connection((host, int(port)), timeout=30) as plain, context.wrap_socket(plain) as connection:
            connection.sendall(opened_call(b"/fusion.v1.FusionService/" + ending))
            answer = b""
            while b"\x00\x00\x00\x01" not in answer:  # a frame of the call's own stream
                received = connection.recv(65_536)
                assert received
                answer += received
    assert len(client(door).fuse([TEXT])) == 1
    assert guarded.processes() == serving


@pytest.mark.usefixtures("certified")
def test_channels_of_the_event_loop_use_the_same_certificates(door: Gateway) -> None:
    import asyncio

    async def check() -> Any:
        async with open_aio_channel(door.address) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            return await stub.Check(health_pb2.HealthCheckRequest(), metadata=(("application", "fusion"),), timeout=120)

    assert asyncio.run(check()).status == health_pb2.HealthCheckResponse.SERVING


BAD_CLIENTS = {
    "no certificate": "TLSV13_ALERT_CERTIFICATE_REQUIRED",
    "expired": "SSLV3_ALERT_CERTIFICATE_EXPIRED",
    "of another authority": "TLSV1_ALERT_UNKNOWN_CA",
}


@pytest.mark.parametrize("kind", BAD_CLIENTS)
def test_a_client_without_a_good_certificate_is_refused(
    kind: str, door: Gateway, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """gRPC knows UNAVAILABLE for a connection that cannot be made; the alert says why."""
    pair = {
        "no certificate": None,
        "expired": door.authority.client("late", expired=True),
        "of another authority": Authority(tmp_path / "other", "other").client("stranger"),
    }[kind]
    use(monkeypatch, door.authority, pair)
    with pytest.raises(UnavailableError):
        client(door).info()
    assert tls_alert(door, pair) == BAD_CLIENTS[kind]
    use(monkeypatch, door.authority, door.authority.client("good"))
    assert len(client(door).fuse([TEXT])) == 1


def tls_alert(door: Gateway, pair: Pair | None) -> str:
    """The reason that the gateway gives for ending the connection."""
    context = ssl.create_default_context(cafile=str(door.authority.cert))
    context.set_alpn_protocols(["h2"])
    if pair:
        context.load_cert_chain(pair.cert, pair.key)
    with (
        socket.create_connection(("127.0.0.1", door.port), timeout=30) as plain,
        pytest.raises(ssl.SSLError) as caught,
        context.wrap_socket(plain, server_hostname="127.0.0.1") as secure,
    ):
        while secure.recv(1024):
            pass
    return str(caught.value.reason)


def test_a_plain_client_and_a_client_of_another_server_are_refused(
    door: Gateway, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UnavailableError):
        FusionClient(f"127.0.0.1:{door.port}", token=TOKEN, timeout_seconds=30).info()
    use(monkeypatch, Authority(tmp_path / "other", "other"), door.authority.client("trusting"))
    with pytest.raises(UnavailableError):  # the gateway's certificate is of no authority that this client trusts
        client(door).info()
    use(monkeypatch, door.authority, door.authority.client("trusting"))
    monkeypatch.setenv("FUSION_TLS_SERVER_NAME", "another.example")
    with pytest.raises(UnavailableError):
        client(door).info()
    monkeypatch.setenv("FUSION_TLS_SERVER_NAME", "gateway.example")
    assert client(door).info().strategy == "avg_ce"


@pytest.mark.usefixtures("certified")
def test_the_token_is_wanted_behind_a_good_certificate(door: Gateway) -> None:
    with pytest.raises(UnauthenticatedError):
        client(door, token="wrong").info()
    with pytest.raises(UnauthenticatedError):
        client(door, token="wrong").fuse([TEXT])
    with pytest.raises(UnauthenticatedError):
        next(client(door, token="wrong").stream(StreamRequest("sentences", "train", seed=0)))


@pytest.mark.usefixtures("certified")
def test_messages_beyond_the_limits_are_refused_and_a_good_client_goes_on(door: Gateway, guarded: Guarded) -> None:
    """What is beyond gRPC's limit is not even read; what is beyond the service's names the setting."""
    from services.rpc import channel as settings

    def send(num_bytes: int) -> grpc.RpcError:
        options = [("grpc.max_send_message_length", -1)]
        credentials = settings.channel_credentials()
        with grpc.secure_channel(door.address.removeprefix("grpcs://"), credentials, options) as channel:
            request = fusion_pb2.FuseRequest(texts=[bytes(num_bytes)])
            with pytest.raises(grpc.RpcError) as caught:
                fusion_pb2_grpc.FusionServiceStub(channel).Fuse(request, metadata=METADATA, timeout=120)
            return caught.value

    good = threading.Thread(target=lambda: results.extend(client(door).fuse([TEXT]) for _ in range(3)))
    results: list[Any] = []
    good.start()
    beyond = send(MAX_MESSAGE_BYTES + 1)
    assert beyond.code() == Code.RESOURCE_EXHAUSTED
    assert str(MAX_MESSAGE_BYTES) in beyond.details()
    limited = send(512 * 1024)
    assert limited.code() == Code.RESOURCE_EXHAUSTED
    assert "service.per_client.request_bytes" in limited.details()
    good.join()
    assert len(results) == 3
    assert len(guarded.client().fuse([TEXT])) == 1


def test_renewed_certificates_are_taken_up_without_a_restart(
    firehose: Firehose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the kubelet does it: the folder is a link to the files, and the link is changed at once."""
    with gateway(tmp_path, firehose.address) as running:
        old = running.authority.client("trainer")
        use(monkeypatch, running.authority, old)
        assert healthy(running)
        before = served(running)
        other = Authority(tmp_path / "next", "next authority")
        put_secret(tmp_path / "tls", other, other.server("gateway.example"))
        use(monkeypatch, other, other.client("trainer"))
        deadline = time.monotonic() + 60
        while not healthy(running):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        use(monkeypatch, other, old)
        assert not healthy(running)
        use(monkeypatch, other, other.client("trainer"))
        assert healthy(running)
        assert served(running) != before


def healthy(door: Gateway) -> bool:
    with open_channel(door.address) as channel:
        try:
            health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=30)
        except grpc.RpcError as error:
            assert error.code() == Code.UNAVAILABLE
            return False
    return True


def served(door: Gateway) -> bytes:
    """The certificate that the gateway shows."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with (
        socket.create_connection(("127.0.0.1", door.port), timeout=30) as plain,
        context.wrap_socket(plain) as secure,
    ):
        shown = secure.getpeercert(binary_form=True)
        assert shown
        return shown
