"""Fusion: several sources' distributions in one vocabulary become one distribution per target token."""

from fusion_core.fusion.config import FusionConfig
from fusion_core.fusion.fused_block import FusedInDetail, TooFewSources, fuse

__all__ = ["FusedInDetail", "FusionConfig", "TooFewSources", "fuse"]
