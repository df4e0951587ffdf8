"""HTTP to one server: bounded concurrency, deadlines, and another try while it is away or overloaded.

All requests share one clock: once no attempt has succeeded for `retry_seconds`, each further failure is raised at
once, so that what waits in line does not wait in vain one after the other.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, NamedTuple, TypeVar

import httpx

from services.base.errors import DeadlineExceededError, UnavailableError
from services.base.retry import Backoff
from services.rpc.deadline import remaining_seconds
from services.source.engines.endpoint.config import OpenAIConfig
from services.source.engines.endpoint.flavour import MalformedAnswerError, field

_CONNECT_SECONDS = 5.0
_LOOK_SECONDS = 10.0
"""Longest time of a request that computes nothing."""
_OVERLOADED = {429, 502, 503, 504}
_SHOWN_CHARACTERS = 300
_Answer = TypeVar("_Answer")


class RefusedRequestError(UnavailableError):
    """The server refuses a request as such: an unknown model, too long a prompt, more candidates than it gives.

    `is_unknown`: it knows no such path or model.
    """

    def __init__(self, problem: str, *, is_unknown: bool = True) -> None:
        super().__init__(problem)
        self.is_unknown = is_unknown


class ServedModel(NamedTuple):
    """The description of a served model in `/v1/models`; `max_tokens` is None where it does not say."""

    name: str
    root: str
    max_tokens: int | None


class _Passing(Exception):  # noqa: N818  # never leaves this module
    """A failure that another try may cure; `lost` when the connection failed."""

    def __init__(self, problem: str, *, lost: bool) -> None:
        super().__init__(problem)
        self.lost = lost


class Connection:
    """Requests to one server. Lives on one event loop. The key is in a header only: no message and no log shows it."""

    def __init__(self, settings: OpenAIConfig, key: str | None) -> None:
        logging.getLogger("httpx").setLevel(logging.WARNING)  # a line per request otherwise
        self.url = settings.base_url
        self._settings = settings
        self._key = key
        self._slots = asyncio.Semaphore(settings.max_concurrent)
        self._client = httpx.AsyncClient(
            timeout=httpx.Timeout(None, connect=_CONNECT_SECONDS),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=settings.max_concurrent),
            headers={"Authorization": f"Bearer {key}"} if key else {},
        )
        self._served: ServedModel | None = None
        self._failing_since: float | None = None
        self._lost = False
        self._closing: asyncio.Task[None] | None = None

    async def served(self) -> ServedModel:
        """Return the description of the configured model, and compare it with this one after a lost connection.

        Raises UnavailableError when the server cannot be reached, RefusedRequestError when it has no such model.
        """
        if self._served is None:
            async with self._within(self._settings.timeout_seconds):
                self._served = await self._patiently(self._look)
        return self._served

    async def post(self, path: str, body: dict[str, Any]) -> Any:
        """Return the answer's JSON value.

        Raises RefusedRequestError for a request that the server refuses, UnavailableError when it cannot be reached
        or is overloaded for `retry_seconds`, or fails, and DeadlineExceededError when it does not answer in time.
        """
        left = remaining_seconds()
        seconds = self._settings.timeout_seconds if left is None else min(left, self._settings.timeout_seconds)

        async def ask() -> Any:
            if self._lost and self._served is not None:
                await self._same_model(self._served)
            return await self._send("POST", path, body)

        async with self._within(seconds), self._slots:
            return await self._patiently(ask)

    async def get(self, path: str) -> Any:
        """Return the answer's JSON value, after one attempt; raises as `post`."""
        async with self._within(_LOOK_SECONDS):
            try:
                return await self._send("GET", path)
            except _Passing as error:
                raise UnavailableError(str(error)) from error

    def close(self) -> None:
        """Close all connections. May be called twice."""
        if self._closing is None:
            self._closing = asyncio.get_running_loop().create_task(self._client.aclose())

    @asynccontextmanager
    async def _within(self, seconds: float) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout(seconds):
                yield
        except TimeoutError as error:
            raise DeadlineExceededError(f"{self.url} did not answer within {seconds:.3g} s") from error

    async def _patiently(self, ask: Callable[[], Awaitable[_Answer]]) -> _Answer:
        """Return what `ask` returns, after more attempts while the failures may pass."""
        backoff = Backoff(0.2, longest_seconds=2.0)
        while True:
            try:
                answer = await ask()
            except _Passing as error:
                now = time.monotonic()
                self._lost = self._lost or error.lost
                self._failing_since = self._failing_since or now
                if now - self._failing_since >= self._settings.retry_seconds:
                    raise UnavailableError(str(error)) from error
                await asyncio.sleep(backoff.next_pause())
            else:
                self._failing_since, self._lost = None, False
                return answer

    async def _look(self) -> ServedModel:
        models = field(await self._send("GET", "/v1/models"), "data")
        entries = [entry for entry in models or () if isinstance(entry, dict) and "id" in entry]
        for entry in entries:
            if entry["id"] == self._settings.model:
                longest = entry.get("max_model_len")
                return ServedModel(entry["id"], str(entry.get("root") or ""), longest and int(longest))
        names = ", ".join(str(entry["id"]) for entry in entries[:10]) or "none"
        raise RefusedRequestError(f"{self.url} serves no model {self._settings.model!r}; it has {names}")

    async def _same_model(self, before: ServedModel) -> None:
        """Raise UnavailableError when the server came back with another model."""
        if (now := await self._look()) != before:
            raise UnavailableError(f"{self.url} came back with another model: {now}, it was {before}")

    async def _send(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        try:
            answer = await self._client.request(method, self.url + path, json=body)
        except httpx.TransportError as error:
            problem = f"{self.url} cannot be reached: {type(error).__name__}: {error}"
            raise _Passing(self._without_key(problem), lost=True) from None  # its request holds the key
        if answer.is_success:
            try:
                return answer.json()
            except ValueError as error:
                raise MalformedAnswerError(f"{self.url}{path} does not answer with JSON") from error
        said = self._without_key(answer.text)[:_SHOWN_CHARACTERS]
        problem = f"{self.url}{path} answers {answer.status_code}: {said}"
        if answer.status_code in _OVERLOADED:
            raise _Passing(problem, lost=False)
        if answer.status_code in {401, 403}:
            raise UnavailableError(f"engine.api_key_env: {problem}")
        if answer.is_client_error:
            raise RefusedRequestError(problem, is_unknown=answer.status_code in {404, 405})
        raise UnavailableError(problem)

    def _without_key(self, text: str) -> str:
        return text.replace(self._key, "***") if self._key else text
