"""The benchmark of mixed text on two tiny sources: every method trains, and its tables are those of the runs."""

from __future__ import annotations

import json

import numpy as np
import pytest

from fusion_core.blocks import Block
from fusion_core.fusion.headroom import common_segments
from tests.bench.mixed.__main__ import add_forecast, add_results, compare
from tests.bench.mixed.experiment import ALONE, CLM_ONLY, FUSED, METHODS, SOFTENED, Experiment, Size
from tests.bench.mixed.picture import forecast_figure
from tests.bench.parts.report import Report
from tests.fakes.tiny_model import make_tiny_model, sentences

TINY = Size("tiny", 0, {"hidden_size": 16, "num_layers": 1, "num_heads": 1, "intermediate_size": 32}, 300, 1, 1)


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    root = tmp_path_factory.mktemp("mixed")
    lines = [json.dumps({"text": sentences(200, seed=n), "domain": "odd" if n % 2 else "even"}) for n in range(40)]
    (root / "tiny-documents.jsonl").write_text("\n".join(lines))
    sources = [
        {"name": name, "model": str(make_tiny_model(root / name, vocabulary_size=300 + 100 * n, seed=n)), "top_k": 16}
        for n, name in enumerate(ALONE)
    ]
    return Experiment(TINY, root, sources)


def entropy(block: Block) -> np.ndarray:
    """Entropy in nats of each row, the tail as one outcome."""
    logprobs_TK = np.concatenate([block.topk_logprobs_TK, block.tail_T[:, None]], axis=1).astype(np.float64)
    return -(np.exp(logprobs_TK) * np.where(np.isinf(logprobs_TK), 0.0, logprobs_TK)).sum(axis=1)


def test_methods_are_what_they_are_called(experiment: Experiment) -> None:
    sources, online = experiment.fusion("online")
    assert sources == list(ALONE) and sum(online.prior.values()) == pytest.approx(1, abs=0.01)
    assert experiment.fusion(SOFTENED)[0] == [experiment.best] and experiment.fusion(SOFTENED)[1].soften == 0.8
    assert experiment.fusion("Gemma alone")[0] == ["gemma3"]
    assert [experiment.fusion(name)[1].k_out for name in FUSED] == [32, 64, 64, 32]
    alone, softened = (experiment.blocks(name)[0] for name in (ALONE[experiment.best], SOFTENED))
    assert np.all(entropy(softened) >= entropy(alone) - 1e-6) and entropy(softened).sum() > entropy(alone).sum() + 0.1


def test_tables_are_those_of_the_runs(experiment: Experiment) -> None:
    nats = {method: np.array([experiment.run(method, 0)["nats_W"]]) for method in METHODS}
    report, compared = Report("mixed"), compare(experiment.held_out, nats)
    add_results(report, compared)
    add_forecast(report, experiment, compared)
    total = sum(len(window.text) for window in experiment.held_out)
    of_all = {str(row["method"]).partition(" (")[0]: row for row in report.rows if "all," in str(row["table"])}
    assert set(of_all) == set(METHODS) and set(compared) == {"all", "even", "odd"}
    for method, row in of_all.items():
        assert row["nats_per_byte"] == pytest.approx(nats[method].sum() / total)
        assert row[f"minus {CLM_ONLY}"] == pytest.approx((nats[method] - nats[CLM_ONLY]).sum() / total)
    forecasts = [row for row in report.rows if row["table"] == "forecast"]
    assert len(forecasts) == 3 * len(FUSED)
    figure = forecast_figure(forecasts)
    points = {line.get_gid(): line.get_xydata()[0] for line in figure.axes[0].lines if line.get_gid()}
    assert len(points) == len(forecasts)
    for row in forecasts:
        x, y = points[f"{row['domain']}, {row['method']}"]
        assert (x, y) == (row["rows_minus_best"], row["training_minus_best"])
    odd = [place for place, window in enumerate(experiment.train) if window.domain == "odd"]
    size = sum(len(experiment.train[place].text) for place in odd)
    for row in (row for row in forecasts if row["domain"] == "odd"):
        own = {
            ALONE[name]: sum(-float(common_segments([blocks[place]]).logprobs_SN.sum()) for place in odd) / size
            for name, blocks in experiment.captured.items()
        }
        assert row["best_source"] == min(own, key=own.__getitem__)
        fused = experiment.blocks(str(row["method"]))
        lost = sum(fused[place].nats_per_byte * len(fused[place].text_bytes) for place in odd) / size
        assert row["rows_minus_best"] == pytest.approx(lost - min(own.values()), abs=1e-5)
        assert row["best_mixture_minus_best"] <= 1e-6  # type: ignore[operator]
