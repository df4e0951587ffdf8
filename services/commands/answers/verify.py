"""`fusion verify`: hold the answers of a file against specs, here or at a verifier that is served."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

from fusion_core.verify.specs import parse_spec, read_spec
from fusion_core.verify.verdict import Verdict
from services.base.atomic import whole_file
from services.base.errors import SettingError
from services.commands.answers.rows import answer_of, json_rows
from services.corpus.readers import local_files
from services.verify.client import VerdictStream
from services.verify.config import VerifyConfig
from services.verify.verifier import Verifier

Judge: TypeAlias = Callable[[str, bytes], Awaitable[Verdict]]
_ROWS_AT_ONCE = 256


@dataclass(slots=True)
class Count:
    """The verdicts on the answers of one source to specs of one kind."""

    answers: int = 0
    right: int = 0
    scores: float = 0.0


@dataclass(slots=True)
class Verify:
    """One run of the command.

    Attributes:
        answers: JSON lines with the answers, as `fusion sample --to` writes them.
        against: globs of JSON lines with the prompts and their specs under `verify`; without them a row's own counts.
        spec: spec of all rows that have none, as JSON.
        address: host:port of a verifier that is served; by default answers are judged in this process.
        application: of that verifier.
        config: limits of programs that are run here.
        counts: results by source and kind.
    """

    answers: Path
    against: Sequence[str] = ()
    spec: str | None = None
    address: str | None = None
    application: str = "verify"
    config: VerifyConfig = field(default_factory=VerifyConfig)
    counts: dict[tuple[str, str], Count] = field(default_factory=dict)

    def run(self, to: Path | None = None) -> None:
        """Judge all answers; write the rows with their verdicts to `to`.

        Raises ValueError naming file, line and key that is wrong, ServiceError when an answer cannot be judged.
        """
        common = None if self.spec is None else _common(self.spec)
        by_prompt = self._specs()
        if to is None:
            asyncio.run(self._judge_all(by_prompt, common, None))
            return
        with whole_file(to) as partial, partial.open("w", encoding="utf-8") as lines:
            asyncio.run(self._judge_all(by_prompt, common, lines))

    def _specs(self) -> dict[str, bytes]:
        """Return the specs of prompts, by the prompt's key; raises ValueError for a prompt with two."""
        specs: dict[str, bytes] = {}
        try:
            paths = local_files(self.against) if self.against else ()
        except SettingError as error:
            raise ValueError(f"--against: {error.problem}") from error
        for path in paths:
            for where, row in json_rows(path):
                if "verify" in row:
                    key, spec = _prompt_key(row, where), _spec_bytes(row["verify"], where)
                    if specs.setdefault(key, spec) != spec:
                        raise ValueError(
                            f"{where}: verify: its prompt has another spec already, and only one can count"
                        )
        return specs

    async def _judge_all(self, by_prompt: dict[str, bytes], common: bytes | None, lines: Any) -> None:
        rows = json_rows(self.answers)
        async with AsyncExitStack() as stack:
            judge = self._judge(stack)
            while some := list(islice(rows, _ROWS_AT_ONCE)):
                specs = [self._spec_of(row, where, by_prompt, common) for where, row in some]
                texts = [answer_of(row, where) for where, row in some]
                verdicts = await asyncio.gather(*map(judge, texts, specs))
                for (_, row), spec, verdict in zip(some, specs, verdicts, strict=True):
                    self._count(row, spec, verdict)
                    if lines is not None:
                        found = {"right": verdict.right, "score": verdict.score, "reason": verdict.reason}
                        lines.write(json.dumps({**row, "verdict": found}, ensure_ascii=False) + "\n")

    def _judge(self, stack: AsyncExitStack) -> Judge:
        if self.address is not None:
            stream = VerdictStream(self.address, self.application)
            stack.push_async_callback(stream.close)
            return lambda text, spec: stream.verdict((text, spec))
        verifier = Verifier(self.config)
        stack.callback(verifier.close)
        return lambda text, spec: verifier.judge(parse_spec(spec), text)

    def _spec_of(self, row: dict[str, Any], where: str, by_prompt: dict[str, bytes], common: bytes | None) -> bytes:
        if "verify" in row:
            return _spec_bytes(row["verify"], where)
        found = by_prompt.get(_prompt_key(row, where)) if by_prompt else None
        if (spec := found or common) is None:
            raise ValueError(f"{where}: no spec: neither the row nor one of --against with its prompt has `verify`")
        return spec

    def _count(self, row: dict[str, Any], spec: bytes, verdict: Verdict) -> None:
        count = self.counts.setdefault((str(row.get("source", "")), json.loads(spec)["kind"]), Count())
        count.answers += 1
        count.right += verdict.right
        count.scores += verdict.score


def _common(spec: str) -> bytes:
    try:
        parse_spec(spec.encode(errors="replace"))
    except ValueError as error:
        raise ValueError(f"--spec: {error}") from error
    return spec.encode()


def _spec_bytes(value: Any, where: str) -> bytes:
    try:
        read_spec(value)
    except ValueError as error:
        raise ValueError(f"{where}: verify.{error}") from error
    return json.dumps(value).encode()


def _prompt_key(row: dict[str, Any], where: str) -> str:
    """Return a text that the row of a prompt and the rows of its answers have in common."""
    if isinstance(prompt := row.get("prompt"), str):
        return json.dumps(prompt)
    messages = row.get("messages")
    if isinstance(messages, list) and messages and all(isinstance(message, dict) for message in messages):
        if messages[-1].get("role") == "assistant":
            messages = messages[:-1]
        return json.dumps(messages, sort_keys=True)
    raise ValueError(f"{where}: no prompt; expected `prompt`, a string, or `messages`")
