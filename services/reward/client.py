"""Client of the reward service, used by training and the command line."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import grpc

from fusion.v1 import block_pb2, reward_pb2, reward_pb2_grpc
from services.base.errors import UnavailableError
from services.rpc.auth import call_metadata
from services.rpc.channel import open_aio_channel
from services.rpc.deadline import timeout_metadata
from services.rpc.ordered_stream import OrderedStream, StreamKind
from services.rpc.status import error_of_call
from services.wire.messages import Message, Messages


@dataclass(frozen=True, slots=True)
class Scored:
    """An answer to messages, and the domain by whose wish it is scored."""

    messages: Sequence[Message]
    answer: str
    domain: str


class RewardClient:
    """A client of one reward service, on the running event loop."""

    def __init__(self, address: str, application: str = "reward", *, timeout_seconds: float = 600.0) -> None:
        self.address, self.application = address, application
        self._timeout_seconds = timeout_seconds
        self._channel = open_aio_channel(address)
        self._stub = reward_pb2_grpc.RewardServiceStub(self._channel)

    async def info(self, timeout_seconds: float = 10.0) -> reward_pb2.GetRewardInfoResponse:
        """Return the service's description; raises ServiceError: UnavailableError while it has no model."""
        request = reward_pb2.GetRewardInfoRequest()
        response: reward_pb2.GetRewardInfoResponse = await self._call(
            self._stub.GetRewardInfo, request, timeout_seconds
        )
        return response

    async def score(self, answers: Sequence[Scored]) -> list[float]:
        """Return the scores of a few answers, in order; raises ServiceError."""
        request = reward_pb2.RewardServiceScoreRequest(items=map(_encoded, answers))
        response = await self._call(self._stub.Score, request, self._timeout_seconds)
        if len(response.scores) != len(answers):
            raise UnavailableError(
                f"reward service {self.application} sent {len(response.scores)} scores of {len(answers)} answers"
            )
        return [message.score for message in response.scores]

    async def _call(self, method: Any, request: Any, timeout_seconds: float) -> Any:
        try:
            metadata = (*call_metadata(self.application), *timeout_metadata(timeout_seconds))
            return await method(request, metadata=metadata, timeout=timeout_seconds)
        except grpc.aio.AioRpcError as error:
            raise error_of_call(error, f"reward service {self.application} at {self.address}") from error

    async def close(self) -> None:
        await self._channel.close()


class ScoreStream(OrderedStream[Scored, float]):
    """A stream of answers to a reward service, and of scores back.

    Args:
        in_flight: answers under way at once, at most 256; others wait here.
        timeout_seconds: a service that owes scores and sends none for so long breaks the stream.
    """

    def __init__(
        self,
        address: str,
        application: str = "reward",
        *,
        in_flight: int = 64,
        timeout_seconds: float | None = None,
    ) -> None:
        super().__init__(address, application, _Scores(), timeout_seconds=timeout_seconds)
        self._gate = asyncio.Semaphore(in_flight)

    async def score(self, answer: Scored) -> float:
        """Return the score of an answer; raises ServiceError when the stream broke before it."""
        async with self._gate:
            return await self.ask(answer)


class _Scores(StreamKind[Scored, float]):
    stub, method, service = reward_pb2_grpc.RewardServiceStub, "StreamScores", "reward service"

    def opening(self) -> reward_pb2.RewardServiceStreamScoresRequest:
        return reward_pb2.RewardServiceStreamScoresRequest(open=reward_pb2.RewardStreamOpen())

    def requests(self, items: Sequence[Scored]) -> Iterator[reward_pb2.RewardServiceStreamScoresRequest]:
        encoded = reward_pb2.RewardItems(items=map(_encoded, items))
        yield reward_pb2.RewardServiceStreamScoresRequest(items=encoded)
        yield reward_pb2.RewardServiceStreamScoresRequest(credit=block_pb2.Credit(blocks=len(items)))

    def messages(self, frame: reward_pb2.RewardServiceStreamScoresResponse) -> Sequence[reward_pb2.RewardScore]:
        return frame.scores

    def fits(self, message: reward_pb2.RewardScore, item: Scored, number: int) -> bool:
        return True

    def decode(self, message: reward_pb2.RewardScore, number: int) -> float:
        return message.score


def _encoded(answer: Scored) -> reward_pb2.RewardItem:
    return reward_pb2.RewardItem(
        messages=Messages(list(answer.messages)).to_bytes(),
        answer=answer.answer.encode(errors="replace"),
        domain=answer.domain,
    )
