"""Everything that the pages name exists: files, links, commands with their options, keys of a recipe."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from typing import Any

import pytest
import typer.main
import yaml
from typer.core import TyperGroup

from services.cli.app import app
from services.recipes.recipe import Recipe
from services.sample.config import SampleConfig
from services.source.config import parse_source
from tests.examples.pages import PAGES, REPOSITORY, anchors, code_blocks, code_spans, commands, links, tables, text_of

_FOLDERS = ("services", "fusion_core", "tests", "protos", "k8s", "docs", "examples", "requirements")
SECTIONS = (
    *("curate", "corpus", "sources", "target", "fusion", "service", "distill", "sample"),
    *("recall", "reward", "verify", "posttrain"),
)


@pytest.mark.parametrize("page", PAGES)
def test_files_and_folders_exist(page: str) -> None:
    named = [span for span in code_spans(text_of(page)) if re.fullmatch(rf"({'|'.join(_FOLDERS)})/[\w./-]*", span)]
    assert [path for path in named if "NAME" not in path and not (REPOSITORY / path).exists()] == []


@pytest.mark.parametrize("page", [*PAGES, "k8s/README.md"])
def test_links_lead_to_a_file_and_a_heading(page: str) -> None:
    folder = (REPOSITORY / page).parent
    for link in links(page):
        path, _, anchor = link.partition("#")
        target = folder / path if path else REPOSITORY / page
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(str(target.resolve().relative_to(REPOSITORY))), link


@pytest.mark.parametrize("page", PAGES)
def test_commands_and_their_options_exist(page: str) -> None:
    root = typer.main.get_command(app)
    for line in commands(page):
        words = line.split()
        if words[0] != "fusion" or len(words) == 1 or words[1].isupper():
            continue
        command = root
        for word in words[1:]:
            if word.startswith("-") or not isinstance(command, TyperGroup):
                break
            assert word.rstrip(",") in command.commands, line
            command = command.commands[word.rstrip(",")]
        options = {option for parameter in command.params for option in parameter.opts} | {"--help"}
        assert {word for word in words if word.startswith("--")} <= options, line


@pytest.mark.parametrize("page", PAGES)
def test_targets_of_make_and_modules_exist(page: str) -> None:
    targets = set(re.findall(r"^([a-z0-9-]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE))
    for line in commands(page):
        words = line.split()
        if words[0] == "make" and len(words) > 1:
            assert words[1] in targets, line
        for module in re.findall(r"python -m ([\w.]+)", line):
            assert module.endswith(".NAME") or importlib.util.find_spec(module) is not None, line


def recipe_schema() -> tuple[dict[str, set[str]], set[str]]:
    """Keys of each section of a recipe, nested ones included, and the values that keys with a choice can have."""
    schema = Recipe.model_json_schema(by_alias=True)
    values: set[str] = set()

    def walk(part: Any) -> Iterator[str]:
        if isinstance(part, list):
            for item in part:
                yield from walk(item)
        elif isinstance(part, dict):
            if reference := part.get("$ref"):
                yield from walk(schema["$defs"][reference.rpartition("/")[2]])
            values.update(value for value in [*part.get("enum", ()), part.get("const")] if isinstance(value, str))
            for key, value in part.get("properties", {}).items():
                yield key
                yield from walk(value)
            for name in ("anyOf", "oneOf", "allOf", "items", "additionalProperties", "prefixItems"):
                yield from walk(part.get(name))

    keys = {section: set(walk(schema["properties"][section])) for section in SECTIONS}
    return keys | {"recipe": set(schema["properties"])}, values


@pytest.mark.parametrize(
    ("page", "heading", "section", "column"),
    [
        ("docs/concepts.md", "Settings of the methods", "fusion", 1),
        ("docs/concepts.md", "The mixture", "fusion", 0),
        ("docs/training.md", "The recipe", "recipe", 0),
        ("docs/training.md", "Section `corpus`", "corpus", 0),
        ("docs/training.md", "Section `target`", "target", 0),
        ("docs/corpus.md", "Keys", "curate", 0),
        ("docs/training.md", "Section `distill`", "distill", 1),
        ("docs/training.md", "Section `service`", "service", 1),
        ("docs/sources.md", "Keys", "sources", 1),
        ("docs/sources.md", "Answers", "sample", 0),
        ("docs/recall.md", "Keys", "recall", 0),
        ("docs/verify.md", "Keys", "verify", 0),
        ("docs/reward.md", "Keys", "reward", 0),
        ("docs/posttrain.md", "The gate", "posttrain", 0),
        ("docs/posttrain.md", "Data", "posttrain", 0),
        ("docs/posttrain.md", "Stages", "posttrain", 0),
        ("docs/failures.md", "When sources fail", "service", 1),
    ],
)
def test_keys_in_a_table_are_keys_of_the_recipe(page: str, heading: str, section: str, column: int) -> None:
    keys, values = recipe_schema()
    [table] = [rows for found, rows in tables(page) if found == heading]
    spans = [span for row in table[1:] for span in code_spans(row[column])]
    named = [re.match(r"[a-z_0-9.]+", span) for span in spans if re.fullmatch(r"[a-z_0-9.]+(: .*)?", span)]
    names = [part for match in named if match for part in match.group().rstrip(".").split(".")]
    assert names
    assert set(names) - keys[section] - values - set(SECTIONS) == set()


def test_every_key_of_a_recipe_is_on_a_page() -> None:
    schema = Recipe.model_json_schema(by_alias=True)["$defs"]
    spans = [span for page in PAGES for span in code_spans(text_of(page))]
    named = {word for span in spans for word in re.findall(r"\w+", span)}
    sections = {name for name in schema if name.endswith("Config")} | {"SourceAtAddress"}
    for section in sorted(sections):
        assert set(schema[section]["properties"]) - named == set(), section


def test_recipes_on_the_pages_are_valid() -> None:
    [recipe] = code_blocks("README.md", "yaml")
    assert len(Recipe.model_validate(yaml.safe_load(recipe)).sources) == 2
    sources, served, sample = code_blocks("docs/sources.md", "yaml")
    assert SampleConfig.model_validate(yaml.safe_load(sample)["sample"]).sources == ("smollm2",)
    assert [parse_source(source).name for source in yaml.safe_load(sources)["sources"]] == ["gemma3", "elsewhere"]
    assert [parse_source(source).name for source in yaml.safe_load(served)["sources"]] == ["teacher"]
    [posttrain] = code_blocks("docs/posttrain.md", "yaml")
    values = yaml.safe_load(recipe) | yaml.safe_load(posttrain)
    assert [stage.kind for stage in Recipe.model_validate(values).posttrain.stages] == ["sft", "dpo", "grpo"]
    [curated] = code_blocks("docs/corpus.md", "yaml")
    assert Recipe.model_validate(yaml.safe_load(curated)).reads_curated
