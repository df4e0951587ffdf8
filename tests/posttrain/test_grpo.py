"""GRPO stages: the pilot, the stop rules, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from services.base.errors import FailedPreconditionError
from services.posttrain.config import GrpoStage, StopConfig
from services.posttrain.stages.grpo import StopRules
from tests.posttrain.scene import TRAINED, Scene, verified, write_rows
from tests.posttrain.test_resume import e_prompt


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    return Scene(tmp_path_factory.mktemp("grpo"))


def hopeless(scene: Scene) -> str:
    words = ("the", "of", "to", "in")
    return write_rows(scene.folder / "hopeless.jsonl", (verified(w, "a phrase that nobody says") for w in words))


def grpo(prompts: str, **changes: Any) -> dict[str, Any]:
    settings = {"num_generations": 4, "per_device_train_batch_size": 16, "max_completion_length": 6, "max_steps": 3}
    return {"kind": "grpo", "prompts": [prompts], "learning_rate": 1e-2, **settings, **changes}


def test_rewards_rise_where_answers_differ(scene: Scene) -> None:
    prompts = write_rows(scene.folder / "e.jsonl", map(e_prompt, TRAINED[:8]))
    stage = grpo(prompts, max_steps=12, per_device_train_batch_size=32)
    chain = scene.chain(scene.config(stage), "rises", force=True)
    lines: list[str] = []
    chain.note = lines.append
    folder = chain.run().parent
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert sum(step["reward"] for step in steps[-3:]) > sum(step["reward"] for step in steps[:3]) + 0.3
    assert any("the pilot's groups" in line for line in lines)


def test_a_run_whose_rewards_cannot_teach_is_refused_by_the_pilot(scene: Scene) -> None:
    with pytest.raises(FailedPreconditionError, match=r"posttrain\.stages\[0\]\.prompts: only 0\.0%"):
        scene.chain(scene.config(grpo(hopeless(scene))), "hopeless").run()
    assert not (scene.folder / "hopeless" / "1-grpo" / "checkpoints").exists()


def test_a_run_ends_by_itself_when_no_group_is_mixed(scene: Scene) -> None:
    stage = grpo(
        hopeless(scene), pilot_prompts=0, max_steps=9, stop={"unmixed_steps": 2}, per_device_train_batch_size=8
    )
    model = scene.chain(scene.config(stage), "equal", force=True).run()
    assert json.loads((model.parent / "stopped.json").read_text())["step"] == 2


def test_stop_rules() -> None:
    rules = StopRules(StopConfig(max_kl=0.5, length_ratio=2, unmixed_steps=2))
    usual = {"frac_reward_zero_std": 1.0, "kl": 0.1, "completions/mean_length": 10.0}
    mixed = {**usual, "frac_reward_zero_std": 0.5}
    assert [rules.after_step(row) for row in (usual, mixed, usual, mixed, mixed)] == [None] * 5
    assert "stop.max_kl" in (rules.after_step({**mixed, "kl": 0.6}) or "")
    assert rules.after_step({**mixed, "completions/mean_length": 19.0}) is None
    assert "stop.length_ratio" in (rules.after_step({**mixed, "completions/mean_length": 21.0}) or "")
    assert rules.after_step(usual) is None
    assert "stop.unmixed_steps" in (rules.after_step(usual) or "")


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"temperature": 0.7}, "temperature"),
        ({"top_p": 0.9}, "top_p"),
        ({"num_generations": 5}, "num_generations"),
        ({"stop": {"max_kl": 1}}, "stop.max_kl"),
        ({"num_iterations": 3}, "save_steps"),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes: dict[str, Any], key: str) -> None:
    with pytest.raises(ValidationError, match=key):
        GrpoStage.model_validate(grpo("x", **changes))


def test_a_program_needs_a_verifier(scene: Scene, tmp_path: Path) -> None:
    spec = {"kind": "program", "functions": ["f"], "tests": "assert f() == 1"}
    prompts = write_rows(tmp_path / "programs.jsonl", [{"prompt": "Write f.", "verify": spec}])
    with pytest.raises(ValueError, match="verifier: needed"):
        scene.chain(scene.config(grpo(prompts)), "programs").run()


def test_fewer_prompts_than_a_step_takes_are_refused(scene: Scene) -> None:
    with pytest.raises(ValueError, match=r"stages\[0\]\.prompts: 4 are fewer than a step's 8"):
        scene.chain(scene.config(grpo(hopeless(scene), per_device_train_batch_size=32)), "few").run()
