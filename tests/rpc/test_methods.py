"""What stands around every method: the token, and exceptions as status codes."""

from __future__ import annotations

import asyncio
import itertools
import pickle
import string
import traceback
import urllib.parse
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from services.base.errors import InvalidArgumentError, ServiceError, UnauthenticatedError, UnavailableError
from services.fusion.fuser import QuorumLostError
from services.rpc.auth import call_metadata, check_token
from services.rpc.methods import bidirectional, public_unary, unary
from services.rpc.status import error_of, status_of


class Context:
    """Stands for the context object that Serve hands to a method."""

    def __init__(self, *metadata: tuple[str, str]) -> None:
        self.metadata = metadata
        self.code: grpc.StatusCode | None = None
        self.details = ""

    def invocation_metadata(self) -> tuple[tuple[str, str], ...]:
        return self.metadata

    def peer(self) -> str:
        return "ipv4:127.0.0.1:40000"

    def set_code(self, code: grpc.StatusCode) -> None:
        self.code = code

    def set_details(self, details: str) -> None:
        self.details = details

    def set_trailing_metadata(self, metadata: tuple[tuple[str, str], ...]) -> None:
        self.trailing = metadata


class Service:
    @unary
    async def Echo(self, request: Any) -> Any:  # noqa: N802
        if isinstance(request, BaseException):
            raise request
        return request

    @public_unary
    async def Check(self, request: Any) -> Any:  # noqa: N802
        return request

    @bidirectional
    async def Repeat(self, requests: AsyncIterator[Any]) -> Any:  # noqa: N802
        async for request in requests:
            if isinstance(request, BaseException):
                raise request
            yield request


def call(request: Any, context: Context, method: str = "Echo") -> Any:
    return asyncio.run(getattr(Service(), method)(request, grpc_context=context))


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (InvalidArgumentError("k: must be 1 to 3"), grpc.StatusCode.INVALID_ARGUMENT),
        (UnavailableError("warming up"), grpc.StatusCode.UNAVAILABLE),
        (TimeoutError(), grpc.StatusCode.DEADLINE_EXCEEDED),
        (QuorumLostError("too few sources", ("a", "b")), grpc.StatusCode.UNAVAILABLE),
        (KeyError("a document's text"), grpc.StatusCode.INTERNAL),
    ],
)
def test_exceptions_become_status_codes(
    error: Exception, code: grpc.StatusCode, caplog: pytest.LogCaptureFixture
) -> None:
    context = Context()
    with pytest.raises(ServiceError) as caught:
        call(error, context)
    assert context.code == code
    again = pickle.loads(pickle.dumps(caught.value))  # as Ray does, which answers INTERNAL for what it cannot read
    assert (type(again), str(again)) == (type(caught.value), str(caught.value))
    logged = "".join(traceback.format_exception(caught.value)) + caplog.text  # Serve logs what leaves the method
    assert "a document's text" not in context.details + logged


def test_an_unexpected_error_is_logged_by_its_place_and_in_full_only_where_asked(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "text of a document"  # in no line of code that a traceback would show

    def fails() -> BaseException:
        try:
            raise ValueError(text)
        except ValueError as cause:
            error = RuntimeError(text)
            error.__cause__ = cause
            return error

    for full in (False, True):
        caplog.clear()
        monkeypatch.setenv("FUSION_LOG_ERRORS", "full" if full else "")
        with pytest.raises(ServiceError):
            call(fails(), Context())
        assert "RuntimeError" in caplog.text
        assert "ValueError" in caplog.text
        assert "test_methods.py" in caplog.text
        assert (text in caplog.text) == full


@pytest.mark.parametrize("character", ["x", "é", "👍", "%", "\n"])
def test_details_fit_into_the_trailers_of_a_call(character: str) -> None:
    for length in (1, 10_000_000):
        _, message = status_of(InvalidArgumentError(character * length))
        assert message.startswith(character)
        assert len(urllib.parse.quote(message, safe=string.printable[:-6].replace("%", ""))) < 4100


def test_status_survives_the_way_to_the_client() -> None:
    error = InvalidArgumentError("k: must be 1 to 3")
    back = error_of(*status_of(error))
    assert (type(back), str(back)) == (InvalidArgumentError, str(error))


def test_token_is_wanted_everywhere_but_in_health_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSION_TOKEN", "secret")
    assert call("x", Context(*call_metadata("fusion"))) == "x"
    assert call("x", Context(), "Check") == "x"
    for metadata in ((), (("authorization", "Bearer wrong"),), (("authorization", "secret"),)):
        context = Context(*metadata)
        with pytest.raises(UnauthenticatedError):
            call("x", context)
        assert context.code == grpc.StatusCode.UNAUTHENTICATED

    async def stream(context: Context) -> list[Any]:
        async def requests() -> AsyncIterator[str]:
            yield "x"

        return [response async for response in Service().Repeat(requests(), grpc_context=context)]

    assert asyncio.run(stream(Context(*call_metadata("fusion")))) == ["x"]
    with pytest.raises(UnauthenticatedError):
        asyncio.run(stream(Context()))


def test_token_file_may_change_under_way(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "token"
    monkeypatch.setenv("FUSION_TOKEN_FILE", str(path))
    with pytest.raises(UnauthenticatedError, match="FUSION_TOKEN_FILE"):
        check_token(())
    for token in ("one", "two"):
        path.write_text(f"{token}\n")
        check_token((("authorization", f"Bearer {token}"),))
    with pytest.raises(UnauthenticatedError):
        check_token((("authorization", "Bearer one"),))


def test_without_a_token_the_services_are_open(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FUSION_TOKEN", "FUSION_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    check_token(())


def test_a_token_is_rotated_without_a_refused_call(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One end may have the next content of the file before the other: no step of three may refuse a call."""
    files = [tmp_path / str(step) for step in range(4)]
    for file, content in zip(files, ("old\n", "old\nnew\n", "new\nold\n", "new\n"), strict=True):
        file.write_text(content)

    def sent_by(file: Path) -> tuple[tuple[str, str], ...]:
        monkeypatch.setenv("FUSION_TOKEN_FILE", str(file))
        return call_metadata("fusion")

    def check_at(file: Path, metadata: tuple[tuple[str, str], ...]) -> None:
        monkeypatch.setenv("FUSION_TOKEN_FILE", str(file))
        check_token(metadata)

    for before, after in itertools.pairwise(files):
        check_at(before, sent_by(after))
        check_at(after, sent_by(before))
    with pytest.raises(UnauthenticatedError):
        check_at(files[3], sent_by(files[0]))
    files[0].write_text("\n")
    with pytest.raises(UnauthenticatedError, match="holds no token"):
        sent_by(files[0])
    with pytest.raises(UnauthenticatedError):
        check_at(files[0], (("authorization", "Bearer "),))
