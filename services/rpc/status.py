"""Exceptions and gRPC status codes: one function each way."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any

import grpc

from services.base.errors import (
    DeadlineExceededError,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    NotServedError,
    ResourceExhaustedError,
    ServiceError,
    UnauthenticatedError,
    UnavailableError,
)

ANSWERED_KEY = "fusion-answered"
"""Key in the trailing metadata of every error that a method of ours ends with. Serve's proxy drops it."""
_MAX_DETAILS_BYTES = 4000
"""Most bytes of a message. gRPC sends it among the trailers, of which a client takes 8 KiB."""


def status_of(error: BaseException) -> tuple[grpc.StatusCode, str]:
    """Return the status code and the message under which an exception leaves a service.

    Unexpected exceptions become INTERNAL without their message, which could quote a document.
    """
    code, message = _status_of(error)
    return code, _shortened(message)


def _shortened(message: str) -> str:
    """Return the message cut to its limit, counted percent-encoded: it may quote a client's text of any length."""
    num_bytes = 0
    for at, character in enumerate(message):
        plain = " " <= character <= "~" and character != "%"
        num_bytes += 1 if plain else 3 * len(character.encode("utf-8", "replace"))
        if num_bytes > _MAX_DETAILS_BYTES:
            return f"{message[:at]} ... (shortened)"
    return message


def _status_of(error: BaseException) -> tuple[grpc.StatusCode, str]:
    if isinstance(error, ServiceError):
        return error.code, str(error)
    if isinstance(error, TimeoutError):
        return grpc.StatusCode.DEADLINE_EXCEEDED, str(error) or "the deadline passed before the answer was ready"
    if isinstance(error, asyncio.CancelledError | GeneratorExit):
        return grpc.StatusCode.CANCELLED, "the call was cancelled"
    if isinstance(error, grpc.aio.AioRpcError):
        return error.code(), error.details() or "a service behind this one failed"
    return grpc.StatusCode.INTERNAL, f"internal error ({type(error).__name__}); the service's log has the details"


_BY_CODE = {
    cls.code: cls
    for cls in (
        InvalidArgumentError,
        FailedPreconditionError,
        NotFoundError,
        ResourceExhaustedError,
        UnavailableError,
        DeadlineExceededError,
        UnauthenticatedError,
    )
}


_OF_A_DEAD_REPLICA = {grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN, grpc.StatusCode.CANCELLED}


def error_of(code: grpc.StatusCode, message: str) -> ServiceError:
    """Return the exception for a status code that a client received."""
    cls = _BY_CODE.get(code)
    return cls(message) if cls else ServiceError(f"{code.name}: {message}")


def error_of_call(error: grpc.RpcError, where: str) -> ServiceError:
    """Return the exception for a call that failed at the client; `where` names the service that was asked.

    The calls of a replica that dies end as INTERNAL from Serve, and as UNKNOWN or CANCELLED from proxies and
    connections that go away. A replica's own unexpected error has the same codes: both are worth another attempt, which
    finds another replica, within the caller's patience.

    NOT_FOUND may come from a proxy that does not know the application, and is NotServedError then. Behind Serve's proxy
    the two look alike: a caller of methods that answer NOT_FOUND themselves must ask for the application's health.
    """
    code, message = error.code(), f"{where}: {error.details() or ''}"
    if code in _OF_A_DEAD_REPLICA:
        return UnavailableError(message)
    if code == grpc.StatusCode.NOT_FOUND and ANSWERED_KEY not in _keys(error.trailing_metadata() or ()):
        return NotServedError(message)
    return error_of(code, message)


def _keys(metadata: Iterable[Any]) -> list[str]:
    return [key for key, _ in metadata]
