"""`fusion cloze`: multiple-choice tasks for `fusion eval --tasks` from the documents of a split."""

from __future__ import annotations

from pathlib import Path

from services.commands.prepare import corpus_and_target, prepare
from services.evaluation.cloze import cloze_questions, write_cloze_tasks
from services.recipes.recipe import Recipe, RecipeError


def write_cloze(recipe: Recipe, folder: Path, split: str, *, per_document: int, seed: int) -> dict[str, int]:
    """Write the tasks of a split's documents, one for each domain, and return their numbers of questions by name.

    Raises RecipeError for a split that is not there, a folder that holds other things, or documents that are too short.
    """
    if folder.is_dir() and any(folder.iterdir()):
        raise RecipeError(f"OUT: {folder} is not empty")
    prepare(recipe, save=False)
    corpus = corpus_and_target(recipe)
    if split not in corpus.splits:
        raise RecipeError(f"--split {split}: the corpus has {', '.join(corpus.splits)}")
    windows = [corpus.window(split, index) for index in range(corpus.num_windows(split))]
    return write_cloze_tasks(cloze_questions(windows, per_document=per_document, seed=seed), folder)
