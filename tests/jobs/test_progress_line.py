"""The progress line: what it promises is what comes."""

from __future__ import annotations

import logging

import pytest

from services.jobs.progress_line import ProgressPrinter, parse_progress

STEPS_PER_EPOCH, EPOCHS = 10, 5


def promised(caplog, *, done_steps: int = 0, kept_seconds: float = 1.0) -> dict[int, tuple[float, float]]:
    """By step, the ETA of its line and the seconds that then really pass. Steps of the first epoch take ten seconds, of
    which the trainer waits nine for the sources; later ones take `kept_seconds`."""
    now = 0.0
    total = STEPS_PER_EPOCH * EPOCHS
    printer = ProgressPrinter(
        "fused", total, steps_per_epoch=STEPS_PER_EPOCH, done_tokens=0, enabled=True, clock=lambda: now
    )
    shown: dict[int, float] = {}
    ended: dict[int, float] = {}
    with caplog.at_level(logging.INFO):
        for step in range(done_steps, total):
            first = step < STEPS_PER_EPOCH
            now += 10.0 if first else kept_seconds
            caplog.clear()
            waited = 9.0 if first else 0.0
            row = {"step": step + 1, "epoch": step // STEPS_PER_EPOCH, "loss": 1.0, "total_tokens": 100 * (step + 1)}
            printer.show({**row, "data_wait_seconds": waited})
            ended[step + 1] = now
            for record in caplog.records:
                progress = parse_progress(record.getMessage())
                assert progress is not None
                shown[progress.step] = progress.eta_seconds
    return {step: (eta, now - ended[step]) for step, eta in shown.items()}


def test_windows_to_score_and_windows_kept_are_counted_apart(caplog):
    lines = promised(caplog)
    assert len(lines) > STEPS_PER_EPOCH
    for eta, real in lines.values():
        assert eta == pytest.approx(real, abs=1.0)


def test_the_pace_of_later_epochs_is_the_one_that_is_seen(caplog):
    """No store, or a slow one: what was assumed is corrected by the first steps of the second epoch."""
    lines = promised(caplog, kept_seconds=7.0)
    for step, (eta, real) in lines.items():
        if step > STEPS_PER_EPOCH:
            assert eta == pytest.approx(real, abs=1.0)


def test_a_line_names_the_stage_where_there_is_one(caplog):
    printer = ProgressPrinter("staged", 2, steps_per_epoch=2, done_tokens=0, enabled=True)
    row = {"step": 2, "epoch": 1, "loss": 1.0, "total_tokens": 10, "data_wait_seconds": 0.0}
    with caplog.at_level(logging.INFO):
        for stage in ({"stage": "long-1"}, {}):
            printer.show(row | stage)
    read = [parse_progress(record.getMessage()) for record in caplog.records]
    assert [progress and (progress.epoch, progress.stage, progress.loss) for progress in read] == [
        (1, "long-1", 1.0), (1, "", 1.0)
    ]  # fmt: skip


def test_a_run_resumed_in_a_later_epoch(caplog):
    for eta, real in promised(caplog, done_steps=25).values():
        assert eta == pytest.approx(real, abs=1.0)
