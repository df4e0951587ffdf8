"""The settings of a running service that decide its fused rows, for `GetFusionInfo` and run identity."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from fusion_core.fusion import FusionConfig
from services.fusion.config import FusionServiceConfig
from services.store.identity import SourceIdentity


def result_settings(config: FusionServiceConfig, identities: Mapping[str, SourceIdentity]) -> dict[str, str]:
    """Return every deciding setting as dotted recipe key and JSON value.

    Args:
        config: of the running service.
        identities: identity of the model behind each source, or behind its stored windows; settings that depend on it
            are missing for a source without one.
    """
    sources = {}
    for endpoint in config.sources:
        known = identities.get(endpoint.name)
        # A key of later versions is left out where it says nothing: runs that began before it go on.
        unset = {"chat_template"} if known and not known.chat_template else set[str]()
        served = known.model_dump(mode="json", exclude={"model", "top_k"} | unset) if known else {}
        sources[endpoint.name] = {"model": endpoint.model, "top_k": endpoint.top_k} | served
    settings: dict[str, Any] = {
        "corpus": {"target_context": config.target_context},
        "fusion": config.fusion.model_dump(mode="json", exclude=_without_effect(config.fusion)),
        "service": {"below_quorum": config.service.below_quorum},
        "sources": sources,
    }
    if config.target_chat_template is not None:
        settings["target"] = {"chat_template": config.target_chat_template}
    return {key: json.dumps(value, sort_keys=True) for key, value in _leaves(settings, "")}


def _without_effect(fusion: FusionConfig) -> set[str]:
    """Return the keys of later versions that change nothing: runs that began before them go on."""
    effective = {
        "sources_by": bool(fusion.sources_by),
        "rate": fusion.strategy == "online",
        "prior": fusion.strategy == "online",
        "min_weight": fusion.min_weight > 0,
        "soften": fusion.soften < 1,
    }
    return {key for key, changes in effective.items() if not changes}


def _leaves(section: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in section.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
