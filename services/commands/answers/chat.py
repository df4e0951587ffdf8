"""`fusion chat`: a conversation with one source that is served."""

from __future__ import annotations

import asyncio
from typing import Any, Self

from services.base.errors import FailedPreconditionError
from services.recipes.recipe import Recipe, RecipeError
from services.source.client import SourceClient
from services.source.config import AnySource
from services.wire.answer import Sampling, messages_prompt, text_prompt


class Chat:
    """A conversation; a context manager that holds the connection.

    Attributes:
        description: who answers, for the user.

    Raises RecipeError naming the option that cannot be honoured, ServiceError when the source does not answer.
    """

    def __init__(self, recipe: Recipe, source: str | None, system: str | None, sampling: Sampling) -> None:
        self._endpoint = recipe.endpoint(_chosen(recipe, source))
        self._messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system is not None else []
        self._sampling = sampling
        self._runner = asyncio.Runner()
        self.description = ""

    def __enter__(self) -> Self:
        self._runner.__enter__()
        try:
            self._runner.run(self._connect())
        except BaseException:
            self._runner.close()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self._runner.run(self._client.close())
        self._runner.close()

    async def _connect(self) -> None:
        self._client = SourceClient(self._endpoint.address, self._endpoint.application)
        try:
            info = await self._client.info()
            if info.max_new_tokens == 0:
                raise FailedPreconditionError(f"source {info.name} runs a version that does not generate")
        except BaseException:
            await self._client.close()
            raise
        self._has_template = bool(info.answer_template)
        how = "" if self._has_template else ", which has no chat template and continues your text"
        self.description = f"{info.name}: {info.model} on {info.engine}{how}"
        fewer = min(self._sampling.max_new_tokens, info.max_new_tokens)
        self._sampling = self._sampling.model_copy(update={"max_new_tokens": fewer})
        if self._messages and not self._has_template:
            raise RecipeError(f"--system: the model of {info.name} has no chat template")

    def say(self, words: str) -> str:
        """Return the answer to what is said; both are part of what is said next."""
        if not self._has_template:
            return self._answer(text_prompt(words))
        asked = [*self._messages, {"role": "user", "content": words}]
        answer = self._answer(messages_prompt(asked))
        self._messages = [*asked, {"role": "assistant", "content": answer}]
        return answer

    def _answer(self, prompt: Any) -> str:
        [[answer]] = self._runner.run(self._client.generate([prompt], self._sampling))
        return printable(answer.text)


def printable(data: bytes) -> str:
    """Return an answer's text with escapes for what a terminal would obey instead of print."""
    text = data.decode("utf-8", errors="replace")
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)


def _chosen(recipe: Recipe, name: str | None) -> AnySource:
    names = [source.name for source in recipe.sources]
    if name is None and len(names) > 1:
        raise RecipeError(f"--source: name one of {', '.join(names)}")
    if name is not None and name not in names:
        raise RecipeError(f"--source {name}: there is no such source, only {', '.join(names)}")
    return recipe.sources[names.index(name) if name is not None else 0]
