"""Does fusing help on mixed text? News, code, arithmetic, five languages and conversations, by domain.

SmolLM2-135M-Instruct and Gemma-3-270M score the text once; a target from scratch is then trained with each method on
the same windows, by the product's own trainer, and scored on documents that nothing has seen. Intervals are those of
`tests.bench.gain`: 95 %, over documents and seeds, differences paired in both. The best source with softened rows is a
control: it is as broad as a mixture, and no second opinion.

The table `forecast` puts beside that what was known before: by domain, how much less than the best source the best
fixed mixture and the fused rows lose on the train windows. Finished runs are kept below runs/bench/mixed, so what broke
off goes on.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fusion_core.fusion.headroom import Segments, best_mixture
from services.corpus.ledger import Window
from services.models.fetch import fetch
from tests.bench.gain import differences, interval
from tests.bench.mixed.experiment import (
    ALONE,
    CLM_ONLY,
    FULL,
    FUSED,
    METHODS,
    QUICK,
    Experiment,
    quickstart_sources,
)
from tests.bench.mixed.picture import draw_forecast
from tests.bench.parts.report import Report, arguments

ALL = "all"

Drawn = dict[str, np.ndarray]
"""By method, nats per byte on the whole text and in every draw."""


def places_by_domain(windows: Sequence[Window]) -> dict[str, np.ndarray]:
    """The places of each domain's windows, and of all."""
    domain_W = np.array([window.domain for window in windows])
    return {ALL: np.arange(len(windows))} | {str(d): np.flatnonzero(domain_W == d) for d in np.unique(domain_W)}


def compare(windows: Sequence[Window], nats: Mapping[str, np.ndarray]) -> dict[str, tuple[Drawn, int]]:
    """By domain what `differences` returns, and the number of documents; `nats` is [S, W] by method."""
    found = {}
    for domain, places in places_by_domain(windows).items():
        names = [windows[place].document for place in places]
        _, document_W = np.unique(names, return_inverse=True)
        bytes_W = np.array([len(windows[place].text) for place in places])
        drawn = differences({method: nats_SW[:, places] for method, nats_SW in nats.items()}, document_W, bytes_W)
        found[domain] = drawn, int(document_W.max()) + 1
    return found


def add_results(report: Report, compared: Mapping[str, tuple[Drawn, int]]) -> None:
    """Add a row for each domain and method, and checks of the fused ones on all domains together."""
    for domain, (drawn, num_documents) in compared.items():
        best = best_single(drawn)
        for method, values_R in sorted(drawn.items(), key=lambda item: float(item[1][0])):
            against: dict[str, float | None] = {}
            for other, title in ((CLM_ONLY, CLM_ONLY), (best, "best single source")):
                value, low, high = interval(values_R - drawn[other], num_documents)
                against |= {f"minus {title}": value, f"{title}, low": low, f"{title}, high": high}
            report.row(
                table=f"trained: {domain}, {num_documents} documents",
                method=method + (" (best single source)" if method == best else ""),
                nats_per_byte=float(values_R[0]),
                **against,
            )
    drawn, num_documents = compared[ALL]
    for method, other in product(FUSED, (CLM_ONLY, *ALONE.values())):
        value, _, high = interval(drawn[method] - drawn[other], num_documents)
        name = f"{method} minus {other}{'' if high is None else ', upper end of the interval'}"
        report.check(name, value if high is None else high, "nats/byte", at_most=0.0)


def best_single(drawn: Drawn) -> str:
    return min(ALONE.values(), key=lambda name: float(drawn[name][0]))


def add_forecast(report: Report, experiment: Experiment, compared: Mapping[str, tuple[Drawn, int]]) -> None:
    """Add by domain and method what the rows promised on the train windows beside what training brought."""
    names = list(experiment.captured)
    bytes_W = np.array([len(window.text) for window in experiment.train])
    fused_MW = {
        method: np.array(
            [-float(block.without_end().gold_T.sum(dtype=np.float64)) for block in experiment.blocks(method)]
        )
        for method in FUSED
    }
    same_sign, number = 0, 0
    for domain, places in places_by_domain(experiment.train).items():
        segments = Segments.joined([experiment.segments[place] for place in places])
        num_bytes = bytes_W[places].sum()
        of_source = dict(zip(names, -segments.logprobs_SN.sum(axis=1) / num_bytes, strict=True))
        best = min(names, key=lambda name: float(of_source[name]))
        mixture = best_mixture(segments)
        drawn, num_documents = compared[domain]
        for method, nats_W in fused_MW.items():
            rows = nats_W[places].sum() / num_bytes - of_source[best]
            brought, low, high = interval(drawn[method] - drawn[ALONE[best]], num_documents)
            same_sign, number = same_sign + ((rows < 0) == (brought < 0)), number + 1
            report.row(
                table="forecast",
                domain=domain,
                method=method,
                best_source=ALONE[best],
                best_mixture_minus_best=mixture.nats_per_byte - of_source[best],
                rows_minus_best=rows,
                training_minus_best=brought,
                low=low,
                high=high,
            )
    report.check("forecasts with the right sign", same_sign / number, "", at_least=1.0)


def main() -> None:
    parser = arguments((__doc__ or "").splitlines()[0])
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, a thread each")
    parser.add_argument(
        "--picture", type=Path, metavar="FILE", help="also draw forecast against outcome, as PNG or SVG"
    )
    options = parser.parse_args()
    _quiet()
    for model in ("smollm2-135m-instruct", "gemma-3-270m"):
        fetch(model)
    experiment = _experiment(options.quick)
    assert experiment.captured  # before the workers start
    seeds = range(experiment.size.num_seeds)
    tasks = [(options.quick, method, seed) for seed in seeds for method in METHODS]
    if options.workers == 1:
        trained = list(map(_train, tasks))
    else:
        with ProcessPoolExecutor(options.workers, get_context("spawn"), _quiet) as pool:
            trained = list(pool.map(_train, tasks))
    nats = {
        method: np.array([nats_W for task, nats_W in zip(tasks, trained, strict=True) if task[1] == method])
        for method in METHODS
    }
    report = Report("mixed")
    compared = compare(experiment.held_out, nats)
    add_results(report, compared)
    add_forecast(report, experiment, compared)
    report.finish(options.json)
    if options.picture is not None:
        draw_forecast([row for row in report.rows if row["table"] == "forecast"], options.picture)


def _quiet() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(1)


def _train(task: tuple[bool, str, int]) -> Any:
    quick, method, seed = task
    nats_W = _experiment(quick).run(method, seed)["nats_W"]
    logging.info("%s, seed %d", method, seed)
    return nats_W


@cache
def _experiment(quick: bool) -> Experiment:
    return Experiment(QUICK if quick else FULL, Path("runs/bench"), quickstart_sources())


if __name__ == "__main__":
    main()
