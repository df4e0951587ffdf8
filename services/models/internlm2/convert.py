"""Convert an InternLM2 checkpoint to a Llama folder that every engine loads, and back."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from services.base.atomic import sweep_partial, whole_folder
from services.models.internlm2 import verify
from services.models.internlm2.config import CONFIG, llama_config, published_config, read_config
from services.models.internlm2.layout import Part, join_wqkv, parts, split_wqkv
from services.models.internlm2.shards import WeightFiles, check_tensors, write_shards
from services.models.internlm2.tokenizer import TEMPLATE, build_tokenizer

ORIGINALS = "internlm2"
"""Folder with the original files beside the weights, in a converted folder; the way back needs them."""
_ORIGINAL_FILES = (
    CONFIG, "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", TEMPLATE,
    "generation_config.json",
)  # fmt: skip
_KEPT_FILES = ("generation_config.json", "LICENSE*", "README.md")
Report = Callable[[str, float], None]


@dataclass(frozen=True, slots=True)
class Converted:
    """The result of a conversion.

    Attributes:
        num_values: weights in all tensors.
        has_template: whether the model has a chat template.
        verified: differences that were measured, None where nobody asked for them.
    """

    num_values: int
    has_template: bool
    verified: verify.Verified | None = None


def to_llama(folder: Path, out: Path, *, check: bool = False, report: Report = lambda what, share: None) -> Converted:
    """Write the Llama folder of an InternLM2 checkpoint; `check` compares it with the reference before it appears.

    Weights keep their type, and every file of weights becomes one. Raises ValueError naming the key or tensor for a
    folder that is no InternLM2 checkpoint.
    """
    values, config = read_config(folder)
    tokenizer = build_tokenizer(folder)
    if tokenizer.size > config.vocab_size:
        raise ValueError(f"{folder / CONFIG}: vocab_size {config.vocab_size}, the tokenizer has {tokenizer.size} ids")
    files, layout = WeightFiles(folder), list(parts(config))
    shapes = dict(files.shapes)
    if config.tie_word_embeddings and "output.weight" in shapes:
        _check_tied(folder, files, "model.tok_embeddings.weight", "output.weight")
        del shapes["output.weight"]
    check_tensors(folder, shapes, {part.published: part.published_shape for part in layout})

    def make(part: Part) -> dict[str, Tensor]:
        tensor = files.tensor(part.published)
        made = split_wqkv(tensor, config) if len(part.llama) == 3 else (tensor,)
        return dict(zip(part.llama, (each.contiguous() for each in made), strict=True))

    with _made(out) as partial:
        num_values = write_shards(partial, _by_file(layout, lambda part: files.file_of[part.published]), make, report)
        _write_json(partial / CONFIG, llama_config(values, config))
        tokenizer.save(partial)
        _copy(folder, partial, _KEPT_FILES)
        (partial / ORIGINALS).mkdir()
        _copy(folder, partial / ORIGINALS, _ORIGINAL_FILES)
        verified = verify.check(folder, partial, report) if check else None
    return Converted(num_values, "default" in tokenizer.templates, verified)


def to_internlm2(
    folder: Path,
    out: Path,
    original: Path | None = None,
    *,
    check: bool = False,
    report: Report = lambda what, share: None,
) -> Converted:
    """Write the InternLM2 checkpoint of a Llama folder that was converted, or of a model trained from one.

    `original` has the files that a Llama folder has no place for, the tokenizer among them: an InternLM2 folder, by
    default those that the conversion kept. Keys of its config.json that have another value now are changed. Raises
    ValueError naming the key or tensor for a model that is none of InternLM2's.
    """
    kept = original or folder / ORIGINALS
    if not (kept / CONFIG).is_file():
        raise ValueError(f"{kept}: no {CONFIG} of an InternLM2 model; name a folder that has one with --original")
    before, _ = read_config(kept)
    values = published_config(folder, before)
    tokenizer = build_tokenizer(kept)
    _check_tokenizer(folder, kept, tokenizer.backend)
    files = WeightFiles(folder)

    with _made(out) as partial:
        _write_json(partial / CONFIG, values)
        _, config = read_config(partial)
        layout, shapes = list(parts(config)), dict(files.shapes)
        if config.tie_word_embeddings and "lm_head.weight" in shapes:
            _check_tied(folder, files, "model.embed_tokens.weight", "lm_head.weight")
            del shapes["lm_head.weight"]
        llama = (pair for part in layout for pair in zip(part.llama, part.llama_shapes, strict=True))
        check_tensors(folder, shapes, dict(llama))

        def make(part: Part) -> dict[str, Tensor]:
            tensors = [files.tensor(name) for name in part.llama]
            return {part.published: join_wqkv(tensors, config) if len(tensors) == 3 else tensors[0]}

        num_values = write_shards(partial, _by_file(layout, lambda part: files.file_of[part.llama[0]]), make, report)
        _copy(kept, partial, [name for name in _ORIGINAL_FILES if name != CONFIG])
        _copy(folder, partial, ("LICENSE*", "README.md"))
        verified = verify.check(partial, folder, report) if check else None
    return Converted(num_values, "default" in tokenizer.templates, verified)


@contextmanager
def _made(out: Path) -> Iterator[Path]:
    """Yield a folder that becomes `out` when all is written; one that is there and not empty is never touched."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} is there already; name a folder that is not")
    out.parent.mkdir(parents=True, exist_ok=True)
    sweep_partial(out.parent)
    with whole_folder(out) as partial:
        yield partial


def _by_file(layout: list[Part], file_of: Callable[[Part], Path]) -> list[list[Part]]:
    """Return the parts by the file that they are in, so that every file of weights becomes one."""
    shards: dict[Path, list[Part]] = {}
    for part in layout:
        shards.setdefault(file_of(part), []).append(part)
    return [shards[path] for path in sorted(shards)]


def _check_tied(folder: Path, files: WeightFiles, embedding: str, output: str) -> None:
    if not torch.equal(files.tensor(embedding), files.tensor(output)):
        raise ValueError(f"{folder}: tensor {output} is not {embedding}, although tie_word_embeddings is true")


def _check_tokenizer(folder: Path, kept: Path, backend: Tokenizer) -> None:
    """Raise ValueError when a folder's ids are not those of the original tokenizer, which goes into the checkpoint."""
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise ValueError(f"{file} is missing")
    if Tokenizer.from_file(str(file)).get_vocab() != backend.get_vocab():
        raise ValueError(f"{file}: its ids are not those of {kept / 'tokenizer.model'}")


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _copy(folder: Path, to: Path, patterns: list[str] | tuple[str, ...]) -> None:
    for pattern in patterns:
        for file in sorted(folder.glob(pattern)):
            shutil.copy2(file, to / file.name)
