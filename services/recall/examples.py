"""Questions about long texts, for training and evaluation: JSON lines of `text`, `question`, `answer` and `spans`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

from pydantic import Field, ValidationError

from fusion_core.recall.split import Span
from services.base.errors import SettingError
from services.base.settings import Settings, explain


class Example(Settings):
    """A question about a text. `spans`: where the text says what matters, start and end in characters."""

    text: str = Field(min_length=1)
    question: str = Field(min_length=1)
    answer: str = ""
    spans: tuple[tuple[Annotated[int, Field(ge=0)], Annotated[int, Field(ge=0)]], ...] = ()


def read_examples(files: Sequence[Path], setting: str) -> list[Example]:
    """Return the examples of JSON lines files; SettingError with file and line for one that cannot be used."""
    examples = [example for file in files for example in _of_file(file, setting)]
    if not examples:
        raise SettingError(setting, f"no example in {', '.join(map(str, files)) or 'no file'}")
    return examples


def _of_file(file: Path, setting: str) -> Iterator[Example]:
    try:
        lines = file.read_text(encoding="utf-8").split("\n")  # JSON may hold other ends of lines as they are
    except (OSError, UnicodeDecodeError) as error:
        raise SettingError(setting, f"{file} cannot be read: {error}") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            example = Example.model_validate(json.loads(line))
        except ValidationError as error:
            raise SettingError(setting, f"{file}, line {number}: {explain(error)}") from error
        except ValueError as error:
            raise SettingError(setting, f"{file}, line {number}: no JSON object: {error}") from error
        for start, end in example.spans:
            if not start < end <= len(example.text):
                problem = f"[{start}, {end}] is no span of a text of {len(example.text)} characters"
                raise SettingError(setting, f"{file}, line {number}: spans: {problem}")
        yield example


def gold_blocks(example: Example, spans: Sequence[Span]) -> list[int]:
    """Return for each of the example's spans the block that holds most of it, the first of equals."""

    def shared(block: Span, start: int, end: int) -> int:
        return min(block.end, end) - max(block.start, start)

    return [max(range(len(spans)), key=lambda b: shared(spans[b], start, end)) for start, end in example.spans]
