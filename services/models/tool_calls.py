"""Read the calls of tools out of an answer, in the way of each family of chat models.

An answer comes in segments: a mark, which is a token of the model's such as `[TOOL_CALLS]`, and the text behind it. A
text that merely looks like a mark is no mark where the model has a token for it. The calls' templates are those of
Hermes and Qwen, Llama 3, Mistral, InternLM2 and DeepSeek; models without tools write a program in a code block.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from services.wire.tool_calls import PYTHON, ToolCall

ToolFormat: TypeAlias = Literal["hermes", "llama3", "mistral", "internlm2", "deepseek", "code_block"]


@dataclass(frozen=True, slots=True)
class Segment:
    """A mark, empty at the beginning of an answer, and the text behind it."""

    mark: str
    text: str


@dataclass(frozen=True, slots=True)
class ReadAnswer:
    """An answer read for calls.

    Attributes:
        words: what it says beside the calls; all of it, marks included, where there is a problem.
        calls: in their order.
        problem: why something that begins like a call is none; empty without such a thing.
    """

    words: str
    calls: tuple[ToolCall, ...] = ()
    problem: str = ""


Reader: TypeAlias = Callable[[Sequence[Segment]], tuple[str, list[ToolCall]]]
"""From segments to words and calls; raises ValueError for a call that is broken."""


@dataclass(frozen=True, slots=True)
class _Format:
    marks: tuple[str, ...]
    read: Reader


def format_of(template: str) -> ToolFormat | None:
    """Return the format of the calls that a chat template writes; None where it writes none, or one not known here."""
    if "<function=" in template or "<arg_key>" in template:  # Qwen3-Coder's and GLM's calls are no JSON
        return None
    found = (name for name, sign in _SIGNS.items() if sign in template)
    return next(found, None)


def marks_of(name: ToolFormat) -> tuple[str, ...]:
    """Return the marks of a format, which are tokens of models that were trained on it."""
    return FORMATS[name].marks


def read_answer(name: ToolFormat, segments: Sequence[Segment], *, text_marks: Collection[str] = ()) -> ReadAnswer:
    """Return words and calls of an answer.

    Args:
        name: the format.
        segments: of the answer; the first has no mark.
        text_marks: marks for which the model has no token, which are then looked for in the text.
    """
    whole = list(_split(segments, text_marks)) if text_marks else list(segments)
    try:
        words, calls = FORMATS[name].read(whole)
        if len(whole) > 1 and not calls:
            raise ValueError(f"no call follows {whole[1].mark}")
    except (ValueError, RecursionError) as error:
        return ReadAnswer("".join(s.mark + s.text for s in segments), problem=f"a call cannot be read: {error}")
    return ReadAnswer(words, tuple(calls))


def _split(segments: Sequence[Segment], marks: Collection[str]) -> Iterator[Segment]:
    pattern = re.compile("|".join(map(re.escape, marks)))
    for segment in segments:
        mark, place = segment.mark, 0
        for found in pattern.finditer(segment.text):
            yield Segment(mark, segment.text[place : found.start()])
            mark, place = found[0], found.end()
        yield Segment(mark, segment.text[place:])


def _code_block(segments: Sequence[Segment]) -> tuple[str, list[ToolCall]]:
    """Read the first code block of Python as a program. What follows it is left out: the output was not known yet."""
    text = "".join(segment.mark + segment.text for segment in segments)
    opened = _OPENING.search(text)
    if opened is None:
        return text, []
    closed = re.compile(rf"^[ \t]*{re.escape(opened[1])}[`~]*[ \t]*$", re.MULTILINE).search(text, opened.end())
    if closed is None:
        raise ValueError("the code block is not closed")
    return text[: closed.end()], [ToolCall(PYTHON, {"code": text[opened.end() : closed.start()]})]


def _hermes(segments: Sequence[Segment]) -> tuple[str, list[ToolCall]]:
    words, calls, opened = "", [], False
    for segment in segments:
        if segment.mark == "<tool_call>":
            calls.append(_json_call(segment.text, "arguments"))
        elif segment.mark == "</tool_call>" and not opened:
            raise ValueError("</tool_call> without <tool_call>")
        else:
            words += segment.text if not calls else segment.text.lstrip()
        opened = segment.mark == "<tool_call>"
    return (words.rstrip() if calls else words), calls


def _llama3(segments: Sequence[Segment]) -> tuple[str, list[ToolCall]]:
    first, *tagged = segments
    if not tagged:
        text = first.text.strip()
        if not re.match(_CALL_BEGINS, text) or not re.search(r'"(parameters|arguments)"\s*:', text):
            return first.text, []
        return "", [_json_call(text, "parameters", "arguments")]
    if len(tagged) > 1:
        raise ValueError("more than one call in a message")
    code = tagged[0].text.strip()
    if re.match(_CALL_BEGINS, code):
        return first.text, [_json_call(code, "parameters", "arguments")]
    if built_in := re.fullmatch(r"(?s)(\w+)\.call\((.*)\)", code):
        return first.text, [ToolCall(built_in[1], _keywords(built_in[2]))]
    return first.text, [ToolCall(PYTHON, {"code": code})]


def _mistral(segments: Sequence[Segment]) -> tuple[str, list[ToolCall]]:
    first, *others = segments
    calls: list[ToolCall] = []
    name = ""
    for segment in others:
        if segment.mark == "[TOOL_CALLS]":
            if name:
                raise ValueError(f"{name[:80]!r} has no arguments")
            name = segment.text.strip()
            if name.startswith(("[", "{")):
                calls += _json_calls(name)
                name = ""
        elif segment.mark == "[ARGS]":
            if not name:
                raise ValueError("[ARGS] without a name")
            calls.append(ToolCall(name, _object(segment.text)))
            name = ""
    if name:
        raise ValueError(f"{name[:80]!r} has no arguments")
    return (first.text.rstrip() if calls else first.text), calls


def _internlm2(segments: Sequence[Segment]) -> tuple[str, list[ToolCall]]:
    words, calls, before = segments[0].text, [], ""
    for number, segment in enumerate(segments[1:], 1):
        if segment.mark in {"<|plugin|>", "<|interpreter|>"}:
            if before != "<|action_start|>":
                raise ValueError(f"{segment.mark} without <|action_start|>")
            if number + 1 == len(segments) or segments[number + 1].mark != "<|action_end|>":
                raise ValueError("<|action_end|> is missing")
            is_program = segment.mark == "<|interpreter|>"
            text = segment.text
            calls.append(
                ToolCall(PYTHON, {"code": _without_fence(text)})
                if is_program
                else _json_call(text, "parameters", "arguments")
            )
        elif segment.mark == "<|action_end|>":
            words += segment.text
        before = segment.mark
    if before == "<|action_start|>":
        raise ValueError("neither <|plugin|> nor <|interpreter|> follows <|action_start|>")
    return (words.rstrip() if calls else words), calls


def _deepseek(segments: Sequence[Segment]) -> tuple[str, list[ToolCall]]:
    calls: list[ToolCall] = []
    kind = ""
    for segment in segments[1:]:
        if segment.mark == "<｜tool▁call▁begin｜>":
            kind = segment.text.strip()
        elif segment.mark == "<｜tool▁sep｜>":
            block = re.fullmatch(r"(?s)\s*([^\n]+)\n```json\n(.*)\n```\s*", segment.text)  # V3; V3.1 has the name first
            name, arguments = (block[1], block[2]) if block else (kind, segment.text)
            if not name:
                raise ValueError(f"{segment.mark} without a name")
            calls.append(ToolCall(name, _object(arguments)))
            kind = ""
    if kind:
        raise ValueError(f"{kind[:80]!r} has no arguments")
    words = segments[0].text
    return (words.rstrip() if calls else words), calls


def _json_calls(text: str) -> list[ToolCall]:
    """Return the calls in a list of objects, or in one object."""
    values = json.loads(text)
    return [_call(value, ("arguments", "parameters")) for value in (values if isinstance(values, list) else [values])]


def _json_call(text: str, *keys: str) -> ToolCall:
    return _call(json.loads(text), keys)


def _call(value: Any, keys: Sequence[str]) -> ToolCall:
    if isinstance(value, dict) and value.get("type") == "function" and isinstance(value.get("function"), dict):
        value = value["function"]
    if not isinstance(value, dict) or not isinstance(value.get("name"), str) or not value["name"]:
        raise ValueError("expected an object with a name")
    arguments: Any = next((value[key] for key in keys if key in value), {})
    return ToolCall(_whole(value["name"]), _object(arguments) if isinstance(arguments, str) else _checked(arguments))


def _object(text: str) -> dict[str, Any]:
    return _checked(json.loads(text))


def _checked(arguments: Any) -> dict[str, Any]:
    if not isinstance(arguments, dict):
        raise ValueError("the arguments are no object")
    _whole(json.dumps(arguments, ensure_ascii=False, allow_nan=False))
    return arguments


def _whole(text: str) -> str:
    text.encode()  # UnicodeEncodeError, a ValueError, for half a surrogate pair, which JSON can spell
    return text


def _keywords(text: str) -> dict[str, Any]:
    """Return the arguments of a call in Python, which have to be named literals."""
    try:
        call = ast.parse(f"f({text})", mode="eval").body
    except (SyntaxError, MemoryError) as error:
        raise ValueError(f"not the arguments of a call: {error}") from error
    if not isinstance(call, ast.Call) or call.args or any(keyword.arg is None for keyword in call.keywords):
        raise ValueError("arguments must be named")
    try:
        return _checked({str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords})
    except TypeError as error:  # a set, bytes or a complex number
        raise ValueError(f"the arguments are none of JSON's: {error}") from error


def _without_fence(text: str) -> str:
    block = re.fullmatch(r"(?s)\s*```(?:python|py)?[ \t]*\n(.*?)\n?```\s*", text)
    return block[1] if block else text.strip("\n")


_CALL_BEGINS = r'\{\s*"(name|type)"\s*:'
_OPENING = re.compile(r"^[ \t]*(```|~~~)[ \t]*(?:python|py|python3)[ \t]*\n", re.MULTILINE | re.IGNORECASE)
_SIGNS: dict[ToolFormat, str] = {
    "internlm2": "<|action_start|>",
    "deepseek": "<｜tool▁calls▁begin｜>",
    "mistral": "[TOOL_CALLS]",
    "hermes": "<tool_call>",
    "llama3": "ipython",
}
"""A part of the template that writes calls in a format."""
FORMATS: dict[ToolFormat, _Format] = {
    "hermes": _Format(("<tool_call>", "</tool_call>"), _hermes),
    "llama3": _Format(("<|python_tag|>",), _llama3),
    "mistral": _Format(("[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"), _mistral),
    "internlm2": _Format(("<|action_start|>", "<|plugin|>", "<|interpreter|>", "<|action_end|>"), _internlm2),
    "deepseek": _Format(
        tuple(f"<｜tool▁{what}｜>" for what in ("calls▁begin", "call▁begin", "sep", "call▁end", "calls▁end")),
        _deepseek,
    ),
    "code_block": _Format((), _code_block),
}
