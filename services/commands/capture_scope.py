"""The part of a recipe that a capture needs: corpus, splits, sources and store."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from services.commands.prepare import prepare
from services.corpus.ledger import Corpus
from services.fusion.sources.remote import tokenizer_of
from services.fusion.sources.through_store import stored_identities
from services.recipes.recipe import Recipe, RecipeError
from services.source.config import AnySource
from services.store.identity import SourceIdentity
from services.store.store import BlockStore


@dataclass(frozen=True)
class CaptureScope:
    """The windows that are captured or verified: of these splits, by these sources, in this store."""

    recipe: Recipe
    corpus: Corpus
    splits: tuple[str, ...]
    sources: tuple[AnySource, ...]
    store: BlockStore

    def stored(self, source: AnySource) -> list[SourceIdentity]:
        """Return the stored identities whose windows this source could have scored: one per revision."""
        endpoint = self.recipe.endpoint(source)
        return stored_identities(self.store, endpoint, *tokenizer_of(endpoint))


def open_scope(recipe: Recipe, *, sources: Sequence[str] = (), splits: Sequence[str] = ()) -> CaptureScope:
    """Prepare the corpus where it is missing and open the store.

    Args:
        recipe: the run.
        sources: names of the sources to take; all when empty.
        splits: names of the splits to take; all when empty.

    Raises RecipeError for an unknown source or split, and where the recipe has no store.
    """
    if recipe.store is None:
        raise RecipeError("service.store: null keeps nothing; a capture needs a folder or URL")
    names = [source.name for source in recipe.sources]
    if unknown := sorted(set(sources) - set(names)):
        raise RecipeError(f"--source {unknown[0]}: there is no such source, only {', '.join(names)}")
    prepare(recipe, save=False)
    corpus = Corpus.open(recipe.corpus_folder)
    if unknown := sorted(set(splits) - set(corpus.splits)):
        raise RecipeError(f"--split {unknown[0]}: the corpus has {', '.join(corpus.splits)}")
    chosen = tuple(source for source in recipe.sources if not sources or source.name in sources)
    return CaptureScope(recipe, corpus, tuple(splits) or corpus.splits, chosen, BlockStore(recipe.store))
