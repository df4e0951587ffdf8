"""What YAML would drop or turn into something else without a word is refused with its line; the rest reads as ever."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from services.recipes.load import load_recipe, read_overrides
from services.recipes.recipe import RecipeError
from services.recipes.strict_yaml import StrictYamlError, read_yaml, write_yaml

REFUSED = [
    ("a: 1\nb: 2\na: 3", "line 3, column 1: the key a stands here and in line 1"),
    ('a: 1\n"a": 3', "line 2, column 1: the key a stands here and in line 1"),
    ("x: {b: 1,\n  c: 2, b: 1}", "line 2, column 9: the key b stands here and in line 1"),
    ("- {b: 1}\n- b: 1\n  b: 2", "line 3, column 3: the key b stands here and in line 2"),
    ("x: &x {a: 1}\ny:\n  <<: *x\n  <<: *x", "line 4, column 3: the key << stands here and in line 3"),
    ("x: &x {a: 1, a: 2}\ny: *x", "line 1, column 14: the key a"),
    ("a: on", "line 1, column 4: on is a truth value to some readers and text to others"),
    ("a: [x, No]", "line 1, column 8: No is a truth value"),
    ("on: 1", "line 1, column 1: on is a truth value"),
    ("a: 010", "010 is octal to some readers and decimal to others"),
    ("a: -0_17", "-0_17 is octal"),
    ("a: 1:30", "1:30 is a number of base 60"),
    ("a: 12:30:45.5", "12:30:45.5 is a number of base 60"),
    ("a: .nan", ".nan is no finite number"),
    ("a: -.Inf", "-.Inf is no finite number"),
    ("a: 1e999", "1e999 is no finite number"),
    ("? [1, 2]\n: 3", "line 1, column 3: a key must be a word or a number"),
    ("{", "not YAML: while parsing a flow node"),
    ("a: b: c", "line 1, column 5: not YAML: mapping values are not allowed here"),
    ("a: 1\n---\nb: 2", "line 2, column 1: not YAML: expected a single document"),
    ("a: *b", "found undefined alias 'b'"),
    ("a: !!python/object:os.system x", "could not determine a constructor"),
    ("a: \x07", "not YAML: unacceptable character"),
    ("a: " + "9" * 5000, "not YAML: Exceeds the limit"),
    ("a: " + "[" * 3000, "not YAML: too deeply nested"),
]


@pytest.mark.parametrize(("text", "message"), REFUSED, ids=[text[:20] for text, _ in REFUSED])
def test_what_would_be_read_as_something_else_is_refused_in_one_line(text: str, message: str) -> None:
    with pytest.raises(StrictYamlError) as error:
        read_yaml(text)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a: 1e-4", {"a": 1e-4}),
        ("a: 2E5", {"a": 2e5}),
        ("a: 1e-4b", {"a": "1e-4b"}),
        ("a: 2024-01-31", {"a": "2024-01-31"}),
        ("a: 'on'\n'no': '010'", {"a": "on", "no": "010"}),
        ("a: true\nb: False\nc: null\nd: ~\ne:", {"a": True, "b": False, "c": None, "d": None, "e": None}),
        ("a: 0\nb: 0.5\nc: 1_000\nd: 0x10", {"a": 0, "b": 0.5, "c": 1000, "d": 16}),
        ("1: a\n'1': b", {1: "a", "1": "b"}),
        ("x: &x {a: 1, b: 1}\ny: {<<: *x, b: 2}", {"x": {"a": 1, "b": 1}, "y": {"a": 1, "b": 2}}),
        ("x: &x [1]\ny: [*x, *x]", {"x": [1], "y": [[1], [1]]}),
        ("", None),
    ],
)
def test_what_every_reader_understands_is_read(text: str, value: object) -> None:
    assert read_yaml(text) == value


SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.text(max_size=8)
)
WORDS = st.sampled_from(["on", "no", "010", "1:30", "2024-01-31", "1e5", ".nan", "<<", "=", "null", "0o7", "1e999"])


@given(st.recursive(SCALARS | WORDS, lambda v: st.lists(v) | st.dictionaries(st.text(max_size=4) | WORDS, v)))
def test_what_is_written_reads_back_here_and_elsewhere(value: object) -> None:
    assert read_yaml(write_yaml(value)) == value
    assert yaml.safe_load(write_yaml(value)) == value


def test_a_recipe_with_a_section_twice_is_refused_with_both_lines(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("name: a\nfusion: {k_out: 8}\ndistill: {}\nfusion: {tau: 1}\n")
    with pytest.raises(RecipeError, match=r"recipe.yaml: line 4, column 1: the key fusion .* line 2"):
        load_recipe(path)


def test_settings_of_the_command_line_are_read_alike() -> None:
    given = ["distill.learning_rate=1e-4", "name=a=b", "sources=[a, b]", "service.store=", "x.y=2024-01-31"]
    assert read_overrides(given) == {
        "distill.learning_rate": 1e-4,
        "name": "a=b",
        "sources": ["a", "b"],
        "service.store": None,
        "x.y": "2024-01-31",
    }


@pytest.mark.parametrize("setting", ["x={", "x=on", "x={a: 1, a: 2}", "x", "=1", "x=a: b: c", "x=[s3://me:secret@b"])
def test_a_setting_that_cannot_be_read_is_named_in_one_line(setting: str) -> None:
    with pytest.raises(RecipeError) as error:
        read_overrides([setting])
    assert str(error.value).startswith("--set ")
    assert "\n" not in str(error.value) and "secret" not in str(error.value)
