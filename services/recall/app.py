"""The Serve application of the recall service: `import_path: services.recall.app:build`, section `recall` as `args`."""

from __future__ import annotations

from typing import Any

from ray.serve import Application

from services.recall.config import RecallConfig
from services.recall.servicer import RecallServicer
from services.rpc.serving.application import application_of

SERVICER = "fusion.v1.recall_pb2_grpc.add_RecallServiceServicer_to_server"


def build(args: dict[str, Any]) -> Application:
    """Return the application for the `args` of a Serve config; raises ValidationError naming the key that is wrong."""
    config = RecallConfig.model_validate(args)
    return application_of("recall", RecallServicer, config, num_gpus=config.num_gpus)
