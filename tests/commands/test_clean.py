"""`fusion corpus` from a recipe to the corpus that reads what is left."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from services.base.files import Files
from services.base.progress_bars import plain_console
from services.cli.app import app
from services.commands.clean import clean_here
from services.commands.prepare import corpus_and_target
from services.corpus.prepare import plan_corpus, read_text
from services.recipes import load_recipe
from services.recipes.recipe import RecipeError
from services.recipes.validate import check_recipe
from tests.fakes.heap.texts import prose

BYTES = 1_000_000


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A recipe over two files of documents; one is short, one there twice, one holds mark-up."""
    monkeypatch.chdir(tmp_path)
    texts = [text for _, text in prose(most=12)]
    rows = [{"text": text, "domain": "books" if n % 2 else "web"} for n, text in enumerate(texts)]
    rows += [rows[0], {"text": "short"}, {"text": "<script>alert(1)</script>\n# |"}]
    for name, part in (("a", rows[:8]), ("b", rows[8:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    return {
        "name": "mine",
        "curate": {
            "files": ["*.jsonl"], "shards": 2, "workers": 1, "seconds_per_megabyte": {"a": 1000},
            "rules": {"fineweb": False, "repetition": False, "min_words": 20},
        },
        "sources": [{"name": "a", "model": "smollm2-135m-instruct"}],
        "target": {"model": "smollm2-135m-instruct"},
    }  # fmt: skip


def written(recipe: dict[str, Any]) -> str:
    Path("mine.yaml").write_text(yaml.safe_dump(recipe))
    return "mine.yaml"


def test_the_corpus_is_what_is_left(recipe: dict[str, Any]) -> None:
    file = written(recipe)
    with pytest.raises(RecipeError, match=r"curate.files: they are not cleaned yet; run `fusion corpus`"):
        corpus_and_target(load_recipe(file))
    done = CliRunner().invoke(app, ["corpus", file])
    assert done.exit_code == 0, done.output
    assert "15 documents = " in done.stdout
    assert "exact_copy 1" in done.stdout
    ledger = json.loads(Path("runs/mine/curate/ledger.json").read_text())
    saved = (ledger["bytes_in"] - ledger["bytes_kept"]) / BYTES * 1000
    assert ledger["seconds_saved"]["a"] == pytest.approx(saved)
    assert f"a: {saved:,.0f} s saved" in done.stdout
    checked = load_recipe(file)
    corpus = plan_corpus(read_text(checked.corpus, "corpus"))
    assert corpus.record["num_documents"] == ledger["kept"] >= 4
    names = {corpus.window("train", n).document for n in range(corpus.num_windows("train"))}
    assert {name.partition(".")[0] for name in names} == {"books", "web"}
    page = Path("runs/mine/curate/corpus.html").read_text()
    assert "fewer words than" in page
    assert "&lt;script&gt;alert(1)" in page
    assert "<script>" not in page
    with pytest.raises(RecipeError, match=r"curate.exact_duplicates: changed since"):
        corpus_and_target(load_recipe(file, {"curate.exact_duplicates": False}))
    saved_again = load_recipe(written(yaml.safe_load(checked.to_yaml())))
    assert saved_again.reads_curated
    assert saved_again.corpus.domain_field == "domain"


def test_steps_ledger_and_page_lie_at_a_url_and_the_run_has_a_copy_of_the_documents(recipe: dict[str, Any]) -> None:
    recipe["curate"] |= {"folder": f"memory:/{Path.cwd()}/cleaned"}
    file = written(recipe)
    done = CliRunner().invoke(app, ["corpus", file], terminal_width=400)
    assert done.exit_code == 0, done.output
    assert done.stdout.splitlines()[-1] == f"memory:/{Path.cwd()}/cleaned/corpus.html"
    assert not Path("runs/mine/curate").exists()
    kept = Files(recipe["curate"]["folder"], "folder")
    assert b"fewer words than" in (kept.read("corpus.html") or b"")
    ledger = json.loads(kept.read("ledger.json") or b"")
    corpus = corpus_and_target(load_recipe(file))
    assert corpus.record["num_documents"] == ledger["kept"] >= 4
    assert corpus_and_target(load_recipe(file)).record == corpus.record


def test_a_url_that_nothing_can_open_is_named_as_what_it_is(recipe: dict[str, Any]) -> None:
    recipe["curate"] |= {"folder": "nowhere://bucket/cleaned"}
    with pytest.raises(RecipeError, match=r"^curate\.folder: cannot open nowhere://bucket/cleaned"):
        corpus_and_target(load_recipe(written(recipe)))
    with pytest.raises(ValueError, match=r"^curate\.folder: cannot open nowhere://bucket/cleaned"):
        clean_here(load_recipe(written(recipe)), plain_console())


def test_a_corpus_of_its_own_files_is_left_alone(recipe: dict[str, Any]) -> None:
    checked = load_recipe(written(recipe | {"corpus": {"files": ["a.jsonl"]}}))
    assert checked.corpus.files == ("a.jsonl",)
    assert not checked.reads_curated


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("curate", None, "corpus: Field required"),
        ("curate.colour", "red", "curate.colour: unknown key"),
        ("curate.files", ["*.none"], "curate.files.0: no file matches"),
        ("curate.shards", 0, "curate.shards: "),
        ("curate.folder", "cleaned", "curate.folder: "),
        ("curate.folder", "s3://id:secret@bucket/cleaned", "curate.folder: a s3:// URL with credentials"),
        ("curate.language", {"keep": ["English"]}, "curate.language.keep.0: "),
        ("curate.seconds_per_megabyte", {"b": 1}, "curate.seconds_per_megabyte: no source is called b; there are a"),
        ("corpus.format", "conversations", "corpus.format: curated documents have parquet"),
        ("corpus.text_field", "body", "corpus.text_field: curated documents have text"),
    ],
)
def test_a_mistake_is_named(recipe: dict[str, Any], key: str, value: Any, message: str) -> None:
    *parents, last = key.split(".")
    section = recipe
    for parent in parents:
        section = section.setdefault(parent, {})
    section[last] = value
    done = CliRunner().invoke(app, ["corpus", written(recipe)])
    assert done.exit_code == 2
    assert message in done.output


def test_a_recipe_without_the_section_says_so(recipe: dict[str, Any]) -> None:
    done = CliRunner().invoke(app, ["corpus", written(recipe | {"curate": None, "corpus": {"files": ["a.jsonl"]}})])
    assert done.exit_code == 2
    assert "curate: the recipe has no such section" in done.output


def test_validate_looks_at_the_files_and_at_the_extra(recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr("services.corpus.cleaning.pipeline.find_spec", lambda name: None if name == "xxhash" else 1)
        done = CliRunner().invoke(app, ["corpus", written(recipe)])
    assert (done.exit_code, "xxhash is not installed; the extra `curate` has it" in done.output) == (2, True)
    recipe["curate"] |= {"files": ["/no/such/*.jsonl"]}
    recipe["sources"][0]["model"] = "/no/such/model"
    with pytest.raises(RecipeError, match=r"curate.files.0: no file matches"):
        check_recipe(load_recipe(written(recipe)))
