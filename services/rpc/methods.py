"""Decorators for the methods of a Ray Serve gRPC deployment: token and limits checked, exceptions turned into codes.

Serve's proxy takes no interceptors, so these decorators do their work. A service that has a method
`record_failure(code)` is told about every call that fails; one that has `client_limits` holds its clients to them.

Serve logs an exception that leaves a method, in the replica and in the proxy, so none leaves that could quote a
document: an unexpected exception goes to the log as its type and its place in the code, without its message.
`FUSION_LOG_ERRORS=full` logs the message as well.
"""

from __future__ import annotations

import functools
import logging
import os
import traceback
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing, nullcontext
from typing import Any, NoReturn, TypeVar

import grpc

from services.base.errors import ServiceError
from services.rpc.auth import Metadata, check_token
from services.rpc.client_limits import ClientLimits, client_of
from services.rpc.deadline import caller_deadline
from services.rpc.status import ANSWERED_KEY, error_of, status_of
from services.rpc.tracing import server_span

logger = logging.getLogger("ray.serve")

Request = TypeVar("Request")
Response = TypeVar("Response")

_OUR_FAULT = {grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN}


def _fail(service: Any, grpc_context: Any, error: BaseException) -> NoReturn:
    """Set the call's status and raise an exception that Serve may log."""
    code, message = status_of(error)
    if record_failure := getattr(service, "record_failure", None):
        record_failure(code)
    grpc_context.set_code(code)
    grpc_context.set_details(message)
    grpc_context.set_trailing_metadata([(ANSWERED_KEY, "1")])
    if code in _OUR_FAULT:
        full = os.environ.get("FUSION_LOG_ERRORS") == "full"
        logger.error("call failed: %s", _described(error, full=full))
    if isinstance(error, Exception):
        # A plain exception in its place: Ray pickles exceptions, and loses the status of one that it cannot read again.
        raise (ServiceError(message) if code in _OUR_FAULT else error_of(code, message)) from None
    raise error  # cancellation is no failure


def _described(error: BaseException, *, full: bool) -> str:
    if full:
        return "".join(traceback.format_exception(error))
    parts = []
    cause: BaseException | None = error
    while cause is not None:
        parts.append(f"{type(cause).__name__}\n{''.join(traceback.format_tb(cause.__traceback__))}")
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)
    return "caused by ".join(parts)


def unary(
    method: Callable[[Any, Request], Awaitable[Response]],
) -> Callable[..., Awaitable[Response]]:
    """Decorate `async def Method(self, request) -> response`; it is cancelled when the caller waits no longer."""

    @functools.wraps(method)
    async def guarded(self: Any, request: Request, metadata: Metadata, peer: str) -> Response:
        check_token(metadata)
        limits: ClientLimits | None = getattr(self, "client_limits", None)
        within = limits.call(client_of(peer, metadata), request) if limits else nullcontext()
        with within, server_span(method.__qualname__, metadata):
            async with caller_deadline(metadata):
                return await method(self, request)

    return _unary(guarded)


def public_unary(
    method: Callable[[Any, Request], Awaitable[Response]],
) -> Callable[..., Awaitable[Response]]:
    """Decorate a unary method that needs no token: health checks, which stock probes send without one."""

    @functools.wraps(method)
    async def bare(self: Any, request: Request, _metadata: Metadata, _peer: str) -> Response:
        return await method(self, request)

    return _unary(bare)


def _unary(method: Callable[[Any, Request, Metadata, str], Awaitable[Response]]) -> Callable[..., Awaitable[Response]]:
    @functools.wraps(method)
    async def call(self: Any, request: Request, grpc_context: Any) -> Response:
        try:
            return await method(self, request, tuple(grpc_context.invocation_metadata()), grpc_context.peer())
        except BaseException as error:
            _fail(self, grpc_context, error)

    del call.__wrapped__  # Serve must see the grpc_context parameter
    return call


def bidirectional(
    method: Callable[[Any, AsyncIterator[Request]], AsyncGenerator[Response, None]],
) -> Callable[..., AsyncGenerator[Response, None]]:
    """Decorate `async def Method(self, requests)` that yields responses."""

    @functools.wraps(method)
    async def call(self: Any, requests: AsyncIterator[Request], grpc_context: Any) -> AsyncGenerator[Response, None]:
        try:
            metadata = tuple(grpc_context.invocation_metadata())
            check_token(metadata)
            limits: ClientLimits | None = getattr(self, "client_limits", None)
            within = limits.stream(client_of(grpc_context.peer(), metadata)) if limits else nullcontext()
            with within as stream, server_span(method.__qualname__, metadata):
                metered = stream.requests(requests) if stream else requests
                async with aclosing(method(self, metered)) as responses:
                    async for response in responses:
                        if stream:
                            stream.sent(response)
                        yield response
        except BaseException as error:
            _fail(self, grpc_context, error)

    del call.__wrapped__  # Serve must see the grpc_context parameter
    return call
