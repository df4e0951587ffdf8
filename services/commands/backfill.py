"""`fusion backfill`: score into the store the windows that streams skipped or fused without a source.

The fusion service lists every such window. Each source scores here the windows that it missed; a part of the list is
deleted when all its windows are in the store, so that a back-fill that was killed resumes with the rest. The next epoch
or the next run then finds these windows complete.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from rich.console import Console

from services.base.errors import NotFoundError, RunFailedError, ServiceError, UnavailableError
from services.base.progress_bars import window_progress
from services.commands.prepare import prepare
from services.corpus.ledger import Corpus
from services.deploy.up import sources_up
from services.fusion.sources.remote import RefusedTextError, RemoteSource
from services.fusion.sources.through_store import ThroughStore
from services.recipes.recipe import Recipe, RecipeError
from services.store.backfill_list import BackfillList, BackfillPart
from services.store.capture_plan import Place
from services.store.identity import SourceIdentity, window_key
from services.store.store import BlockStore

_IN_FLIGHT = 256
"""Windows that a source is asked for at once, all its replicas together."""

Missed = Mapping[str, list[tuple[str, int]]]
"""Split and index of the windows that each source took no part in, by source."""


@dataclass(frozen=True, slots=True)
class Backfilled:
    """Number of windows that a back-fill completed, and of answers that it took."""

    windows: int
    answers: int


class Backfill:
    """The back-fill list of a recipe's store; raises RecipeError where there can be none."""

    def __init__(self, recipe: Recipe) -> None:
        if recipe.store is None:
            raise RecipeError("service.store: null keeps nothing; a back-fill needs a folder or URL")
        self.recipe = recipe
        prepare(recipe, save=False)
        self.corpus = Corpus.open(recipe.corpus_folder)
        self.store = BlockStore(recipe.store)
        self._list = BackfillList(self.store.files)

    def parts(self) -> Iterator[tuple[str, BackfillPart]]:
        """Yield the parts of the list for this recipe's corpus; raises ValueError for one that is damaged.

        A split is known by its windows: a pool may have had another name, or hold the windows of another split.
        """
        splits = {self.corpus.fingerprint(split): split for split in reversed(self.corpus.splits)}
        for fingerprint, split in splits.items():
            for path, part in self._list.parts(fingerprint):
                yield path, part.model_copy(update={"split": split})

    def run(self, console: Console) -> Backfilled:
        """Complete every listed window; a source that does not run is deployed for as long as it takes.

        Raises RunFailedError when a source or the store fails under way: scored windows stay.
        """
        parts = list(self.parts())
        missed: dict[str, set[tuple[str, int]]] = defaultdict(set)
        for _, part in parts:
            for window in part.windows:
                for name in window.missing:
                    missed[name].add((part.split, window.index))
        sources = [source for source in self.recipe.sources if source.name in missed]
        absent = asyncio.run(self._absent([source.name for source in sources]))
        if unreachable := [s.name for s in sources if s.name in absent and s.address is not None]:
            raise UnavailableError(f"source {unreachable[0]} does not answer at its address")
        wanted = {source.name: sorted(missed[source.name]) for source in sources}
        start = [source for source in sources if source.name in absent]
        with sources_up(self.recipe, start, console), window_progress(console) as progress:
            identities = asyncio.run(self._score(wanted, progress))
        self._finish(parts, identities)
        windows = {(part.split, window.index) for _, part in parts for window in part.windows}
        return Backfilled(len(windows), sum(map(len, wanted.values())))

    def _finish(self, parts: list[tuple[str, BackfillPart]], identities: Mapping[str, SourceIdentity]) -> None:
        """Delete the parts whose windows a new reader of the store finds."""
        reader, left = BlockStore(self.store.files.root), 0
        stores = {name: reader.source(identity) for name, identity in identities.items()}
        for path, part in parts:
            lost = 0
            for window in part.windows:
                key = window_key(self.corpus.window(part.split, window.index).passage)
                place = Place(part.fingerprint, window.index)
                lost += sum(stores[name].find_row(key, place) is None for name in window.missing if name in stores)
            if not lost:
                self._list.done(path)
            left += lost
        if left:
            raise RunFailedError(f"service.store: {left} answers could not be kept; they stay on the back-fill list")

    def _open(self, name: str) -> ThroughStore:
        config = next(source for source in self.recipe.sources if source.name == name)
        return ThroughStore(RemoteSource(self.recipe.endpoint(config), self.recipe.service), self.store)

    async def _absent(self, names: list[str]) -> set[str]:
        """Return the sources that do not answer; raises ServiceError when one is not the recipe's."""
        absent = set()
        for name in names:
            source = self._open(name)
            try:
                await source.source.identity()
            except (UnavailableError, NotFoundError):
                absent.add(name)
            finally:
                await source.close()
        return absent

    async def _score(self, wanted: Missed, progress: Callable[[str, int, int], None]) -> dict[str, SourceIdentity]:
        """Score by all sources side by side and return their identities; one that fails does not stop the others."""
        try:
            results = await asyncio.gather(
                *(self._score_by(name, places, progress) for name, places in wanted.items()), return_exceptions=True
            )
        finally:
            await asyncio.to_thread(self.store.flush)
        identities = {}
        for name, result in zip(wanted, results, strict=True):
            if isinstance(result, ServiceError):
                raise RunFailedError(f"{result}; what was scored stays, the same command goes on from there")
            if isinstance(result, BaseException):
                raise result
            identities[name] = result
        return identities

    async def _score_by(
        self, name: str, places: list[tuple[str, int]], progress: Callable[[str, int, int], None]
    ) -> SourceIdentity:
        source, gate, done = self._open(name), asyncio.Semaphore(_IN_FLIGHT), 0
        try:
            async with asyncio.TaskGroup() as group:

                async def score(split: str, index: int) -> None:
                    nonlocal done
                    passage = self.corpus.window(split, index).passage
                    async with gate:
                        try:
                            await source.score(passage, place=Place(self.corpus.fingerprint(split), index))
                        except RefusedTextError:
                            await source.keep_refusal(passage, await source.source.identity())
                    done += 1
                    progress(name, done, len(places))

                for split, index in places:
                    group.create_task(score(split, index))
            return await source.source.identity()
        except* ServiceError as errors:
            raise next(_leaves(errors)) from None
        finally:
            await source.close()


def _leaves(errors: BaseExceptionGroup[BaseException]) -> Iterator[BaseException]:
    for error in errors.exceptions:
        if isinstance(error, BaseExceptionGroup):
            yield from _leaves(error)
        else:
            yield error
