"""`fusion export`: the fused windows of a split as a data set that Hugging Face's `datasets` reads."""

from __future__ import annotations

import asyncio
import io
import json
import os
from collections import Counter
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from fusion_core.blocks import Block
from services.base.atomic import write_whole
from services.base.version import git_revision
from services.commands.analysis.scoring import opened_fuser, score_by_all
from services.commands.prepare import corpus_and_target, prepare
from services.corpus.ledger import Corpus, Window
from services.distill.huggingface.distillkit import distillkit_example_of
from services.distill.huggingface.example import example_of, first_token
from services.fusion.fuser import Fuser
from services.recipes.recipe import Recipe, RecipeError
from services.store.capture_plan import Place

_WINDOWS_PER_FILE = 256
_SCHEMA = pa.schema(
    [
        ("input_ids", pa.list_(pa.int32())),
        ("labels", pa.list_(pa.int32())),
        ("topk_ids", pa.list_(pa.list_(pa.int32()))),
        ("topk_logprobs", pa.list_(pa.list_(pa.float32()))),
        ("tail", pa.list_(pa.float32())),
        ("fused", pa.list_(pa.bool_())),
        ("document", pa.string()),
        ("domain", pa.string()),
        ("start_byte", pa.int64()),
        ("weights", pa.list_(pa.struct([("source", pa.string()), ("weight", pa.float32())]))),
    ]
)
_DISTILLKIT_SCHEMA = pa.schema(
    [
        ("input_ids", pa.list_(pa.int32())),
        ("attention_mask", pa.list_(pa.int32())),
        ("labels", pa.list_(pa.int32())),
        ("token_ids", pa.list_(pa.list_(pa.int32()))),
        ("top_values", pa.list_(pa.list_(pa.float32()))),
    ]
)
_COLUMNS = """`input_ids` and `labels` are as transformers has them. Each token whose label is not -100, in order,
has a row in `topk_ids` (-1 where padded), `topk_logprobs` (nats) and `tail` (log of the mass outside the candidates);
rows where `fused` is false must not be learned from. `weights` are the sources' shares in a window."""
_DISTILLKIT_COLUMNS = """The columns are those of DistillKit's offline distillation, `dataset.prepacked: true`: the row
in `token_ids` and `top_values` (nats) at a position predicts the token at the next one, and counts where the position
has a label."""
_CARD = """---
configs:
- config_name: default
  data_files:
  - split: {name}
    path: "{files}-*.parquet"
---
# {corpus}/{split}, fused

{num_windows} windows with the fused next-token distributions of {sources}, in the vocabulary {vocabulary} of the
target's tokenizer. {columns}

Settings of the fusion:

```json
{settings}
```
"""


@dataclass(slots=True)
class Exported:
    """The number of windows that were written, and of those that a source or the target does not take, by its name."""

    windows: int = 0
    left_out: Counter[str] = field(default_factory=Counter)


def export(
    recipe: Recipe,
    folder: Path,
    split: str,
    progress: Callable[[str, int, int], None],
    *,
    distillkit_length: int | None = None,
) -> Exported:
    """Write the fused windows of a split to a folder as Parquet files with a card, in the order of the corpus.

    Windows come from the store where they are there, else from the sources that run. With `distillkit_length` the
    columns are those that DistillKit reads, of so many positions each.

    Raises RecipeError for an unknown split and a folder that is not empty, UnavailableError when a source has neither
    the windows in the store nor an answer.
    """
    if folder.exists() and any(folder.iterdir()):
        raise RecipeError(f"{folder}: is not empty; name a new folder, or one without files")
    prepare(recipe, save=False)
    corpus = corpus_and_target(recipe)
    if split not in corpus.splits:
        raise RecipeError(f"--split {split}: the corpus has {', '.join(corpus.splits)}")
    folder.mkdir(parents=True, exist_ok=True)
    return asyncio.run(_export(recipe, corpus, split, folder, progress, distillkit_length))


async def _export(
    recipe: Recipe,
    corpus: Corpus,
    split: str,
    folder: Path,
    progress: Callable[[str, int, int], None],
    distillkit_length: int | None,
) -> Exported:
    done, name, number = Exported(), split.replace("/", "_").replace("-", "_").replace(".", "_"), 0
    # `datasets` finds what it has read before by the folder's name and this pattern: every export needs another one.
    files = f"{name}-{os.urandom(4).hex()}"
    async with opened_fuser(recipe) as fuser:
        first = first_token(fuser.target)
        async for windows in _fused(fuser, corpus, split, done):
            if windows:
                if distillkit_length is None:
                    rows, schema = [_row(window, block, first) for window, block in windows], _SCHEMA
                else:
                    rows = [_nested(distillkit_example_of(block, first, distillkit_length)) for _, block in windows]
                    schema = _DISTILLKIT_SCHEMA
                await asyncio.to_thread(_write, folder / f"{files}-{number:05}.parquet", rows, schema)
                number += 1
            progress(split, done.windows + sum(done.left_out.values()), corpus.num_windows(split))
        card = _CARD.format(
            name=name,
            files=files,
            corpus=corpus.name,
            split=split,
            num_windows=done.windows,
            sources=", ".join(f"`{source.name}` ({source.model})" for source in recipe.sources),
            columns=_COLUMNS if distillkit_length is None else _DISTILLKIT_COLUMNS,
            vocabulary=f"`{fuser.target.fingerprint}`",
            settings=json.dumps(
                recipe.fusion.model_dump(mode="json") | {"git_revision": git_revision()}, indent=2, ensure_ascii=False
            ),
        )
    write_whole(folder / "README.md", card)
    return done


async def _fused(fuser: Fuser, corpus: Corpus, split: str, done: Exported) -> AsyncIterator[list[tuple[Window, Block]]]:
    """Yield the windows of one file after the other with their blocks, and count them."""
    fingerprint, total = corpus.fingerprint(split), corpus.num_windows(split)
    for start in range(0, total, _WINDOWS_PER_FILE):
        windows = [corpus.window(split, index) for index in range(start, min(start + _WINDOWS_PER_FILE, total))]
        asked = (
            score_by_all(fuser, window.passage, place=Place(fingerprint, window.index), window=window)
            for window in windows
        )
        taken = []
        for window, scored in zip(windows, await asyncio.gather(*asked), strict=True):
            if isinstance(scored[0], str):
                done.left_out[scored[0]] += 1
            else:
                taken.append((window, scored[1].block))
        done.windows += len(taken)
        yield taken


def _row(window: Window, block: Block, first: int) -> dict[str, Any]:
    example = {name: list(column) if column.ndim == 2 else column for name, column in example_of(block, first).items()}
    return example | {
        "document": window.document,
        "domain": window.domain,
        "start_byte": window.start_byte,
        "weights": [{"source": share.name, "weight": share.weight} for share in block.shares if share.present],
    }


def _nested(example: dict[str, Any]) -> dict[str, Any]:
    """Return columns as pyarrow takes them: a matrix as a list of its rows."""
    return {name: list(column) if column.ndim == 2 else column for name, column in example.items()}


def _write(path: Path, rows: list[dict[str, Any]], schema: pa.Schema) -> None:
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), sink, compression="zstd")
    write_whole(path, sink.getvalue())
