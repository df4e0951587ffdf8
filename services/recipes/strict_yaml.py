"""YAML without surprises: text that YAML would drop or turn into something else is refused, naming its line.

PyYAML reads YAML 1.1. Where YAML 1.2 and most readers see something else in an unquoted word, it is refused: `on`,
`off`, `yes`, `no` (true or false there, text here), `010` (8 or 10) and `1:30` (90 or text). Dates stay text. Numbers
such as 1e-4 are numbers, as in YAML 1.2; YAML 1.1 takes them for text.
"""

from __future__ import annotations

import math
import re
from typing import Any

import yaml

_FLOAT = re.compile(r"[-+]?([0-9][0-9_]*\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+")
_OCTAL = re.compile(r"[-+]?0[0-9_]+")
_SEXAGESIMAL = re.compile(r"[-+]?[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?")
_BOOL, _INT, _REAL, _TIMESTAMP = (f"tag:yaml.org,2002:{kind}" for kind in ("bool", "int", "float", "timestamp"))


class StrictYamlError(ValueError):
    """Text that is not YAML, or that YAML would read as something else than is written; the message names the line."""


def read_yaml(text: str) -> Any:
    """Return the value of one YAML document; raises StrictYamlError, in one line, for what is broken or ambiguous."""
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _check(node, set())
        return loader.construct_document(node)
    except StrictYamlError:
        raise
    except yaml.MarkedYAMLError as error:
        problem = ", ".join(filter(None, (error.context, error.problem)))
        raise StrictYamlError(_at(error.problem_mark or error.context_mark, f"not YAML: {problem}")) from error
    except (yaml.YAMLError, ValueError) as error:  # ValueError: an integer of thousands of digits
        raise StrictYamlError(f"not YAML: {' '.join(str(error).split())}") from error
    except RecursionError as error:
        raise StrictYamlError("not YAML: too deeply nested") from error


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with YAML 1.2's floats, and without dates."""


class StrictDumper(yaml.SafeDumper):
    """PyYAML's safe dumper; it also puts text in quotes that YAML 1.2 takes for a number, such as 1e5."""


def write_yaml(value: Any) -> str:
    """Return a value as a YAML document that `read_yaml`, and any other reader, reads the same; keys keep order."""
    return yaml.dump(value, Dumper=StrictDumper, sort_keys=False)


def _check(node: yaml.Node, checked: set[int]) -> None:
    """Refuse keys that stand twice and ambiguous words below a node; anchors are looked at once."""
    if id(node) in checked:
        return
    checked.add(id(node))
    if isinstance(node, yaml.ScalarNode):
        if node.style is None and (problem := _ambiguity(node.tag, node.value)):
            raise StrictYamlError(_at(node.start_mark, problem))
        return
    if isinstance(node, yaml.MappingNode):
        _check_keys(node)
    for child in node.value:
        for part in child if isinstance(child, tuple) else (child,):
            _check(part, checked)


def _check_keys(node: yaml.MappingNode) -> None:
    lines: dict[tuple[str, str], int] = {}
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise StrictYamlError(_at(key.start_mark, "a key must be a word or a number"))
        name, line = (key.tag, key.value), key.start_mark.line + 1  # `a` and "a" are one key, 1 and "1" are two
        if name in lines:
            problem = f"the key {key.value} stands here and in line {lines[name]} of the same section"
            raise StrictYamlError(_at(key.start_mark, problem))
        lines[name] = line


def _at(mark: yaml.Mark | None, problem: str) -> str:
    return problem if mark is None else f"line {mark.line + 1}, column {mark.column + 1}: {problem}"


def _ambiguity(tag: str, word: str) -> str | None:
    """Return why an unquoted word is refused; None for one that all readers read the same."""
    if tag == _BOOL and word.lower() not in {"true", "false"}:
        return f"{word} is a truth value to some readers and text to others; write true or false, or put it in quotes"
    if tag in {_INT, _REAL} and _SEXAGESIMAL.fullmatch(word):
        return f"{word} is a number of base 60 to some readers and text to others; put it in quotes"
    if tag == _REAL and not math.isfinite(float(re.sub(r"_|\.(?=[a-z])", "", word.lower()))):
        return f"{word} is no finite number"
    if tag == _INT and _OCTAL.fullmatch(word):
        return f"{word} is octal to some readers and decimal to others; leave the leading zero out, or put it in quotes"
    return None


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != _TIMESTAMP]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _resolver in (_Loader, StrictDumper):
    _resolver.add_implicit_resolver(_REAL, re.compile(f"^(?:{_FLOAT.pattern})$"), list("-+.0123456789"))
