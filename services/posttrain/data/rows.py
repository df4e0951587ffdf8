"""Rows of JSON lines: prompts with specs, answered prompts, and pairs of answers; every mistake names file and line."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fusion_core.verify.specs import Spec, read_spec
from services.base.errors import SettingError
from services.corpus.readers import local_files
from services.posttrain.data.tokens import Prompt
from services.wire.messages import check_messages


@dataclass(frozen=True, slots=True)
class VerifiedPrompt:
    """A prompt with the spec that its answers are held against; `skill` names what it tests, empty where none is."""

    prompt: Prompt
    spec: Spec
    verify: dict[str, Any]
    skill: str = ""


def read_rows(setting: str, patterns: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the rows of all files with their places; SettingError naming the setting, file and line."""
    try:
        files = local_files(patterns)
    except SettingError as error:
        raise SettingError(setting, error.problem) from error
    for path in files:
        yield from _rows(setting, path)


def _rows(setting: str, path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                row = json.loads(line)
            except ValueError as error:
                raise SettingError(setting, f"{where}: not JSON: {error}") from error
            if not isinstance(row, dict):
                raise SettingError(setting, f"{where}: expected an object")
            yield where, row


def verified_prompts(setting: str, patterns: Sequence[str]) -> list[VerifiedPrompt]:
    """Return the prompts of files with their specs; SettingError for a row that has none."""
    prompts = []
    for where, row in read_rows(setting, patterns):
        if "verify" not in row:
            raise SettingError(setting, f"{where}: needs a spec under `verify`")
        try:
            spec = read_spec(row["verify"])
        except ValueError as error:
            raise SettingError(setting, f"{where}: verify.{error}") from error
        prompt, answer = split_answer(setting, where, row)
        if answer is not None:
            raise SettingError(setting, f"{where}: ends with an answer; leave out what is to be answered")
        prompts.append(VerifiedPrompt(prompt, spec, row["verify"], str(row.get("skill", ""))))
    if not prompts:
        raise SettingError(setting, "there are no rows in the files")
    return prompts


def split_answer(setting: str, where: str, row: dict[str, Any]) -> tuple[Prompt, str | None]:
    """Return prompt and answer of a row: `prompt` and `completion`, or `messages` that end with the assistant's.

    The answer is None where the row has none. Raises SettingError.
    """
    answer = row.get("completion")
    if "messages" in row:
        prompt = _messages(setting, where, row["messages"])
        if answer is None and prompt and prompt[-1]["role"] == "assistant":
            answer = prompt[-1]["content"]
            prompt = prompt[:-1]
        if not prompt:
            raise SettingError(setting, f"{where}: messages: there is none before the answer")
        return prompt, _text(setting, where, "completion", answer)
    given = row.get("prompt")
    if isinstance(given, list):
        if not given:
            raise SettingError(setting, f"{where}: prompt: holds no message")
        return _messages(setting, where, given), _text(setting, where, "completion", answer)
    if not isinstance(given, str):
        raise SettingError(setting, f"{where}: needs `prompt` (a string or messages) or `messages`")
    return given, _text(setting, where, "completion", answer)


def answered_rows(setting: str, patterns: Sequence[str]) -> list[dict[str, Any]]:
    """Return rows with `prompt` and `completion`; SettingError for a row without an answer."""
    rows = []
    for where, row in read_rows(setting, patterns):
        prompt, answer = split_answer(setting, where, row)
        if not answer:
            raise SettingError(setting, f"{where}: no answer; expected `completion`, or messages that end with one")
        rows.append({"prompt": prompt, "completion": answer, "origin": where})
    return rows


def pair_rows(setting: str, patterns: Sequence[str]) -> list[dict[str, Any]]:
    """Return rows with `prompt`, `chosen` and `rejected`; SettingError for a row without them."""
    rows = []
    for where, row in read_rows(setting, patterns):
        prompt, _ = split_answer(setting, where, row)
        sides = {side: _text(setting, where, side, row.get(side)) for side in ("chosen", "rejected")}
        for side, text in sides.items():
            if not text:
                raise SettingError(setting, f"{where}: {side}: a text that is not empty")
        if sides["chosen"] == sides["rejected"]:
            raise SettingError(setting, f"{where}: chosen and rejected are the same text")
        rows.append({"prompt": prompt, **sides, "origin": where})
    return rows


def prompt_key(prompt: Prompt) -> str:
    """Return a text that is the same for equal prompts, and for no others."""
    return json.dumps(prompt, ensure_ascii=False, sort_keys=True)


def prompt_text(prompt: Prompt) -> str:
    """Return the words of a prompt; of a conversation those of the last message."""
    return prompt if isinstance(prompt, str) else str(prompt[-1].get("content") or "")


def _messages(setting: str, where: str, value: Any) -> list[dict[str, Any]]:
    try:
        check_messages(value)
    except ValueError as error:
        raise SettingError(setting, f"{where}: {error}") from error
    return list(value)


def _text(setting: str, where: str, key: str, value: Any) -> str | None:
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], dict):  # a conversation of one message
        value = value[0].get("content")
    if value is not None and not isinstance(value, str):
        raise SettingError(setting, f"{where}: {key}: expected a string")
    try:
        (value or "").encode()
    except UnicodeEncodeError as error:
        raise SettingError(setting, f"{where}: {key}: holds half of a surrogate pair, which is no text") from error
    return value
