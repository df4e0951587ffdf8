"""`fusion sample`: the sources' answers to the recipe's prompts, asked for where they are missing in the store."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from fusion.v1 import source_pb2
from services.base.atomic import whole_file
from services.base.errors import (
    DeadlineExceededError,
    NotFoundError,
    RunFailedError,
    ServiceError,
    SettingError,
    UnavailableError,
)
from services.base.files import Files
from services.base.progress_bars import window_progress
from services.base.retry import Backoff
from services.deploy.up import sources_up
from services.fusion.sources.remote import tokenizer_of
from services.recipes.recipe import Recipe, RecipeError
from services.recipes.resolve import resolve_sources
from services.sample.answers import AnswerIdentity, AnswerStore, conversation
from services.sample.config import SampleConfig
from services.sample.prompts import read_prompts
from services.sample.sampler import Sampler, Tally
from services.source.client import SourceClient
from services.source.config import AnySource


class Sample:
    """One run of the command.

    Raises RecipeError naming the key or option that cannot be honoured.
    """

    def __init__(self, recipe: Recipe, *, sources: Sequence[str] = ()) -> None:
        if recipe.sample is None:
            raise RecipeError("sample: the recipe has no such section; it names the prompts")
        self.recipe, self.config = recipe, recipe.sample
        names = [source.name for source in recipe.sources]
        if unknown := sorted(set(sources) - set(names)):
            raise RecipeError(f"--source {unknown[0]}: there is no such source, only {', '.join(names)}")
        wanted = set(sources or self.config.sources or names)
        self.sources = [source for source in recipe.sources if source.name in wanted]
        self.files = Files(_location(recipe, self.config), "sample.store")
        try:
            self.num_prompts = sum(1 for _ in self._prompts())
        except SettingError as error:
            raise RecipeError(f"sample.{error}") from error
        self._stores: dict[str, AnswerStore] = {}

    def run(self, console: Console) -> dict[str, Tally]:
        """Ask every source for what is missing; one that does not run is deployed for as long as it takes.

        Raises RunFailedError when a source or the store fails under way: the answers that came stay.
        """
        resolve_sources(self.recipe)
        serving = asyncio.run(self._serving())
        absent = [source for source in self.sources if source.name not in serving]
        if unreachable := [source.name for source in absent if source.address is not None]:
            raise UnavailableError(f"source {unreachable[0]} does not answer at its address")
        with sources_up(self.recipe, absent, console), window_progress(console, "prompts") as progress:
            return asyncio.run(self._sample(progress))

    def export(self, path: Path) -> int:
        """Write all answers to the recipe's prompts as rows of a corpus, JSON lines; return how many there are."""
        sampling, num_rows = self.config.sampling, 0
        with whole_file(path) as partial, partial.open("w", encoding="utf-8") as lines:
            for source in self.sources:
                for prompt in self._prompts():
                    for number in sampling.numbers:
                        row = self._stores[source.name].find(prompt, sampling, number)
                        if row is not None:
                            lines.write(json.dumps(conversation(row, source.name), ensure_ascii=False) + "\n")
                            num_rows += 1
        return num_rows

    def _prompts(self) -> Iterator[Any]:
        return read_prompts(self.config.prompts)

    async def _serving(self) -> set[str]:
        """Return the names of the sources that answer."""
        found = set()
        for source in self.sources:
            client = self._client(source)
            try:
                await client.info()
                found.add(source.name)
            except (UnavailableError, NotFoundError):
                continue
            finally:
                await client.close()
        return found

    def _client(self, source: AnySource) -> SourceClient:
        endpoint = self.recipe.endpoint(source)
        return SourceClient(endpoint.address, endpoint.application)

    async def _info(self, source: AnySource) -> source_pb2.GetSourceInfoResponse:
        """Return who serves; a source that has just started may need more than one attempt."""
        client, backoff = self._client(source), Backoff()
        try:
            for _ in range(self.recipe.service.source_attempts - 1):
                try:
                    return await client.info()
                except (UnavailableError, DeadlineExceededError):
                    await asyncio.sleep(backoff.next_pause())
            return await client.info()
        finally:
            await client.close()

    async def _sample(self, progress: Any) -> dict[str, Tally]:
        """Sample from all sources side by side; one that fails does not stop the others."""
        names = [source.name for source in self.sources]
        running = (self._sample_source(source, progress) for source in self.sources)
        results = await asyncio.gather(*running, return_exceptions=True)
        tallies = {}
        for name, result in zip(names, results, strict=True):
            if isinstance(result, BaseException):
                raise result
            tallies[name] = result
        return tallies

    async def _sample_source(self, source: AnySource, progress: Any) -> Tally:
        endpoint = self.recipe.endpoint(source)
        info = await self._info(source)
        if info.problem:
            raise RunFailedError(f"source {source.name}: {info.problem}")
        store = await asyncio.to_thread(
            AnswerStore, self.files, AnswerIdentity.of(info), answers_per_shard=self.config.answers_per_shard
        )
        self._stores[source.name] = store
        vocabulary, _ = await asyncio.to_thread(tokenizer_of, endpoint)
        sampler = Sampler(
            endpoint.address,
            endpoint.application,
            store,
            expected_vocabulary=vocabulary.fingerprint,
            in_flight=self.config.in_flight,
            attempts=self.recipe.service.source_attempts,
            timeout_seconds=self.config.timeout_seconds,
        )

        def report(done: int) -> None:
            progress(source.name, done, self.num_prompts)

        try:
            return await sampler.run(self._prompts(), self.config.sampling, report)
        except (ServiceError, OSError) as error:
            raise RunFailedError(f"source {source.name}: {error}; what was answered stays, run it again") from error
        finally:
            await sampler.close()


def _location(recipe: Recipe, config: SampleConfig) -> str:
    location = config.store if config.store is not None else recipe.store
    if location is None:
        raise RecipeError("sample.store: set it, or service.store; both are null")
    return location if "://" in location else str((recipe.run_folder / location).absolute())
