"""`fusion reward train`, `eval` and `score`, and the service in a recipe."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError
from typer.testing import CliRunner

from services.cli.app import app
from services.deploy.serve_config import serve_config
from services.recipes.recipe import Recipe
from services.reward.train import RewardJob
from tests.fakes.services.plain_reward import plain_reward_service
from tests.reward.planted import planted_pairs


def a_recipe(folder: Path, job: RewardJob, **serve: Any) -> Path:
    reward = job.config.model_dump(mode="json", exclude={"serve"}) | ({"serve": serve["serve"]} if serve else {})
    recipe = {
        "name": "judged",
        "output_dir": str(job.run_folder.parents[2]),
        "corpus": {"files": [str(folder / "*.txt")]},
        "sources": [{"name": "one", "model": str(job.start), "address": "127.0.0.1:1"}],
        "target": {"model": str(job.start)},
        "reward": reward,
    }
    path = folder / "judged.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def fusion(*words: str) -> Any:
    return CliRunner().invoke(app, list(words))


def test_train_and_eval(trained: RewardJob, tmp_path: Path) -> None:
    recipe = a_recipe(tmp_path, trained)
    done = fusion("reward", "train", str(recipe))
    assert done.exit_code == 0, done.output
    assert "trained already" in done.output
    done = fusion("reward", "eval", str(recipe))
    assert done.exit_code == 0, done.output
    evaluation = json.loads((trained.run_folder / "evaluation.json").read_text())
    assert evaluation["right"]["value"] >= 0.9
    assert evaluation["right"]["pairs"] == sum(evaluation["shares"][d][d]["pairs"] for d in ("brief", "rich"))


def test_mistakes_name_the_key(trained: RewardJob, tmp_path: Path) -> None:
    recipe = str(a_recipe(tmp_path, trained))
    for change, problem in (
        ("reward.start=nowhere", "reward.start: model folder nowhere does not exist"),
        ("reward.data=[nowhere.jsonl]", "reward.data: no file matches 'nowhere.jsonl'"),
        ("reward.gamma=1", "reward.gamma: run trained was started with 2.0"),
        ("reward.batch_pairs=0", "reward.batch_pairs"),
        ("reward.domains.brief=Tell it all.", "reward.domains: two of them have the same system prompt"),
    ):
        done = fusion("reward", "train", recipe, "--set", change)
        assert (done.exit_code, problem in done.output) == (2, True), done.output
    done = fusion("validate", recipe, "--set", "reward.start=nowhere", "--set", "reward.data=[nowhere.jsonl]")
    assert done.exit_code == 2
    assert "reward.start: model folder nowhere does not exist" in done.output
    assert "reward.data: no file matches 'nowhere.jsonl'" in done.output
    done = fusion("reward", "eval", recipe, "--run-name", "other")
    assert (done.exit_code, "there is no model in" in done.output) == (2, True), done.output


def test_answers_are_scored_here_and_at_a_service_alike(trained: RewardJob, tmp_path: Path) -> None:
    pairs = planted_pairs(12, seed=9)
    rows: list[dict[str, Any]] = [
        {"messages": [*p.messages, {"role": "assistant", "content": p.chosen}], "domain": p.domain, "source": "one"}
        for p in pairs
    ]
    asked = pairs[0].messages
    rows.append({"messages": asked, "completion": pairs[0].chosen, "domain": pairs[0].domain, "source": "again"})
    rows.append({"prompt": "the of", "completion": "and", "source": "two"})
    file = tmp_path / "answers.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    here, there = tmp_path / "here.jsonl", tmp_path / "there.jsonl"
    command = ("reward", "score", str(file), "--domain", "rich")
    done = fusion(*command, "--model", str(trained.files.model), "--to", str(here))
    assert done.exit_code == 0, done.output
    from services.reward.config import RewardServiceConfig

    with plain_reward_service(RewardServiceConfig(model=str(trained.files.model))) as address:
        done = fusion(*command, "--address", address, "--to", str(there))
    assert done.exit_code == 0, done.output
    mine, served = ([json.loads(line) for line in path.read_text().splitlines()] for path in (here, there))
    assert mine[12]["reward"] == pytest.approx(mine[0]["reward"], abs=1e-4), "the same conversation in two forms"
    assert [row["reward"] for row in served] == pytest.approx([row["reward"] for row in mine], abs=1e-4)
    assert [{**row, "domain": row.get("domain", "rich")} for row in rows] == [
        {key: value for key, value in row.items() if key != "reward"} for row in mine
    ]
    done = fusion(*command[:-1], "loud", "--model", str(trained.files.model))
    assert (done.exit_code, "line 14: domain: 'loud' is none of brief, rich" in done.output) == (2, True), done.output
    done = fusion("reward", "score", str(file), "--model", str(trained.files.model))
    assert (done.exit_code, "line 14: domain: neither the row nor --domain" in done.output) == (2, True), done.output


def test_the_section_adds_the_application_unless_one_runs_already(trained: RewardJob, tmp_path: Path) -> None:
    def deployed(serve: dict[str, Any] | None) -> Recipe:
        return Recipe.model_validate(yaml.safe_load(a_recipe(tmp_path, trained, serve=serve).read_text()))

    [_, entry] = serve_config(deployed({"max_items": 3}))["applications"]
    assert (entry["name"], entry["import_path"]) == ("reward", "services.reward.app:build")
    assert (entry["args"]["max_items"], entry["args"]["model"]) == (3, str(trained.files.model))
    for without in (None, {"address": "10.0.0.7:9000"}):
        assert len(serve_config(deployed(without))["applications"]) == 1
    with pytest.raises(ValidationError, match=r"reward\.serve\.application: one is the name of another"):
        deployed({"application": "one"})
