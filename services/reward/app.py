"""The Serve application of the reward model: `import_path: services.reward.app:build`, `reward.serve` as `args`."""

from __future__ import annotations

from typing import Any

from ray.serve import Application

from services.reward.config import RewardServiceConfig
from services.reward.servicer import RewardServicer
from services.rpc.serving.application import application_of

SERVICER = "fusion.v1.reward_pb2_grpc.add_RewardServiceServicer_to_server"


def build(args: dict[str, Any]) -> Application:
    """Return the application for the `args` of a Serve config; raises ValidationError naming the key that is wrong."""
    config = RewardServiceConfig.model_validate(args)
    return application_of("reward", RewardServicer, config, num_gpus=config.num_gpus)
