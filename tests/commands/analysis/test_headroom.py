"""`fusion headroom` on two real sources: from the services, and from the store when these are gone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from fusion_core.fusion import FusionConfig
from services.cli.app import app
from services.commands.evaluate import evaluate
from services.recipes.load import load_recipe
from tests.commands.analysis.conftest import write_recipe


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["headroom", *arguments], terminal_width=200)


def test_headroom_says_what_the_models_lose_and_the_store_says_the_same(
    models: dict[str, Path], addresses: dict[str, str], tmp_path: Path
) -> None:
    recipe, json_file = write_recipe(tmp_path, models, addresses), tmp_path / "headroom.json"
    few = run(recipe, "--windows", "10")
    assert few.exit_code == 0, few.output
    assert "of 10 windows" in few.output
    write_recipe(tmp_path, models, {})
    unknown = run(recipe)
    assert unknown.exit_code == 2 and "`fusion capture`" in unknown.output  # most windows are not in the store

    write_recipe(tmp_path, models, addresses)
    served = run(recipe, "--json", str(json_file))
    assert served.exit_code == 0, served.output
    found = json.loads(json_file.read_text())
    assert found["verdict"]["sentence"] in served.output.replace("\n", " ")
    assert {cost["basis"] for cost in found["cost"].values()} == {"measured"} and len(found["cost"]) == 2
    assert found["outside_k"]["fused"]["16"] <= found["outside_k"]["fused"]["8"]
    evaluated = evaluate(load_recipe(recipe), [], "held_out", sources=True)["domains"]
    assert set(evaluated) == set(found["domains"]) == {"all", "even", "odd"}
    for domain, result in found["domains"].items():
        assert result["bytes"] == evaluated[domain]["bytes"]
        scores = {name: values["nats_per_byte"]["value"] for name, values in result["models"].items()}
        expected = evaluated[domain]["models"]
        for ours, its in (("source small",) * 2, ("source large",) * 2, ("target", "untouched target")):
            assert scores[ours] == pytest.approx(expected[its]["nats_per_byte"]["value"], abs=1e-4)
        assert scores["best mixture"] <= min(scores["source small"], scores["source large"]) + 1e-3

    prior = found["prior"]
    assert prior == pytest.approx(found["domains"]["all"]["mixture"]["weights"], abs=1e-3)
    pasted = next(line for line in served.output.splitlines() if line.startswith("for strategy online: "))
    section = yaml.safe_load(pasted.removeprefix("for strategy online: "))["fusion"]
    assert section == {"strategy": "online", "prior": prior}
    assert FusionConfig.model_validate(section).prior == prior

    write_recipe(tmp_path, models, {})
    stored = run(recipe, "--json", str(json_file), "--set", "fusion.soften=0.5")
    assert stored.exit_code == 0, stored.output
    assert "not timed, as they do not answer: small, large" in stored.output
    for name, values in json.loads(json_file.read_text())["domains"]["all"]["models"].items():
        before = found["domains"]["all"]["models"][name]["nats_per_byte"]["value"]
        assert values["nats_per_byte"]["value"] == pytest.approx(before, abs=1e-4), name


def test_a_split_that_is_not_there_is_named(models: dict[str, Path], tmp_path: Path) -> None:
    done = run(write_recipe(tmp_path, models, {}), "--split", "test")
    assert done.exit_code == 2
    assert "--split test: the corpus has train, held_out" in done.output
