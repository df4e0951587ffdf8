"""The request to a verifier: an object with `kind` and its keys, as a row of a data set or a message carries it.

{"kind": "answer", "expected": "3/4"}
{"kind": "constraints", "constraints": [{"name": "words", "at_most": 50}, {"name": "no_commas"}]}
{"kind": "json_schema", "schema": {"type": "object", "required": ["name"]}}
{"kind": "program", "functions": ["add"], "tests": "assert add(1, 2) == 3"}
"""

from __future__ import annotations

import json
import keyword
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

from fusion_core.verify.constraints import check_constraint, fulfils, read_json
from fusion_core.verify.final_answer import final_answer
from fusion_core.verify.json_schema import check_schema, problem
from fusion_core.verify.values import LONGEST_ANSWER, same_answer
from fusion_core.verify.verdict import Verdict, failed, passed

MOST_CONSTRAINTS = 64


@dataclass(frozen=True, slots=True)
class AnswerSpec:
    """The final answer has this value; `tolerance` is relative, see fusion_core/verify/values.py."""

    kind: ClassVar[str] = "answer"
    expected: str
    tolerance: float = 0.0

    def judge(self, text: str) -> Verdict:
        """Return the verdict on an answer."""
        found = final_answer(text)
        if found is None:
            return failed("no final answer was found")
        same = same_answer(found, self.expected, tolerance=self.tolerance)
        return passed() if same else failed(f"the final answer is {found:.80}, not {self.expected:.80}")


@dataclass(frozen=True, slots=True)
class ConstraintsSpec:
    """The answer fulfils all of these constraints, given by name and parameters; the score is the share fulfilled."""

    kind: ClassVar[str] = "constraints"
    constraints: tuple[tuple[str, Mapping[str, Any]], ...]

    def judge(self, text: str) -> Verdict:
        """Return the verdict on an answer."""
        broken = [name for name, parameters in self.constraints if not fulfils(text, name, parameters)]
        if not broken:
            return passed()
        return failed(f"not fulfilled: {', '.join(broken)}", 1 - len(broken) / len(self.constraints))


@dataclass(frozen=True, slots=True)
class JsonSchemaSpec:
    """The answer is JSON that fits this schema; see fusion_core/verify/json_schema.py for the keywords."""

    kind: ClassVar[str] = "json_schema"
    schema: Any

    def judge(self, text: str) -> Verdict:
        """Return the verdict on an answer."""
        try:
            value = read_json(text)
            found = problem(value, self.schema)
        except ValueError as error:
            return failed(f"not JSON: {error}")
        except RecursionError:
            return failed("nested too deeply")
        return passed() if found is None else failed(found)


@dataclass(frozen=True, slots=True)
class ProgramSpec:
    """The answer is Python code that defines `functions`, which `tests` call; the tests raise where it is wrong.

    Attributes:
        functions: names that the tests call; arguments and results are passed by value, as plain data.
        tests: Python code.
        prompt: code that the answer goes on with, or stands below; the tests may use what it defines.
    """

    kind: ClassVar[str] = "program"
    functions: tuple[str, ...]
    tests: str
    prompt: str = ""


Spec: TypeAlias = AnswerSpec | ConstraintsSpec | JsonSchemaSpec | ProgramSpec


def read_spec(value: Any) -> Spec:
    """Return the spec in an object; raises ValueError naming the key that is wrong and what is allowed."""
    given = value.get("kind") if isinstance(value, dict) else value
    if not isinstance(value, dict) or not isinstance(given, str) or given not in _READERS:
        raise ValueError(f"kind: {given!r:.80} is none of {', '.join(_READERS)}")
    allowed, read = _READERS[given]
    if unknown := sorted(set(value) - {"kind", *allowed}):
        raise ValueError(f"{unknown[0]}: unknown key; kind {given} has {', '.join(allowed)}")
    return read(value)


def parse_spec(data: bytes) -> Spec:
    """Return the spec in JSON; raises ValueError as `read_spec` does."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON: {error}") from error
    return read_spec(value)


def _answer(value: dict[str, Any]) -> AnswerSpec:
    expected, tolerance = value.get("expected"), value.get("tolerance", 0.0)
    if type(expected) in {int, float}:
        expected = str(expected)
    if not isinstance(expected, str) or not expected.strip() or len(expected) > LONGEST_ANSWER:
        raise ValueError(
            f"expected: a number, or a string of at most {LONGEST_ANSWER} characters that is not blank; "
            f"got {expected!r:.80}"
        )
    if type(tolerance) not in {int, float} or not 0 <= tolerance < 1:
        raise ValueError(f"tolerance: a number from 0 to below 1, got {tolerance!r:.80}")
    return AnswerSpec(expected, float(tolerance))


def _constraints(value: dict[str, Any]) -> ConstraintsSpec:
    given = value.get("constraints")
    if not isinstance(given, list) or not 1 <= len(given) <= MOST_CONSTRAINTS:
        raise ValueError(f"constraints: a list of 1 to {MOST_CONSTRAINTS} objects")
    checked = []
    for index, constraint in enumerate(given):
        try:
            checked.append(check_constraint(constraint))
        except ValueError as error:
            raise ValueError(f"constraints[{index}].{error}") from error
    return ConstraintsSpec(tuple(checked))


def _json_schema(value: dict[str, Any]) -> JsonSchemaSpec:
    if "schema" not in value:
        raise ValueError("schema: is missing")
    try:
        check_schema(value["schema"])
    except ValueError as error:
        raise ValueError(f"schema: {error}") from error
    return JsonSchemaSpec(value["schema"])


def _program(value: dict[str, Any]) -> ProgramSpec:
    functions, tests, prompt = value.get("functions"), value.get("tests"), value.get("prompt", "")
    if not isinstance(functions, list) or not functions or not all(map(_is_name, functions)):
        raise ValueError("functions: a list of at least one name of a function")
    for key, text in (("tests", tests), ("prompt", prompt)):
        if not isinstance(text, str) or (key == "tests" and not text.strip()):
            raise ValueError(f"{key}: Python code as a string, got {text!r:.80}")
    return ProgramSpec(tuple(functions), str(tests), prompt)


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and value.isidentifier() and not keyword.iskeyword(value)


_READERS: dict[str, tuple[tuple[str, ...], Callable[[dict[str, Any]], Spec]]] = {
    "answer": (("expected", "tolerance"), _answer),
    "constraints": (("constraints",), _constraints),
    "json_schema": (("schema",), _json_schema),
    "program": (("functions", "tests", "prompt"), _program),
}
"""For each kind its keys, and the function that reads it."""
KINDS = tuple(_READERS)
