"""A chain on the workers of Ray Train."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.posttrain.scene import Scene

pytestmark = pytest.mark.drill


@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_chain_runs_on_workers(num_workers: int, tmp_path: Path) -> None:
    import ray

    scene = Scene(tmp_path)
    ray.init("local", num_cpus=2, include_dashboard=False)
    try:
        config = scene.config(scene.sft(per_device_train_batch_size=4), num_workers=num_workers)
        promoted = scene.chain(config, "on_ray").run()
    finally:
        ray.shutdown()
    assert (promoted / "config.json").is_file()
    metrics = (promoted.parent / "metrics.jsonl").read_text().splitlines()
    assert len(metrics) == {1: 48, 2: 24}[num_workers], "workers share the rows"
