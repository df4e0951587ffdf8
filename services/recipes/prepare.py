"""What has to lie on disk before anything starts: the corpus in windows, the target's folder, the resolved recipe."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from fusion_core.vocabulary import Vocabulary
from services.common.cluster import deployments
from services.common.corpus import TRAIN, Corpus, prepare_corpus
from services.common.models import resolve_model
from services.distill.target import prepare_target
from services.recipes.recipe import Recipe, RecipeError, load_recipe


def prepare(recipe: Recipe, say: Callable[[str], None] = lambda line: None, *, save: bool = True) -> Path:
    """Makes what is missing, leaves alone what is there; returns the resolved recipe's file.

    The file says what is served: a training run on services that are up must not write it (`save=False`).

    Raises RecipeError or ValueError naming the key that cannot be honoured.
    """
    resolve_sources(recipe)
    try:
        recipe.run_folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RecipeError(f"output_dir: cannot write to {recipe.run_folder}: {error.strerror}") from error
    say(f"corpus {recipe.corpus.name}")
    corpus = prepare_corpus(recipe.corpus, recipe.corpus_folder)
    say(
        "; ".join(
            f"{split}: {corpus.num_windows(split)} windows, {corpus.num_bytes(split):,} bytes"
            for split in corpus.splits
        )
    )
    target = recipe.target
    if target.model is not None:
        target = target.model_copy(update={"model": str(_resolve("target.model", target.model))})
    prepare_target(
        target,
        _texts(corpus),
        recipe.target_folder,
        recipe.distill.seed,
        corpus_fingerprint=corpus.fingerprint(TRAIN),
    )
    say(f"target {recipe.target_folder}")
    path = recipe.run_folder / "recipe.yaml"
    if save or not path.is_file():
        recipe.save(path)
    return path


def resolve_sources(recipe: Recipe) -> dict[str, Path]:
    """Folders of the sources' models, which the fusion service needs for their tokenizers; raises RecipeError."""
    return {
        source.name: _resolve(f"sources[{index}].model", source.model) for index, source in enumerate(recipe.sources)
    }


def target_vocabulary(fingerprint: str) -> Vocabulary | None:
    """The target vocabulary of a deployment on this machine, by its fingerprint."""
    for deployment in deployments():
        folder = load_recipe(deployment.recipe).target_folder
        if folder.is_dir() and (vocabulary := Vocabulary.from_pretrained(folder)).fingerprint == fingerprint:
            return vocabulary
    return None


def _resolve(key: str, model: str) -> Path:
    try:
        return resolve_model(model)
    except ValueError as error:
        raise RecipeError(f"{key}: {error}") from error


def _texts(corpus: Corpus) -> list[str]:
    return [text.decode("utf-8") for text in corpus.texts(TRAIN)]
