"""Losses of the distillation: causal language modelling and the divergence from fused next-token distributions."""

from fusion_core.losses.buckets import FUSION_LOSSES, FusionLoss, bucket_divergence
from fusion_core.losses.chunked import Losses, fused_losses
from fusion_core.losses.rows import SparseRows
from fusion_core.losses.weighting import LambdaSchedule, lambda_at, source_reward

__all__ = [
    "FUSION_LOSSES",
    "FusionLoss",
    "LambdaSchedule",
    "Losses",
    "SparseRows",
    "bucket_divergence",
    "fused_losses",
    "lambda_at",
    "source_reward",
]
