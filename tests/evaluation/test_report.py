"""The report says what was measured, and says plainly when fusion did not help."""

from __future__ import annotations

import json
import re

import pytest

from services.evaluation.controls import Training, comparisons, training_of
from services.evaluation.report.opening import verdict
from services.evaluation.report.pictures import _running_mean
from services.evaluation.report.report import write_report
from services.evaluation.report.run_summary import summarise


def write_run(folder, *, fused: bool, steps: int = 20) -> None:
    folder.mkdir(parents=True)
    rows = [
        {
            "step": step,
            "epoch": 0,
            "loss": 8 / step,
            "clm": 8 / step,
            "fusion": 9 / step if fused else None,
            "tokens": 100 if step % 2 else 300,
            "windows": 4,
            "tokens_per_second": 50.0,
            "step_seconds": 2.0,
            "data_wait_seconds": 0.5,
            "masked_share": (0.0 if step % 2 else 0.04) if fused else None,
            "covered_mass": 0.97 if fused else None,
            "source_weights": {"left": 0.25, "right": 0.75} if fused else {},
            "total_tokens": 200 * step,
            "total_windows": 4 * step,
        }
        for step in range(1, steps + 1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def run_folder(tmp_path):
    write_run(tmp_path / "fused", fused=True)
    write_run(tmp_path / "clm_only", fused=False)
    summary = {
        "nats_per_byte": {"clm_only": 1.8, "fused": 1.7, "left": 1.0, "right": 0.9},
        "wall_seconds": 612.4,
        "git_revision": "abc123",
    }
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    return tmp_path


def test_the_report_holds_scores_training_weights_and_pictures(run_folder):
    report = write_report(run_folder).read_text()
    held_out = [line.split(" | ")[0] for line in report.splitlines() if line.endswith(("| target |", "| source |"))]
    assert held_out == ["| right", "| left", "| fused", "| clm_only"]
    assert "**The fused target is better than CLM only by 0.1000 nats per byte (5.56 %).**" in report
    assert "| fused | 20 | 4,000 | 80 | 100 | 25.0 % |" in report
    assert "| 3.00 % | 0.9700 |" in report
    assert "| fused | 0.250 | 0.750 |" in report
    assert "612 s in all, revision abc123" in report
    for picture in ("loss_clm", "loss_fusion", "source_weights"):
        assert (run_folder / f"{picture}.png").read_bytes().startswith(b"\x89PNG")
        assert f"({picture}.png)" in report
    assert "held_out.png" not in report


def test_the_page_holds_all_of_the_report_and_asks_for_nothing(run_folder):
    write_report(run_folder)
    page = (run_folder / "report.html").read_text()
    assert "<td>fused</td>" in page and "better than CLM only by 0.1000" in page
    assert page.count("<img") == len(list(run_folder.glob("*.png")))
    for reference in re.findall(r'(?:src|href)="([^"]*)"', page):
        assert reference.startswith("data:image/png;base64,iVBOR")
    for picture in ("mass", "data_wait"):  # of this run's steps a quarter is waiting, and 2 % of the tokens are masked
        assert (run_folder / f"{picture}.png").exists()


def test_scores_with_intervals_are_shown_by_domain(run_folder):
    def score(value, low, high):
        return {"value": value, "low": low, "high": high}

    def models(difference):
        fused = {"nats_per_byte": score(1.7, 1.6, 1.8), "accuracy": score(0.31, 0.3, 0.32)}
        control = {"nats_per_byte": score(1.8, 1.7, 1.9), "accuracy": score(0.3, 0.29, 0.31)}
        return {
            "bytes": 1234,
            "documents": 12,
            "models": {"clm_only": control, "fused": fused | {"difference_from": {"clm_only": difference}}},
        }

    domains = {
        "all": models(score(-0.1, -0.15, -0.05)),
        "code": models(score(-0.1, -0.2, 0.01)),
        "<script>alert(1)</script>\n# $\\nothing$": models(score(-0.1, -0.2, 0.01)),
    }
    evaluation = {"corpus": "toy", "split": "held_out", "domains": domains}
    (run_folder / "evaluation.json").write_text(json.dumps(evaluation))
    report = write_report(run_folder).read_text()
    assert "| fused | fused: all | 1.7000 | 1.6000 to 1.8000 | 31.0 % |" in report
    assert report.index("| fused | fused: all | 1.7000") < report.index("| clm_only | CLM only | 1.8000")
    assert "fused minus clm_only: -0.1000 nats per byte (-0.1500 to -0.0500): better beyond the interval" in report
    assert "no difference beyond the interval" in report.split("held_out: code")[1]
    assert (run_folder / "domains.png").exists()
    assert "\n# " not in report
    page = (run_folder / "report.html").read_text()
    assert "<script>" not in page and "&lt;script&gt;alert(1)" in page


def test_too_few_documents_give_no_verdict(run_folder):
    """Also where an earlier version wrote an interval, which of one document has no width."""
    for low, high in ((-0.1, -0.1), (None, None)):
        score = {"value": -0.1, "low": low, "high": high}
        values = {"nats_per_byte": {"value": 1.7, "low": low, "high": high}, "accuracy": score}
        models = {"clm_only": values, "fused": values | {"difference_from": {"clm_only": score}}}
        domains = {"all": {"bytes": 9, "documents": 7, "models": models}}
        evaluation = {"corpus": "toy", "split": "held_out", "domains": domains}
        (run_folder / "evaluation.json").write_text(json.dumps(evaluation))
        report = write_report(run_folder).read_text()
        assert "| fused | fused: all | 1.7000 | - |" in report
        assert "9 bytes in 7 documents: too few for intervals, which need 8." in report
        assert "fused minus clm_only: -0.1000 nats per byte: no verdict from 7 documents, 8 are needed" in report
        assert "beyond the interval" not in report and (run_folder / "domains.png").exists()


def test_fused_targets_are_held_against_every_control(run_folder):
    trainings = {
        "both": Training("fused", ("left", "right")),
        "right_only": Training("single", ("right",)),
        "tokens": Training("clm"),
    }
    score = {"value": 1.7, "low": 1.6, "high": 1.8}
    models = {
        name: {
            "nats_per_byte": score,
            "accuracy": score,
            "difference_from": {other: score for other in trainings if other != name},
        }
        for name in trainings
    }
    evaluation = {
        "corpus": "toy",
        "split": "held_out",
        "trainings": {name: training.to_json() for name, training in trainings.items()},
        "domains": {"all": {"bytes": 1, "documents": 1, "models": models}},
    }
    (run_folder / "evaluation.json").write_text(json.dumps(evaluation))
    report = write_report(run_folder).read_text()
    assert "| right_only | right alone |" in report and "| both | fused: left, right |" in report
    assert re.findall(r"\*\*(\w+) minus (\w+)", report) == [
        ("both", "right_only"), ("both", "tokens"), ("right_only", "tokens"),
    ]  # fmt: skip


def test_controls_are_runs_of_the_same_shape_and_the_dense_run_of_a_mixture(tmp_path):
    def run(name, lambda_, **settings):
        settings = {"distill.sources": [], "distill.lambda": lambda_, "distill.lambda_end": None} | settings
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text(json.dumps({"settings": settings}))
        return training_of(tmp_path / name)

    moe = {"distill.moe": {"shards": 8, "shared": 2, "copies": 4, "init": "split"}}
    stages = {"distill.stages": [{"name": "short"}, {"name": "long"}]}
    trainings = {
        "dense": run("dense", 0.5),
        "dense_clm": run("dense_clm", 1),
        "experts": run("experts", 0.5, **moe),
        "experts_staged": run("experts_staged", 0.5, **moe, **stages),
        "staged": run("staged", 0.5, **stages),
        "staged_clm": run("staged_clm", 1, **stages),
    }
    assert str(trainings["experts"]) == "fused: all; experts split 8-2-4"
    assert str(trainings["staged_clm"]) == "CLM only; stages short, long"
    assert comparisons(trainings) == [
        ("dense", "dense_clm"), ("experts", "dense"), ("experts_staged", "staged"), ("staged", "staged_clm"),
    ]  # fmt: skip
    assert Training.from_json(json.loads(json.dumps(trainings["experts"].to_json()))) == trainings["experts"]


def test_evaluations_become_a_picture(run_folder):
    (run_folder / "fused" / "evaluations.jsonl").write_text('{"step": 10, "epoch": 0, "nats_per_byte": 1.9}\n')
    assert "(held_out.png)" in write_report(run_folder).read_text()


def test_a_lost_comparison_is_said_plainly():
    assert verdict({"clm_only": 1.7, "fused": 1.8}) == (
        "**The fused target is NOT better than CLM only: it is worse by 0.1000 nats per byte (5.88 %).**"
    )
    assert "NOT better" in (verdict({"clm_only": 1.7, "fused": 1.7}) or "")
    assert verdict({"fused": 1.7}) is None


def test_a_run_that_was_not_evaluated_is_reported_as_far_as_it_goes(run_folder):
    (run_folder / "summary.json").unlink()
    assert "Not evaluated yet" in write_report(run_folder).read_text()
    single = write_report(run_folder / "fused")
    assert single.parent == run_folder / "fused"
    assert "| fused | 20 | 4,000 |" in single.read_text()


def test_nothing_to_report_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="there is no run to report on"):
        write_report(tmp_path)
    (tmp_path / "summary.json").write_text("[]")
    with pytest.raises(ValueError, match="expected a mapping"):
        write_report(tmp_path)


def test_means_are_weighted_by_tokens(run_folder):
    totals = summarise(run_folder / "fused" / "metrics.jsonl")
    assert totals is not None
    assert (totals.steps, totals.epochs, totals.tokens, totals.windows) == (20, 1, 4000, 80)
    assert (totals.tokens_per_second, totals.wait_share) == (100.0, 0.25)
    assert totals.masked_share == pytest.approx(0.03)
    assert totals.source_weights == pytest.approx({"left": 0.25, "right": 0.75})
    control = summarise(run_folder / "clm_only" / "metrics.jsonl")
    assert control is not None and control.fusion is None and control.masked_share is None
    assert summarise(run_folder / "absent.jsonl") is None


def test_the_verdict_and_the_cost_come_first_and_each_score_stands_once(run_folder):
    score = {"value": 1.7123, "low": 1.6, "high": 1.8}
    values = {"nats_per_byte": score, "accuracy": score}
    even = {"value": -0.01, "low": -0.05, "high": 0.03}
    models = {"clm_only": values, "fused": values | {"difference_from": {"clm_only": even}}, "source left": values}
    domains = {"all": {"bytes": 9, "documents": 20, "models": models}}
    (run_folder / "evaluation.json").write_text(json.dumps({"corpus": "toy", "split": "held_out", "domains": domains}))
    report = write_report(run_folder).read_text()
    first, rest = report.split("![domains](domains.png)")
    assert "**fused minus clm_only: -0.0100 nats per byte (-0.0500 to 0.0300): no difference" in first
    assert "If the difference is real, some 320 documents would tell it; there are 20." in first  # 20 (0.04 / 0.01)^2
    assert "fused: 4,000 tokens in 40 s (100 tokens/s), 25.0 % of the time waiting for data" in first
    assert "A token takes 1.00 times as long with fused rows as without." in first
    assert "| right | 0.9000" in rest and "| left | 1.0000" not in rest and "| fused | 1.7000" not in rest
    assert report.count("fused minus clm_only") == 1


def test_pictures_that_say_nothing_are_left_out(tmp_path):
    write_run(tmp_path / "clm_only", fused=False, steps=3)
    path = tmp_path / "clm_only" / "metrics.jsonl"
    path.write_text(path.read_text().replace('"data_wait_seconds": 0.5', '"data_wait_seconds": 0.01'))
    write_report(tmp_path)
    assert {file.name for file in tmp_path.glob("*.png")} == {"loss_clm.png"}


def test_a_running_mean_is_that_of_the_neighbours_that_are_there():
    values = [0.0, 3.0, 6.0, 9.0, 0.0]
    assert _running_mean(values, 3) == pytest.approx([1.5, 3.0, 6.0, 5.0, 4.5])
