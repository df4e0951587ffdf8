"""The settings that a running service names: all that decides a row, under the recipe's keys."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from services.fusion.result_settings import result_settings
from services.store.identity import SourceIdentity
from tests.fakes.services.plain_fusion import plain_fusion


def value_at(recipe: dict[str, Any], dotted: str) -> Any:
    """The value of a dotted key in a dumped recipe."""
    for key in dotted.split("."):
        recipe = recipe[key]
    return recipe


def test_every_fusion_setting_is_named_as_in_the_recipe(tmp_path: Path) -> None:
    with plain_fusion(tmp_path) as fusion:
        info = fusion.client().info()
        settings = {key: json.loads(value) for key, value in info.settings.items()}
        dumped = fusion.recipe.model_dump(mode="json", by_alias=True)
        for key in ("tau", "strategy", "scope", "span_tokens", "k_out", "min_sources", "weights"):
            assert settings[f"fusion.{key}"] == value_at(dumped, f"fusion.{key}")
        for key, value in dumped["fusion"]["alignment"].items():
            assert settings[f"fusion.alignment.{key}"] == value
        assert settings["service.below_quorum"] == "wait"
        for number, source in enumerate(fusion.recipe.sources):
            own = {
                key.rpartition(".")[2]: v for key, v in settings.items() if key.startswith(f"sources.{source.name}.")
            }
            assert (own["model"], own["top_k"]) == (source.model, 8)
            assert own["vocabulary"] == info.sources[number].vocabulary
            assert own["revision"]
            assert own["engine"].startswith("synthetic")


def test_a_source_that_is_not_known_has_only_what_is_configured(tmp_path: Path) -> None:
    with plain_fusion(tmp_path) as fusion:
        config = fusion.recipe.fusion_service()
        known = SourceIdentity.model_validate(
            dict.fromkeys(SourceIdentity.model_fields, "x") | {"top_k": 8, "revision": "r"}
        )
        without, with_it = (result_settings(config, identities) for identities in ({}, {"source-0": known}))
        assert without.items() <= with_it.items()
        assert {key for key in with_it if key not in without} == {
            f"sources.source-0.{field}" for field in SourceIdentity.model_fields if field not in {"model", "top_k"}
        }
        assert with_it["sources.source-0.revision"] == '"r"'


@pytest.mark.parametrize(
    "changes", [{"tau": 0.5}, {"scope": "span"}, {"alignment": {"method": "byte", "follow_tokens": False}}]
)
def test_a_changed_setting_changes_what_is_named(changes: dict[str, Any], tmp_path: Path) -> None:
    with plain_fusion(tmp_path) as fusion:
        config = fusion.recipe.fusion_service()
        values = config.model_dump(mode="json")
        other = type(config).model_validate(values | {"fusion": values["fusion"] | changes})
        assert result_settings(config, {}) != result_settings(other, {})


def test_keys_of_later_versions_are_named_only_where_they_change_rows(tmp_path: Path) -> None:
    with plain_fusion(tmp_path) as fusion:
        config = fusion.recipe.fusion_service()
        later = {"sources_by", "rate", "prior", "min_weight", "soften"}
        assert not later & {key.split(".")[1] for key in result_settings(config, {}) if key.startswith("fusion.")}
        names = [source.name for source in config.sources]
        changes = {"strategy": "online", "prior": dict.fromkeys(names, 0.5), "min_weight": 0.1, "soften": 0.8}
        values = config.model_dump(mode="json")
        values["fusion"] = {**values["fusion"], "weights": {}, **changes}
        named = result_settings(type(config).model_validate(values), {})
        assert {key: json.loads(named[f"fusion.{key}"]) for key in ("rate", "min_weight", "soften")} == {
            "rate": 0.05, "min_weight": 0.1, "soften": 0.8
        }  # fmt: skip
        assert named[f"fusion.prior.{names[0]}"] == "0.5"
