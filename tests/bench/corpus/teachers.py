"""Seconds that real sources spend on the mixed heap of `tests.bench.corpus`, with and without `curate`.

The whole heap is cleaned with the default settings. A random sample of its documents is scored by the sources of the
quickstart: those that stay, as the cleaning leaves them, and those that go, in turns. Without `curate` they read both.

`teacher_seconds.py` is its door.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from services.models.catalogue import resolve_model
from services.recipes.load import load_recipe
from services.source.config import SourceConfig
from services.source.scorer import Scorer
from services.wire.passage import Passage
from tests.bench.corpus.__main__ import rows, settings, write
from tests.bench.parts.report import Report, arguments

_WINDOW_BYTES = 1024
_TURNS = 4
"""Alternations between what stays and what goes, so that a slow minute of the machine falls on both."""


def passages(texts: Sequence[str]) -> list[Passage]:
    """Return the texts in windows, cut between characters."""
    cut = []
    for text in texts:
        data = text.encode()
        while data:
            window = data[:_WINDOW_BYTES].decode(errors="ignore").encode()
            cut.append(Passage(window))
            data = data[len(window) :]
    return cut


async def measure(report: Report, source: SourceConfig, groups: dict[str, list[str]]) -> dict[str, float]:
    """Return the seconds that a source needs for each group."""
    scorer = await Scorer.load(source, resolve_model(source.model))
    seconds, tokens = dict.fromkeys(groups, 0.0), dict.fromkeys(groups, 0)

    async def score(texts: Sequence[str]) -> int:
        prompts = scorer.encode(passages(texts))
        blocks = await asyncio.gather(*(scorer.score(prompt, source.top_k) for prompt in prompts))
        return sum(block.num_tokens for block in blocks)

    try:
        await score(groups["stays"][:4])
        for turn in range(_TURNS):
            for name, texts in groups.items():
                started = time.perf_counter()
                tokens[name] += await score(texts[turn::_TURNS])
                seconds[name] += time.perf_counter() - started
    finally:
        scorer.close()
    for name, texts in groups.items():
        megabytes = sum(len(text.encode()) for text in texts) / 1e6
        report.row(
            source=source.name,
            documents=name,
            number=len(texts),
            megabytes=megabytes,
            tokens=tokens[name],
            seconds=seconds[name],
            seconds_per_megabyte=seconds[name] / megabytes,
        )
    return seconds


def cleaned(folder: Path) -> dict[str, Any]:
    """Clean the heap in a process of its own, since vLLM's workers inherit what is imported here; return the ledger."""
    (folder / "config.json").write_text(settings(folder).model_dump_json())
    command = [sys.executable, "-m", "tests.bench.corpus", "--config", str(folder / "config.json")]
    subprocess.run([*command, "--out", str(folder / "out")], check=True, stdout=subprocess.DEVNULL)
    ledger: dict[str, Any] = json.loads((folder / "out" / "ledger.json").read_text())
    return ledger


def main() -> None:
    options = arguments(__doc__ or "").parse_args()
    report = Report("corpus_teacher_seconds")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        heap = write(folder, options.quick)
        ledger = cleaned(folder)
        kept = rows(folder / "out", "documents/*.parquet")
        drawn = random.Random(14).sample(sorted(heap.texts), 40 if options.quick else 160)
        groups = {
            "stays": [kept[name]["text"] for name in drawn if name in kept],
            "goes": [heap.texts[name] for name in drawn if name not in kept],
        }
        for source in load_recipe("quickstart").deployed:
            os.environ.update(source.env)
            seconds = asyncio.run(measure(report, source, groups))
            spared = seconds["goes"] / sum(seconds.values())
            report.check(f"{source.name}: share of the seconds spared", spared, "", at_least=0.05)
        spared = 1 - ledger["bytes_kept"] / ledger["bytes_in"]
        report.row(
            documents="whole heap", number=len(heap.texts), megabytes=ledger["bytes_in"] / 1e6, bytes_spared=spared
        )
    report.finish(options.json)
