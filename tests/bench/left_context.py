"""Left context: what it brings a teacher and a student, and what it costs, at several lengths of it.

Text, windows and teachers are the quickstart's. Of a document longer than a window only the windows behind the first
one have a context, and no more than stands before them; first windows are the same at every length. A student is a
small target from scratch, trained with CLM only: at every length on the same windows in the same order from the same
weights, with the context in its input, and scored with as much of it. Teachers score every window with as much context
as the student reads. Intervals are 95 % bootstrap intervals over documents, differences are paired.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from fusion_core.blocks import Block
from fusion_core.vocabulary import Vocabulary
from services.commands.prepare import corpus_and_target
from services.corpus.ledger import HELD_OUT, TRAIN, Corpus, Window
from services.distill.config import DistillConfig
from services.distill.job import DistillJob
from services.distill.plan import make_plan
from services.distill.workers.worker import DistillWorker
from services.distill.workers.world import World
from services.evaluation.intervals import ALL, compare
from services.evaluation.nats_per_byte import Scores, nats_per_byte
from services.jobs.step_log import read_rows
from services.models.catalogue import resolve_model
from services.models.prompt import encode_passages
from services.recipes.load import load_recipe
from services.recipes.recipe import Recipe
from services.source.config import SourceConfig
from services.wire.passage import Passage
from tests.bench.parts.gain_blocks import BlocksInMemory
from tests.bench.parts.report import Report, arguments


@dataclass(frozen=True)
class Size:
    """Sizes of the benchmark: lengths of the context, text, and the student's shape and training."""

    lengths: tuple[int, ...]
    train_bytes: int
    held_out_bytes: int
    num_teachers: int
    shape: Mapping[str, int]
    vocabulary_size: int
    epochs: int


_SHAPE = {"hidden_size": 160, "num_layers": 4, "num_heads": 4, "intermediate_size": 432}
_TINY = {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "intermediate_size": 64}
FULL = Size((0, 512, 1024, 2048), 100_000, 32_000, 2, _SHAPE, 2048, epochs=4)
QUICK = Size((0, 1024), 8_000, 4_000, 1, _TINY, 400, epochs=1)


@dataclass(frozen=True)
class Text:
    """Windows with context of one length, and the target before training."""

    train: list[Window]
    held_out: list[Window]
    target: Path


def text_of(size: Size, context_bytes: int, folder: Path) -> Text:
    """The quickstart's text in windows, below `folder`."""
    quickstart = load_recipe("quickstart")
    recipe = Recipe.model_validate(
        {
            "name": f"context-{context_bytes}",
            "output_dir": str(folder),
            "corpus": quickstart.corpus.model_dump()
            | {
                "context_bytes": context_bytes,
                "train_bytes": size.train_bytes,
                "held_out_bytes": size.held_out_bytes,
                "held_out_share": 0.25,
            },
            "sources": [source.model_dump() for source in quickstart.sources],
            "target": {
                "config": {**size.shape, "max_positions": 2048},
                "tokenizer": {"train": {"vocabulary_size": size.vocabulary_size}},
            },
        }
    )
    corpus = corpus_and_target(recipe)
    return Text(_windows(corpus, TRAIN), _windows(corpus, HELD_OUT), recipe.target_folder)


def _windows(corpus: Corpus, split: str) -> list[Window]:
    return [corpus.window(split, index) for index in range(corpus.num_windows(split))]


def teacher_scores(source: SourceConfig, texts: Mapping[int, Text]) -> dict[int, Scores]:
    """The source's scores of the held-out windows at every length; a window that is the same at two is scored once."""
    folder = resolve_model(source.model)
    bos = Vocabulary.from_pretrained(folder).special_tokens[source.bos_token] if source.bos_token else None
    passages = [passage for text in texts.values() for passage in _passages(text.held_out)]
    different = {passage.identity: passage for passage in passages}
    scores = nats_per_byte(folder, list(different.values()), bos=bos, device="cpu")
    place = {identity: number for number, identity in enumerate(different)}
    return {
        length: _chosen(scores, [place[passage.identity] for passage in _passages(text.held_out)])
        for length, text in texts.items()
    }


def _passages(windows: Sequence[Window]) -> list[Passage]:
    return [replace(window.passage, ends_document=False) for window in windows]


def _chosen(scores: Scores, indices: Sequence[int]) -> Scores:
    return Scores(
        nats_W=scores.nats_W[indices],
        bytes_W=scores.bytes_W[indices],
        tokens_W=scores.tokens_W[indices],
        token_starts_W=tuple(scores.token_starts_W[index] for index in indices),
        hits_W=tuple(scores.hits_W[index] for index in indices),
        lossless_W=scores.lossless_W[indices],
    )


@dataclass(frozen=True)
class Student:
    """A trained target: its scores, and what its training took."""

    scores: Scores
    inputs_per_token: float
    seconds: float


def student(size: Size, text: Text, folder: Path) -> Student:
    """A target trained on the windows of `text`; CPU seconds are those of training."""
    vocabulary = Vocabulary.from_pretrained(text.target)
    config = DistillConfig.model_validate(
        {
            "lambda": 1.0, "epochs": size.epochs, "batch_windows": 4, "learning_rate": 2e-3, "warmup_share": 0.05,
            "seed": 0, "checkpoint_every_steps": 10**6, "device": "cpu", "torch_threads": 1,
        }
    )  # fmt: skip
    job = DistillJob("student", folder, text.target, "gain", TRAIN, "", config)
    blocks = [token_block(vocabulary, window.passage) for window in text.train]
    fusion = BlocksInMemory(vocabulary, {TRAIN: blocks})
    start = time.process_time()
    DistillWorker(job, make_plan(job, fusion), fusion, World()).run()
    seconds = time.process_time() - start
    rows = read_rows(job.files.metrics)
    inputs, tokens = (sum(row[key] for row in rows) for key in ("input_tokens", "tokens"))
    return Student(nats_per_byte(job.files.model, _passages(text.held_out), device="cpu"), inputs / tokens, seconds)


def token_block(vocabulary: Vocabulary, passage: Passage) -> Block:
    """The passage without any distribution, for CLM only."""
    [prompt] = encode_passages(vocabulary, [passage])
    num_tokens = prompt.encoding.num_tokens
    return Block(
        text_bytes=prompt.text,
        token_ids_T=prompt.encoding.token_ids_T,
        byte_ends_T=prompt.encoding.byte_ends_T,
        topk_ids_TK=np.empty((num_tokens, 0), dtype=np.int32),
        topk_logprobs_TK=np.empty((num_tokens, 0), dtype=np.float32),
        tail_T=np.zeros(num_tokens, dtype=np.float32),
        gold_T=np.zeros(num_tokens, dtype=np.float32),
        vocabulary=vocabulary.fingerprint,
        mask_T=prompt.encoding.lossless_T,
        ends_document=prompt.encoding.ends_document,
        context_ids_C=prompt.context_ids,
    )


def add_rows(
    report: Report, role: str, model: str, scores: Mapping[int, Scores], texts: Mapping[int, Text], **cells: Any
) -> None:
    """Add a row per length; `cells` hold further columns, a value per length each."""
    windows = next(iter(texts.values())).held_out
    behind = [number for number, window in enumerate(windows) if window.start_byte]
    names = {length: str(length) for length in scores}
    compared = compare({names[n]: each for n, each in scores.items()}, [window.document for window in windows])[ALL]
    inside = compare(
        {names[n]: _chosen(each, behind) for n, each in scores.items()}, [windows[number].document for number in behind]
    )[ALL]
    shortest = names[min(scores)]
    for length, name in names.items():
        difference = inside["models"][name]["difference_from"].get(shortest, {"value": None, "low": None, "high": None})
        contexts = [len(texts[length].held_out[number].context) for number in behind]
        report.row(
            table="nats per byte",
            role=role,
            model=model,
            context_bytes=length,
            all_windows=compared["models"][name]["nats_per_byte"]["value"],
            behind_the_first=inside["models"][name]["nats_per_byte"]["value"],
            minus_none=difference["value"],
            low=difference["low"],
            high=difference["high"],
            mean_context=float(np.mean(contexts)),
            **{column: values[length] for column, values in cells.items()},
        )


def inputs_per_token(folder: Path, windows: Sequence[Window]) -> float:
    """Tokens that a model reads for one that has a row."""
    prompts = encode_passages(Vocabulary.from_pretrained(folder), _passages(windows))
    return sum(prompt.num_tokens for prompt in prompts) / sum(prompt.encoding.num_tokens for prompt in prompts)


def main() -> None:
    options = arguments(__doc__ or "").parse_args()
    size, report = QUICK if options.quick else FULL, Report("left_context")
    with tempfile.TemporaryDirectory() as folder:
        texts = {length: text_of(size, length, Path(folder)) for length in size.lengths}
        first = texts[size.lengths[0]]
        for text in texts.values():
            assert [w.text for w in text.train + text.held_out] == [w.text for w in first.train + first.held_out]
        report.row(
            table="text",
            train_windows=len(first.train),
            held_out_windows=len(first.held_out),
            behind_the_first=sum(window.start_byte > 0 for window in first.held_out),
            held_out_documents=len({window.document for window in first.held_out}),
        )
        students = {length: student(size, text, Path(folder) / f"student-{length}") for length, text in texts.items()}
        add_rows(
            report,
            "student",
            "CLM only, from scratch",
            {length: trained.scores for length, trained in students.items()},
            texts,
            inputs_per_token={length: trained.inputs_per_token for length, trained in students.items()},
            seconds={length: trained.seconds for length, trained in students.items()},
        )
        for source in load_recipe("quickstart").deployed[: size.num_teachers]:
            read = {n: inputs_per_token(resolve_model(source.model), text.held_out) for n, text in texts.items()}
            add_rows(report, "teacher", source.name, teacher_scores(source, texts), texts, inputs_per_token=read)
    for row in report.rows:
        if row.get("minus_none") is not None and row["context_bytes"]:
            name = f"{row['model']}, {row['context_bytes']} bytes: windows behind the first, against none"
            report.check(name, float(row["minus_none"] or 0.0), "nats/byte", at_most=0.0)
    report.finish(options.json)


if __name__ == "__main__":
    main()
