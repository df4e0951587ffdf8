"""Limits on what one client holds of a replica at once, so that a careless one cannot take all of it.

A client is a bearer token on a host: trainers that share a token and run on several machines have a share each, those
behind one gateway share one. Every replica counts for itself.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from pydantic import Field

from services.base.errors import InvalidArgumentError, ResourceExhaustedError
from services.base.settings import Settings


class PerClient(Settings):
    """Section `per_client` of a service; calls above these limits are refused with RESOURCE_EXHAUSTED."""

    streams: int = Field(64, ge=1, description="Streams that a client may hold open at a replica.")
    blocks: int = Field(
        1024, ge=1, description="Blocks that its streams together may have been granted and not yet sent."
    )
    request_bytes: int = Field(
        32 * 2**20, ge=1, description="Bytes of its requests that are being answered; no message may be larger."
    )


def client_of(peer: str, metadata: Iterable[tuple[str, str]]) -> str:
    """Return a name for the caller to count by: a hash of the token sent and the host that it came from."""
    host = peer.rpartition(":")[0]
    token = next((value for key, value in metadata if key == "authorization"), "")
    return hashlib.sha256(f"{host} {token}".encode()).hexdigest()[:16]


_SENT = ("blocks", "found", "skipped", "answers", "verdicts", "scores")
"""Fields of responses whose items use up a credit each."""


@dataclass(slots=True)
class _Held:
    streams: int = 0
    blocks: int = 0
    request_bytes: int = 0


class ClientLimits:
    """Counts for one replica, on one event loop. `section` is the recipe's section of the settings, for messages."""

    def __init__(self, settings: PerClient, section: str) -> None:
        self.settings = settings
        self.section = section
        self._held: defaultdict[str, _Held] = defaultdict(_Held)

    @property
    def idle(self) -> bool:
        """True when no call and no stream is open."""
        return not self._held

    @contextmanager
    def call(self, client: str, request: Any) -> Iterator[None]:
        """Hold a unary call's bytes while it lasts.

        Raises ResourceExhaustedError when the client's calls are too large together.
        """
        num_bytes = self.check_size(request)
        held = self._held[client]
        allowed = self.settings.request_bytes
        if held.request_bytes + num_bytes > allowed:
            raise ResourceExhaustedError(
                f"request: {num_bytes} bytes beside {held.request_bytes} of other calls of this client; "
                f"{self.section}.request_bytes is {allowed}"
            )
        held.request_bytes += num_bytes
        try:
            yield
        finally:
            held.request_bytes -= num_bytes
            self._forget(client)

    @contextmanager
    def stream(self, client: str) -> Iterator[OpenStream]:
        """Hold a stream while it lasts; raises ResourceExhaustedError when the client has too many."""
        held, allowed = self._held[client], self.settings.streams
        if held.streams >= allowed:
            raise ResourceExhaustedError(
                f"stream: this client has {held.streams} open; {self.section}.streams is {allowed}"
            )
        held.streams += 1
        opened = OpenStream(self, held)
        try:
            yield opened
        finally:
            held.streams -= 1
            held.blocks -= opened.blocks
            self._forget(client)

    def check_size(self, message: Any) -> int:
        """Return the message's bytes; raises ResourceExhaustedError for one that is too large by itself."""
        num_bytes, allowed = int(message.ByteSize()), self.settings.request_bytes
        if num_bytes > allowed:
            raise ResourceExhaustedError(f"request: {num_bytes} bytes; {self.section}.request_bytes is {allowed}")
        return num_bytes

    def _forget(self, client: str) -> None:
        if self._held[client] == _Held():
            del self._held[client]


class OpenStream:
    """One stream's share of what its client holds."""

    def __init__(self, limits: ClientLimits, held: _Held) -> None:
        self._limits, self._held = limits, held
        self.blocks = 0

    async def requests(self, messages: AsyncIterator[Any]) -> AsyncIterator[Any]:
        """Yield the client's messages; raises for a credit, or a message, that is beyond the limits."""
        async for message in messages:
            self._limits.check_size(message)
            if message.WhichOneof("message") == "credit":
                self._grant(message.credit.blocks)
            yield message

    def sent(self, response: Any) -> None:
        """Give back the credits of a frame that was sent; a skipped window has used up its credit as well."""
        num_sent = sum(len(getattr(response, field, ())) for field in _SENT)
        num_blocks = min(num_sent, self.blocks)
        self.blocks -= num_blocks
        self._held.blocks -= num_blocks

    def _grant(self, blocks: int) -> None:
        allowed, section = self._limits.settings.blocks, self._limits.section
        if blocks > allowed:
            raise InvalidArgumentError(f"credit.blocks: {blocks} at once; {section}.blocks is {allowed}")
        if self._held.blocks + blocks > allowed:
            raise ResourceExhaustedError(
                f"credit.blocks: {blocks} beside {self._held.blocks} that this client has granted and not received; "
                f"{section}.blocks is {allowed}"
            )
        self.blocks += blocks
        self._held.blocks += blocks
