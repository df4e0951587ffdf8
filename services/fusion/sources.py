"""The sources behind the fusion service: asked with a deadline and retries, read through the store."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

from fusion.v1 import fusion_pb2, source_pb2
from fusion_core.blocks import Block
from fusion_core.vocabulary import Vocabulary
from services.common.errors import (
    FailedPreconditionError,
    InvalidArgumentError,
    ServiceError,
    UnauthenticatedError,
    UnavailableError,
)
from services.common.models import resolve_model
from services.common.passage import Passage
from services.common.plausible import implausible
from services.common.store.capture import Place
from services.common.store.identity import SourceIdentity, window_key
from services.common.store.store import BlockStore, SourceStore
from services.fusion.config import ServiceConfig, SourceEndpoint
from services.fusion.metrics import StoreMetrics
from services.source.client import ScoreStream, SourceClient

logger = logging.getLogger("ray.serve")

_FIRST_PAUSE_SECONDS = 0.5
_LONGEST_PAUSE_SECONDS = 15.0
_DOWN_SECONDS = 15.0
"""How long a source that did not answer is not asked who it is, as long as the store has its windows."""


class Source:
    """One source, asked over gRPC and read through the store."""

    def __init__(self, endpoint: SourceEndpoint, service: ServiceConfig, store: BlockStore | None) -> None:
        self.endpoint = endpoint
        self.name = endpoint.name
        self.vocabulary = self.vocabulary_of(endpoint)
        self._service = service
        self._store = store
        self._client = SourceClient(
            endpoint.address, endpoint.application, timeout_seconds=service.source_timeout_seconds
        )
        self._info: source_pb2.GetSourceInfoResponse | None = None
        self._away: tuple[float, SourceIdentity] | None = None
        if store is not None:
            self._metrics = StoreMetrics(self.name)

    @staticmethod
    def vocabulary_of(endpoint: SourceEndpoint) -> Vocabulary:
        """From the folder of the model's tokenizer; raises ValueError."""
        return Vocabulary.from_pretrained(resolve_model(endpoint.model), eos_token=endpoint.eos_token)

    async def status(self, splits: Mapping[str, str] | None = None) -> fusion_pb2.SourceStatus:
        """How the source answers just now, and which of the splits (fingerprints by name) the store holds."""
        status = fusion_pb2.SourceStatus(
            name=self.name, address=self.endpoint.address, top_k=self.endpoint.top_k, model=self.endpoint.model
        )
        try:
            self._info = None
            info = await self._checked_info()
        except ServiceError as error:
            status.problem = str(error)
            status.captured.extend(await asyncio.to_thread(self._captured, splits or {}))
        else:
            status.serving = True
            status.vocabulary = info.vocabulary
            status.model = info.model
        return status

    def _captured(self, splits: Mapping[str, str]) -> list[str]:
        try:
            store = self._stored()
        except (UnavailableError, OSError):
            return []
        return [name for name, fingerprint in splits.items() if store.captured(fingerprint)]

    @asynccontextmanager
    async def stream(self) -> AsyncIterator[ScoreStream]:
        """A stream of this source's own, for one consumer."""
        endpoint = self.endpoint
        stream = ScoreStream(
            endpoint.address,
            endpoint.application,
            top_k=endpoint.top_k,
            expected_vocabulary=self.vocabulary.fingerprint,
        )
        try:
            yield stream
        finally:
            await stream.close()

    async def score(self, passage: Passage, stream: ScoreStream | None = None, place: Place | None = None) -> Block:
        """Scores a passage, through the store where there is one; raises ServiceError when all attempts failed.

        `place` is where a window of a data set stands: a captured one is found by it.
        """
        pause = _FIRST_PAUSE_SECONDS
        for attempt in range(1, self._service.source_attempts + 1):
            try:
                async with asyncio.timeout(self._service.source_timeout_seconds):
                    # After a failure the text goes alone: what broke the stream may have been another text.
                    return await self._score_once(passage, stream if attempt == 1 else None, place)
            except UnauthenticatedError as error:
                raise FailedPreconditionError(f"source {self.name} refuses this service's token: {error}") from error
            except (InvalidArgumentError, FailedPreconditionError):
                if stream is None or attempt > 1 or attempt == self._service.source_attempts:
                    raise  # it went alone: trying again would not help
            except (ServiceError, TimeoutError) as error:
                self._info = None  # the source may come back as another one
                if attempt == self._service.source_attempts:
                    raise UnavailableError(f"source {self.name}: {error or 'no answer before the deadline'}") from error
                logger.warning("source %s, attempt %d: %s", self.name, attempt, error)
            await asyncio.sleep(pause * random.uniform(0.5, 1.5))
            pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)
        raise AssertionError("unreachable")

    async def _score_once(self, passage: Passage, stream: ScoreStream | None, place: Place | None) -> Block:
        if self._store is None:
            return await self._ask(passage, stream)
        key, store = window_key(passage), await self._windows()
        if (kept := await asyncio.to_thread(store.find, key, place)) is not None:
            self._metrics.hits.inc()
            return kept
        self._metrics.misses.inc()
        store = self._store.source(await self.identity())
        block = await self._ask(passage, stream)
        try:
            await asyncio.to_thread(store.keep, key, block)
        except ValueError as error:
            raise UnavailableError(f"source {self.name} sent a broken block: {error}") from error
        return block

    async def _ask(self, passage: Passage, stream: ScoreStream | None) -> Block:
        await self._checked_info()
        if stream is not None:
            block = await stream.score(passage)
        else:
            [block] = await self._client.score(
                [passage], top_k=self.endpoint.top_k, expected_vocabulary=self.vocabulary.fingerprint
            )
        self._check(block, passage)
        return block

    async def identity(self) -> SourceIdentity:
        """Who serves now; raises ServiceError."""
        return SourceIdentity.of(await self._checked_info(), self.endpoint.top_k)

    async def _windows(self) -> SourceStore:
        """The stored windows of the source that serves, or, when none does, of the one that was stored."""
        assert self._store is not None
        if self._away is not None and time.monotonic() < self._away[0]:
            return self._store.source(self._away[1])
        try:
            identity = await self.identity()
        except (FailedPreconditionError, UnauthenticatedError):
            raise
        except ServiceError as error:
            try:
                store = await asyncio.to_thread(self._stored)
            except (UnavailableError, OSError) as why:
                raise UnavailableError(f"{error}; {why}") from error
            self._away = (time.monotonic() + _DOWN_SECONDS, store.identity)
            return store
        self._away = None
        return self._store.source(identity)

    def _stored(self) -> SourceStore:
        """What the store has of the source as it is configured; raises UnavailableError unless that is one thing."""
        if self._store is None:
            raise UnavailableError("there is no store")
        fitting = stored_identities(self._store, self.endpoint, self.vocabulary)
        if len(fitting) != 1:
            which = ", ".join(identity.digest for identity in fitting) or "none"
            raise UnavailableError(f"the store must hold windows of just one such source to do without it, has {which}")
        return self._store.source(fitting[0])

    async def _checked_info(self) -> source_pb2.GetSourceInfoResponse:
        if self._info is None:
            info = await self._client.info()
            if info.problem:
                raise UnavailableError(info.problem)
            if info.vocabulary != self.vocabulary.fingerprint:
                raise FailedPreconditionError(
                    f"source {self.name}: serves vocabulary {info.vocabulary}, but {self.endpoint.model} as configured "
                    f"has {self.vocabulary.fingerprint}"
                )
            if info.max_top_k < self.endpoint.top_k:
                raise FailedPreconditionError(
                    f"source {self.name}: serves at most top_k {info.max_top_k}; {self.endpoint.top_k} is configured"
                )
            self._info = info
        return self._info

    def _check(self, block: Block, passage: Passage) -> None:
        """A source can break without an error; nothing wrong may go further."""
        ends = passage.ends_document and self.vocabulary.eos_id is not None
        if block.text_bytes != passage.text or block.ends_document != ends:
            raise UnavailableError(f"source {self.name}: answered for another text")
        if block.vocabulary != self.vocabulary.fingerprint:
            raise FailedPreconditionError(f"source {self.name}: answered in vocabulary {block.vocabulary}")
        if found := implausible(block.gold_T, block.topk_logprobs_TK, self.vocabulary.size):
            raise UnavailableError(f"source {self.name}: {found}")

    async def close(self) -> None:
        await self._client.close()


def stored_identities(store: BlockStore, endpoint: SourceEndpoint, vocabulary: Vocabulary) -> list[SourceIdentity]:
    """The sources in a store that an endpoint may mean, as far as it is configured; raises OSError."""
    wanted = {"vocabulary": vocabulary.fingerprint, "top_k": endpoint.top_k}
    wanted |= {
        key: value
        for key in ("engine", "dtype", "bos_token", "eos_token")
        if (value := getattr(endpoint, key)) is not None
    }
    return [
        identity
        for identity in store.identities()
        if wanted.items() <= (identity.model_dump() | {"engine": identity.engine.partition(" ")[0]}).items()
    ]
