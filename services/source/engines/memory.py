"""Bounds on the tokens in an engine: scoring makes a float32 row over the whole vocabulary for every token."""

from __future__ import annotations

import json
from pathlib import Path

from services.source.config import SourceConfig
from services.source.engines.config import ModelConfig

_BYTES_PER_ENTRY = 3 * 4
"""Bytes for a logit, its float32 log-softmax, and a third copy that the softmax makes on the way."""
_FEWEST_ROWS = 256


def rows_at_once(engine: ModelConfig, folder: Path, *, max_tokens_in_flight: int | None = None) -> int:
    """Return the number of rows that fit into logits_memory_bytes: the engine's batch, in tokens.

    Never fewer than 256: smaller batches are all overhead, and vLLM refuses to start with them. Raises ValueError when
    the model's config.json does not say how wide a row is and max_tokens_in_flight is not set.
    """
    vocabulary_size = _model_vocabulary_size(folder)
    if vocabulary_size is None:
        if max_tokens_in_flight is None:
            raise ValueError(f"max_tokens_in_flight: {folder / 'config.json'} has no vocab_size to derive it from")
        return max_tokens_in_flight
    rows = max(_FEWEST_ROWS, engine.logits_memory_bytes // (_BYTES_PER_ENTRY * vocabulary_size))
    return rows if max_tokens_in_flight is None else min(rows, max_tokens_in_flight)


def tokens_in_flight(config: SourceConfig, folder: Path) -> int:
    """Return the configured bound, else two batches: one that runs and one that is ready when the engine is."""
    if config.max_tokens_in_flight is not None:
        return config.max_tokens_in_flight
    if config.engine.kind == "synthetic":
        return 64 * (config.max_tokens + 1)
    if config.engine.kind == "openai":  # the server bounds its own memory
        return config.engine.max_concurrent * (config.max_tokens + 1)
    return max(2 * rows_at_once(config.engine, folder), config.max_tokens + 1)


def _model_vocabulary_size(folder: Path) -> int | None:
    """Return the width of the lm_head, which may be padded beyond the tokenizer's ids; None when it is not known."""
    values = json.loads((folder / "config.json").read_text())
    size = values.get("vocab_size") or values.get("text_config", {}).get("vocab_size")
    return None if size is None else int(size)
