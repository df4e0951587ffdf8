"""From a text to its fused block: all sources asked side by side, projected and mixed off the event loop."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from pathlib import Path

import numpy as np
import pyarrow as pa

from fusion.v1 import fusion_pb2
from fusion_core.alignment.method import Alignment
from fusion_core.blocks import Block
from fusion_core.fusion import TooFewSources, fuse
from fusion_core.vocabulary import Encoding, Vocabulary
from services.base.errors import (
    DeadlineExceededError,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    UnavailableError,
)
from services.fusion.config import FusionServiceConfig
from services.fusion.metrics import FusionMetrics
from services.fusion.sources.remote import Source
from services.rpc.deadline import remaining_seconds
from services.source.client import ScoreStream
from services.store.backfill_list import BackfillList, BackfillWindow
from services.store.capture_plan import Place
from services.store.identity import SourceIdentity
from services.store.store import BlockStore
from services.wire.passage import Passage

logger = logging.getLogger("ray.serve")

_SOURCES_SHARE = 0.9
"""Of the time that a caller waits: who answered by then is fused, so that one slow source does not fail the call."""


class QuorumLostError(UnavailableError):
    """Fewer than min_sources answered for a text; `missing` names those that did not."""

    def __init__(self, message: str, missing: Sequence[str]) -> None:
        super().__init__(message)
        self.missing = tuple(missing)


class _TooLateError(UnavailableError):
    """A source did not answer while the caller could still use it: nothing is said about the source."""


class Fuser:
    """The sources and the target vocabulary of one fusion service; lives on one event loop."""

    def __init__(self, config: FusionServiceConfig) -> None:
        self._config = config
        self.metrics = FusionMetrics()
        self.target = Vocabulary.from_pretrained(Path(config.tokenizer))
        if self.target.eos_id is None:
            logger.warning("the target's tokenizer has no EOS: blocks have no end row, and the target learns no end")
        self._store = BlockStore(config.service.store) if config.service.store else None
        self._backfill = BackfillList(self._store.files) if self._store else None
        self._sources = {endpoint.name: Source(endpoint, config.service, self._store) for endpoint in config.sources}
        vocabularies = {name: source.vocabulary for name, source in self._sources.items()}
        self._alignment = Alignment(vocabularies, self.target, config.fusion.alignment)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._sources)

    def check_names(self, names: Sequence[str]) -> tuple[str, ...]:
        """The sources to ask, all for none named; raises NotFoundError for a name that is not known."""
        for name in names:
            if name not in self._sources:
                raise NotFoundError(f"sources: {name!r} is not known; this service has {', '.join(self.names)}")
        return tuple(dict.fromkeys(names)) or self.names

    async def statuses(self, splits: Mapping[str, str]) -> list[fusion_pb2.SourceStatus]:
        """How every source answers just now, and which of the splits (fingerprints by name) are in the store."""
        return list(await asyncio.gather(*(source.status(splits) for source in self._sources.values())))

    def identities(self) -> dict[str, SourceIdentity]:
        """Who serves each source, or whose stored windows stand for it, as far as that is known."""
        return {name: known for name, source in self._sources.items() if (known := source.known) is not None}

    async def problem(self, splits: Mapping[str, str]) -> str | None:
        """Why the service cannot fuse now: too few sources answer or were captured. None when it can."""
        statuses = await self.statuses(splits)
        self.metrics.serving(statuses)
        serving = sum(status.serving for status in statuses)
        if sum(status.serving or bool(status.captured) for status in statuses) >= self._config.fusion.min_sources:
            return None
        problems = "; ".join(status.problem for status in statuses if status.problem)
        return f"{serving} of {len(statuses)} sources answer, {self._config.fusion.min_sources} are needed: {problems}"

    async def open_streams(self, stack: AsyncExitStack, names: Sequence[str]) -> dict[str, ScoreStream]:
        """A stream to each of the named sources, closed with the stack."""
        return {name: await stack.enter_async_context(self._sources[name].stream()) for name in names}

    async def fuse(
        self,
        passage: Passage,
        *,
        names: Sequence[str],
        k: int,
        streams: Mapping[str, ScoreStream] | None = None,
        place: Place | None = None,
    ) -> Block:
        """Asks the named sources and fuses what they answer; `place` is where a window of a data set stands.

        A source that fails takes no part, and the block says so. Raises UnavailableError when too few answer, and
        InvalidArgumentError or FailedPreconditionError when a source refuses the text for good.
        """
        asked = [self._answer(self._sources[name], passage, (streams or {}).get(name), place) for name in names]
        answers = await asyncio.gather(*asked, return_exceptions=True)
        blocks: dict[str, Block | None] = {}
        problems = []
        for name, answer in zip(names, answers, strict=True):
            if isinstance(answer, Block):
                blocks[name] = answer
            elif isinstance(answer, UnavailableError):
                blocks[name] = None
                problems.append(str(answer))
                self._sources[name].meter.miss()
            else:
                raise answer
        try:
            return await asyncio.to_thread(self._mix, passage, blocks, k)
        except TooFewSources as error:
            self.metrics.quorum_lost()
            late = any(isinstance(answer, _TooLateError) for answer in answers)
            reason = f"{error}: {'; '.join(problems)}"
            if late:
                raise DeadlineExceededError(reason) from error
            raise QuorumLostError(reason, [name for name, block in blocks.items() if block is None]) from error
        except ValueError as error:
            raise FailedPreconditionError(f"fusion: {error}") from error

    async def _answer(self, source: Source, passage: Passage, stream: ScoreStream | None, place: Place | None) -> Block:
        """What a source says, as long as there is time left to fuse it with the others' answers."""
        remaining = remaining_seconds()
        try:
            async with asyncio.timeout(None if remaining is None else _SOURCES_SHARE * remaining):
                return await source.score(passage, stream, place)
        except TimeoutError as error:
            raise _TooLateError(f"source {source.name}: no answer before the caller's deadline") from error

    async def note(self, corpus: str, split: str, fingerprint: str, windows: Sequence[BackfillWindow]) -> None:
        """Puts windows that lack sources on the back-fill list, where there is a store; raises UnavailableError."""
        if self._backfill is None or not windows:
            return
        try:
            await asyncio.to_thread(self._backfill.add, corpus, split, fingerprint, windows)
        except (OSError, pa.ArrowException) as error:
            raise UnavailableError(f"service.store: the back-fill list cannot be written: {error}") from error

    def flush(self) -> None:
        """Writes scored windows that are only in memory to the store."""
        if self._store is not None:
            self._store.flush()

    def realised_tokens(self, passage: Passage) -> Block:
        """A block without distributions: no candidates, all mass in the tail, every row masked."""
        encoding = self._encode(passage)
        num_tokens = encoding.num_tokens
        return Block(
            text_bytes=passage.text,
            token_ids_T=encoding.token_ids_T,
            byte_ends_T=encoding.byte_ends_T,
            topk_ids_TK=np.zeros((num_tokens, 0), dtype=np.int32),
            topk_logprobs_TK=np.zeros((num_tokens, 0), dtype=np.float32),
            tail_T=np.zeros(num_tokens, dtype=np.float32),
            gold_T=np.full(num_tokens, -np.inf, dtype=np.float32),
            vocabulary=self.target.fingerprint,
            mask_T=np.zeros(num_tokens, dtype=np.bool_),
            covered_mass=0.0,
            ends_document=encoding.ends_document,
        )

    def _encode(self, passage: Passage) -> Encoding:
        """The target's tokens of the text, which stands alone for the target. One without EOS has no end row."""
        encoding = self.target.encode(passage.text)
        if passage.ends_document and self.target.eos_id is not None:
            return encoding.with_end(self.target.eos_id)
        return encoding

    def _mix(self, passage: Passage, blocks: Mapping[str, Block | None], k: int) -> Block:
        encoding = self._encode(passage)
        if encoding.num_tokens == 0:
            raise InvalidArgumentError("texts: the target's tokenizer keeps nothing of this text")
        rows = self._alignment.project(blocks, encoding)
        # A caller that names fewer sources than the quorum asks for just those.
        quorum = min(self._config.fusion.min_sources, len(blocks))
        block = fuse(
            passage.text, encoding, rows, self._config.fusion, self.target.fingerprint, k_out=k, min_sources=quorum
        )
        self.metrics.fused(block)
        return block
