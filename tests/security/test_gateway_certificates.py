"""Certificates at the gateway that ships: those of strangers are refused, renewed ones are taken up while it runs."""

from __future__ import annotations

import socket
import ssl
import time
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from services.base.errors import UnavailableError
from services.fusion.client import FusionClient
from services.rpc.channel import open_channel
from tests.security.certificates import Authority, Pair
from tests.security.deployment import TOKEN
from tests.security.firehose import Firehose
from tests.security.gateway import TEXT, Gateway, client, gateway, put_secret, use

pytestmark = pytest.mark.timeout(900)

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
        FusionClient(f"127.0.0.1:{door.port}", token=TOKEN, timeout_seconds=30, patience_seconds=1).info()
    use(monkeypatch, Authority(tmp_path / "other", "other"), door.authority.client("trusting"))
    with pytest.raises(UnavailableError):  # the gateway's certificate is of no authority that this client trusts
        client(door).info()
    use(monkeypatch, door.authority, door.authority.client("trusting"))
    monkeypatch.setenv("FUSION_TLS_SERVER_NAME", "another.example")
    with pytest.raises(UnavailableError):
        client(door).info()
    monkeypatch.setenv("FUSION_TLS_SERVER_NAME", "gateway.example")
    assert client(door).info().strategy == "avg_ce"


def test_renewed_certificates_are_taken_up_without_a_restart(
    firehose: Firehose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Certificates change as the kubelet does it: the folder is a link to the files, and the link moves at once."""
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
            assert error.code() == grpc.StatusCode.UNAVAILABLE
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
