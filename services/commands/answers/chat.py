"""`fusion chat`: a conversation with one source that is served."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Self, TypeAlias

from services.base.errors import FailedPreconditionError
from services.commands.answers.python_tool import INSTRUCTION, SCHEMA, PythonTool
from services.models.tool_calls import ReadAnswer, Segment, read_answer
from services.recipes.recipe import Recipe, RecipeError
from services.source.client import SourceClient
from services.source.config import AnySource
from services.wire.answer import Answer, AnswerPrompt, Sampling, messages_prompt, text_prompt
from services.wire.messages import Message
from services.wire.tool_calls import PYTHON

MAX_TOOL_TURNS = 4
MOST_CALLS = 8
"""Calls of one answer that are run."""

Show: TypeAlias = Callable[[str, str], None]
"""Takes a part of the conversation between question and answer for the user: its title and its printable text."""


class Chat:
    """A conversation; a context manager that holds the connection.

    Attributes:
        description: who answers, for the user.

    Raises RecipeError naming the option that cannot be honoured, ServiceError when the source does not answer, or when
    programs are to be run and cannot be.
    """

    def __init__(
        self,
        recipe: Recipe,
        source: str | None,
        system: str | None,
        sampling: Sampling,
        *,
        runs_python: bool = False,
        max_tool_turns: int = MAX_TOOL_TURNS,
        show: Show = lambda title, text: None,
    ) -> None:
        self._recipe, self._endpoint = recipe, recipe.endpoint(_chosen(recipe, source))
        self._system, self._messages = system, list[Message]()
        self._sampling = sampling
        self._runs_python, self._max_tool_turns, self._show = runs_python, max_tool_turns, show
        self._python: PythonTool | None = None
        self._tools: list[Any] | None = None
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
        self._runner.run(self._close())
        self._runner.close()

    async def _connect(self) -> None:
        self._client = SourceClient(self._endpoint.address, self._endpoint.application)
        try:
            await self._look()
        except BaseException:
            await self._close()
            raise

    async def _look(self) -> None:
        """Ask the source what it can do, and open the tool."""
        info = await self._client.info()
        if info.max_new_tokens == 0:
            raise FailedPreconditionError(f"source {info.name} runs a version that does not generate")
        self._has_template = bool(info.answer_template)
        for option, given in (("--system", self._system is not None), ("--tools", self._runs_python)):
            if given and not self._has_template:
                raise RecipeError(f"{option}: the model of {info.name} has no chat template")
        how = "" if self._has_template else ", which has no chat template and continues your text"
        fewer = min(self._sampling.max_new_tokens, info.max_new_tokens)
        self._sampling = self._sampling.model_copy(update={"max_new_tokens": fewer})
        system = [self._system] if self._system is not None else []
        if self._runs_python:
            self._python = await PythonTool.open(self._recipe)
            how = f"; its programs run in {self._python.where}"
            if info.tool_format not in {"", "code_block"}:
                self._tools = [SCHEMA]
            else:
                system.append(INSTRUCTION)
        if system:
            self._messages = [{"role": "system", "content": "\n\n".join(system)}]
        self.description = f"{info.name}: {info.model} on {info.engine}{how}"

    async def _close(self) -> None:
        if self._python is not None:
            await self._python.close()
        await self._client.close()

    def say(self, words: str) -> str:
        """Return the answer to what is said; both are part of what is said next, and so are programs and outputs."""
        return self._runner.run(self._say(words))

    async def _say(self, words: str) -> str:
        if not self._has_template:
            return printable((await self._answer(text_prompt(words))).text)
        asked: list[Message] = [*self._messages, {"role": "user", "content": words}]
        for turns_left in range(self._max_tool_turns, -1, -1):
            reply = self._read(await self._answer(messages_prompt(asked, self._tools)))
            if reply.problem and self._python is not None:
                self._show("not run", printable(reply.problem.encode()))
            if not reply.calls or self._python is None:
                break
            if not turns_left:
                self._show("not run", f"--max-tool-turns is {self._max_tool_turns}, and the answer calls a tool again")
                break
            asked += await self._with_results(reply, self._python)
        self._messages = [*asked, {"role": "assistant", "content": reply.words}]
        return printable(reply.words.encode())

    async def _with_results(self, reply: ReadAnswer, python: PythonTool) -> list[Message]:
        """Run the calls of an answer; return the messages to go on with: the answer, and what came of the calls."""
        if reply.words.strip() and self._tools:
            self._show("answer", printable(reply.words.encode()))
        results = []
        for number, call in enumerate(reply.calls):
            code = call.arguments.get("code") if call.name == PYTHON else f"{call.name} {call.arguments}"
            self._show(PYTHON, printable(str(code).encode(errors="replace")))
            ran = number < MOST_CALLS
            results.append(await python.result(call) if ran else f"error: at most {MOST_CALLS} calls are run at once")
            self._show("output", printable(results[-1].encode(errors="replace")))
        if not self._tools:
            output = "\n".join(results)
            return [
                {"role": "assistant", "content": reply.words},
                {"role": "user", "content": f"Output of the program:\n{output}"},
            ]
        called = [call.as_message_part() for call in reply.calls]
        answer: Message = {"role": "assistant", "content": reply.words or None, "tool_calls": called}
        return [answer, *(call.answered(text) for call, text in zip(reply.calls, results, strict=True))]

    def _read(self, answer: Answer) -> ReadAnswer:
        """Return the words of an answer, and its calls where it may have any."""
        text = answer.text.decode("utf-8", errors="replace")
        if self._tools:
            return ReadAnswer(answer.content.decode("utf-8", errors="replace"), answer.tool_calls, answer.tool_problem)
        return read_answer("code_block", [Segment("", text)]) if self._python is not None else ReadAnswer(text)

    async def _answer(self, prompt: AnswerPrompt) -> Answer:
        [[answer]] = await self._client.generate([prompt], self._sampling)
        return answer


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
