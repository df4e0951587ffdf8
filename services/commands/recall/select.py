"""`fusion recall select` and `ask`: the key blocks of a file, and the answer that a model gives from them."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fusion.v1 import recall_pb2
from services.base.settings import explain
from services.commands.answers.chat import Chat
from services.deploy.local_ray import deployments
from services.recall.client import LongText, RecallClient
from services.recall.config import RecallConfig
from services.recall.excerpt import excerpt_of, prompt_of
from services.recipes.load import load_recipe
from services.recipes.recipe import Recipe, RecipeError
from services.wire.answer import Sampling


@dataclass(frozen=True, slots=True)
class Found:
    """A key block: its text, and its bytes, score and hop as in `recall.proto`."""

    text: str
    start_byte: int
    end_byte: int
    score: float
    hop: int


@dataclass(frozen=True, slots=True)
class Lookup:
    """A question about a file, and who looks for its key blocks.

    Attributes:
        file: UTF-8.
        question: about it.
        judge: folder of a judge that reads it in this process; None asks a service.
        address, application: of that service; by default that of the recipe that is up.
        budget_bytes: bytes of all key blocks; by default as the service likes.
        hops: blocks that the judge keeps in mind after each hop, such as `3,5`; by default as the service likes.
    """

    file: Path
    question: str
    judge: str | None = None
    address: str | None = None
    application: str | None = None
    budget_bytes: int | None = None
    hops: str | None = None

    def find(self, recipe: Recipe | None = None) -> list[Found]:
        """Return the key blocks in the order of the file.

        Raises ValueError naming the option that cannot be honoured, ServiceError when the service does not answer.
        """
        text = self.file.read_bytes()
        try:
            text.decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"{self.file}: not UTF-8 at byte {error.start}") from error
        if not text or not self.question:
            raise ValueError(f"{self.file}: is empty" if not text else "--question: must not be empty")
        if self.judge is not None and (self.address or self.application) is not None:
            raise ValueError("--judge: reads the text in this process; give it, or --address and --application")
        found = self._here(text) if self.judge is not None else asyncio.run(self._served(text, recipe))
        return [
            Found(text[b.start_byte : b.end_byte].decode(), b.start_byte, b.end_byte, b.score, b.hop) for b in found
        ]

    def prompt(self, found: Sequence[Found]) -> str:
        """Return what a model is asked."""
        return prompt_of(excerpt_of(self.file.read_bytes(), found), self.question)

    def _here(self, text: bytes) -> Sequence[Any]:
        from services.recall.judge import Judge
        from services.recall.selector import Selection, select

        config = self._config()
        try:
            judge = Judge.load(self.judge or "")
        except ValueError as error:
            raise ValueError(f"--judge: {str(error).removeprefix('judge: ')}") from error
        selection = Selection(config.budget_bytes, hops=config.hops, rehearsal=config.rehearsal)
        return select(judge, text.decode(), self.question, selection).blocks

    def _config(self) -> RecallConfig:
        """Return the section `recall` that the options stand for; raises ValueError naming the option."""
        from pydantic import ValidationError

        given: dict[str, Any] = {}
        if self.budget_bytes is not None:
            given["budget_bytes"] = self.budget_bytes
        if self.hops is not None:
            given["hops"] = self.hops.split(",")
        try:
            return RecallConfig.model_validate(given)
        except ValidationError as error:
            lines = (line.replace("_", "-", 1) for line in explain(error).split("\n"))
            raise ValueError("\n".join(f"--{line}" for line in lines)) from error

    async def _served(self, text: bytes, recipe: Recipe | None) -> Sequence[Any]:
        address, application = self.address, "recall"
        if address is None:
            address, application = endpoint_of(recipe or running_recipe("--judge or --address"))
        config = self._config()
        settings = recall_pb2.RecallSettings(
            budget_bytes=config.budget_bytes if self.budget_bytes is not None else None,
            hops=config.hops if self.hops is not None else (),
        )
        client = RecallClient(address, self.application or application)
        try:
            [found] = await client.select([LongText(text, self.question)], settings)
        finally:
            await client.close()
        return found.blocks


def answer(lookup: Lookup, recipe: Recipe | None, source: str | None, sampling: Sampling) -> tuple[list[Found], str]:
    """Return the key blocks and the answer that a source gives from them; the default recipe is the one that is up.

    Raises what `Lookup.find` and `Chat` raise.
    """
    chosen = recipe or running_recipe("--recipe")
    with Chat(chosen, source, None, sampling) as conversation:  # before the judge works: the source may be missing
        found = lookup.find(chosen)
        return found, conversation.say(lookup.prompt(found))


def running_recipe(option: str) -> Recipe:
    """Return the recipe of what is up; raises RecipeError, which names the option, unless it is exactly one."""
    running = deployments()
    if len(running) != 1:
        names = ", ".join(deployment.name for deployment in running) or "none"
        raise RecipeError(f"{option}: needed unless exactly one recipe is up (up now: {names})")
    return load_recipe(running[0].recipe)


def endpoint_of(recipe: Recipe) -> tuple[str, str]:
    """Return address and application of a recipe's recall service; raises RecipeError when it has none."""
    config = recipe.recall
    if config is None or (config.judge is None and config.address is None):
        raise RecipeError("recall.judge: the recipe names no judge, and no address of a service that runs already")
    return config.address or f"127.0.0.1:{recipe.service.grpc_port}", config.application
