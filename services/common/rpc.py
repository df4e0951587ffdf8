"""Decorators for the methods of a Ray Serve gRPC deployment: token checked, exceptions turned into status codes.

Serve's proxy takes no interceptors, so what an interceptor would do stands here. A service that has a method
`record_failure(code)` is told about every call that fails.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Any, TypeVar

import grpc

from services.common.auth import Metadata, check_token
from services.common.deadline import caller_deadline
from services.common.errors import status_of
from services.common.tracing import server_span

logger = logging.getLogger("ray.serve")

Request = TypeVar("Request")
Response = TypeVar("Response")

_OUR_FAULT = {grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN}


def _set_status(service: Any, grpc_context: Any, error: BaseException) -> None:
    code, message = status_of(error)
    if record_failure := getattr(service, "record_failure", None):
        record_failure(code)
    grpc_context.set_code(code)
    grpc_context.set_details(message)
    if code in _OUR_FAULT:
        logger.error("call failed", exc_info=error)


def unary(
    method: Callable[[Any, Request], Awaitable[Response]],
) -> Callable[..., Awaitable[Response]]:
    """For `async def Method(self, request) -> response`; it is cancelled when the caller waits no longer."""

    @functools.wraps(method)
    async def traced(self: Any, request: Request, metadata: Metadata) -> Response:
        check_token(metadata)
        with server_span(method.__qualname__, metadata):
            async with caller_deadline(metadata):
                return await method(self, request)

    return _unary(traced)


def public_unary(
    method: Callable[[Any, Request], Awaitable[Response]],
) -> Callable[..., Awaitable[Response]]:
    """The same without a token: for health checks, which stock probes send bare."""

    @functools.wraps(method)
    async def bare(self: Any, request: Request, _metadata: Metadata) -> Response:
        return await method(self, request)

    return _unary(bare)


def _unary(method: Callable[[Any, Request, Metadata], Awaitable[Response]]) -> Callable[..., Awaitable[Response]]:
    @functools.wraps(method)
    async def call(self: Any, request: Request, grpc_context: Any) -> Response:
        try:
            return await method(self, request, tuple(grpc_context.invocation_metadata()))
        except BaseException as error:
            _set_status(self, grpc_context, error)
            raise

    del call.__wrapped__  # Serve must see the grpc_context parameter
    return call


def bidirectional(
    method: Callable[[Any, AsyncIterator[Request]], AsyncGenerator[Response, None]],
) -> Callable[..., AsyncGenerator[Response, None]]:
    """For `async def Method(self, requests)` that yields responses."""

    @functools.wraps(method)
    async def call(self: Any, requests: AsyncIterator[Request], grpc_context: Any) -> AsyncGenerator[Response, None]:
        try:
            metadata = tuple(grpc_context.invocation_metadata())
            check_token(metadata)
            with server_span(method.__qualname__, metadata):
                async with aclosing(method(self, requests)) as responses:
                    async for response in responses:
                        yield response
        except BaseException as error:
            _set_status(self, grpc_context, error)
            raise

    del call.__wrapped__  # Serve must see the grpc_context parameter
    return call
