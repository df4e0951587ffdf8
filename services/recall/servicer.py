"""The recall service as a Ray Serve deployment."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import grpc

from fusion.v1 import recall_pb2
from services.base.concurrency import gather_or_cancel
from services.base.errors import InvalidArgumentError
from services.models.catalogue import resolve_model
from services.models.revision import weights_revision
from services.recall.config import MOST_HOPS, MOST_KEPT, RecallConfig
from services.recall.judge import Judge
from services.recall.metrics import RecallMetrics
from services.recall.selector import BlockJudge, KeyBlocks, Selection, Selector, longest_block
from services.rpc.auth import accepted_tokens
from services.rpc.client_limits import ClientLimits
from services.rpc.draining import Draining, replica_name
from services.rpc.health import health_response
from services.rpc.methods import bidirectional, public_unary, unary
from services.rpc.pipeline import RequestPipeline, opening_of
from services.wire.protocol import PROTOCOL_VERSION

MAX_WAITING = 16
"""Texts that a stream may have waiting for credits."""


@dataclass(frozen=True, slots=True)
class _Task:
    """A text with its question, the number that it has in its call or stream."""

    number: int
    text: str
    num_bytes: int
    question: str


class RecallServicer:
    """Methods of fusion.v1.RecallService and grpc.health.v1.Health.

    `judge`: default the one that the configuration names.
    """

    async def __init__(self, config: RecallConfig, judge: BlockJudge | None = None) -> None:  # type: ignore[misc]  # Serve awaits constructors
        accepted_tokens()  # refuses a malformed token now, not at every call
        self._config = config
        self.client_limits = ClientLimits(config.per_client, "recall.per_client")
        given: tuple[BlockJudge, str] = (judge, "") if judge is not None else await asyncio.to_thread(_load, config)
        self._selector, self._revision = Selector(given[0]), given[1]
        self._metrics = RecallMetrics()
        self._draining = Draining()
        self._replica = replica_name()

    @unary
    async def GetRecallInfo(self, request: recall_pb2.GetRecallInfoRequest) -> recall_pb2.GetRecallInfoResponse:
        config = self._config
        return recall_pb2.GetRecallInfoResponse(
            judge=config.judge or "",
            revision=self._revision,
            max_block_tokens=longest_block(self._selector.judge),
            window_tokens=self._selector.judge.window_tokens,
            max_text_bytes=config.max_text_bytes,
            max_question_bytes=config.max_question_bytes,
            max_documents=config.max_documents,
            defaults=recall_pb2.RecallSettings(
                budget_bytes=config.budget_bytes, hops=config.hops, rehearsal=config.rehearsal
            ),
            protocol_version=PROTOCOL_VERSION,
        )

    @unary
    async def SelectKeyBlocks(self, request: recall_pb2.SelectKeyBlocksRequest) -> recall_pb2.SelectKeyBlocksResponse:
        most = self._config.max_documents
        if not 1 <= len(request.documents) <= most:
            raise InvalidArgumentError(f"documents: 1 to {most} are allowed, got {len(request.documents)}")
        selection = self._selection(request.settings)
        tasks = await asyncio.to_thread(self._tasks, request.documents, 0)
        found = await gather_or_cancel(*(self._found(task, selection) for task in tasks))
        return recall_pb2.SelectKeyBlocksResponse(found=found)

    @bidirectional
    async def StreamKeyBlocks(
        self, requests: AsyncIterator[recall_pb2.StreamKeyBlocksRequest]
    ) -> AsyncGenerator[recall_pb2.StreamKeyBlocksResponse, None]:
        selection = self._selection((await opening_of(requests)).settings)

        def tasks_of(message: recall_pb2.RecallDocuments, first: int) -> list[_Task]:
            return self._tasks(message.documents, first)

        async def found(task: _Task) -> recall_pb2.KeyBlocks:
            return await self._found(task, selection)

        size = recall_pb2.KeyBlocks.ByteSize
        pipeline = RequestPipeline(requests, "documents", tasks_of, found, size, max_waiting=MAX_WAITING)
        async with self._draining.holding(pipeline), aclosing(pipeline.answers()) as frames:
            yield recall_pb2.StreamKeyBlocksResponse(replica=self._replica)
            async for frame in frames:
                yield recall_pb2.StreamKeyBlocksResponse(found=frame)

    @public_unary
    async def Check(self, request: Any) -> Any:
        return await health_response(request, "fusion.v1.RecallService", _no_problem)

    def record_failure(self, code: grpc.StatusCode) -> None:
        """Count a call that ended with an error; services/rpc/methods.py calls this for every one."""
        self._metrics.errors.inc(1, {"code": code.name})

    async def close(self) -> None:
        """End the watch for draining and the judge's thread."""
        await self._draining.close()
        await asyncio.to_thread(self._selector.close)

    def _selection(self, settings: recall_pb2.RecallSettings) -> Selection:
        """Return how blocks are selected; raises InvalidArgumentError naming the setting that cannot be honoured."""
        config = self._config
        hops = tuple(settings.hops) or config.hops
        if len(hops) > MOST_HOPS or not all(1 <= kept <= MOST_KEPT for kept in hops):
            raise InvalidArgumentError(f"settings.hops: 1 to {MOST_HOPS} numbers of 1 to {MOST_KEPT} are allowed")
        rehearsal = settings.rehearsal if settings.HasField("rehearsal") else config.rehearsal
        kind = settings.WhichOneof("budget")
        budget = config.budget_bytes if kind is None else getattr(settings, kind)
        if budget < 1:
            raise InvalidArgumentError(f"settings.{kind}: must be at least 1")
        return Selection(budget, kind == "budget_tokens", hops, rehearsal)

    def _tasks(self, documents: Sequence[recall_pb2.RecallDocument], first: int) -> list[_Task]:
        """Return the tasks of documents numbered from `first`; raises InvalidArgumentError naming the field."""
        config = self._config
        tasks: list[_Task] = []
        for number, document in enumerate(documents, first):
            text = _read(document.text, f"documents[{number}].text", config.max_text_bytes)
            question = _read(document.question, f"documents[{number}].question", config.max_question_bytes)
            tasks.append(_Task(number, text, len(document.text), question))
        return tasks

    async def _found(self, task: _Task, selection: Selection) -> recall_pb2.KeyBlocks:
        start = time.monotonic()
        try:
            found = await self._selector.select(task.text, task.question, selection)
        except InvalidArgumentError as error:
            raise InvalidArgumentError(f"documents[{task.number}].{error}") from error
        self._metrics.seconds.inc(time.monotonic() - start)
        self._metrics.documents.inc(1)
        self._metrics.text_bytes.inc(task.num_bytes)
        return recall_pb2.KeyBlocks(blocks=_messages(found), text_bytes=task.num_bytes, num_blocks=found.num_blocks)


def _load(config: RecallConfig) -> tuple[Judge, str]:
    """Return the judge and the revision of its weights; raises ValueError when there is none."""
    if config.judge is None:
        raise ValueError("recall.judge: name the judge's folder; `fusion recall train` makes one")
    judge = Judge.load(config.judge, device="cuda" if config.num_gpus else "cpu", precision=config.precision)
    return judge, weights_revision(resolve_model(config.judge))


def _read(data: bytes, field: str, most_bytes: int) -> str:
    if not data:
        raise InvalidArgumentError(f"{field}: must not be empty")
    if len(data) > most_bytes:
        raise InvalidArgumentError(f"{field}: {len(data)} bytes, at most {most_bytes} are allowed")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise InvalidArgumentError(f"{field}: not UTF-8 at byte {error.start}") from error


def _messages(found: KeyBlocks) -> Iterator[recall_pb2.KeyBlock]:
    for block in found.blocks:
        yield recall_pb2.KeyBlock(
            start_byte=block.start_byte,
            end_byte=block.end_byte,
            score=block.score,
            hop=block.hop,
            num_tokens=block.num_tokens,
        )


async def _no_problem() -> None:
    """Say that the service can do its work: without its judge it does not start."""
