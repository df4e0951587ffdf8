"""The sources behind the fusion service: asked with deadlines, retries and a breaker, read through the store."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

from fusion.v1 import fusion_pb2, source_pb2
from fusion_core.blocks import Block
from fusion_core.vocabulary import Vocabulary
from services.base.errors import (
    DeadlineExceededError,
    FailedPreconditionError,
    InvalidArgumentError,
    ResourceExhaustedError,
    ServiceError,
    UnauthenticatedError,
    UnavailableError,
)
from services.fusion.config import ServiceConfig, SourceEndpoint
from services.fusion.sources.breaker import Breaker, RetryBudget, State
from services.fusion.sources.meters import SourceMeter, StoreMetrics
from services.models.catalogue import resolve_model
from services.source.client import ScoreStream, SourceClient
from services.store.capture_plan import Place
from services.store.identity import SourceIdentity, window_key
from services.store.source_store import SourceStore
from services.store.store import BlockStore
from services.wire.passage import Passage
from services.wire.plausible import implausible

logger = logging.getLogger("ray.serve")

_FIRST_PAUSE_SECONDS = 0.5
_LONGEST_PAUSE_SECONDS = 15.0
_STATUS_SECONDS = 5.0
"""How long a source may take to say who it is when somebody asks how it is doing."""
_TRIAL = Passage(b"The")
_BREAKER_STATES: dict[State, fusion_pb2.BreakerState] = {
    "closed": fusion_pb2.BREAKER_STATE_CLOSED,
    "open": fusion_pb2.BREAKER_STATE_OPEN,
    "half-open": fusion_pb2.BREAKER_STATE_HALF_OPEN,
}


class Source:
    """One source, asked over gRPC and read through the store."""

    def __init__(self, endpoint: SourceEndpoint, service: ServiceConfig, store: BlockStore | None) -> None:
        self.endpoint = endpoint
        self.name = endpoint.name
        self.vocabulary = self.vocabulary_of(endpoint)
        self.meter = SourceMeter(self.name)
        self._service = service
        self._store = store
        self._client = SourceClient(
            endpoint.address, endpoint.application, timeout_seconds=service.source_timeout_seconds
        )
        self._breaker = Breaker(
            self.name, self._try, failures=service.breaker_failures, pause_seconds=service.breaker_pause_seconds
        )
        self._budget = RetryBudget(service.retry_budget)
        self._info: source_pb2.GetSourceInfoResponse | None = None
        self._asking: asyncio.Task[source_pb2.GetSourceInfoResponse] | None = None
        self._seen: SourceIdentity | None = None
        self._substitute: SourceIdentity | None = None
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
            self._breaker.check()
            info = self._info = self._checked(await self._client.info(_STATUS_SECONDS))
        except ServiceError as error:
            status.problem = str(error)
            status.captured.extend(await asyncio.to_thread(self._captured, splits or {}))
        else:
            status.serving = True
            status.vocabulary = info.vocabulary
            status.model = info.model
        status.breaker = _BREAKER_STATES[self._breaker.state]
        status.missing, status.retries = self.meter.missing, self.meter.retries
        status.timeouts = self.meter.timeouts
        return status

    def _captured(self, splits: Mapping[str, str]) -> list[str]:
        try:
            store = self._stored()
        except (UnavailableError, OSError):
            return []
        if self._seen is None:
            self._substitute = store.identity
        return [name for name, fingerprint in splits.items() if store.has_capture(fingerprint)]

    @asynccontextmanager
    async def stream(self) -> AsyncIterator[ScoreStream]:
        """A stream of this source's own, for one consumer."""
        endpoint = self.endpoint
        stream = ScoreStream(
            endpoint.address,
            endpoint.application,
            top_k=endpoint.top_k,
            expected_vocabulary=self.vocabulary.fingerprint,
            timeout_seconds=self._service.source_timeout_seconds,
        )
        try:
            yield stream
        finally:
            await stream.close()

    async def score(self, passage: Passage, stream: ScoreStream | None = None, place: Place | None = None) -> Block:
        """Scores a passage, through the store where there is one; raises ServiceError when all attempts failed.

        `place` is where a window of a data set stands: a captured one is found by it.
        """
        self._budget.asked()
        pause = _FIRST_PAUSE_SECONDS
        for attempt in range(1, self._service.source_attempts + 1):
            # After a failure the text goes alone: what broke the stream may have been another text.
            alone = stream is None or attempt > 1
            last = attempt == self._service.source_attempts
            try:
                return await self._score_once(passage, None if alone else stream, place)
            except (InvalidArgumentError, FailedPreconditionError):
                if alone or last:
                    raise  # trying again would not help
            except ServiceError as error:
                if isinstance(error, UnauthenticatedError) and self._seen is None:
                    raise FailedPreconditionError(
                        f"source {self.name} refuses this service's token: {error}"
                    ) from error
                if last or self._breaker.state != "closed" or not self._budget.take():
                    raise UnavailableError(f"source {self.name}: {error}") from error
                logger.warning("source %s, attempt %d: %s", self.name, attempt, error)
            self.meter.retry()
            await asyncio.sleep(pause * random.uniform(0.5, 1.5))
            pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)
        raise AssertionError("unreachable")

    async def _score_once(self, passage: Passage, stream: ScoreStream | None, place: Place | None) -> Block:
        if self._store is None:
            return (await self._ask(passage, stream))[0]
        key, store = window_key(passage), await self._windows()
        if (kept := await asyncio.to_thread(store.find, key, place)) is not None:
            self._metrics.hits.inc()
            return kept
        self._metrics.misses.inc()
        block, identity = await self._ask(passage, stream)
        try:
            await asyncio.to_thread(self._store.source(identity).put, key, block)
        except ValueError as error:
            raise UnavailableError(f"source {self.name} sent a broken block: {error}") from error
        return block

    async def _ask(self, passage: Passage, stream: ScoreStream | None) -> tuple[Block, SourceIdentity]:
        """The source's own answer, and whose it is; every failure is told to the breaker."""
        identity = await self._serving_identity()
        try:
            if stream is not None:
                block = await stream.score(passage)
            else:
                [block] = await self._client.score(
                    [passage], top_k=self.endpoint.top_k, expected_vocabulary=self.vocabulary.fingerprint
                )
            self._check(block, passage)
        except (InvalidArgumentError, ResourceExhaustedError):
            raise  # the text's fault, or a source at its limits, which is sound and wants pauses only
        except ServiceError as error:
            self._failed(error)
            raise
        self._breaker.succeeded()
        return block, identity

    def _failed(self, error: ServiceError) -> None:
        self._info = None  # the source may come back as another one
        if self._breaker.failed(error) and isinstance(error, DeadlineExceededError):
            self.meter.timeout()

    async def _try(self) -> None:
        """What the breaker asks for before windows are: who serves, and a short text."""
        self._info = None
        await self._checked_info()
        [block] = await self._client.score(
            [_TRIAL], top_k=self.endpoint.top_k, expected_vocabulary=self.vocabulary.fingerprint
        )
        self._check(block, _TRIAL)

    @property
    def known(self) -> SourceIdentity | None:
        """Who served last, or whose stored windows stand for the source; None before either is known."""
        return self._seen or self._substitute

    async def identity(self) -> SourceIdentity:
        """Who serves now; raises ServiceError."""
        return SourceIdentity.of(await self._checked_info(), self.endpoint.top_k)

    async def _windows(self) -> SourceStore:
        """The stored windows of the source that serves, or, when none does, of the one that was stored."""
        assert self._store is not None
        try:
            identity = await self._serving_identity()
        except (FailedPreconditionError, UnauthenticatedError):
            raise
        except ServiceError as error:
            if (known := self.known) is None:
                try:
                    known = (await asyncio.to_thread(self._stored)).identity
                except (UnavailableError, OSError) as why:
                    raise UnavailableError(f"{error}; {why}") from error
                self._substitute = known
            return self._store.source(known)
        self._substitute = None
        return self._store.source(identity)

    async def _serving_identity(self) -> SourceIdentity:
        self._breaker.check()
        try:
            return await self.identity()
        except ServiceError as error:
            self._failed(error)
            raise

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
        """All windows that want to know ask once together, and fail with one error."""
        if self._info is not None:
            return self._info
        if self._asking is None or self._asking.done():
            self._asking = asyncio.create_task(self._ask_info())
        return await asyncio.shield(self._asking)

    async def _ask_info(self) -> source_pb2.GetSourceInfoResponse:
        self._info = info = self._checked(await self._client.info(min(10.0, self._service.source_timeout_seconds)))
        return info

    def _checked(self, info: source_pb2.GetSourceInfoResponse) -> source_pb2.GetSourceInfoResponse:
        """Raises FailedPreconditionError when the source does not fit. One that did fit before is treated as one that
        fails: it may come back as what it was."""
        if info.problem:
            raise UnavailableError(info.problem)
        problem = None
        if info.vocabulary != self.vocabulary.fingerprint:
            problem = (
                f"serves vocabulary {info.vocabulary}, but {self.endpoint.model} as configured "
                f"has {self.vocabulary.fingerprint}"
            )
        elif info.max_top_k < self.endpoint.top_k:
            problem = f"serves at most top_k {info.max_top_k}; {self.endpoint.top_k} is configured"
        if problem is None:
            self._seen = SourceIdentity.of(info, self.endpoint.top_k)
            return info
        error = FailedPreconditionError if self._seen is None else UnavailableError
        raise error(f"source {self.name}: {problem}")

    def _check(self, block: Block, passage: Passage) -> None:
        """A source can break without an error; nothing wrong may go further."""
        ends = passage.ends_document and self.vocabulary.eos_id is not None
        if block.text_bytes != passage.text or block.ends_document != ends:
            raise UnavailableError(f"source {self.name}: answered for another text")
        if block.vocabulary != self.vocabulary.fingerprint:
            raise UnavailableError(f"source {self.name}: answered in vocabulary {block.vocabulary}")
        if found := implausible(block, vocabulary_size=self.vocabulary.size, k=self.endpoint.top_k):
            raise UnavailableError(f"source {self.name}: {found}")

    async def close(self) -> None:
        await self._breaker.close()
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
