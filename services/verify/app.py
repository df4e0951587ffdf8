"""The Serve application of the verifier: `import_path: services.verify.app:build`, section `verify` as `args`."""

from __future__ import annotations

from typing import Any

from ray.serve import Application

from services.rpc.serving.application import application_of
from services.verify.config import VerifyConfig
from services.verify.servicer import VerifierServicer

SERVICER = "fusion.v1.verify_pb2_grpc.add_VerifierServiceServicer_to_server"


def build(args: dict[str, Any]) -> Application:
    """Return the application for the `args` of a Serve config; raises ValidationError naming the key that is wrong."""
    return application_of("verify", VerifierServicer, VerifyConfig.model_validate(args))
