"""`fusion capture`: every window of the recipe's corpus scored by every source, in shards that resume and repair.

The windows of a shard are fixed by the corpus, not by the time of writing: a capture that was killed goes on with the
missing shards, and ends with the same bytes as one that was not, if the source answers the same twice.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress

import pyarrow as pa
from rich.console import Console

from services.base.errors import NotFoundError, RunFailedError, ServiceError, UnavailableError
from services.base.progress_bars import plain_console, window_progress
from services.commands.capture_scope import CaptureScope
from services.deploy.up import sources_up
from services.fusion.sources.remote import RefusedTextError, RemoteSource
from services.fusion.sources.through_store import refusal
from services.models.revision import weights_revision
from services.recipes.recipe import RecipeError
from services.recipes.resolve import resolve_sources
from services.source.config import AnySource, SourceConfig
from services.store.capture_plan import CapturePlan, capture_folder, read_plan
from services.store.captured_split import CapturedSplit, renamed
from services.store.identity import SourceIdentity, window_key
from services.store.rows import encode_row
from services.store.shard import UNREADABLE, check_shard, write_shard
from services.store.source_store import SourceStore

WINDOWS_PER_SHARD = 256
_IN_FLIGHT = 256
"""Windows that a source is asked for at once, all its replicas together."""

Progress = Callable[[str, int, int], None]
"""A function of a name, the number of windows that are done, and the number of all."""


class Capture:
    """The capture of the windows that are not in the store yet, or are damaged there."""

    def __init__(self, scope: CaptureScope, *, windows_per_shard: int | None = None) -> None:
        """Take the scope; `windows_per_shard` is for a new capture, one that was begun before goes on with its own."""
        self.recipe, self.corpus, self.store = scope.recipe, scope.corpus, scope.store
        self.scope = scope
        self._folders = resolve_sources(scope.recipe)
        self._windows_per_shard = windows_per_shard

    def run(self, console: Console) -> None:
        """Capture missing and damaged shards; a source that does not run is deployed for as long as it takes.

        Raises RunFailedError when a source or the store fails under way: the shards that are complete stay.
        """
        identities = asyncio.run(self._serving_now())
        absent = [source for source in self.scope.sources if source.name not in identities]
        for source in absent:
            if (identity := self._stored(source)) is not None:
                identities[source.name] = identity
        missing = {name: self._missing(identity, console) for name, identity in identities.items()}
        needed = [source for source in self.scope.sources if missing.get(source.name) is None or missing[source.name]]
        for source in self.scope.sources:
            if source not in needed:
                console.print(f"{source.name}: complete")
        to_start = [source for source in needed if source in absent]
        if unreachable := [source.name for source in to_start if source.address is not None]:
            raise UnavailableError(f"source {unreachable[0]} does not answer at its address")
        if needed:
            with sources_up(self.recipe, to_start, console), window_progress(console) as progress:
                asyncio.run(self._capture(needed, progress))

    async def _serving_now(self) -> dict[str, SourceIdentity]:
        """Return the identities of the sources that answer; raises ServiceError when one is not the recipe's."""
        found = {}
        for source in self.scope.sources:
            asked = RemoteSource(self.recipe.endpoint(source), self.recipe.service)
            try:
                found[source.name] = await asked.identity()
            except (UnavailableError, NotFoundError):
                continue
            finally:
                await asked.close()
        return found

    async def _identity(self, source: RemoteSource) -> SourceIdentity:
        """Return a source's identity; one that has just started may need more than one attempt."""
        for _ in range(self.recipe.service.source_attempts - 1):
            with suppress(ServiceError):
                return await source.identity()
        return await source.identity()

    def _stored(self, source: AnySource) -> SourceIdentity | None:
        """Return the stored identity that a deployment would have now: the same weights under the same settings."""
        fitting = self.scope.stored(source)
        if isinstance(source, SourceConfig) and source.weights_here and fitting:
            revision = weights_revision(self._folders[source.name])
            fitting = [identity for identity in fitting if identity.revision == revision]
        return fitting[0] if len(fitting) == 1 else None

    def _captured(self, identity: SourceIdentity, split: str) -> CapturedSplit:
        """Return the split's capture, under the plan that is in the store or a new one."""
        store, fingerprint = self.store.source(identity), self.corpus.fingerprint(split)
        there = read_plan(store.files, capture_folder(store.folder, fingerprint))
        wanted = self._windows_per_shard
        if there is not None and wanted not in {None, there.windows_per_shard}:
            raise RecipeError(
                f"--windows-per-shard: {self.corpus.name}/{split} was begun with {there.windows_per_shard}; leave it "
                f"out, or delete {store.files.location(capture_folder(store.folder, fingerprint))}"
            )
        if there is not None:  # the same windows, perhaps under another name of the corpus or the pool
            return CapturedSplit(store, self.corpus, renamed(there, self.corpus, split))
        plan = CapturePlan(
            corpus=self.corpus.name,
            split=split,
            fingerprint=fingerprint,
            num_windows=self.corpus.num_windows(split),
            windows_per_shard=wanted or WINDOWS_PER_SHARD,
        )
        return CapturedSplit(store, self.corpus, plan)

    def _missing(self, identity: SourceIdentity, console: Console) -> list[tuple[CapturedSplit, list[int]]]:
        """Return the splits that are not complete, with their shards that are missing or damaged."""
        found = []
        self._drop_damaged(self.store.source(identity), console)
        for split in self.scope.splits:
            captured = self._captured(identity, split)
            bad = []
            for shard in range(captured.plan.num_shards):
                problem = captured.problem(shard)
                if problem is not None:
                    bad.append(shard)
                    captured.store.ignore_shard(captured.path(shard))
                if problem not in {None, "missing"}:
                    place = self.store.files.location(f"{captured.path(shard)}.parquet")
                    console.print(f"{place}: {problem}; it is captured again", soft_wrap=True)
            if bad or not captured.finished:
                found.append((captured, bad))
            else:
                captured.add_keys()
        return found

    def _drop_damaged(self, store: SourceStore, console: Console) -> None:
        """Delete damaged shards of single windows: they are scored again when a reader asks for them."""
        for path in store.uncaptured_shards():
            try:
                check_shard(store.files, path)
            except ValueError as error:
                store.delete_shard(path)
                place = store.files.location(f"{path}.parquet")
                console.print(f"{place}: {error}; deleted", soft_wrap=True)

    async def _capture(self, needed: Sequence[AnySource], progress: Progress) -> None:
        """Capture from all sources side by side; one that fails does not stop the others."""
        running = (self._capture_source(source, progress) for source in needed)
        results = await asyncio.gather(*running, return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException):
                raise result

    async def _capture_source(self, config: AnySource, progress: Progress) -> None:
        source = RemoteSource(self.recipe.endpoint(config), self.recipe.service)
        try:
            identity = await self._identity(source)
            quiet = plain_console(quiet=True)
            missing = await asyncio.to_thread(self._missing, identity, quiet)
            for captured, _ in missing:  # all first: a later capture must find how many windows a shard has
                await asyncio.to_thread(captured.begin)
            for captured, shards in missing:
                await _capture_split(source, captured, shards, progress)
                await asyncio.to_thread(captured.finish)
        except ServiceError as error:
            raise RunFailedError(f"{error}; what is complete stays, the same command goes on from there") from error
        except UNREADABLE as error:
            raise RunFailedError(f"service.store: {error}; what is complete stays") from error
        finally:
            await source.close()


async def _capture_split(
    source: RemoteSource, captured: CapturedSplit, shards: Sequence[int], progress: Progress
) -> None:
    """Score the windows of the shards and write each shard when it is full, while the next one is being scored."""
    plan = captured.plan
    name, gate = f"{source.name}/{plan.split}", asyncio.Semaphore(_IN_FLIGHT)
    done = plan.num_windows - sum(len(plan.windows(shard)) for shard in shards)
    progress(name, done, plan.num_windows)
    before: tuple[int, list[asyncio.Task[pa.RecordBatch]]] = (-1, [])
    tasks: list[asyncio.Task[pa.RecordBatch]] = []

    async def row(index: int) -> pa.RecordBatch:
        nonlocal done
        async with gate:
            found = await _row(source, captured, index)
        done += 1
        progress(name, done, plan.num_windows)
        return found

    try:
        for shard in (*shards, -1):
            tasks = [asyncio.create_task(row(index)) for index in plan.windows(shard)] if shard >= 0 else []
            if before[1]:
                rows = await asyncio.gather(*before[1])
                await asyncio.to_thread(write_shard, captured.store.files, captured.path(before[0]), rows)
            before = (shard, tasks)
    finally:
        for task in (*before[1], *tasks):
            task.cancel()
        await asyncio.gather(*before[1], *tasks, return_exceptions=True)


async def _row(source: RemoteSource, captured: CapturedSplit, index: int) -> pa.RecordBatch:
    """Return the window's row: from the store when a stream or another corpus has left it there, else scored now."""
    passage = captured.corpus.window(captured.plan.split, index).passage
    key = window_key(passage)
    if (kept := await asyncio.to_thread(captured.store.find_row, key)) is not None:
        return kept
    try:
        block = (await source.score(passage)).block
    except RefusedTextError:
        block = refusal(passage, source.vocabulary, source.endpoint.top_k)
    try:
        return encode_row(key, block)
    except ValueError as error:
        raise UnavailableError(f"source {source.name} sent a broken block: {error}") from error
