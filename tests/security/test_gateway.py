"""Calls and streams through the gateway that ships: a real Envoy in front of a real service."""

from __future__ import annotations

import queue
import socket
import ssl
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from fusion.v1 import block_pb2, fusion_pb2, fusion_pb2_grpc, source_pb2, source_pb2_grpc
from services.base.errors import UnauthenticatedError
from services.corpus.ledger import Corpus
from services.fusion.client import StreamRequest
from services.rpc.auth import call_metadata
from services.rpc.channel import open_aio_channel, open_channel
from services.wire.protocol import MAX_MESSAGE_BYTES
from tests.fuzz.raw import opened_call
from tests.security.certificates import Pair
from tests.security.deployment import BLOCKS, TOKEN, Guarded
from tests.security.firehose import Firehose
from tests.security.gateway import TEXT, Gateway, client, envoy, gateway, image_version, use

pytestmark = pytest.mark.timeout(900)
Code = grpc.StatusCode
METADATA = call_metadata("fusion", TOKEN)


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
    """Return the number of frames sent, once it has not changed for two seconds."""
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
    """Messages beyond gRPC's limit are not even read; beyond the service's the error names the setting."""
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
