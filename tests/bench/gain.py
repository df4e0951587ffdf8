"""Does fusing help? Small targets trained on the same tokens by every method; held-out nats per byte with intervals.

SmolLM2-135M-Instruct and Gemma-3-270M score English news once. A target from scratch with a vocabulary of its own is
then trained with each method on the same windows in the same order, with three seeds (weights and order), by the
product's own trainer. `min_edit` and `transport` are what FuseLLM and PTA-LLM published, with the next-token shift put
right: ten candidates, scaled to sum to one, a token without a partner taught as itself, and of the sources the one with
the lowest loss in the window. `transport` chooses among the target's own candidates; those are of the CLM-only target
with the same seed, since an untrained target has none worth choosing from.

What is scored are documents that neither training nor the choice of settings has seen: settings were chosen on the
validation part. Intervals are 95 % bootstrap intervals over documents and seeds, differences are paired in both.

The second table is one pretrained target, SmolLM2-135M-Instruct with LoRA, taught by Gemma alone or by nobody; its
intervals are over documents only. All that is finished is kept below runs/bench/gain: a run that broke off goes on.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from itertools import product, repeat
from multiprocessing import get_context
from typing import Any

import numpy as np
import torch

from tests.bench.gain_runs import BYTE, CLM_ONLY, FULL, LORA, METHODS, QUICK, Experiment
from tests.bench.report import Report, arguments

BEST = "byte, avg_ce, window"
"""The method whose figures are checked: the product's default, decided on before anything was trained."""
_DRAWS = 4000
_PERCENTILES = (2.5, 97.5)


def differences(
    nats_by_method: dict[str, np.ndarray], document_W: np.ndarray, bytes_W: np.ndarray, *, seed: int = 0
) -> dict[str, np.ndarray]:
    """Nats per byte of every method on the whole text and in every draw: float64 [1 + draws] by method.

    `nats_by_method` is [S, W] each, S seeds and W windows of the documents `document_W`. A draw takes documents and
    seeds with replacement, the same ones for all methods, so that differences between them are paired.
    """
    num_documents = int(document_W.max()) + 1
    num_seeds = next(iter(nats_by_method.values())).shape[0]
    rng = np.random.default_rng(seed)
    documents_RD = rng.multinomial(num_documents, np.full(num_documents, 1 / num_documents), size=_DRAWS)
    seeds_RS = rng.multinomial(num_seeds, np.full(num_seeds, 1 / num_seeds), size=_DRAWS) / num_seeds
    documents_RD = np.concatenate([np.ones((1, num_documents)), documents_RD])
    seeds_RS = np.concatenate([np.full((1, num_seeds), 1 / num_seeds), seeds_RS])
    bytes_R = documents_RD @ np.bincount(document_W, bytes_W, num_documents)
    result = {}
    for method, nats_SW in nats_by_method.items():
        nats_SD = np.stack([np.bincount(document_W, nats_W, num_documents) for nats_W in nats_SW])
        result[method] = ((documents_RD @ nats_SD.T) * seeds_RS).sum(axis=1) / bytes_R
    return result


def interval(values_R: np.ndarray) -> tuple[float, float, float]:
    """(value, low, high) from the value itself and the draws behind it."""
    low, high = np.percentile(values_R[1:], _PERCENTILES)
    return float(values_R[0]), float(low), float(high)


def add_rows(
    report: Report, table: str, results: dict[str, list[dict[str, Any]]], experiment: Experiment, against: Sequence[str]
) -> dict[str, np.ndarray]:
    """Adds a row per method; returns what `differences` does."""
    document_W, bytes_W = experiment.held_out_documents(len(next(iter(results.values()))[0]["nats_W"]))
    drawn = differences(
        {method: np.array([run["nats_W"] for run in runs]) for method, runs in results.items()}, document_W, bytes_W
    )
    for method, runs in results.items():
        cells: dict[str, Any] = {"table": table, "method": method, "lambda": runs[0]["settings"]["config"]["lambda_"]}
        value, low, high = interval(drawn[method])
        cells |= {"nats_per_byte": value, "low": low, "high": high}
        for other in against:
            if other in drawn and other != method:
                value, low, high = interval(drawn[method] - drawn[other])
                cells |= {f"minus {other}": value, f"minus {other}, low": low, f"minus {other}, high": high}
        per_seed = [sum(run["nats_W"]) / bytes_W.sum() for run in runs]
        cells |= {"seeds": " ".join(f"{value:.4f}" for value in per_seed)}
        cells |= {"rows_with_distribution": runs[0]["rows_with_distribution"], "tokens_trained": runs[0]["tokens"]}
        report.row(**cells)
    return drawn


def train_all(quick: bool, tasks: Sequence[tuple[str, int]], workers: int) -> dict[str, list[dict[str, Any]]]:
    """The runs of every method, in the order of the seeds."""
    with ProcessPoolExecutor(workers, get_context("spawn"), _quiet) as pool:
        found = list(pool.map(_train, repeat(quick), *zip(*tasks, strict=True)))
    results: dict[str, list[dict[str, Any]]] = {}
    for (method, _), run in sorted(zip(tasks, found, strict=True), key=lambda item: item[0][1]):
        results.setdefault(method, []).append(run)
    return results


def _quiet() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(1)


def _train(quick: bool, method: str, seed: int) -> dict[str, Any]:
    experiment = _experiment(quick)
    return experiment.lora_run(method) if method in LORA else experiment.run(method, seed)


@cache
def _experiment(quick: bool) -> Experiment:
    return Experiment(QUICK if quick else FULL)


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, default=1, help="runs at a time, a thread each")
    options = parser.parse_args()
    _quiet()
    report = Report("gain")
    experiment = _experiment(options.quick)
    for name, blocks in experiment.captured.items():
        num_bytes = sum(len(block.text_bytes) for block in blocks)
        nats = sum(block.nats_per_byte * len(block.text_bytes) for block in blocks)
        report.row(
            table="sources",
            source=name,
            nats_per_byte_of_train_text=nats / num_bytes,
            windows=len(blocks),
            bytes=num_bytes,
            source_tokens=sum(block.num_tokens for block in blocks),
        )
    methods = [method for method in METHODS if not options.quick or method in {CLM_ONLY, BYTE["gemma3"], BEST}]
    tasks = [(method, seed) for method, seed in product(methods, range(experiment.size.num_seeds))]
    tasks += [(method, 0) for method in LORA] if not options.quick else []
    results = train_all(options.quick, tasks, options.workers)

    targets = {method: runs for method, runs in results.items() if method in METHODS}
    singles = [method for method in BYTE.values() if method in targets]
    best_single = min(singles, key=lambda method: np.sum([run["nats_W"] for run in targets[method]]))
    drawn = add_rows(report, "target from scratch", targets, experiment, (CLM_ONLY, "min_edit", best_single))
    for other in (CLM_ONLY, "min_edit"):
        if other in drawn:
            _, _, high = interval(drawn[BEST] - drawn[other])
            report.check(f"{BEST} minus {other}, upper end of the interval", high, "nats/byte", at_most=0.0)
    value, _, _ = interval(drawn[BEST] - drawn[best_single])
    report.check(f"{BEST} minus best single source ({best_single})", value, "nats/byte", at_most=0.0)
    pretrained = {method: runs for method, runs in results.items() if method in LORA}
    if pretrained:
        pretrained = {"untouched": [experiment.untouched()]} | pretrained
        add_rows(report, "SmolLM2-135M with LoRA", pretrained, experiment, ("untouched", next(iter(LORA))))
    report.finish(options.json)


if __name__ == "__main__":
    main()
