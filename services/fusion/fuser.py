"""The fusion of a text: all sources asked side by side, their rows projected and mixed off the event loop."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import NamedTuple

import pyarrow as pa

from fusion.v1 import fusion_pb2
from fusion_core.alignment.method import Alignment
from fusion_core.alignment.projected_rows import ProjectedRows
from fusion_core.blocks import Block
from fusion_core.fusion import FusedInDetail, TooFewSources, fuse
from fusion_core.vocabulary import Vocabulary
from services.base.concurrency import Coalesced
from services.base.errors import (
    DeadlineExceededError,
    FailedPreconditionError,
    NotFoundError,
    UnavailableError,
)
from services.corpus.ledger import Window
from services.fusion.config import FusionServiceConfig
from services.fusion.metrics import FusionMetrics
from services.fusion.sources.remote import RefusedTextError, RemoteSource
from services.fusion.sources.through_store import ThroughStore
from services.fusion.target_text import TargetText, UnfusableTextError
from services.fusion.warm_up import TEXT, made_up_block
from services.models.prompt import Prompt
from services.rpc.deadline import remaining_seconds
from services.store.backfill_list import BackfillList, BackfillWindow
from services.store.capture_plan import Place
from services.store.identity import SourceIdentity
from services.store.store import BlockStore
from services.wire.passage import Passage

logger = logging.getLogger("ray.serve")

_SOURCES_SHARE = 0.9
"""Share of the caller's time that sources have: the answers by then are fused, so that one slow source does not fail
the call."""
_CHECKED_SECONDS = 1.0
"""Largest age of an answer to a health check: anybody may ask, and every new answer asks all sources."""


class Fused(NamedTuple):
    """A fused block, and the sources that it lacks although they may give the window later."""

    block: Block
    missing: tuple[str, ...]


class QuorumLostError(UnavailableError):
    """Fewer than min_sources answered for a text; `missing` names those that may answer later."""

    def __init__(self, message: str, missing: Sequence[str]) -> None:
        super().__init__(message)
        self.missing = tuple(missing)


class _TooLateError(UnavailableError):
    """A source did not answer in time for the caller; it may be sound all the same."""


class Fuser:
    """The sources and the target vocabulary of one fusion service; lives on one event loop.

    Args:
        config: of the service.
        splits: fingerprint of every split that is streamed, by name.
    """

    def __init__(self, config: FusionServiceConfig, splits: Mapping[str, str]) -> None:
        self._config = config
        self._splits = splits
        self.metrics = FusionMetrics()
        self.text = TargetText(config)
        self.target = self.text.vocabulary
        self._store = BlockStore(config.service.store) if config.service.store else None
        self._backfill = BackfillList(self._store.files) if self._store else None
        self._sources = {
            endpoint.name: ThroughStore(RemoteSource(endpoint, config.service), self._store)
            for endpoint in config.sources
        }
        self._alignment = Alignment(self.vocabularies, self.target, config.fusion.alignment)
        self._statuses = Coalesced(self._ask_all)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._sources)

    @property
    def vocabularies(self) -> dict[str, Vocabulary]:
        return {name: source.vocabulary for name, source in self._sources.items()}

    def check_names(self, names: Sequence[str]) -> tuple[str, ...]:
        """Return the sources to ask, all for none named; raises NotFoundError for a name that is not known."""
        for name in names:
            if name not in self._sources:
                raise NotFoundError(f"sources: {name!r} is not known; this service has {', '.join(self.names)}")
        return tuple(dict.fromkeys(names)) or self.names

    def names_for(self, window: Window, names: Sequence[str]) -> tuple[str, ...]:
        """Return those of the named sources that score a window of this domain, see `fusion.sources_by`.

        Raises FailedPreconditionError where no entry is for its domain, and UnfusableTextError where all that it names
        are left out.
        """
        try:
            chosen = self._config.fusion.sources_of(window.domain, names)
        except LookupError as error:
            raise FailedPreconditionError(f"fusion.{error}: document {window.document}") from error
        if not chosen:
            raise UnfusableTextError(f"fusion.sources_by: none of {', '.join(names)} scores domain {window.domain!r}")
        return chosen

    def compile_loops(self) -> None:
        """Fuse a made-up window, so that no caller waits for a compiler (minutes on a busy machine without a cache)."""
        endpoints = self._config.sources
        blocks = {e.name: made_up_block(self._sources[e.name].vocabulary, e.top_k) for e in endpoints}
        with suppress(ValueError, TooFewSources, UnfusableTextError):  # a tokenizer that cannot write this text
            self._fused(self.encode(Passage(TEXT, ends_document=True)), blocks, self._config.fusion.k_out)

    async def statuses(self) -> list[fusion_pb2.SourceStatus]:
        """Ask every source how it is doing; of one that does not answer, look up which splits the store holds."""
        return await self._statuses.get()

    def identities(self) -> dict[str, SourceIdentity]:
        """Return the identity of each source, or that of its stored windows, where either is known."""
        return {name: known for name, source in self._sources.items() if (known := source.known) is not None}

    async def problem(self) -> str | None:
        """Return why the service could not fuse within the last second, None when it could.

        It could not when fewer than min_sources answered or were captured.
        """
        statuses = await self._statuses.get(max_age_seconds=_CHECKED_SECONDS)
        self.metrics.serving(statuses)
        serving = sum(status.serving for status in statuses)
        if sum(status.serving or bool(status.captured) for status in statuses) >= self._config.fusion.min_sources:
            return None
        problems = "; ".join(status.problem for status in statuses if status.problem)
        return f"{serving} of {len(statuses)} sources answer, {self._config.fusion.min_sources} are needed: {problems}"

    def encode(self, passage: Passage) -> Prompt:
        """Return the target's tokens, as `TargetText.encode` does. Takes milliseconds: call it off the event loop."""
        return self.text.encode(passage)

    async def fuse(
        self,
        passage: Passage,
        prompt: Prompt,
        *,
        names: Sequence[str],
        k: int,
        streamed: bool = False,
        place: Place | None = None,
    ) -> Fused:
        """Ask the named sources and fuse their answers.

        A source that fails, or does not take the text, takes no part, and the block says so.

        Args:
            passage: the text to score.
            prompt: the passage in the target's tokens, see `encode`.
            names: the sources to ask.
            k: candidates per row of the block.
            streamed: whether the text is one of many, which share streams to the sources.
            place: split and index of a window of a data set.

        Raises:
            UnfusableTextError: fewer than min_sources take the text.
            QuorumLostError: fewer than min_sources answered.
            FailedPreconditionError: a source has never fitted the configuration.
        """
        answers = await self._answers(passage, names, streamed, place)
        blocks = {name: answer if isinstance(answer, Block) else None for name, answer in answers.items()}
        for name in names:
            if blocks[name] is None:
                self._sources[name].meter.miss()
        try:
            block = await asyncio.to_thread(self._mix, prompt, blocks, k)
        except TooFewSources as error:
            self.metrics.quorum_lost()
            raise self._too_few(error, answers) from error
        except ValueError as error:
            raise FailedPreconditionError(f"fusion: {error}") from error
        return Fused(block, _may_come_later(answers))

    async def fuse_in_detail(
        self, passage: Passage, prompt: Prompt, *, names: Sequence[str], streamed: bool, place: Place | None
    ) -> FusedInDetail:
        """Fuse as `fuse` does, and return also what the block was made of. Raises as `fuse`."""
        answers = await self._answers(passage, names, streamed, place)
        blocks = {name: answer if isinstance(answer, Block) else None for name, answer in answers.items()}
        try:
            rows, block = await asyncio.to_thread(self._fused, prompt, blocks, self._config.fusion.k_out)
        except TooFewSources as error:
            raise self._too_few(error, answers) from error
        problems = {name: answer for name, answer in answers.items() if isinstance(answer, Exception)}
        return FusedInDetail(block, blocks, rows, problems)

    async def list_for_backfill(
        self, corpus: str, split: str, fingerprint: str, windows: Sequence[BackfillWindow]
    ) -> None:
        """Put windows that lack sources on the back-fill list, where there is a store; raises UnavailableError."""
        if self._backfill is None or not windows:
            return
        try:
            await asyncio.to_thread(self._backfill.add, corpus, split, fingerprint, windows)
        except (OSError, pa.ArrowException) as error:
            raise UnavailableError(f"service.store: the back-fill list cannot be written: {error}") from error

    def flush(self) -> None:
        """Write scored windows that are only in memory to the store."""
        if self._store is not None:
            self._store.flush()

    async def close(self) -> None:
        """End the streams to the sources and write windows that are only in memory to the store."""
        await asyncio.gather(*(source.close() for source in self._sources.values()))
        await asyncio.to_thread(self.flush)

    async def _ask_all(self) -> list[fusion_pb2.SourceStatus]:
        return list(await asyncio.gather(*(source.status(self._splits) for source in self._sources.values())))

    async def _answers(
        self, passage: Passage, names: Sequence[str], streamed: bool, place: Place | None
    ) -> dict[str, Block | UnavailableError | RefusedTextError]:
        """Return the answer of each source, or why there is none; raises every other error."""
        asked = [self._answer(self._sources[name], passage, streamed, place) for name in names]
        answers = {}
        for name, answer in zip(names, await asyncio.gather(*asked, return_exceptions=True), strict=True):
            if not isinstance(answer, Block | UnavailableError | RefusedTextError):
                raise answer
            answers[name] = answer
        return answers

    async def _answer(self, source: ThroughStore, passage: Passage, streamed: bool, place: Place | None) -> Block:
        """Return a source's block, as long as there is time left to fuse it with the others'."""
        remaining = remaining_seconds()
        try:
            async with asyncio.timeout(None if remaining is None else _SOURCES_SHARE * remaining):
                return await source.score(passage, streamed=streamed, place=place)
        except TimeoutError as error:
            raise _TooLateError(f"source {source.name}: no answer before the caller's deadline") from error

    def _too_few(self, error: TooFewSources, answers: Mapping[str, object]) -> Exception:
        """Return the error for a text that too few sources answered for: it says whether to ask again, and whom."""
        reason = f"{error}: {'; '.join(str(answer) for answer in answers.values() if isinstance(answer, Exception))}"
        refused_by = [name for name, answer in answers.items() if isinstance(answer, RefusedTextError)]
        missing = _may_come_later(answers)
        if not missing or len(answers) - len(refused_by) < self._quorum(len(answers)):
            return UnfusableTextError(f"texts: {reason}", refused_by)
        if any(isinstance(answer, _TooLateError) for answer in answers.values()):
            return DeadlineExceededError(reason)
        return QuorumLostError(reason, missing)

    def _quorum(self, num_asked: int) -> int:
        """Return how many sources must answer: all, where a caller names fewer than min_sources."""
        return min(self._config.fusion.min_sources, num_asked)

    def _mix(self, prompt: Prompt, blocks: Mapping[str, Block | None], k: int) -> Block:
        _, block = self._fused(prompt, blocks, k)
        self.metrics.fused(block)
        return block

    def _fused(
        self, prompt: Prompt, blocks: Mapping[str, Block | None], k: int
    ) -> tuple[dict[str, ProjectedRows | None], Block]:
        rows = self._alignment.project(blocks, prompt.encoding)
        block = fuse(
            prompt.text,
            prompt.encoding,
            rows,
            self._config.fusion,
            self.target.fingerprint,
            k_out=k,
            min_sources=self._quorum(len(blocks)),
        )
        return rows, replace(block, context_ids_C=prompt.context_ids, first_id=prompt.first_id)


def _may_come_later(answers: Mapping[str, object]) -> tuple[str, ...]:
    """Return the sources that failed; one that does not take the text will not answer later either."""
    return tuple(name for name, answer in answers.items() if isinstance(answer, UnavailableError))
