"""`fusion posttrain`: from a recipe to a promoted folder, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from services.cli.app import app
from tests.posttrain.scene import Scene


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    return Scene(tmp_path_factory.mktemp("command"))


def recipe_file(scene: Scene, name: str, *stages: dict[str, Any], **changes: Any) -> str:
    recipe = {
        "name": name,
        "output_dir": str(scene.folder / "runs"),
        "corpus": {"files": [str(scene.folder / "text.txt")]},
        "sources": [{"name": "some", "model": str(scene.start), "engine": "transformers"}],
        "target": {"model": str(scene.start)},
        "posttrain": {
            "stages": list(stages),
            "gate": {"prompts": [scene.held_out], "max_new_tokens": 8},
            "num_workers": 0,
            "device": "cpu",
            "torch_threads": 1,
            **changes,
        },
    }
    path = scene.folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return str(path)


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["posttrain", *arguments], terminal_width=400)


def test_a_recipe_s_chain_is_run_and_a_stage_goes_on_from_another_run(scene: Scene) -> None:
    recipe = recipe_file(scene, "good", scene.sft())
    done = invoke(recipe)
    assert done.exit_code == 0, done.output
    promoted = scene.folder / "runs" / "good" / "posttrain" / "1-sft" / "model"
    assert f"promoted: {promoted}" in done.stdout
    summary = json.loads((promoted.parents[1] / "chain.json").read_text())
    assert summary["promoted"] == str(promoted)
    assert (promoted.parents[1] / "posttrain.html").is_file()
    again = invoke(recipe, "--run-name", "second", "--set", "posttrain.start=posttrain/1-sft")
    assert again.exit_code == 1, "it is perfect already: nothing rises"
    assert "1-sft: held back by the gate (mean score)" in again.stderr
    forced = invoke(recipe, "--run-name", "second", "--set", "posttrain.start=posttrain/1-sft", "--force")
    assert forced.exit_code == 0, forced.output


def test_a_target_from_scratch_is_made_first(scene: Scene) -> None:
    recipe = recipe_file(scene, "scratch", scene.sft(max_steps=1))
    shape = "{hidden_size: 16, num_layers: 1, num_heads: 2, intermediate_size: 16}"
    target = f"target={{config: {shape}, tokenizer: {{train: {{vocabulary_size: 300}}}}}}"
    done = invoke(recipe, "--set", target, "--set", "corpus.separator=.", "--force")
    assert done.exit_code == 0, done.output
    made = scene.folder / "runs" / "scratch"
    record = json.loads((made / "posttrain" / "1-sft" / "run.json").read_text())
    assert record["start"] == str(made / "target")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gate": {"prompts": ["nowhere/*.jsonl"]}}, "posttrain.gate.prompts: no file matches 'nowhere/*.jsonl'"),
        ({"start": "nowhere"}, "posttrain.start: model folder nowhere does not exist"),
        ({"stages": [{"kind": "ppo"}]}, "posttrain.stages.0"),
    ],
)
def test_mistakes_are_named_by_their_key(scene: Scene, changes: dict[str, Any], message: str) -> None:
    recipe = recipe_file(scene, "bad", scene.sft(), **changes)
    done = invoke(recipe)
    assert (done.exit_code, message in done.stderr) == (2, True), done.output
    checked = CliRunner().invoke(app, ["validate", recipe], terminal_width=400)
    assert (checked.exit_code, message in checked.stderr) == (2, True), checked.output


def test_a_skill_needs_held_out_prompts(scene: Scene) -> None:
    done = invoke(recipe_file(scene, "skill", scene.sft(skill="sums")))
    assert done.exit_code == 2
    assert "posttrain.stages[0].skill: gate.prompts has 0 prompts of 'sums'" in done.stderr


def test_a_recipe_without_the_section_says_so(scene: Scene, tmp_path: Path) -> None:
    values = yaml.safe_load(Path(recipe_file(scene, "none", scene.sft())).read_text())
    del values["posttrain"]
    (tmp_path / "none.yaml").write_text(yaml.safe_dump(values))
    done = invoke(str(tmp_path / "none.yaml"))
    assert (done.exit_code, "posttrain: the recipe has no such section" in done.stderr) == (2, True), done.output
