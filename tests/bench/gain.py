"""Does fusing help? Small targets trained on the same tokens by every method; held-out nats per byte with intervals.

SmolLM2-135M-Instruct and Gemma-3-270M score English news once. A target from scratch with a vocabulary of its own is
then trained with each method on the same windows in the same order, with three seeds (weights and order), by the
product's own trainer. `min_edit` and `transport` are what FuseLLM and PTA-LLM published, with the next-token shift put
right: ten candidates, scaled to sum to one, a token without a partner taught as itself, and of the sources the one with
the lowest loss in the window. `transport` chooses among the target's own candidates; those are of the CLM-only target
with the same seed, since an untrained target has none worth choosing from. These two have their own, better lambda.

What is scored are documents that neither training nor the choice of settings has seen: settings were chosen on the
validation part. Intervals are 95 % bootstrap intervals over documents and seeds, differences are paired in both.

Then CLM only with half as many epochs more (two of the seeds), and one pretrained target: SmolLM2-135M-Instruct with
LoRA, taught by Gemma or by nobody, with intervals over documents only. Finished runs are kept below runs/bench/gain, so
what broke off goes on.
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

from services.evaluation.intervals import MIN_DOCUMENTS
from tests.bench.parts.gain_runs import BYTE, CLM_ONLY, FULL, LORA, METHODS, MIN_EDIT, QUICK, TRIED, Experiment
from tests.bench.parts.report import Report, arguments

BEST = "byte, avg_ce, window"
"""The method whose figures are checked: the product's default, decided on before anything was trained."""
LONGER = 6
"""Epochs that CLM only is given to catch up."""
_DRAWS = 4000
_PERCENTILES = (2.5, 97.5)

Run = dict[str, Any]
"""The part of a run that `gain_runs` keeps."""
Task = tuple[str, int, tuple[tuple[str, Any], ...]]
"""Method, seed and changes to the settings."""


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


def interval(values_R: np.ndarray, num_documents: int) -> tuple[float, float | None, float | None]:
    """Return (value, low, high) from the value itself and the draws behind it; no ends from too few documents."""
    if num_documents < MIN_DOCUMENTS:
        return float(values_R[0]), None, None
    low, high = np.percentile(values_R[1:], _PERCENTILES)
    return float(values_R[0]), float(low), float(high)


def add_rows(
    report: Report, table: str, results: dict[str, list[Run]], experiment: Experiment, against: Sequence[str]
) -> dict[str, np.ndarray]:
    """Adds a row per method and one per difference from those in `against`; returns what `differences` does."""
    document_W, bytes_W = experiment.held_out_documents(len(next(iter(results.values()))[0]["nats_W"]))
    num_documents = int(document_W.max()) + 1
    drawn = differences(
        {method: np.array([run["nats_W"] for run in runs]) for method, runs in results.items()}, document_W, bytes_W
    )
    for method, runs in results.items():
        value, low, high = interval(drawn[method], num_documents)
        per_seed = [sum(run["nats_W"]) / bytes_W.sum() for run in runs]
        report.row(
            table=table,
            method=method,
            **{"lambda": runs[0]["settings"]["config"]["lambda_"]},
            nats_per_byte=value,
            low=low,
            high=high,
            by_seed=" ".join(f"{value:.4f}" for value in per_seed),
            rows_with_distribution=runs[0]["rows_with_distribution"],
            tokens_trained=runs[0]["tokens"],
        )
    for method, other in product(results, against):
        if other in drawn and other != method:
            value, low, high = interval(drawn[method] - drawn[other], num_documents)
            cells = {"method": method, "minus": other, "nats_per_byte": value, "low": low, "high": high}
            report.row(table=f"{table}: differences", **cells)
    return drawn


def train_all(quick: bool, tasks: Sequence[Task], workers: int) -> dict[Task, Run]:
    """All runs, in this order as workers become free."""
    with ProcessPoolExecutor(workers, get_context("spawn"), _quiet) as pool:
        return dict(zip(tasks, pool.map(_train, repeat(quick), tasks), strict=True))


def _quiet() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(1)


def _train(quick: bool, task: Task) -> Run:
    method, seed, changes = task
    experiment = _experiment(quick)
    return experiment.lora_run(method) if method in LORA else experiment.run(method, seed, **dict(changes))


@cache
def _experiment(quick: bool) -> Experiment:
    return Experiment(QUICK if quick else FULL)


def add_sources(report: Report, experiment: Experiment) -> None:
    """Add the sources' own losses on the text that the targets are trained on."""
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


def add_checks(report: Report, drawn: dict[str, np.ndarray], best_single: str, num_documents: int) -> None:
    """Add the figures that are claimed; an upper end only where there are documents enough for one."""
    for other in (CLM_ONLY, MIN_EDIT):
        if other in drawn and (high := interval(drawn[BEST] - drawn[other], num_documents)[2]) is not None:
            report.check(f"{BEST} minus {other}, upper end of the interval", high, "nats/byte", at_most=0.0)
    value, _, _ = interval(drawn[BEST] - drawn[best_single], num_documents)
    report.check(f"{BEST} minus best single source ({best_single})", value, "nats/byte", at_most=0.0)


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, default=1, help="runs at a time, a thread each")
    options = parser.parse_args()
    _quiet()
    report = Report("gain")
    experiment = _experiment(options.quick)
    add_sources(report, experiment)
    seeds = range(experiment.size.num_seeds)
    methods = [method for method in METHODS if not options.quick or method in {CLM_ONLY, BYTE["gemma3"], BEST}]
    targets: dict[str, list[Task]] = {method: [(method, seed, ()) for seed in seeds] for method in methods}
    tried: list[Task] = []
    longer: dict[str, list[Task]] = {}
    alone: dict[str, list[Task]] = {}
    pretrained: dict[str, list[Task]] = {}
    if not options.quick:
        tried = [(method, 0, tuple(changes.items())) for method, changes in TRIED]
        pretrained = {name: [(name, 0, ())] for name in LORA}
        alone = {name: [(name, seed, ()) for seed in seeds[:2]] for name in BYTE.values()}
        longer = {
            f"{CLM_ONLY}, {LONGER} epochs": [(CLM_ONLY, seed, (("epochs", LONGER),)) for seed in seeds[:2]],
            BEST: targets[BEST][:2],
        }
    groups = (*targets.values(), tried, *alone.values(), *pretrained.values(), *longer.values())
    runs = train_all(options.quick, [task for group in groups for task in group], options.workers)

    def of(tasks: dict[str, list[Task]]) -> dict[str, list[Run]]:
        return {method: [runs[task] for task in group] for method, group in tasks.items()}

    for task in tried:
        config = runs[task]["settings"]["config"]
        report.row(
            table="settings tried, seed 0, validation part",
            method=task[0],
            learning_rate=config["learning_rate"],
            **{"lambda": config["lambda_"]},
            nats_per_byte=runs[task]["validation"][-1],
        )
    best_single = BYTE["gemma3"]
    if alone:
        best_single = min(alone, key=lambda name: np.sum([run["nats_W"] for run in of(alone)[name]]))
        add_rows(report, "single sources, two seeds", of(alone), experiment, (best_single,))
    drawn = add_rows(report, "target from scratch", of(targets), experiment, (CLM_ONLY, MIN_EDIT, best_single))
    document_W, _ = experiment.held_out_documents(len(experiment.held_out))
    add_checks(report, drawn, best_single, int(document_W.max()) + 1)
    if longer:
        add_rows(report, "more training without sources", of(longer), experiment, list(longer)[:1])
    if pretrained:
        runs_with_lora = {"untouched": [experiment.untouched()]} | of(pretrained)
        add_rows(report, "SmolLM2-135M with LoRA", runs_with_lora, experiment, ("untouched", next(iter(LORA))))
    report.finish(options.json)


if __name__ == "__main__":
    main()
