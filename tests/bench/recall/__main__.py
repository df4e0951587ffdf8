"""Recall: a judge trained on two-hop questions beside the baselines, hops and rehearsal, memory and time by length.

The judge learns on sentences of books and pages, and is asked about the news, with other names. Its run is kept in
`$FUSION_HOME/bench`, so that a benchmark which was broken off goes on with it.
"""

from __future__ import annotations

import random
import resource
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from time import perf_counter, process_time

import numpy as np
import torch

from fusion_core.recall.memory import MemoryConfig
from fusion_core.recall.split import split
from services.base.home import fusion_home
from services.jobs.step_log import read_rows
from services.models.fetch import fetch
from services.recall.evaluate import (
    Find,
    at_random,
    both_found,
    by_bm25,
    by_bm25_twice,
    by_memory,
    dense,
    head,
    interval,
    sliding_window,
)
from services.recall.examples import Example, gold_blocks
from services.recall.job import JudgeJob, run
from services.recall.judge import Document, Judge
from services.recall.training_config import JudgeTrainingConfig
from tests.bench.parts.report import Report, arguments
from tests.bench.recall.documents import Names, make_example, prose

_BLOCKS = 5
"""Blocks that every way may name."""
_WORDS_PER_TOKEN = 0.68
_MEMORY = MemoryConfig(window_tokens=256)
"""The judge reads windows as long as those that it learned on: positions behind them were never labelled."""
_WAYS_WITHOUT_JUDGE: dict[str, Find] = {
    "head": head,
    "random": at_random,
    "sliding window": sliding_window,
    "BM25": by_bm25,
    "BM25 twice": by_bm25_twice,
}


def main() -> None:
    options = arguments(__doc__ or "").parse_args()
    report = Report("recall")
    torch.set_num_threads(1)
    _split(report, 1_000 if options.quick else 10_000)
    fetch("all-minilm-l6-v2")
    folder = _judge(report, (2,) if options.quick else (160, 130))
    judge = Judge.load(folder)
    _blocks(report, judge, {2_000: 3} if options.quick else {2_000: 20, 8_000: 3})
    _lengths(report, folder, (2_000, 4_000) if options.quick else (2_000, 8_000, 32_000))
    report.finish(options.json)


def _split(report: Report, number: int) -> None:
    """Split random Unicode texts, and a text of a million characters."""
    draw, lossless = random.Random(0), 0
    for _ in range(number):
        text = "".join(chr(draw.choice((32, 46, 10, draw.randrange(1, 0xD800), draw.randrange(0xE000, 0x110000))))
                       for _ in range(draw.randrange(1, 200)))  # fmt: skip
        ends = sorted(draw.sample(range(1, len(text) + 1), draw.randint(0, len(text))))
        blocks = split(text, ends)
        lossless += "".join(text[block.start : block.end] for block in blocks) == text
    report.check("texts that their blocks make up exactly", lossless / number, "share", at_least=1)
    text = "Some words of a sentence, and others. " * 26_000
    ends = np.flatnonzero(np.frombuffer(text.encode(), np.uint8) == ord(" "))
    started = process_time()
    split(text, ends)
    report.row(table="splitter", texts=number, megabyte_seconds=process_time() - started)


def _examples(half: int, seed: int, number: int, tokens: int) -> list[Example]:
    draw, names, sentences = random.Random(seed), Names(half), prose(half)
    return [make_example(draw, names, sentences, round(tokens * _WORDS_PER_TOKEN)) for _ in range(number)]


def _judge(report: Report, rounds: Sequence[int]) -> str:
    """Return the folder of a judge that was trained on texts of some 900 tokens, in rounds of so many steps.

    The learning rate rises and falls in every round, which starts from the judge of the one before.
    """
    folder = fusion_home() / "bench" / f"recall-{rounds[0]}"
    folder.mkdir(parents=True, exist_ok=True)
    train = folder / "train.jsonl"
    train.write_text("".join(example.model_dump_json() + "\n" for example in _examples(0, 1, 300, 900)))
    encoder = "all-minilm-l6-v2"
    for number, steps in enumerate(rounds):
        config = JudgeTrainingConfig(
            files=(str(train),),
            encoder=encoder,
            num_workers=0,
            steps=steps,
            checkpoint_every_steps=20,
            seed=number,
            batch_windows=6,
            window_tokens=256,
        )
        job = JudgeJob("bench", folder / (f"run-{number}" if number else "run"), config)
        run(job)
        rows = read_rows(job.files.metrics)
        report.row(
            table="training",
            round=number + 1,
            steps=len(rows),
            seconds=sum(row["seconds"] for row in rows),
            tokens=sum(row["tokens"] for row in rows),
            first_loss=float(np.mean([row["loss"] for row in rows[:20]])),
            last_loss=float(np.mean([row["loss"] for row in rows[-20:]])),
        )
        encoder = str(job.files.model)
    return encoder


def _blocks(report: Report, judge: Judge, numbers: dict[int, int]) -> None:
    """Compare all ways by the share of questions of which both blocks are found, on texts of other words and names."""
    ways = _WAYS_WITHOUT_JUDGE | {"judge, hops 3,5": by_memory(judge, _MEMORY)}
    shortest = min(numbers)
    only_short: dict[str, Find] = {
        "dense retrieval": dense(Judge.load("all-minilm-l6-v2", fresh=True)),
        "judge, a single step": by_memory(judge, _MEMORY.model_copy(update={"hops": (5,)})),
        "judge without rehearsal": by_memory(judge, _MEMORY.model_copy(update={"rehearsal": False})),
    }
    right: dict[tuple[str, int], list[float]] = {}
    for tokens, number in numbers.items():
        examples = _examples(1, 2, number, tokens)
        documents = [judge.read(example.text) for example in examples]
        for name, find in (ways | only_short if tokens == shortest else ways).items():
            right[name, tokens] = _right(find, examples, documents)
            share, low, high = interval(right[name, tokens])
            report.row(
                table=f"both blocks among {_BLOCKS}",
                way=name,
                tokens=round(float(np.mean([sum(document.tokens_in_window) for document in documents]))),
                questions=number,
                share=share,
                low=low,
                high=high,
            )
    judged = np.array(right["judge, hops 3,5", shortest])
    report.check("judge, both blocks", judged.mean(), "share", at_least=0.9)
    best = max((*_WAYS_WITHOUT_JUDGE, "dense retrieval"), key=lambda way: float(np.mean(right[way, shortest])))
    for other in (best, "judge, a single step", "judge without rehearsal"):
        _, low, _ = interval((judged - right[other, shortest]).tolist())
        report.check(f"judge above {other}, low end of the interval", low, "share", at_least=0.001)


def _right(find: Find, examples: Sequence[Example], documents: Sequence[Document]) -> list[float]:
    found = [find(example.question, document, _BLOCKS) for example, document in zip(examples, documents, strict=True)]
    gold = [gold_blocks(example, document.spans) for example, document in zip(examples, documents, strict=True)]
    return [float(both_found(wanted, blocks)) for wanted, blocks in zip(gold, found, strict=True)]


def _selection(folder: str, tokens: int) -> tuple[int, float, float, float]:
    """Return tokens of a text, CPU and wall seconds of one selection from it, and the MiB that this process took."""
    torch.set_num_threads(1)
    judge = Judge.load(folder)
    [example] = _examples(1, 3, 1, tokens)
    cpu, wall = process_time(), perf_counter()
    document = judge.read(example.text)
    judge.recall(example.question, document, _MEMORY)
    cpu, wall = process_time() - cpu, perf_counter() - wall
    return sum(document.tokens_in_window), cpu, wall, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _lengths(report: Report, folder: str, lengths: Sequence[int]) -> None:
    """Measure one selection by length, each in a process of its own."""
    rates, peaks = [], []
    for tokens in lengths:
        with ProcessPoolExecutor(1, get_context("spawn")) as process:
            real, cpu, wall, peak = process.submit(_selection, folder, tokens).result()
        rates.append(1000 * cpu / real)
        peaks.append(peak)
        report.row(table="one selection", tokens=real, cpu_seconds=cpu, seconds=wall, peak_mebibytes=peak)
    report.check("peak memory, longest next to shortest", peaks[-1] / peaks[0], "times", at_most=1.1)
    report.check("CPU seconds a token, longest next to shortest", rates[-1] / rates[0], "times", at_most=1.25)


if __name__ == "__main__":
    main()
