"""Check JSON against a subset of JSON Schema, draft 2020-12, in time linear in schema times value.

The subset has no regular expressions and no references, which an answer or a schema could use to take for ever. A
keyword outside it is an error of the schema, never ignored; `$schema`, `title`, `description`, `default`, `examples`
say nothing about a value.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

_DEEPEST = 64
"""Depth up to which schemas may be nested."""


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


_TYPES: dict[str, Callable[[Any], bool]] = {
    "null": lambda value: value is None,
    "boolean": lambda value: isinstance(value, bool),
    "integer": lambda value: _is_number(value) and (isinstance(value, int) or value.is_integer()),
    "number": _is_number,
    "string": lambda value: isinstance(value, str),
    "array": lambda value: isinstance(value, list),
    "object": lambda value: isinstance(value, dict),
}
_SILENT = frozenset({"$schema", "$id", "$comment", "title", "description", "default", "examples"})
_COUNTS = {
    "minLength": (str, False), "maxLength": (str, True), "minItems": (list, False), "maxItems": (list, True),
    "minProperties": (dict, False), "maxProperties": (dict, True),
}  # fmt: skip
_BOUNDS: dict[str, Callable[[Any, Any], bool]] = {
    "minimum": lambda value, bound: value >= bound,
    "maximum": lambda value, bound: value <= bound,
    "exclusiveMinimum": lambda value, bound: value > bound,
    "exclusiveMaximum": lambda value, bound: value < bound,
}
_LISTS = frozenset({"allOf", "anyOf", "oneOf", "prefixItems"})
_SCHEMAS = frozenset({"not", "items", "additionalProperties"})
KEYWORDS = frozenset(
    {"type", "enum", "const", "properties", "required", "uniqueItems", *_COUNTS, *_BOUNDS, *_LISTS, *_SCHEMAS}
)
"""Keywords that are checked."""


def check_schema(schema: Any, where: str = "", depth: int = 0) -> None:
    """Raise ValueError naming the keyword of a schema that is not in the subset, or has a wrong value."""
    if isinstance(schema, bool):
        return
    if not isinstance(schema, dict):
        raise ValueError(f"{where or 'schema'}: a schema is an object, true or false; got {schema!r:.80}")
    if depth > _DEEPEST:
        raise ValueError(f"{where}: nested deeper than {_DEEPEST}")
    for key, value in schema.items():
        path = f"{where}.{key}".lstrip(".")
        if key in _SILENT:
            continue
        if key not in KEYWORDS:
            raise ValueError(f"{path}: not supported; allowed are {', '.join(sorted(KEYWORDS))}")
        if key in _SCHEMAS:
            check_schema(value, path, depth + 1)
        elif key in _LISTS or key == "properties":
            _check_parts(key, value, path, depth)
        elif not _fits(key, value):
            raise ValueError(f"{path}: {value!r:.80} is not allowed here")


def _check_parts(key: str, value: Any, path: str, depth: int) -> None:
    is_object = key == "properties"
    if not isinstance(value, dict if is_object else list) or not (value or is_object):
        raise ValueError(f"{path}: needs {'an object' if is_object else 'a list'} of schemas, got {value!r:.80}")
    for name, part in value.items() if isinstance(value, dict) else enumerate(value):
        check_schema(part, f"{path}.{name}", depth + 1)


def _fits(key: str, value: Any) -> bool:
    if key == "type":
        names = value if isinstance(value, list) else [value]
        return bool(names) and all(isinstance(name, str) and name in _TYPES for name in names)
    if key == "required":
        return isinstance(value, list) and all(isinstance(name, str) for name in value)
    if key == "enum":
        return isinstance(value, list)
    if key == "uniqueItems":
        return isinstance(value, bool)
    if key in _COUNTS:
        return isinstance(value, int) and not isinstance(value, bool) and value >= 0
    return _is_number(value) if key in _BOUNDS else True


def problem(value: Any, schema: Any) -> str | None:
    """Return the first thing that is wrong with a value by a checked schema, or None."""
    return next(_problems(value, schema, "value"), None)


def _problems(value: Any, schema: Any, where: str) -> Iterator[str]:
    if isinstance(schema, bool):
        if not schema:
            yield f"{where}: nothing is allowed here"
        return
    if "type" in schema:
        names = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
        if not any(_TYPES[name](value) for name in names):
            yield f"{where}: is not {' or '.join(names)}"
    if "const" in schema and canonical(value) != canonical(schema["const"]):
        yield f"{where}: is not the one value that is allowed"
    if "enum" in schema and canonical(value) not in set(map(canonical, schema["enum"])):
        yield f"{where}: is none of the values that are allowed"
    yield from _sizes(value, schema, where)
    yield from _combined(value, schema, where)
    if isinstance(value, dict):
        yield from _of_object(value, schema, where)
    elif isinstance(value, list):
        yield from _of_list(value, schema, where)


def _sizes(value: Any, schema: dict[str, Any], where: str) -> Iterator[str]:
    for key, (kind, is_upper) in _COUNTS.items():
        if key in schema and isinstance(value, kind):
            good = len(value) <= schema[key] if is_upper else len(value) >= schema[key]
            if not good:
                yield f"{where}: {key} is {schema[key]}, it has {len(value)}"
    for key, holds in _BOUNDS.items():
        if key in schema and _is_number(value) and not holds(value, schema[key]):
            yield f"{where}: {key} is {schema[key]}"


def _combined(value: Any, schema: dict[str, Any], where: str) -> Iterator[str]:
    for part in schema.get("allOf", ()):
        yield from _problems(value, part, where)
    for key in ("anyOf", "oneOf"):
        if key in schema:
            fitting = sum(problem(value, part) is None for part in schema[key])
            if fitting == 0 or (key == "oneOf" and fitting > 1):
                yield f"{where}: fits {fitting} schemas of {key}"
    if "not" in schema and problem(value, schema["not"]) is None:
        yield f"{where}: fits the schema of not"


def _of_object(value: dict[str, Any], schema: dict[str, Any], where: str) -> Iterator[str]:
    properties = schema.get("properties", {})
    for name in schema.get("required", ()):
        if name not in value:
            yield f"{where}: lacks {name!r}"
    for name, item in value.items():
        if name in properties:
            yield from _problems(item, properties[name], f"{where}.{name}")
        elif "additionalProperties" in schema:
            yield from _problems(item, schema["additionalProperties"], f"{where}.{name}")


def _of_list(value: list[Any], schema: dict[str, Any], where: str) -> Iterator[str]:
    first = schema.get("prefixItems", ())
    for index, item in enumerate(value):
        if index < len(first):
            yield from _problems(item, first[index], f"{where}[{index}]")
        elif "items" in schema:
            yield from _problems(item, schema["items"], f"{where}[{index}]")
    if schema.get("uniqueItems") and len(set(map(canonical, value))) < len(value):
        yield f"{where}: an item is there twice"


def canonical(value: Any) -> str:
    """Return a text that equal JSON values have in common: 1 and 1.0 are equal, 1 and true are not."""
    return json.dumps(_plain(value), sort_keys=True)


def _plain(value: Any) -> Any:
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, list):
        return list(map(_plain, value))
    return {key: _plain(item) for key, item in value.items()} if isinstance(value, dict) else value
