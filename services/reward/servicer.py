"""The reward service as a Ray Serve deployment."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from typing import Any

import grpc

from fusion.v1 import reward_pb2
from fusion_core.arrays import Int32
from services.base.concurrency import gather_or_cancel
from services.base.errors import InvalidArgumentError, UnavailableError
from services.models.chat_template import TurnRefusedError
from services.reward.config import RewardServiceConfig
from services.reward.metrics import RewardMetrics
from services.reward.model import RewardModel
from services.reward.scorer import BatchScorer, ServedModel
from services.rpc.auth import accepted_tokens
from services.rpc.client_limits import ClientLimits
from services.rpc.draining import Draining, replica_name
from services.rpc.health import health_response
from services.rpc.methods import bidirectional, public_unary, unary
from services.rpc.pipeline import RequestPipeline, opening_of
from services.wire.messages import read_messages
from services.wire.protocol import PROTOCOL_VERSION

MAX_WAITING = 256
"""Answers that a stream may have waiting for credits."""


@dataclass(frozen=True, slots=True)
class _Item:
    """A conversation in tokens, and the domain that it is scored by."""

    ids: Int32
    domain: str


class RewardServicer:
    """Methods of fusion.v1.RewardService and grpc.health.v1.Health."""

    async def __init__(self, config: RewardServiceConfig) -> None:  # type: ignore[misc]  # Serve awaits constructors
        accepted_tokens()  # refuses a malformed token now, not at every call
        self._config = config
        self.client_limits = ClientLimits(config.per_client, "reward.serve.per_client")
        self._served = ServedModel(config)
        self._metrics = RewardMetrics()
        self._draining = Draining()
        self._replica = replica_name()
        with contextlib.suppress(UnavailableError):  # a model that is trained later is opened then
            await self._served.opened()

    @unary
    async def GetRewardInfo(self, request: reward_pb2.GetRewardInfoRequest) -> reward_pb2.GetRewardInfoResponse:
        model, _ = await self._served.opened()
        config = self._config
        return reward_pb2.GetRewardInfoResponse(
            model=str(self._served.folder),
            revision=self._served.revision,
            domains=model.card.domains,
            max_tokens=model.card.max_tokens,
            max_text_bytes=config.max_text_bytes,
            max_items=config.max_items,
            protocol_version=PROTOCOL_VERSION,
        )

    @unary
    async def Score(self, request: reward_pb2.RewardServiceScoreRequest) -> reward_pb2.RewardServiceScoreResponse:
        most = self._config.max_items
        if not 1 <= len(request.items) <= most:
            raise InvalidArgumentError(f"items: 1 to {most} are allowed, got {len(request.items)}")
        model, batches = await self._served.opened()
        items = await asyncio.to_thread(self._items, model, request.items, 0)
        scores = await gather_or_cancel(*(self._scored(batches, item) for item in items))
        return reward_pb2.RewardServiceScoreResponse(scores=scores)

    @bidirectional
    async def StreamScores(
        self, requests: AsyncIterator[reward_pb2.RewardServiceStreamScoresRequest]
    ) -> AsyncGenerator[reward_pb2.RewardServiceStreamScoresResponse, None]:
        await opening_of(requests)
        model, batches = await self._served.opened()
        pipeline = RequestPipeline(
            requests,
            "items",
            lambda given, first: self._items(model, given.items, first),
            partial(self._scored, batches),
            reward_pb2.RewardScore.ByteSize,
            max_waiting=MAX_WAITING,
        )
        async with self._draining.holding(pipeline), aclosing(pipeline.answers()) as frames:
            yield reward_pb2.RewardServiceStreamScoresResponse(replica=self._replica)
            async for frame in frames:
                yield reward_pb2.RewardServiceStreamScoresResponse(scores=frame)

    @public_unary
    async def Check(self, request: Any) -> Any:
        return await health_response(request, "fusion.v1.RewardService", self._problem)

    async def _problem(self) -> str | None:
        """Return why no answer can be scored; None where one can."""
        try:
            await self._served.opened()
        except UnavailableError as error:
            return str(error)
        return None

    def record_failure(self, code: grpc.StatusCode) -> None:
        """Count a call that ended with an error; services/rpc/methods.py calls this for every one."""
        self._metrics.errors.inc(1, {"code": code.name})

    async def close(self) -> None:
        """End the watch for draining and the model's thread."""
        await self._draining.close()
        await self._served.close()

    def _items(self, model: RewardModel, given: Sequence[reward_pb2.RewardItem], first: int) -> list[_Item]:
        """Return items numbered from `first` in tokens; raises InvalidArgumentError naming the field."""
        items = []
        for number, item in enumerate(given, first):
            where, most = f"items[{number}]", self._config.max_text_bytes
            if (num_bytes := len(item.messages) + len(item.answer)) > most:
                raise InvalidArgumentError(f"{where}: {num_bytes} bytes, at most {most} are allowed")
            try:
                messages = read_messages(item.messages).messages
            except ValueError as error:
                raise InvalidArgumentError(f"{where}.messages: {error}") from error
            if not messages:
                raise InvalidArgumentError(f"{where}.messages: at least one is needed")
            try:
                ids = model.tokens.encode(messages, item.answer.decode(errors="replace"), item.domain)
            except TurnRefusedError as error:
                raise InvalidArgumentError(f"{where}.messages: {error}") from error
            except ValueError as error:
                raise InvalidArgumentError(f"{where}.{error}") from error
            if len(ids) > model.card.max_tokens:
                raise InvalidArgumentError(
                    f"{where}: {len(ids)} tokens; the model was trained on at most {model.card.max_tokens}"
                )
            items.append(_Item(ids, item.domain))
        return items

    async def _scored(self, batches: BatchScorer, item: _Item) -> reward_pb2.RewardScore:
        start = time.monotonic()
        score = await batches.score(item.ids)
        self._metrics.seconds.inc(time.monotonic() - start)
        self._metrics.tokens.inc(len(item.ids))
        self._metrics.answers.inc(1, {"domain": item.domain})
        if score > 0:
            self._metrics.scores.inc(1, {"domain": item.domain})
        return reward_pb2.RewardScore(score=score, num_tokens=len(item.ids))
