"""Balance losses and figures of routing in a run: the same for any micro-batch and number of workers."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from ray.util.metrics import Gauge

from services.distill.config import DistillConfig
from services.distill.plan import make_plan
from services.distill.workers.parallel import parallelise
from services.distill.workers.worker import DistillWorker
from services.distill.workers.world import World
from services.evaluation.report.report import write_report
from services.jobs.observer import curves_of, observer
from services.jobs.run_folder import RunFolder
from services.jobs.step_log import read_rows
from services.jobs.tracking import Trackers, Tracking
from tests.fakes.files.curves import tensorboard_curves
from tests.fakes.fusion_stream import FakeFusion, corpus
from tests.fakes.training import job_in, run_workers, train

pytestmark = pytest.mark.usefixtures("one_thread")

BALANCE = {"expert": 0.2, "device": 0.1, "groups": 4}
MOE = {"shards": 6, "shared": 2, "copies": 2, "router_std": 0.5, "balance": BALANCE}
FIGURES = ("load_cv", "dead_experts", "router_entropy", "balance")


def run(folder: Path, target: Path, **changes: object):
    job = job_in(folder, target, epochs=1, **{"moe": MOE, **changes})
    train(job, FakeFusion(target, corpus(18)))
    return job


@pytest.fixture(scope="module")
def balanced(tmp_path_factory, target):
    torch.set_num_threads(1)
    return run(tmp_path_factory.mktemp("balanced"), target)


def same(job, other) -> None:
    mine, theirs = read_rows(job.files.metrics), read_rows(other.files.metrics)
    assert len(mine) == len(theirs) == 5
    for one, two in zip(mine, theirs, strict=True):
        assert one["loss"] == pytest.approx(two["loss"], abs=2e-5)
        assert one["gradient_norm"] == pytest.approx(two["gradient_norm"], rel=1e-3)
        for key in ("load_cv", "router_entropy", "balance"):
            assert one["routing"][key] == pytest.approx(two["routing"][key], abs=1e-3)
    assert mine[0]["routing"]["balance"] == pytest.approx(theirs[0]["routing"]["balance"], abs=1e-6)


def test_the_loss_is_what_the_metrics_say(tmp_path, target, balanced):
    for row in read_rows(balanced.files.metrics):
        assert row["routing"]["layers"] == [0, 1]
        assert all(len(row["routing"][key]) == 2 for key in FIGURES)
        assert row["loss"] > 0.3 * row["clm"] + 0.7 * row["fusion"] + 0.2 * sum(row["routing"]["balance"])
    only_experts = run(tmp_path, target, moe=MOE | {"balance": {"expert": 0.2}})
    for row in read_rows(only_experts.files.metrics):
        expected = 0.3 * row["clm"] + 0.7 * row["fusion"] + 0.2 * sum(row["routing"]["balance"])

        assert row["loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("changes", [{"micro_batch_windows": 1}, {"micro_batch_windows": 3, "pack_tokens": 64}])
def test_any_micro_batch_has_the_same_loss(tmp_path, target, balanced, changes):
    same(run(tmp_path, target, **changes), balanced)


def two_workers(rank: int, target_folder: Path, folder: Path) -> None:
    for name, changes in (("ddp", {}), ("fsdp", {"micro_batch_windows": 1})):
        job = job_in(folder / name, target_folder, epochs=1, moe=MOE, num_workers=2, parallel=name, **changes)
        shards = partial(parallelise, kind=name, device=torch.device("cpu"))
        fusion = FakeFusion(target_folder, corpus(18))
        DistillWorker(job, make_plan(job, fusion), fusion, World(rank=rank, size=2, parallel=shards)).run()


def test_two_workers_have_the_same_loss(tmp_path, target, balanced):
    codes = run_workers(two_workers, target, tmp_path, num_workers=2, meeting=tmp_path / "meeting")
    assert codes == [0, 0]
    for name in ("ddp", "fsdp"):
        same(job_in(tmp_path / name, target), balanced)


def test_balance_spreads_tokens(tmp_path, target):
    last = {}
    for weight in (0.0, 1.0):
        job = job_in(
            tmp_path / str(weight), target, epochs=6, moe=MOE | {"balance": {"expert": weight}}, learning_rate=1e-2
        )
        train(job, FakeFusion(target, corpus(18)))
        last[weight] = [row["routing"] for row in read_rows(job.files.metrics)[-5:-1]]
    for layer in range(2):
        with_balance, without = (sum(row["load_cv"][layer] for row in last[weight]) for weight in (1.0, 0.0))
        assert with_balance < 0.5 * without
    assert last[1.0][-1]["balance"] == pytest.approx([1.0, 1.0], abs=0.1)


def test_routing_json_and_the_report_have_the_load_of_every_expert(tmp_path, target, balanced):
    routing = json.loads(balanced.files.routing.read_text())
    last = read_rows(balanced.files.metrics)[-1]
    assert (routing["step"], routing["tokens"]) == (5, last["tokens"])
    for load, cv in zip(routing["load"], last["routing"]["load_cv"], strict=True):
        assert len(load) == 8 and sum(load) == pytest.approx(8)
        assert torch.tensor(load).std(unbiased=False).item() == pytest.approx(cv, abs=1e-6)
    report = write_report(balanced.run_folder).read_text()
    assert f"## Experts of {balanced.run_folder.name}" in report
    [picture] = balanced.run_folder.glob("experts_*.png")
    assert f"({picture.name})" in report and picture.stat().st_size > 1000


def test_tensorboard_has_the_figures_of_every_layer(tmp_path, balanced):
    files, rows = RunFolder(tmp_path), read_rows(balanced.files.metrics)
    with Trackers(Tracking(), "run", files, after_step=0, figures=curves_of) as trackers:
        for row in rows:
            trackers.write(row)
    written = tensorboard_curves(files.events)
    for key in FIGURES:
        wanted = {row["step"]: row["routing"][key][1] for row in rows}
        assert written[f"{key}/layer_1"] == pytest.approx(wanted, rel=1e-5)


def test_prometheus_has_the_figures_of_every_layer(balanced, monkeypatch):
    exported: dict[tuple[str, str], float] = {}

    def export(gauge: Gauge, value: float, tags: dict[str, str] | None = None) -> None:
        exported[gauge.info["name"], (tags or {}).get("layer", "")] = value

    monkeypatch.setattr(Gauge, "set", export)  # without a cluster Ray drops what it is given
    [*_, last] = read_rows(balanced.files.metrics)
    observer("run")(last)
    names = ("expert_load_cv", "dead_experts", "router_entropy_nats", "expert_balance")
    for name, key in zip(names, FIGURES, strict=True):
        for layer in range(2):
            assert exported[f"llm_fusion_train_{name}", str(layer)] == last["routing"][key][layer]


@pytest.mark.parametrize(
    ("balance", "message"),
    [
        ({"device": 0.1}, "groups: at least 2 with a device-level loss"),
        ({"groups": 2}, "groups: at least 2 with a device-level loss"),
    ],
)
def test_settings_that_say_nothing_are_refused(balance, message):
    with pytest.raises(ValueError, match=message):
        DistillConfig.model_validate({"moe": {"balance": balance}})


def test_groups_that_do_not_divide_the_experts_are_refused_before_any_worker_starts(tmp_path, target):
    job = job_in(tmp_path, target, moe=MOE | {"balance": {"device": 0.1, "groups": 3}})
    with pytest.raises(
        ValueError, match=r"^distill\.moe\.balance\.groups: must divide the 8 experts of a layer, got 3"
    ):
        make_plan(job, FakeFusion(target, corpus(18)))
