"""A run on a mixed corpus: every window is learned from the sources of its domain, and metrics and report show it."""

from __future__ import annotations

from collections import Counter, defaultdict
from pathlib import Path

import pytest

from services.commands.distill_job import job_from_recipe
from services.corpus.ledger import Corpus
from services.distill.config import DistillConfig
from services.distill.plan import make_plan
from services.distill.workers.worker import DistillWorker
from services.distill.workers.world import World
from services.evaluation.report.report import write_report
from services.fusion.client import FusedWindow, StreamRequest
from services.jobs.step_log import read_rows
from tests.fakes.services.plain_fusion import plain_fusion
from tests.fusion.sources.test_sources_by import RULE, SCORED_BY, mixed


def test_a_run_learns_each_document_from_the_sources_of_its_domain(tmp_path: Path) -> None:
    with plain_fusion(tmp_path, windows=mixed(tmp_path), sources_by=RULE, min_sources=2, native=True) as fusion:
        settings = {"batch_windows": 5, "epochs": 1, "lambda": 0.5, "device": "cpu", "torch_threads": 1}
        distill = DistillConfig.model_validate(settings)
        address = fusion.recipe.service.model_copy(update={"address": fusion.address})
        recipe = fusion.recipe.model_copy(update={"distill": distill, "service": address})
        job, before = job_from_recipe(recipe, "fused"), [source.scored for source in fusion.sources]
        DistillWorker(job, make_plan(job, fusion.client()), fusion.client(), World()).run()
        asked = [source.scored - n for source, n in zip(fusion.sources, before, strict=True)]
        request = StreamRequest("words", "train", seed=7)
        windows = {w.index: w for w in fusion.client().stream(request) if isinstance(w, FusedWindow)}

    corpus, ledger = Corpus.open(recipe.corpus_folder), read_rows(job.files.ledger)
    assert sorted(n for row in ledger for n in row["windows"]) == list(range(corpus.num_windows("train")))
    domains = {n: corpus.window("train", n).domain for n in windows}
    assert asked == [sum(name in SCORED_BY[d] for d in domains.values()) for name in ("source-0", "source-1")]

    for step, metrics in zip(ledger, read_rows(job.files.metrics), strict=True):
        scored_by = {tuple(sorted(group["sources"])): group for group in metrics["scored_by"]}
        of_rule = Counter(tuple(sorted(SCORED_BY[domains[n]])) for n in step["windows"])
        assert {names: group["windows"] for names, group in scored_by.items()} == of_rule
        tokens: Counter[tuple[str, ...]] = Counter()
        sums: dict[tuple[tuple[str, ...], str], float] = defaultdict(float)
        for n in step["windows"]:
            names, block = tuple(sorted(SCORED_BY[domains[n]])), windows[n].block
            tokens[names] += block.num_tokens
            for share in block.shares:
                sums[names, share.name] += share.weight * block.num_tokens
        for names, group in scored_by.items():
            assert group["tokens"] == tokens[names]
            wanted = {name: sums[names, name] / tokens[names] for name in names}
            assert group["sources"] == pytest.approx(wanted, abs=1e-5)
            assert sum(group["sources"].values()) == pytest.approx(1, abs=1e-5)
        of_all = {name: sum(v for (_, n), v in sums.items() if n == name) / tokens.total() for _, name in sums}
        assert metrics["source_weights"] == pytest.approx(of_all, abs=1e-5)

    report = write_report(recipe.run_folder).read_text()
    for names in {tuple(sorted(chosen)) for chosen in SCORED_BY.values()}:
        count = sum(tuple(sorted(SCORED_BY[d])) == names for d in domains.values())
        assert f"| fused | {', '.join(names)} | {count} | " in report
