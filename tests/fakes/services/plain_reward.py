"""A real reward service without Ray: the servicer on a plain gRPC server in this process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from fusion.v1 import reward_pb2_grpc
from services.reward.config import RewardServiceConfig
from services.reward.servicer import RewardServicer
from tests.fakes.services.on_thread import served


@contextmanager
def plain_reward_service(config: RewardServiceConfig) -> Iterator[str]:
    """Serves as long as the block takes; gives the address."""
    with served(RewardServicer, reward_pb2_grpc.add_RewardServiceServicer_to_server, config) as running:
        yield running.address
