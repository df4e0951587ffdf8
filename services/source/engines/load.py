"""Load the engine that a source is configured with."""

from __future__ import annotations

from pathlib import Path

from services.source.config import SourceConfig
from services.source.engines.base import Engine


async def load_engine(config: SourceConfig, folder: Path, vocabulary_size: int) -> Engine:
    """The engine that the configuration names."""
    if config.engine == "synthetic":
        from services.source.engines.synthetic import SyntheticEngine

        return SyntheticEngine(config.synthetic, vocabulary_size, config.largest_top_k)
    if config.engine == "vllm":
        from services.source.engines.vllm import VllmEngine

        return await VllmEngine.load(config, folder)
    from services.source.engines.transformers import TransformersEngine

    return await TransformersEngine.load(config, folder)
