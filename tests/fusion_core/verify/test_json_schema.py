"""The subset of JSON Schema against the library of the same name."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusion_core.verify.json_schema import check_schema, problem
from fusion_core.verify.specs import read_spec

NAMES = st.sampled_from(["a", "b", "c"])
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 3),
    st.sampled_from([0.5, 1.0, -2.0, 1e300]),
    st.sampled_from(["", "a", "bb"]),
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(NAMES, inner, max_size=3), max_leaves=12
)
TYPES = st.sampled_from(["null", "boolean", "integer", "number", "string", "array", "object"])


def schemas() -> st.SearchStrategy[Any]:
    def objects(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
        some = st.lists(inner, min_size=1, max_size=3)
        count = st.integers(0, 3)
        keys = {
            "type": TYPES | st.lists(TYPES, min_size=1, max_size=2, unique=True),
            "enum": st.lists(VALUES, min_size=1, max_size=3),
            "const": VALUES,
            "properties": st.dictionaries(NAMES, inner, max_size=2),
            "required": st.lists(NAMES, max_size=2, unique=True),
            "additionalProperties": inner,
            "items": inner,
            "prefixItems": some,
            "uniqueItems": st.booleans(),
            "allOf": some,
            "anyOf": some,
            "oneOf": some,
            "not": inner,
            "minimum": st.integers(-2, 2),
            "maximum": st.integers(-2, 2),
            "exclusiveMinimum": st.integers(-2, 2),
            "exclusiveMaximum": st.integers(-2, 2),
            **dict.fromkeys(
                ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties"), count
            ),
            "description": st.just("ignored"),
        }
        return st.fixed_dictionaries({}, optional=keys).map(lambda schema: dict(list(schema.items())[:6]))

    return st.recursive(st.booleans(), objects, max_leaves=6)


@given(schemas(), st.lists(VALUES, min_size=1, max_size=5))
def test_it_agrees_with_the_library(schema: Any, values: list[Any]) -> None:
    check_schema(schema)
    for value in values:
        assert (problem(value, schema) is None) == jsonschema.Draft202012Validator(schema).is_valid(value), value


def test_every_keyword_decides_something() -> None:
    """Random values rarely reach every bound: one value within and one outside, for each keyword."""
    for schema, good, bad in (
        ({"type": ["string", "null"]}, None, 1),
        ({"type": "integer"}, 1.0, True),
        ({"enum": [1, "a"]}, 1.0, True),
        ({"const": {"a": [1]}}, {"a": [1.0]}, {"a": [2]}),
        ({"properties": {"a": {"type": "string"}}}, {"b": 1}, {"a": 1}),
        ({"required": ["a"]}, {"a": None}, {}),
        ({"additionalProperties": False, "properties": {"a": True}}, {"a": 1}, {"b": 1}),
        ({"items": {"type": "string"}, "prefixItems": [True]}, [1, "a"], [1, 2]),
        ({"prefixItems": [False]}, [], [1]),
        ({"uniqueItems": True}, [1, True, "1"], [{"a": 1}, {"a": 1.0}]),
        ({"allOf": [{"minimum": 1}, {"maximum": 2}]}, 2, 3),
        ({"anyOf": [{"minimum": 3}, {"maximum": 1}]}, 1, 2),
        ({"oneOf": [{"minimum": 1}, {"maximum": 2}]}, 0, 1),
        ({"not": {"type": "string"}}, 1, "a"),
        ({"exclusiveMinimum": 1, "exclusiveMaximum": 3}, 2, 1),
        ({"minLength": 1, "maxLength": 2}, "ab", "abc"),
        ({"minItems": 1, "maxItems": 2}, [1], []),
        ({"minProperties": 1, "maxProperties": 1}, {"a": 1}, {"a": 1, "b": 2}),
    ):
        check_schema(schema)
        library = jsonschema.Draft202012Validator(schema)
        assert problem(good, schema) is None and library.is_valid(good), schema
        assert problem(bad, schema) is not None and not library.is_valid(bad), schema


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"pattern": "(a+)+$"}, "^pattern: not supported; allowed are additionalProperties, "),
        ({"properties": {"a": {"$ref": "#"}}}, r"^properties\.a\.\$ref: not supported"),
        ({"type": "str"}, "^type: 'str' is not allowed"),
        ({"anyOf": []}, "^anyOf: needs a list of schemas"),
        ({"items": 3}, "^items: a schema is an object, true or false"),
        ({"minItems": -1}, "^minItems: -1 is not allowed"),
        ({"minimum": "1"}, "^minimum: '1' is not allowed"),
        ({"required": "a"}, "^required: 'a' is not allowed"),
    ],
)
def test_a_schema_outside_the_subset_is_refused(schema: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_schema(schema)


def test_a_schema_that_is_nested_too_deeply_is_refused() -> None:
    schema: Any = True
    for _ in range(100):
        schema = {"items": schema}
    with pytest.raises(ValueError, match="nested deeper than 64"):
        check_schema(schema)


def test_answers_are_read_with_and_without_a_code_block() -> None:
    spec = read_spec({"kind": "json_schema", "schema": {"type": "object", "required": ["name"]}})
    assert spec.judge('```json\n{"name": "x"}\n```').right
    assert spec.judge(json.dumps({"name": 1})).right
    for wrong in ("", "{}", "[]", "{'name': 1}", 'Here it is: {"name": 1}', '{"name": NaN}', "[" * 10**6, "1" * 10**6):
        verdict = spec.judge(wrong)
        assert not verdict.right and verdict.reason
