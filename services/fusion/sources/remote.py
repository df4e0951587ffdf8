"""One source behind the fusion service, asked over gRPC with deadlines, retries and a circuit breaker."""

from __future__ import annotations

import asyncio
import logging
import math
from functools import partial
from typing import NamedTuple

from fusion.v1 import fusion_pb2, source_pb2
from fusion_core.blocks import Block
from fusion_core.vocabulary import Vocabulary
from services.base.concurrency import Coalesced
from services.base.errors import (
    DeadlineExceededError,
    FailedPreconditionError,
    InvalidArgumentError,
    ResourceExhaustedError,
    ServiceError,
    UnauthenticatedError,
    UnavailableError,
)
from services.base.retry import Backoff
from services.fusion.config import ServiceConfig, SourceEndpoint
from services.fusion.sources.breaker import Breaker, RetryBudget, State
from services.fusion.sources.meters import SourceMeter
from services.fusion.sources.stream_pool import StreamPool
from services.models.catalogue import resolve_model
from services.models.chat_tokenizer import open_chat
from services.source.client import ScoreStream, SourceClient
from services.store.identity import SourceIdentity
from services.wire.passage import Passage
from services.wire.plausible import implausible

logger = logging.getLogger("ray.serve")

_INFO_SECONDS = 10.0
"""Longest time in which a source must describe itself."""
_STATUS_SECONDS = 5.0
"""The same where the status of all sources is asked for."""
_TRIAL = Passage(b"The")
_BREAKER_STATES: dict[State, fusion_pb2.BreakerState] = {
    "closed": fusion_pb2.BREAKER_STATE_CLOSED,
    "open": fusion_pb2.BREAKER_STATE_OPEN,
    "half-open": fusion_pb2.BREAKER_STATE_HALF_OPEN,
}


class RefusedTextError(InvalidArgumentError):
    """A source does not take this text, now or later: its tokenizer keeps nothing of it, or it is too long."""


class Scored(NamedTuple):
    """A source's block, and the identity of the model that answered."""

    block: Block
    identity: SourceIdentity


def tokenizer_of(endpoint: SourceEndpoint) -> tuple[Vocabulary, str]:
    """Return the vocabulary of a source's model and the hash of its chat template, empty for none.

    Raises ValueError.
    """
    folder = resolve_model(endpoint.model)
    if chat := open_chat(folder, endpoint.chat_template, endpoint.eos_token):
        return chat.vocabulary, chat.template.hash
    return Vocabulary.from_pretrained(folder, eos_token=endpoint.eos_token), ""


class RemoteSource:
    """One source, asked over gRPC. Lives on one event loop.

    Attributes:
        vocabulary, chat_template: the model's tokenizer, and the hash of the template that writes conversations for it.
        known: identity of the model that served last; None before the source was reached for the first time.
    """

    def __init__(self, endpoint: SourceEndpoint, service: ServiceConfig) -> None:
        self.endpoint = endpoint
        self.name = endpoint.name
        self.vocabulary, self.chat_template = tokenizer_of(endpoint)
        self.meter = SourceMeter(self.name)
        self.known: SourceIdentity | None = None
        self._attempts = service.source_attempts
        self._timeout_seconds = service.source_timeout_seconds
        self._client = SourceClient(endpoint.address, endpoint.application, timeout_seconds=self._timeout_seconds)
        self._streams = StreamPool(self._open_stream)
        self._breaker = Breaker(
            self.name, self._try, failures=service.breaker_failures, pause_seconds=service.breaker_pause_seconds
        )
        self._budget = RetryBudget(service.retry_budget)
        self._info = Coalesced(self._ask_who_serves)

    async def identity(self) -> SourceIdentity:
        """Return the identity of the model that serves; it is asked for once, and again only after a failure.

        Raises UnavailableError when the source cannot be reached, does not fit any more, or is left out by the breaker;
        FailedPreconditionError when it has never fitted the configuration, or refuses this service's token.
        """
        self._breaker.check()
        try:
            return SourceIdentity.of(await self._info.get(max_age_seconds=math.inf), self.endpoint.top_k)
        except ServiceError as error:
            self._failed(error)
            if isinstance(error, UnauthenticatedError) and self.known is None:
                raise FailedPreconditionError(f"source {self.name} refuses this service's token: {error}") from error
            raise

    async def score(self, passage: Passage, *, streamed: bool = True) -> Scored:
        """Ask for the block of a passage, over a stream that others share or in a call of its own.

        Raises RefusedTextError when the source does not take the text, FailedPreconditionError as `identity`, and
        UnavailableError when all attempts failed.
        """
        self._budget.asked()
        backoff = Backoff(0.5, longest_seconds=15.0)
        for attempt in range(1, self._attempts + 1):
            # After a failure the text goes alone: another text may have broken the stream.
            alone, last = not streamed or attempt > 1, attempt == self._attempts
            try:
                return await self._score_once(passage, alone)
            except InvalidArgumentError as error:
                if alone or last:  # trying again would not help
                    raise RefusedTextError(f"source {self.name}: {error}") from error
            except FailedPreconditionError:
                raise
            except ServiceError as error:
                if last or self._breaker.state != "closed" or not self._budget.take():
                    raise UnavailableError(f"source {self.name}: {error}") from error
                logger.warning("source %s, attempt %d: %s", self.name, attempt, error)
            self.meter.retry()
            await asyncio.sleep(backoff.next_pause())
        raise AssertionError("unreachable")

    async def status(self) -> fusion_pb2.SourceStatus:
        """Ask the source for its description; return its status, and counts of the texts that it missed."""
        status = fusion_pb2.SourceStatus(
            name=self.name,
            address=self.endpoint.address,
            top_k=self.endpoint.top_k,
            model=self.endpoint.model,
            breaker=_BREAKER_STATES[self._breaker.state],
            missing=self.meter.missing,
            retries=self.meter.retries,
            timeouts=self.meter.timeouts,
        )
        try:
            self._breaker.check()
            async with asyncio.timeout(_STATUS_SECONDS):
                info = await self._info.get()
        except TimeoutError:
            status.problem = f"source {self.name}: did not say within {_STATUS_SECONDS:g} s who it is"
        except ServiceError as error:
            status.problem = str(error)
        else:
            status.serving, status.vocabulary, status.model = True, info.vocabulary, info.model
        return status

    async def close(self) -> None:
        """End streams, trials and the connection."""
        await self._breaker.close()
        await self._streams.close()
        await self._client.close()

    async def _score_once(self, passage: Passage, alone: bool) -> Scored:
        """Make one attempt; every failure of the source is told to the breaker."""
        identity = await self.identity()
        try:
            block = await (self._score_alone(passage) if alone else self._streams.score(passage))
            await self._check(block, passage)
        except (InvalidArgumentError, ResourceExhaustedError):
            raise  # the text's fault, or a sound source at its limits, which needs pauses only
        except FailedPreconditionError as error:
            self._failed(error)
            raise UnavailableError(f"it is another one than a moment ago: {error}") from error
        except ServiceError as error:
            self._failed(error)
            raise
        self._breaker.succeeded()
        return Scored(block, identity)

    async def _score_alone(self, passage: Passage) -> Block:
        [block] = await self._client.score(
            [passage], top_k=self.endpoint.top_k, expected_vocabulary=self.vocabulary.fingerprint
        )
        return block

    def _open_stream(self) -> ScoreStream:
        return ScoreStream(
            self.endpoint.address,
            self.endpoint.application,
            top_k=self.endpoint.top_k,
            expected_vocabulary=self.vocabulary.fingerprint,
            timeout_seconds=self._timeout_seconds,
        )

    def _failed(self, error: ServiceError) -> None:
        self._info.forget()  # the source may come back as another one
        if self._breaker.failed(error) and isinstance(error, DeadlineExceededError):
            self.meter.timeout()

    async def _try(self) -> None:
        """Try the source for the breaker: ask for its description, and for the block of a short text."""
        await self._info.get()
        await self._check(await self._score_alone(_TRIAL), _TRIAL)

    async def _ask_who_serves(self) -> source_pb2.GetSourceInfoResponse:
        """Return the source's description; raises FailedPreconditionError when it does not fit.

        A source that did fit before raises UnavailableError instead: it may come back as it was.
        """
        info = await self._client.info(min(_INFO_SECONDS, self._timeout_seconds))
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
        elif self.chat_template not in {"", info.chat_template}:
            problem = (
                f"has the chat template {info.chat_template or 'none'}, but the one that is configured has the hash "
                f"{self.chat_template}"
            )
        if problem is None:
            self.known = SourceIdentity.of(info, self.endpoint.top_k)
            return info
        error = FailedPreconditionError if self.known is None else UnavailableError
        raise error(f"source {self.name}: {problem}")

    async def _check(self, block: Block, passage: Passage) -> None:
        """Raise UnavailableError for a block that no sound source gives: one can break, or lie, without an error."""
        check = partial(problem_with, block, passage, self.vocabulary, self.endpoint.top_k)
        if (problem := await asyncio.to_thread(check)) is not None:
            raise UnavailableError(f"source {self.name}: {problem}")


def problem_with(block: Block, passage: Passage, vocabulary: Vocabulary, top_k: int) -> str | None:
    """Return why a decoded block cannot be a sound source's answer to the passage; None when it can.

    A block that passes can be projected: it is of the passage's text, in the source's vocabulary, with `top_k`
    candidates a row whose ids exist and whose log-probabilities fit together.
    """
    ends = passage.ends_document and vocabulary.eos_id is not None
    if block.text_bytes != passage.text or block.ends_document != ends:
        return "answered for another text"
    if block.vocabulary != vocabulary.fingerprint:
        return f"answered in vocabulary {block.vocabulary}"
    if (problem := implausible(block, vocabulary_size=vocabulary.size, k=top_k)) is not None:
        return problem
    num_text = block.num_text_tokens
    if ends and block.token_ids_T[-1] != vocabulary.eos_id:
        return "the end row's token is not EOS"
    # Where rows are masked the tokenizer has changed the text, and its tokens cannot be compared with it.
    if block.mask_T.all() and not vocabulary.spells(
        passage.text, block.token_ids_T[:num_text], block.byte_ends_T[:num_text]
    ):
        return "the realised tokens do not spell the text"
    return None
