"""Bearer tokens as people keep them: what can be sent is sent, what cannot is refused by name and never shown."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent import futures
from pathlib import Path

import grpc
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from services.base.errors import InvalidArgumentError, UnauthenticatedError
from services.rpc.auth import accepted_tokens, call_metadata, check_token, read_token


@pytest.fixture(autouse=True)
def no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FUSION_TOKEN", raising=False)
    monkeypatch.delenv("FUSION_TOKEN_FILE", raising=False)


@pytest.mark.parametrize("written", ["secret", "secret\n", "secret\r\n", " secret\t", "\n\nsecret\n"])
@pytest.mark.parametrize("in_file", [False, True])
def test_white_space_around_a_token_is_no_part_of_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, written: str, in_file: bool
) -> None:
    if in_file:
        (tmp_path / "token").write_bytes(written.encode())
        monkeypatch.setenv("FUSION_TOKEN_FILE", str(tmp_path / "token"))
    else:
        monkeypatch.setenv("FUSION_TOKEN", written)
    assert accepted_tokens() == ("secret",)
    assert ("authorization", "Bearer secret") in call_metadata("fusion")
    check_token((("authorization", "Bearer secret"),))


@pytest.mark.parametrize("written", ["two words", "schlüssel", "a\tb", "a\nb", "\x07bell", "\n", "  "])
def test_a_token_that_no_call_can_carry_is_refused_by_name(monkeypatch: pytest.MonkeyPatch, written: str) -> None:
    monkeypatch.setenv("FUSION_TOKEN", written)
    for refuse in (accepted_tokens, read_token, lambda: call_metadata("fusion"), lambda: check_token(())):
        with pytest.raises(UnauthenticatedError, match=r"^FUSION_TOKEN: ") as caught:
            refuse()
        assert not written.strip() or written.strip() not in str(caught.value)
    monkeypatch.delenv("FUSION_TOKEN")
    with pytest.raises(UnauthenticatedError, match=r"^token: "):
        call_metadata("fusion", token=written)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"good\nbad token\n", "line 2: a token is visible ASCII"),
        ("gut\nschlüssel\n".encode(), "line 2: a token is visible ASCII"),
        (b"\xff\xfe\x00", "is not text in UTF-8"),
        (b"good\0", "line 1: a token is visible ASCII"),
    ],
)
def test_a_file_with_anything_else_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: bytes, reason: str
) -> None:
    (tmp_path / "token").write_bytes(content)
    monkeypatch.setenv("FUSION_TOKEN_FILE", str(tmp_path / "token"))
    with pytest.raises(UnauthenticatedError, match=f"^FUSION_TOKEN_FILE: .*{reason}"):
        accepted_tokens()


def test_a_file_from_windows_holds_the_tokens_that_it_shows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "token").write_bytes(b"\xef\xbb\xbfnew\r\nold\r\n")
    monkeypatch.setenv("FUSION_TOKEN_FILE", str(tmp_path / "token"))
    assert accepted_tokens() == ("new", "old")


@pytest.mark.parametrize("given", [b"Bearer \xff", "Bearer \udcff", "Bearer \ud800", "Bearer schlüssel", ""])
def test_garbage_in_a_call_is_no_token(monkeypatch: pytest.MonkeyPatch, given: str | bytes) -> None:
    monkeypatch.setenv("FUSION_TOKEN", "secret")
    with pytest.raises(UnauthenticatedError, match=r"^authorization: a valid bearer token is required"):
        check_token((("authorization", given),))


@pytest.mark.parametrize("name", ["fusion\n", "füsion", "a\0"])
def test_an_application_that_no_call_can_name_is_refused(name: str) -> None:
    with pytest.raises(InvalidArgumentError, match=r"^application: a name is printable ASCII"):
        call_metadata(name)


def test_a_cluster_with_one_application_needs_no_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSION_TOKEN", "secret")
    assert call_metadata("") == (("authorization", "Bearer secret"),)


@pytest.fixture(scope="module")
def echo() -> Iterator[grpc.Channel]:
    """A channel to a server that answers with the authorization that it was sent."""

    def answer(_request: bytes, context: grpc.ServicerContext) -> bytes:
        return str(dict(context.invocation_metadata())["authorization"]).encode()

    server = grpc.server(futures.ThreadPoolExecutor(1))
    methods = {"Say": grpc.unary_unary_rpc_method_handler(answer)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("echo", methods),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield channel
    server.stop(None)


@given(token=st.text(max_size=30))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
def test_whatever_is_not_refused_arrives_as_it_is(echo: grpc.Channel, token: str) -> None:
    """The oracle is gRPC: metadata that it does not take never get there."""
    try:
        metadata = call_metadata("fusion", token=token or None)
    except UnauthenticatedError:
        return
    if token:
        arrived = echo.unary_unary("/echo/Say")(b"", metadata=metadata, timeout=30)
        assert arrived == f"Bearer {token.strip()}".encode()
