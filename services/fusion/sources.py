"""The sources behind the fusion service: asked with a deadline and retries, read through the store."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import numpy as np

from fusion.v1 import fusion_pb2, source_pb2
from fusion_core.alignment.byte import ByteProjection
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
from services.fusion.config import ServiceConfig, SourceEndpoint
from services.fusion.store import BlockStore
from services.source.client import ScoreStream, SourceClient

logger = logging.getLogger("ray.serve")

_FIRST_PAUSE_SECONDS = 0.5
_LONGEST_PAUSE_SECONDS = 15.0


class Source:
    """One source: its endpoint, its vocabulary and the projection into the target's."""

    def __init__(
        self, endpoint: SourceEndpoint, target: Vocabulary, service: ServiceConfig, store: BlockStore | None
    ) -> None:
        self.endpoint = endpoint
        self.name = endpoint.name
        self.vocabulary = Vocabulary.from_pretrained(resolve_model(endpoint.model), eos_token=endpoint.eos_token)
        self.projection = ByteProjection(self.vocabulary, target)
        self.projection.warm()  # seconds now, so that no window pays them
        self._service = service
        self._store = store
        self._client = SourceClient(
            endpoint.address, endpoint.application, timeout_seconds=service.source_timeout_seconds
        )
        self._info: source_pb2.GetSourceInfoResponse | None = None

    async def status(self) -> fusion_pb2.SourceStatus:
        """How the source answers just now."""
        status = fusion_pb2.SourceStatus(
            name=self.name, address=self.endpoint.address, top_k=self.endpoint.top_k, model=self.endpoint.model
        )
        try:
            self._info = None
            info = await self._checked_info()
        except ServiceError as error:
            status.problem = str(error)
        else:
            status.serving = True
            status.vocabulary = info.vocabulary
            status.model = info.model
        return status

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

    async def score(self, passage: Passage, stream: ScoreStream | None = None) -> Block:
        """Scores a passage, through the store where there is one; raises ServiceError when all attempts failed."""
        pause = _FIRST_PAUSE_SECONDS
        for attempt in range(1, self._service.source_attempts + 1):
            try:
                async with asyncio.timeout(self._service.source_timeout_seconds):
                    # After a failure the text goes alone: what broke the stream may have been another text.
                    return await self._score_once(passage, stream if attempt == 1 else None)
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

    async def _score_once(self, passage: Passage, stream: ScoreStream | None) -> Block:
        info = await self._checked_info()
        key = ""
        if self._store is not None:
            key = BlockStore.key(info, self.endpoint.top_k, passage)
            if (kept := await asyncio.to_thread(self._store.get, key)) is not None:
                return kept
        if stream is not None:
            block = await stream.score(passage)
        else:
            [block] = await self._client.score(
                [passage], top_k=self.endpoint.top_k, expected_vocabulary=self.vocabulary.fingerprint
            )
        self._check(block, passage)
        if self._store is not None:
            try:
                await asyncio.to_thread(self._store.put, key, block)
            except OSError as error:  # a full disk costs the next pass, not this one
                logger.warning("service.store: cannot keep a window of source %s: %s", self.name, error)
        return block

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
        uniform = -np.log(self.vocabulary.size)
        if block.k > 1 and np.allclose(block.topk_logprobs_TK, uniform, atol=1e-2):
            raise UnavailableError(f"source {self.name}: every candidate has probability 1/V; its weights are lost")

    async def close(self) -> None:
        await self._client.close()
