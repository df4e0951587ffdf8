"""A source read through the store: stored windows are not asked for, and answers are kept."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping

import numpy as np

from fusion.v1 import fusion_pb2
from fusion_core.blocks import PADDING_ID, Block
from fusion_core.vocabulary import Vocabulary
from services.base.errors import FailedPreconditionError, ServiceError, UnavailableError
from services.fusion.config import SourceEndpoint
from services.fusion.sources.meters import StoreMetrics
from services.fusion.sources.remote import RefusedTextError, RemoteSource
from services.store.capture_plan import Place
from services.store.identity import SourceIdentity, window_key
from services.store.rows import STEP_NATS
from services.store.source_store import SourceStore
from services.store.store import BlockStore
from services.wire.passage import Passage
from services.wire.plausible import implausible

logger = logging.getLogger("ray.serve")


class ThroughStore:
    """One source and its windows in the store, if there is one. Lives on one event loop."""

    def __init__(self, source: RemoteSource, store: BlockStore | None) -> None:
        self.source = source
        self.name = source.name
        self.vocabulary = source.vocabulary
        self.meter = source.meter
        self._store = store
        self._substitute: SourceIdentity | None = None
        self._metrics = StoreMetrics(self.name)

    @property
    def known(self) -> SourceIdentity | None:
        """The identity of the model that served last, or of its stored windows; None before either is known."""
        return self.source.known or self._substitute

    async def score(self, passage: Passage, *, streamed: bool = True, place: Place | None = None) -> Block:
        """Return the block of a passage: the stored one, or the source's own, which is then kept.

        `place` is split and index of a window of a data set, which find a captured one. Raises as `RemoteSource.score`.
        """
        if self._store is None:
            return (await self.source.score(passage, streamed=streamed)).block
        key, problem = window_key(passage), ""
        try:
            windows = await self._windows()
        except UnavailableError as error:
            problem = f"; {error}"
        else:
            if (kept := await asyncio.to_thread(self._find, windows, key, place)) is not None:
                self._metrics.hits.inc()
                if not kept.mask_T.any():
                    raise RefusedTextError(f"source {self.name}: the store says that it does not take this text")
                return kept
        self._metrics.misses.inc()
        try:
            block, identity = await self.source.score(passage, streamed=streamed)
        except UnavailableError as error:
            raise UnavailableError(f"{error}{problem}") from error
        try:
            await asyncio.to_thread(self._store.source(identity).put, key, block)
        except ValueError as error:
            raise UnavailableError(f"source {self.name} sent a broken block: {error}") from error
        return block

    async def keep_refusal(self, passage: Passage, identity: SourceIdentity) -> None:
        """Store the fact that the source does not take a text, so that it is not asked for again."""
        assert self._store is not None
        block = refusal(passage, self.vocabulary, self.source.endpoint.top_k)
        await asyncio.to_thread(self._store.source(identity).put, window_key(passage), block)

    async def status(self, splits: Mapping[str, str]) -> fusion_pb2.SourceStatus:
        """Return the source's status; when it does not answer, with the names of its captured `splits`.

        `splits` holds the fingerprint of every split by name.
        """
        status = await self.source.status()
        if not status.serving:
            status.captured.extend(await asyncio.to_thread(self._captured, splits))
        return status

    async def close(self) -> None:
        """End streams and connection; the owner of the store flushes it."""
        await self.source.close()

    async def _windows(self) -> SourceStore:
        """Return the stored windows of the source that serves or, when none does, of the one that served or was stored.

        Raises UnavailableError when there is none to be read, and FailedPreconditionError as `RemoteSource.identity`.
        """
        assert self._store is not None
        try:
            identity = await self.source.identity()
        except FailedPreconditionError:
            raise
        except ServiceError:
            if self.known is None:
                self._substitute = (await asyncio.to_thread(self._only_stored)).identity
            known = self.known
            assert known is not None
            return self._store.source(known)
        self._substitute = None
        return self._store.source(identity)

    def _find(self, windows: SourceStore, key: bytes, place: Place | None) -> Block | None:
        """Look a window up; one that no sound source can have given counts as absent."""
        block = windows.find(key, place)
        if block is None or not block.mask_T.any():
            return block
        # A row is rounded and then rescaled, by half a step each.
        size, k = self.vocabulary.size, self.source.endpoint.top_k
        problem = implausible(block, vocabulary_size=size, k=k, rounded_nats=STEP_NATS)
        if problem is None:
            return block
        logger.warning("service.store: a window of source %s in %s: %s", self.name, windows.folder, problem)
        return None

    def _captured(self, splits: Mapping[str, str]) -> list[str]:
        try:
            store = self._only_stored()
        except UnavailableError:
            return []
        if self.source.known is None:
            self._substitute = store.identity
        return [name for name, fingerprint in splits.items() if store.has_capture(fingerprint)]

    def _only_stored(self) -> SourceStore:
        """Return the windows of the stored source that is configured; raises UnavailableError unless just one fits."""
        if self._store is None:
            raise UnavailableError("there is no store")
        try:
            source = self.source
            fitting = stored_identities(self._store, source.endpoint, source.vocabulary, source.chat_template)
        except OSError as error:
            raise UnavailableError(f"service.store: {error}") from error
        if len(fitting) != 1:
            which = ", ".join(identity.digest for identity in fitting) or "none"
            raise UnavailableError(f"the store must hold windows of just one such source to do without it, has {which}")
        return self._store.source(fitting[0])


def refusal(passage: Passage, vocabulary: Vocabulary, top_k: int) -> Block:
    """Return the block that the store keeps for a text that a source does not take: one masked row, no candidates."""
    num_tokens = 1 + (passage.ends_document and vocabulary.eos_id is not None)
    return Block(
        text_bytes=passage.text,
        token_ids_T=np.zeros(num_tokens, np.int32),
        byte_ends_T=np.full(num_tokens, len(passage.text), np.int32),
        topk_ids_TK=np.full((num_tokens, top_k), PADDING_ID, np.int32),
        topk_logprobs_TK=np.full((num_tokens, top_k), -np.inf, np.float32),
        tail_T=np.zeros(num_tokens, np.float32),
        gold_T=np.zeros(num_tokens, np.float32),
        vocabulary=vocabulary.fingerprint,
        mask_T=np.zeros(num_tokens, np.bool_),
        covered_mass=0.0,
        ends_document=num_tokens > 1,
    )


def stored_identities(
    store: BlockStore, endpoint: SourceEndpoint, vocabulary: Vocabulary, chat_template: str = ""
) -> list[SourceIdentity]:
    """Return the sources in a store that an endpoint may mean, as far as it is configured; raises OSError."""
    wanted = {"vocabulary": vocabulary.fingerprint, "top_k": endpoint.top_k, "chat_template": chat_template}
    wanted |= {
        key: value
        for key in ("engine", "dtype", "bos_token", "eos_token")
        if (value := getattr(endpoint, key)) is not None
    }
    return [identity for identity in store.identities() if wanted.items() <= identity.model_dump().items()]
