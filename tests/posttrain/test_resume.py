"""A stage of each kind that is killed goes on from its checkpoint to the same weights, bit by bit."""

from __future__ import annotations

import multiprocessing
import random
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from services.base.errors import FailedPreconditionError
from services.jobs.step_log import read_rows
from tests.distill.conftest import one_thread  # noqa: F401  # a fixture
from tests.fakes.files.curves import tensorboard_curves
from tests.fakes.training import weights
from tests.posttrain.killed_process import run_until_killed
from tests.posttrain.scene import TRAINED, Scene, verified, write_rows

KILLING = multiprocessing.get_context("forkserver")
KILLING.set_forkserver_preload(["tests.posttrain.killed_process"])

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    return Scene(tmp_path_factory.mktemp("resume"))


def stage_of(kind: str, scene: Scene) -> dict[str, Any]:
    common = {"kind": kind, "max_steps": 4, "save_steps": 2, "learning_rate": 1e-3, "seed": 3, "save_total_limit": 9}
    if kind == "sft":
        return {**common, "data": [scene.right], "per_device_train_batch_size": 16}  # killed where an epoch ends
    if kind == "dpo":
        return {**common, "data": [scene.pairs], "lora": {"rank": 4}}
    prompts = write_rows(scene.folder / "e.jsonl", (e_prompt(word) for word in TRAINED[:6]))
    settings = {"num_generations": 4, "max_completion_length": 4, "pilot_prompts": 0, "beta": 0.1}
    return {**common, "prompts": [prompts], **settings}


def e_prompt(word: str) -> dict[str, Any]:
    """A random model's answer has the letter now and then."""
    spec = {"kind": "constraints", "constraints": [{"name": "letter_count", "letter": "e", "at_least": 1}]}
    return {**verified(word), "verify": spec}


@pytest.mark.parametrize("kind", ["sft", "dpo", "grpo"])
def test_a_killed_stage_ends_with_the_same_weights(kind: str, scene: Scene) -> None:
    stage = stage_of(kind, scene)
    config = scene.config(stage)
    whole = scene.chain(config, f"{kind}_whole", force=True).run()
    file = scene.folder / f"{kind}.json"
    file.write_text(config.model_dump_json())
    # Forked from a process that has imported TRL once, for all kinds.
    process = KILLING.Process(target=run_until_killed, args=(scene.folder, file, f"{kind}_killed", 1))
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    stage_folder = scene.folder / f"{kind}_killed" / f"1-{kind}"
    assert not (stage_folder / "model").exists()
    if kind == "sft":
        other = scene.config({**stage, "weight_decay": 0.5})
        with pytest.raises(FailedPreconditionError, match="weight_decay"):
            scene.chain(other, "sft_killed", force=True).run()
    resumed = scene.chain(config, f"{kind}_killed", force=True).run()
    rows = read_rows(stage_folder / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    curves = tensorboard_curves(stage_folder / "events")
    for key in ("loss", "learning_rate", "grad_norm", "epoch"):
        assert curves[key] == pytest.approx({row["step"]: row[key] for row in rows}, rel=1e-6)
    before, after = weights(Path(whole)), weights(Path(resumed))
    start = weights(scene.start)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert any(not torch.equal(after[name], start[name]) for name in start), "the stage changed nothing"


def test_a_checkpoint_that_a_kill_cut_off_is_passed_over(scene: Scene) -> None:
    config = scene.config(stage_of("sft", scene))
    whole = scene.chain(config, "cut", force=True).run()
    before = weights(whole)
    stage = whole.parent
    (whole / "config.json").unlink()
    newest = stage / "checkpoints" / "checkpoint-4" / "optimizer.pt"
    newest.write_bytes(newest.read_bytes()[:100])
    again = weights(scene.chain(config, "cut", force=True).run())
    assert all(torch.equal(again[name], before[name]) for name in before)


@pytest.mark.drill
def test_a_chain_killed_at_five_to_ten_random_moments_ends_in_the_same_folder(scene: Scene) -> None:
    rng = random.Random(0)
    stages = [{**stage_of(kind, scene), "max_steps": 30, "save_steps": 2} for kind in ("sft", "dpo", "grpo")]
    config = scene.config(*stages)
    whole = scene.chain(config, "ten_whole", force=True).run()
    file = scene.folder / "ten.json"
    file.write_text(config.model_dump_json())
    reached = []
    while len(reached) < 10:
        process = KILLING.Process(target=run_until_killed, args=(scene.folder, file, "ten_killed", 10**9))
        process.start()
        process.join(rng.uniform(1, 4))
        if process.exitcode is not None:
            break  # it has come to its end before the tenth kill
        process.kill()
        process.join()
        reached.append(len(list(scene.folder.glob("ten_killed/*/checkpoints/checkpoint-*"))))
    assert len(reached) >= 5 and reached[-1] > 0, reached
    resumed = scene.chain(config, "ten_killed", force=True).run()
    assert resumed.parent.name == whole.parent.name == "3-grpo"
    before, after = weights(whole), weights(resumed)
    assert all(torch.equal(after[name], before[name]) for name in before)
