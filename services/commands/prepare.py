"""What has to lie on disk before anything starts: the corpus in windows, the target's folder, the resolved recipe."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

from fusion_core.vocabulary import Vocabulary
from services.base.errors import SettingError
from services.corpus.ledger import Corpus
from services.corpus.prepare import WindowTokenizer, plan_corpus, read_text
from services.distill.target.prepare import prepare_target
from services.models.catalogue import resolve_model
from services.models.packages import file_sha256
from services.recipes.recipe import Recipe, RecipeError
from services.recipes.resolve import resolve, resolve_sources


def prepare(recipe: Recipe, print_line: Callable[[str], None] = lambda line: None, *, save: bool = True) -> Path:
    """Makes what is missing, leaves alone what is there; returns the resolved recipe's file.

    The file says what is served: a training run on services that are up must not write it (`save=False`).

    Raises RecipeError or ValueError naming the key that cannot be honoured.
    """
    resolve_sources(recipe)
    try:
        recipe.run_folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RecipeError(f"output_dir: cannot write to {recipe.run_folder}: {error.strerror}") from error
    corpus_and_target(recipe, print_line)
    path = recipe.run_folder / "recipe.yaml"
    if save or not path.is_file():
        recipe.save(path)
    return path


def corpus_and_target(recipe: Recipe, print_line: Callable[[str], None] = lambda line: None) -> Corpus:
    """The corpus in windows that suit the tokenizers of all sources and of the target; both are made when missing.

    The target comes in between: its tokenizer may be trained on the corpus, and the windows are planned for it too.
    """

    print_line(f"corpus {recipe.corpus.name}")
    try:
        text = read_text(recipe.corpus, recipe.corpus_folder)
        target = recipe.target
        if target.model is not None:
            target = target.model_copy(update={"model": str(resolve("target.model", target.model))})
        folder, seed = recipe.target_folder, recipe.distill.seed
        prepare_target(target, text.train_texts(), folder, seed, corpus_fingerprint=text.fingerprint)
        print_line(f"target {folder}")
        own = _tokenizer("target", folder, _max_positions(folder), reads_context=False)
        corpus = plan_corpus(text, [*_source_tokenizers(recipe, print_line), own])
    except SettingError as error:
        raise RecipeError(f"corpus.{error}") from error
    for split in corpus.splits:
        info = corpus.record["splits"][split]
        line = f"{split}: {corpus.num_windows(split)} windows, {corpus.num_bytes(split):,} bytes"
        if info["num_cuts"] and info["num_cuts_at_boundaries"] is not None:
            line += f", {info['num_cuts_at_boundaries']} of {info['num_cuts']} cuts at boundaries of every tokenizer"
        print_line(line)
    return corpus


def _source_tokenizers(recipe: Recipe, print_line: Callable[[str], None]) -> Iterator[WindowTokenizer]:
    for index, source in enumerate(recipe.sources):
        try:
            folder = resolve_model(source.model)
        except ValueError as error:
            print_line(f"windows are planned without the tokenizer of sources[{index}]: {error}")
        else:
            yield _tokenizer(f"sources[{index}]", folder, source.max_tokens, reads_context=True)


def _tokenizer(name: str, folder: Path, max_tokens: int | None, *, reads_context: bool) -> WindowTokenizer:
    file = folder / "tokenizer.json"
    identity = file_sha256(file) if file.is_file() else str(folder)
    return WindowTokenizer(name, identity, lambda: Vocabulary.from_pretrained(folder), max_tokens, reads_context)


def _max_positions(folder: Path) -> int | None:
    """The longest window that the target can be trained on: BOS and all its tokens but the last."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    positions: int | None = config.get("text_config", config).get("max_position_embeddings")
    return positions
