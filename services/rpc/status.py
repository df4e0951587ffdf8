"""Exceptions and gRPC status codes: one function each way."""

from __future__ import annotations

import asyncio

import grpc

from services.base.errors import (
    DeadlineExceededError,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    ResourceExhaustedError,
    ServiceError,
    UnauthenticatedError,
    UnavailableError,
)

INTERNAL_ERROR = "internal error"
"""How the message of an unexpected exception begins: what else is INTERNAL does not come from our code."""


_MAX_DETAILS_BYTES = 4000
"""gRPC sends the message among the trailers, of which a client takes 8 KiB."""


def status_of(error: BaseException) -> tuple[grpc.StatusCode, str]:
    """Status code and message under which an exception leaves a service.

    Unexpected exceptions become INTERNAL without their message, which could quote a document.
    """
    code, message = _status_of(error)
    return code, _shortened(message)


def _shortened(message: str) -> str:
    """Messages may name what a client sent, which can be of any length; on the wire they are percent-encoded."""
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
    return grpc.StatusCode.INTERNAL, f"{INTERNAL_ERROR} ({type(error).__name__}); the service's log has the details"


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


_OF_OTHERS = {grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN, grpc.StatusCode.CANCELLED}


def error_of(code: grpc.StatusCode, message: str) -> ServiceError:
    """The exception for a status code that a client received."""
    cls = _BY_CODE.get(code)
    return cls(message) if cls else ServiceError(f"{code.name}: {message}")


def error_of_call(error: grpc.RpcError, where: str) -> ServiceError:
    """The exception for a call that failed at the client; `where` names the service that was asked."""
    code, details = error.code(), error.details() or ""
    # A replica that dies takes its calls with it, and Serve reports that as INTERNAL, in words of its own; proxies and
    # connections that go away have other codes for it. No service of ours sends them.
    died = code in _OF_OTHERS and not details.startswith(INTERNAL_ERROR)
    return UnavailableError(f"{where}: {details}") if died else error_of(code, f"{where}: {details}")
