"""Load the engine that a source is configured with."""

from __future__ import annotations

from pathlib import Path

from services.source.config import SourceConfig
from services.source.engines.base import Engine
from services.source.engines.mixtures import check_mixture


async def load_engine(config: SourceConfig, folder: Path, vocabulary_size: int) -> Engine:
    """Load the engine that the configuration names; only that one's libraries are imported.

    Raises ValueError naming the key that does not fit, `model` for a mixture of experts that the engine would compute
    wrongly.
    """
    check_mixture(config, folder)
    settings = config.engine
    match settings.kind:
        case "synthetic":
            from services.source.engines.synthetic import SyntheticEngine

            return SyntheticEngine(settings, vocabulary_size, config.largest_top_k)
        case "vllm":
            from services.source.engines.vllm import VllmEngine

            return await VllmEngine.load(config, settings, folder)
        case "openai":
            from fusion_core.vocabulary import Vocabulary
            from services.source.engines.endpoint.engine import EndpointEngine

            return await EndpointEngine.load(config, settings, Vocabulary.from_pretrained(folder))
        case "transformers":
            from services.source.engines.transformers import TransformersEngine

            return await TransformersEngine.load(config, settings, folder)
