"""Fusion: several sources' distributions in one vocabulary become one distribution per target token."""

from fusion_core.fusion.config import DEFAULT_DOMAIN, FusionConfig
from fusion_core.fusion.fused_block import FusedInDetail, TooFewSources, fuse

__all__ = ["DEFAULT_DOMAIN", "FusedInDetail", "FusionConfig", "TooFewSources", "fuse"]
