"""Recall: a judge trained on two-hop questions beside the baselines, hops and rehearsal, memory and time by length.

The judge learns on sentences of books and pages, and is asked about the news, with other names. Settings are chosen on
questions for validation: of other books and pages, with names that neither training nor test has. The runs are kept in
`$FUSION_HOME/bench`, so that a benchmark which was broken off goes on with them.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from time import process_time

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
from services.recall.judge import Document, Judge, Precision
from services.recall.train import JudgeTrainer, label
from services.recall.training_config import JudgeTrainingConfig
from tests.bench.parts.report import Report, arguments
from tests.bench.recall.documents import ManyNames, Names, make_example, prose
from tests.bench.recall.selection import selection

_BLOCKS = 5
"""Blocks that every way may name."""
_WORDS_PER_TOKEN = 0.68
_MEMORY = MemoryConfig()


@dataclass(frozen=True)
class Round:
    """Steps of training on texts of about so many tokens; the learning rate rises and falls in each round."""

    steps: int
    text_tokens: int
    block_tokens: int
    window_tokens: int
    batch_windows: int


_DENSE, _LONG = Round(450, 350, 24, 192, 8), Round(200, 900, 63, 512, 3)
_ROUNDS = (_DENSE, _LONG)
"""Short blocks in short texts first: more facts and rivals in as many tokens; then texts as they are."""
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
    quick = [Round(2, 350, 24, 192, 2), Round(2, 900, 63, 512, 1)]
    folder = _judge(report, quick if options.quick else _ROUNDS, 2 if options.quick else 48)
    _speed(report)
    judge = Judge.load(folder, precision="auto")
    _blocks(report, judge, {2_000: 3} if options.quick else {2_000: 50, 8_000: 5})
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


def _examples(part: str, seed: int, number: int, tokens: int) -> list[Example]:
    """Return questions about texts of about so many tokens, for `part`: train, validation or test."""
    draw, sentences = random.Random(seed), prose(int(part == "test"))
    cut = len(sentences) * 4 // 5
    if part != "test":
        sentences = sentences[:cut] if part == "train" else sentences[cut:]
    names = ManyNames(draw, sentences) if part == "train" else Names(int(part == "test"))
    return [make_example(draw, names, sentences, round(tokens * _WORDS_PER_TOKEN)) for _ in range(number)]


def _judge(report: Report, rounds: Sequence[Round], num_validated: int) -> str:
    """Return the folder of a judge trained in rounds, each from the judge of the one before; validate it after each."""
    folder = fusion_home() / "bench" / f"recall-{rounds[0].steps}"
    folder.mkdir(parents=True, exist_ok=True)
    encoder = "all-minilm-l6-v2"
    examples = _examples("validation", 2, num_validated, 900)
    for number, each in enumerate(rounds, 1):
        train = folder / f"train-{number}.jsonl"
        lines = [
            example.model_dump_json() for example in _examples("train", 10 + number, 4 * each.steps, each.text_tokens)
        ]
        train.write_text("".join(f"{line}\n" for line in lines))
        config = JudgeTrainingConfig(
            files=(str(train),),
            encoder=encoder,
            num_workers=0,
            steps=each.steps,
            checkpoint_every_steps=20,
            learning_rate=3e-4,
            seed=number,
            batch_windows=each.batch_windows,
            block_tokens=each.block_tokens,
            window_tokens=each.window_tokens,
        )
        job = JudgeJob("bench", folder / f"run-{number}", config)
        run(job)
        rows = read_rows(job.files.metrics)
        encoder = str(job.files.model)
        judge = Judge.load(encoder, precision="auto")
        documents = [judge.read(example.text) for example in examples]
        right = _right(by_memory(judge, _MEMORY), examples, documents)
        report.row(
            table="training",
            round=number,
            steps=len(rows),
            seconds=sum(row["seconds"] for row in rows),
            tokens=sum(row["tokens"] for row in rows),
            first_loss=float(np.mean([row["loss"] for row in rows[:20]])),
            last_loss=float(np.mean([row["loss"] for row in rows[-20:]])),
            validation=float(np.mean(right)),
        )
        for first in range(0, len(rows), 30):
            losses = [row["loss"] for row in rows[first : first + 30]]
            report.row(table="loss", round=number, until_step=first + len(losses), loss=float(np.mean(losses)))
    return encoder


def _speed(report: Report) -> None:
    """Compare a step of training by precision, in seconds of the CPU."""
    rates: dict[str, float] = {}
    precisions: tuple[Precision, ...] = ("float32", "auto")
    for precision in precisions:
        judge = Judge.load("all-minilm-l6-v2", fresh=True, precision=precision)
        labelled = [label(judge, example, 63) for example in _examples("train", 4, 8, 900)]
        config = JudgeTrainingConfig(files=("-",), encoder="-", window_tokens=512, batch_windows=3)
        trainer = JudgeTrainer(judge, labelled, config)
        trainer.step()
        seconds, tokens = process_time(), sum(trainer.step().tokens for _ in range(3))
        rates[precision] = tokens / (process_time() - seconds)
        report.row(table="training speed", precision=precision, tokens_a_cpu_second=rates[precision])
    report.check("training, bfloat16 next to float32", rates["auto"] / rates["float32"], "times", at_least=1.3)


def _blocks(report: Report, judge: Judge, numbers: dict[int, int]) -> None:
    """Compare all ways by the share of questions of which both blocks are found, on texts of other words and names."""
    ways = _WAYS_WITHOUT_JUDGE | {"judge, hops 3,5": by_memory(judge, _MEMORY)}
    shortest = min(numbers)
    only_short: dict[str, Find] = {
        "dense retrieval": dense(Judge.load("all-minilm-l6-v2", fresh=True, precision="auto")),
        "judge, a single step": by_memory(judge, _MEMORY.model_copy(update={"hops": (5,)})),
        "judge without rehearsal": by_memory(judge, _MEMORY.model_copy(update={"rehearsal": False})),
    }
    right: dict[tuple[str, int], list[float]] = {}
    for tokens, number in numbers.items():
        examples = _examples("test", 2, number, tokens)
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


def _lengths(report: Report, folder: str, lengths: Sequence[int]) -> None:
    """Measure one selection by length, each in a process of its own."""
    rates, peaks = [], []
    for tokens in lengths:
        [example] = _examples("test", 3, 1, tokens)
        with ProcessPoolExecutor(1, get_context("spawn")) as process:
            real, cpu, wall, before, peak = process.submit(selection, folder, example.question, example.text).result()
        rates.append(1000 * cpu / real)
        peaks.append(peak)
        report.row(
            table="one selection",
            tokens=real,
            cpu_seconds=cpu,
            seconds=wall,
            mebibytes_before=before,
            peak_mebibytes=peak,
        )
    report.check("peak memory, longest next to shortest", peaks[-1] / peaks[0], "times", at_most=1.1)
    report.check("CPU seconds a token, longest next to shortest", rates[-1] / rates[0], "times", at_most=1.25)


if __name__ == "__main__":
    main()
