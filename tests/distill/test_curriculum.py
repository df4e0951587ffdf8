"""A curriculum: stages with shares of pools, rates and RoPE bases of their own, resumed wherever it was killed."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import re
import signal
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from transformers import AutoModelForCausalLM, LlamaConfig

from services.base.errors import FailedPreconditionError, NotFoundError
from services.distill.config import DistillConfig
from services.distill.curriculum import Stage, stage_windows
from services.distill.job import DistillJob
from services.distill.plan import claim_run, make_plan
from services.distill.target.rope import check_rope, set_rope_theta
from services.evaluation.report.run_summary import summarise
from services.fusion.client import FusedWindow, SkippedWindow, StreamRequest
from services.jobs.step_log import read_rows
from services.jobs.storage import newest_complete
from tests.fakes.fusion_stream import FakeFusion, corpus
from tests.fakes.training import job_in, numbers, train, weights

pytestmark = pytest.mark.usefixtures("one_thread")

STAGES = [
    {"name": "short", "share": 0.5, "mixture": {"short": 1.0}},
    {"name": "mixed", "share": 0.3, "mixture": {"train": 0.5, "long": 0.5}, "rope_theta": 50_000.0},
    {"name": "late", "share": 0.2, "mixture": {"long": 0.25, "train": 0.75}, "learning_rate": 1e-3},
]
TOTAL, SIZES = 60, (30, 18, 12)
POOLS = {"train/short": corpus(12, seed=1), "train/long": corpus(5, seed=2)}
TIMES = {"tokens_per_second", "step_seconds", "data_wait_seconds"}


def staged(folder: Path, target: Path, **changes: object) -> DistillJob:
    settings = {"stages": STAGES, "num_windows": TOTAL, "epochs": 1, "checkpoint_every_steps": 2, "warmup_share": 0.1}
    return job_in(folder, target, **settings | changes)


class DeadlyFusion(FakeFusion):
    """Kills this process, as the kernel would, at window `last` of a stage."""

    stage, last = 1, 0

    def stream(self, request: StreamRequest, *, prefetch_windows: int = 32) -> Iterator[FusedWindow | SkippedWindow]:
        for window in super().stream(request, prefetch_windows=prefetch_windows):
            at = window.cursor
            if (at.epoch, at.dealt + at.received) == (self.stage, self.last):
                os.kill(os.getpid(), signal.SIGKILL)
            yield window


def toy(target: Path, kind: type[FakeFusion] = FakeFusion) -> FakeFusion:
    return kind(target, corpus(18), pools=POOLS)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, target: Path) -> DistillJob:
    torch.set_num_threads(1)
    job = staged(tmp_path_factory.mktemp("undisturbed"), target)
    train(job, toy(target))
    return job


def test_every_stage_takes_its_windows_from_its_pools_in_their_shares(undisturbed: DistillJob) -> None:
    """At every step; and no window of a pool comes again before all have come."""
    ledger, drawn = read_rows(undisturbed.files.ledger), {"train": [], "train/short": [], "train/long": []}
    for number, (stage, size) in enumerate(zip(STAGES, SIZES, strict=True)):
        taken, counts = 0, dict.fromkeys(drawn, 0)
        rows = [row for row in ledger if row["epoch"] == number]
        assert len(rows) == math.ceil(size / 4)
        for row in rows:
            for split, indices in row["windows"].items():
                counts[split] += len(indices)
                drawn[split] += indices
            taken = sum(counts.values())
            for pool, share in stage["mixture"].items():
                split = pool if pool == "train" else f"train/{pool}"
                assert abs(counts[split] - Fraction(str(share)) * taken) < 1
        assert taken == size
    for split, size in (("train/short", 12), ("train/long", 5)):
        assert len(drawn[split]) > size
        assert max(map(drawn[split].count, range(size))) - min(map(drawn[split].count, range(size))) <= 1
    assert len(set(drawn["train"])) == 18


def test_metrics_and_report_name_the_stages(undisturbed: DistillJob) -> None:
    rows = read_rows(undisturbed.files.metrics)
    assert [row["stage"] for row in rows] == ["short"] * 8 + ["mixed"] * 5 + ["late"] * 3
    totals = summarise(undisturbed.files.metrics)
    assert totals is not None
    found = [(stage.name, stage.steps, stage.windows) for stage in totals.stages]
    assert found == [
        ("short", 8, 30),
        ("mixed", 5, 18),
        ("late", 3, 12),
    ]
    assert sum(stage.tokens for stage in totals.stages) == totals.tokens
    assert totals.stages[-1].clm == pytest.approx(rows[-1]["clm"])


def test_one_schedule_scales_the_rate_of_each_stage(undisturbed: DistillJob) -> None:
    rows = read_rows(undisturbed.files.metrics)
    for step, row in enumerate(rows):
        peak = 1e-3 if row["stage"] == "late" else 3e-3
        scale = (step + 1) / 2 if step < 2 else 0.5 * (1 + math.cos(math.pi * (step - 2) / 14))
        assert row["learning_rate"] == pytest.approx(peak * scale)


def test_the_rope_base_of_a_stage_is_saved_and_used(undisturbed: DistillJob, target: Path) -> None:
    def base(folder: Path) -> float:
        return float(json.loads((folder / "config.json").read_text())["rope_parameters"]["rope_theta"])

    assert base(target) == base(undisturbed.files.checkpoints / "step-8") == 10_000.0
    assert base(undisturbed.files.checkpoints / "step-10") == base(undisturbed.files.model) == 50_000.0
    model, ids = AutoModelForCausalLM.from_pretrained(undisturbed.files.model), torch.arange(40)[None]
    raised = AutoModelForCausalLM.from_pretrained(target)
    raised.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert not torch.allclose(raised(ids).logits, model(ids).logits, atol=1e-4)
        check_rope(raised)
        set_rope_theta(raised, 50_000.0)
        torch.testing.assert_close(raised(ids).logits, model(ids).logits)


def test_a_model_without_one_base_is_refused() -> None:
    from transformers import GPT2Config

    for config, reason in (
        (GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=40), "gpt2 has no rotary"),
        (
            LlamaConfig(
                hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=40,
                rope_parameters={"rope_type": "linear", "rope_theta": 10_000.0, "factor": 2.0},
            ),
            "llama has bases of its own",
        ),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=rf"distill\.stages\.rope_theta: {reason}"):
            check_rope(AutoModelForCausalLM.from_config(config))


def test_killed_in_its_second_stage_a_run_takes_the_same_windows(
    tmp_path: Path, target: Path, undisturbed: DistillJob
) -> None:
    """A checkpoint lies inside the second stage, and steps after it were taken."""
    job, fusion = staged(tmp_path, target), toy(target, DeadlyFusion)
    fusion.last = 18
    attempt = multiprocessing.get_context("fork").Process(target=train, args=(job, fusion))
    attempt.start()
    attempt.join(120)
    assert attempt.exitcode == -signal.SIGKILL
    newest = newest_complete(job.checkpoints)
    assert newest is not None and 8 < newest.step < 13
    train(job, toy(target))
    assert read_rows(job.files.ledger) == read_rows(undisturbed.files.ledger)
    for row, expected in zip(read_rows(job.files.metrics), read_rows(undisturbed.files.metrics), strict=True):
        for key in expected.keys() - TIMES:
            assert numbers(row[key]) == pytest.approx(numbers(expected[key]), abs=1e-6), key
    trained = weights(job.files.model)
    for name, weight in weights(undisturbed.files.model).items():
        torch.testing.assert_close(trained[name], weight, rtol=0, atol=1e-6)


def test_another_curriculum_is_another_run(tmp_path: Path, target: Path) -> None:
    fusion, job = toy(target), staged(tmp_path, target)
    claim_run(job, make_plan(job, fusion))
    (job.files.checkpoints / "step-1").mkdir(parents=True)
    record = {"step": 1, "plan": make_plan(job, fusion).identity, "files": {}}
    (job.files.checkpoints / "step-1" / "checkpoint.json").write_text(json.dumps(record))
    claim_run(job, make_plan(job, fusion))
    other = staged(tmp_path, target, stages=[{**STAGES[0], "share": 0.6}, {**STAGES[1], "share": 0.4}])
    with pytest.raises(FailedPreconditionError, match=r"distill\.stages: run run was started with"):
        claim_run(other, make_plan(other, fusion))
    with pytest.raises(FailedPreconditionError, match=r"distill\.num_windows: run run was started with 60, now 61"):
        claim_run(job, make_plan(staged(tmp_path, target, num_windows=61), fusion))
    fusion.splits["train/long"] = corpus(6, seed=2)
    with pytest.raises(FailedPreconditionError, match=r"corpus\.pools: run run was started with"):
        claim_run(job, make_plan(job, fusion))
    del fusion.splits["train/long"]
    with pytest.raises(NotFoundError, match=r"distill\.stages: stage mixed draws from long, .* it has held_out, train"):
        make_plan(job, fusion)


@given(
    shares=st.lists(st.integers(1, 40), min_size=1, max_size=6),
    num_windows=st.integers(1000, 10**12),
)
def test_stages_share_the_windows_of_the_run(shares: list[int], num_windows: int) -> None:
    whole = [share * 10_000 // sum(shares) for share in shares]
    whole[0] += 10_000 - sum(whole)
    stages = tuple(Stage(name=str(number), share=share / 10_000) for number, share in enumerate(whole))
    sizes = stage_windows(stages, num_windows)
    assert sum(sizes) == num_windows
    for number in range(len(stages)):
        assert abs(sum(sizes[:number]) - Fraction(sum(whole[:number]), 10_000) * num_windows) <= Fraction(1, 2)


def test_a_stage_without_a_window_is_refused() -> None:
    stages = (Stage(name="long", share=0.999), Stage(name="short", share=0.001))
    with pytest.raises(ValueError, match=r"distill\.stages: stage short has no window"):
        stage_windows(stages, 100)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"stages": [{"name": "a", "share": 0.5}]}, "stages.share: shares must sum to 1, they sum to 0.5"),
        ({"stages": [{"name": "a", "share": 0.33333}, {"name": "b", "share": 0.66667}]}, "at most 4 decimals"),
        ({"stages": [{"name": "a", "share": 0.5}, {"name": "a", "share": 0.5}]}, "stages: names must differ"),
        ({"stages": [{"name": "a", "share": 1, "mixture": {"x": 0.3, "y": 0.6}}]}, "mixture: shares must sum to 1"),
        ({"stages": [{"name": "a", "share": 1, "mixture": {}}]}, "at least 1 item"),
        ({"stages": [{"name": "a b", "share": 1}]}, "stages.0.name"),
        ({"stages": [{"name": "a", "share": 1}], "epochs": 2}, "epochs: a run has either epochs or stages"),
        ({"num_windows": 5}, "num_windows: only with stages"),
        ({"stages": [{"name": "a", "share": 1, "rope_theta": 1e6}], "lora": {}}, "stages.rope_theta: adapters leave"),
    ],
)
def test_mistakes_in_a_curriculum_are_named(changes: dict[str, object], problem: str) -> None:
    with pytest.raises(ValidationError, match=re.escape(problem)):
        DistillConfig.model_validate(changes)
