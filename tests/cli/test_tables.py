"""What users and models write is shown as it is: never read as markup, never obeyed by the terminal."""

from __future__ import annotations

import ast
import io
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

import services
from fusion_core.blocks import SourceShare
from fusion_core.vocabulary import Vocabulary
from services.base.progress_bars import deployment_progress, model_progress, plain_console, window_progress
from services.cli.app import app
from services.cli.tables import show_block, show_evaluation
from tests.fakes.blocks import random_block
from tests.fakes.tokenizers import SPECIAL, description, wrap

NASTY = "[/INST] [red]x[/nothing] :smile: \\[b] [link=http://x]"


def console() -> Console:
    made = plain_console()
    made.file, made.width = io.StringIO(), 400
    return made


def printed(on: Console) -> str:
    assert isinstance(on.file, io.StringIO)
    return on.file.getvalue()


def vocabulary_with(*names: str) -> Vocabulary:
    described = description("byte_level")
    size = len(described["model"]["vocab"])
    described["added_tokens"] += [
        {**described["added_tokens"][0], "id": size + n, "content": name} for n, name in enumerate(names)
    ]
    assert SPECIAL[0] == described["added_tokens"][0]["content"]
    return wrap(described)


def test_tokens_that_look_like_markup_or_escapes_are_printed() -> None:
    vocabulary = vocabulary_with("[/INST]", "[bold]", "\x1b[2J")
    ids = [vocabulary.special_tokens[name] for name in ("[/INST]", "[bold]", "\x1b[2J")]
    block = random_block(num_tokens=3, k=4)
    block.topk_ids_TK[:, :3] = ids
    block.topk_ids_TK[:, 3] = 30
    block.mask_T[:] = True
    text = b"[/a]\x1b:b:"
    shown = console()
    changed = replace(block, text_bytes=text, vocabulary="[/v]")
    changed.byte_ends_T[:] = [4, 5, 8]
    show_block(changed, vocabulary, 4, shown)
    for cell in ("[/INST] 0.", "[bold] 0.", "\\x1b[2J 0.", "[/a]", ":b:", "target vocabulary [/v]"):
        assert cell in printed(shown)
    assert "\x1b" not in printed(shown)


def test_a_source_without_a_usable_row_has_no_number() -> None:
    block = random_block(num_tokens=3, k=4)
    block.mask_T[:] = False
    nothing = float("nan")
    shares = (SourceShare("blind", True, 0.0, nothing), SourceShare("sees", True, 1.0, 0.5))
    shown = console()
    show_block(replace(block, shares=shares, covered_mass=nothing), None, 1, shown)
    assert "source blind: weight 0.000, - nats/byte\nsource sees: weight 1.000, 0.500 nats/byte\n" in printed(shown)
    assert "covered mass -, masked 100.0%" in printed(shown)
    assert "nan" not in printed(shown)


def test_names_in_tables_and_progress_are_printed() -> None:
    shown = console()
    nats = {"value": 1.0, "low": 0.5, "high": 1.5}
    result = {"models": {NASTY: {"nats_per_byte": nats, "accuracy": nats}}, "bytes": 3, "documents": 1}
    tasks = {NASTY: {NASTY: {NASTY: 0.5}}}
    show_evaluation({"corpus": NASTY, "split": "x", "trainings": {}, "domains": {"all": result}, "tasks": tasks}, shown)
    with model_progress(shown, NASTY) as model, deployment_progress(shown) as states, window_progress(shown) as windows:
        model(NASTY, 0.5)
        states({NASTY: "RUNNING"})
        windows(NASTY, 1, 1)
    assert printed(shown).count("[/INST] [red]x[/nothing] :smile: \\[b] [link=http://x]") >= 6


def test_progress_on_a_terminal_takes_no_markup_either() -> None:
    shown = Console(file=io.StringIO(), width=400, force_terminal=True, markup=False, emoji=False)
    with model_progress(shown, NASTY) as model:
        model(NASTY, 0.5)
    with deployment_progress(shown) as states:
        states({NASTY: "RUNNING"})
    with window_progress(shown) as windows:
        windows(NASTY, 1, 1)
    assert "[/INST]" in printed(shown)


def test_every_console_and_every_column_of_text_is_a_plain_one() -> None:
    """Rich reads markup unless it is told not to, for each console and each column of a progress bar."""
    for path in sorted(Path(services.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            assert name not in {"from_markup", "rprint"}, path
            if name == "Console":
                assert (given.get("markup"), given.get("emoji")) == ("False", "False"), path
            if name == "TextColumn":
                assert given.get("markup") == "False", path


@pytest.mark.parametrize(
    "arguments",
    [
        ["[/INST]"],
        ["validate", "[/INST].yaml"],
        ["validate", "quickstart", "--set", "[/INST]"],
        ["validate", "quickstart", "--set", "[/INST]=1"],
        ["validate", "quickstart", "--set", 'name="[/INST]"'],
        ["validate", "quickstart", "--set", "x={"],
        ["validate", "quickstart", "--set", 'sources.0.model="[/INST]"'],
        ["validate", "quickstart", "--set", "sources.9.name=x"],
        ["validate", "quickstart", "--set", "name..x=1"],
        ["validate", "quickstart", "--[/INST]"],
        ["fetch", "--text", "x", "--address", "[/INST]"],
        ["fetch", "--text", "x", "--top", "[/INST]"],
        ["fetch", "--text", ""],
        ["models", "fetch", "[/INST]"],
        ["down", "[/INST]"],
        ["runs", "[/INST]"],
        ["report", "[/INST]"],
        ["k8s", "render", "quickstart", "--base", "[/INST]"],
        ["k8s", "wait"],
    ],
    ids=" ".join,
)
def test_a_mistake_ends_with_code_2_and_its_words(arguments: list[str]) -> None:
    done = CliRunner().invoke(app, arguments, terminal_width=300)
    assert (done.exit_code, "Traceback" in done.output) == (2, False), (done.output, done.exception)
    if "[/INST]" in " ".join(arguments) and "--top" not in arguments:  # typer does not repeat a number that is none
        assert "[/INST]" in done.stderr
