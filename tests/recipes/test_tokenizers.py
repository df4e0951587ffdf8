"""Tokenizers that cannot be used are named by `fusion validate` and `prepare`, before anything starts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from fusion_core.vocabulary import Vocabulary
from services.cli.app import app
from services.commands.prepare import prepare
from services.corpus.ledger import Corpus
from services.recipes.load import load_recipe
from services.recipes.recipe import RecipeError
from services.recipes.tokenizers import tokenizer_identity
from tests.fakes.tiny_model import make_tiny_model, sentences
from tests.fakes.tokenizers import train

Written = Callable[..., Path]


def save(tokenizer: Tokenizer, folder: Path) -> Path:
    special = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    (folder / "config.json").write_text("{}")
    return folder


def wordpiece() -> Tokenizer:
    words = {word: index for index, word in enumerate(["<unk>", "<bos>", "<eos>", "<pad>", "the", "##s"])}
    tokenizer = Tokenizer(models.WordPiece(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


def silent() -> Tokenizer:
    """A tokenizer whose normalizer leaves nothing of any text."""
    tokenizer = Tokenizer.from_str(train("byte_level", 640).to_str())
    tokenizer.normalizer = normalizers.Replace(Regex(r"[\s\S]"), "")
    return tokenizer


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny", vocabulary_size=400, seed=1)


@pytest.fixture
def written(good: Path, tmp_path: Path) -> Written:
    """Writes a recipe of two sources and a target on folders that are good unless given."""
    (tmp_path / "texts").mkdir()
    for number in range(8):
        (tmp_path / "texts" / f"{number}.txt").write_text(sentences(300, seed=number))

    def write(first: Path = good, second: Path = good, target: Any = None, **source: Any) -> Path:
        recipe = {
            "name": "tried",
            "output_dir": str(tmp_path / "runs"),
            "corpus": {"files": [f"{tmp_path}/texts/*"], "window_bytes": 128, "shared_run_bytes": None},
            "sources": [
                {"name": "a", "model": str(first), "engine": "transformers", "max_tokens": 255, **source},
                {"name": "b", "model": str(second), "engine": "transformers", "max_tokens": 255},
            ],
            "target": target or {"model": str(good)},
        }
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(recipe))
        return path

    return write


def refusal(recipe: Path) -> str:
    """The line with which `fusion validate` ends; `prepare` says the same and makes nothing."""
    done = CliRunner().invoke(app, ["validate", str(recipe)], terminal_width=300)
    assert done.exit_code == 2, done.output
    [line] = done.stderr.splitlines()
    with pytest.raises(RecipeError) as error:
        prepare(load_recipe(recipe))
    assert line == f"error: {error.value}"
    assert not load_recipe(recipe).run_folder.exists()
    return line


def test_good_tokenizers_are_good(written: Written) -> None:
    assert CliRunner().invoke(app, ["validate", str(written())]).exit_code == 0


def test_wordpiece_is_refused_wherever_it_stands(written: Written, good: Path, tmp_path: Path) -> None:
    folder = save(wordpiece(), tmp_path / "wordpiece")
    assert "sources.0.model: " in refusal(written(first=folder))
    assert "WordPiece" in refusal(written(first=folder))
    assert "sources.1.model: " in refusal(written(second=folder))
    assert "target.model: " in refusal(written(target={"model": str(folder)}))
    scratch = {"tokenizer": str(folder), "config": {"hidden_size": 32, "num_layers": 1, "num_heads": 2}}
    assert "target.tokenizer: " in refusal(written(target=scratch))


def test_a_tokenizer_that_leaves_nothing_of_a_text_is_refused(written: Written, tmp_path: Path) -> None:
    assert "sources.0.model: tokenizer: it drops" in refusal(written(first=save(silent(), tmp_path / "silent")))


def test_a_file_that_is_no_tokenizer_is_refused_in_one_line(written: Written, tmp_path: Path) -> None:
    folder = save(wordpiece(), tmp_path / "broken")
    (folder / "tokenizer.json").write_text('{"model": {"type": "BPE",\n')
    assert "sources.0.model: tokenizer: " in refusal(written(first=folder))


@pytest.mark.parametrize("role", ["bos_token", "eos_token"])
def test_a_role_that_the_tokenizer_has_not_is_refused(written: Written, role: str) -> None:
    assert f"sources.0.{role}: '<nothing>' is no special token of" in refusal(written(**{role: "<nothing>"}))


def test_a_source_of_conversations_needs_a_template(written: Written, tmp_path: Path) -> None:
    lines = [
        json.dumps({"prompt": f"{sentences(80, seed=n)}?", "completion": sentences(90, seed=n + 50)}) for n in range(9)
    ]
    (tmp_path / "chats.jsonl").write_text("\n".join(lines))
    recipe = yaml.safe_load(written().read_text())
    recipe["corpus"] = {"files": [f"{tmp_path}/chats.jsonl"], "format": "conversations", "shared_run_bytes": None}
    recipe["target"]["chat_template"] = "plain"
    recipe["sources"][1]["chat_template"] = "plain"
    path = tmp_path / "chats.yaml"
    path.write_text(yaml.safe_dump(recipe))
    assert "sources.0.chat_template: the model has no chat template of its own; set `plain`" in refusal(path)
    recipe["sources"][0]["chat_template"] = "{{ raise_exception('no') }}"
    path.write_text(yaml.safe_dump(recipe))
    assert "sources.0.chat_template: a question and an answer cannot be written" in refusal(path)
    recipe["sources"][0]["chat_template"] = "plain"
    path.write_text(yaml.safe_dump(recipe))
    assert CliRunner().invoke(app, ["validate", str(path)]).exit_code == 0
    loaded = load_recipe(path)
    assert loaded.endpoint(loaded.sources[0]).chat_template == "plain"
    assert loaded.fusion_service().target_chat_template == "plain"


def test_what_windows_were_planned_with_is_not_loaded_again(
    written: Written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load_recipe(written())
    prepare(recipe)
    planned = Corpus.open(recipe.corpus_folder).record
    loaded: list[Any] = []
    load = Vocabulary.from_pretrained
    monkeypatch.setattr(Vocabulary, "from_pretrained", lambda *args, **more: loaded.append(args) or load(*args, **more))
    prepare(recipe)
    assert (loaded, Corpus.open(recipe.corpus_folder).record) == ([], planned)
    changed = save(train("llama3", 640), tmp_path / "changed")
    prepare(load_recipe(written(second=changed)))
    assert {str(folder) for [folder] in loaded if str(folder) == str(changed)} == {str(changed)}
    assert json.dumps(planned) != json.dumps(Corpus.open(recipe.corpus_folder).record)


@pytest.fixture
def folder(good: Path, tmp_path: Path) -> Path:
    copied = tmp_path / "copied"
    shutil.copytree(good, copied)
    return copied


def change(file: Path, **settings: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


def test_another_role_is_another_tokenizer(folder: Path, good: Path) -> None:
    """`tokenizer.json` does not say which token ends a document."""
    assert tokenizer_identity(folder) == tokenizer_identity(good)
    before = Vocabulary.from_pretrained(folder)
    control = [name for name, token in before.special_tokens.items() if token != before.eos_id]
    change(folder / "tokenizer_config.json", eos_token=control[0])
    assert Vocabulary.from_pretrained(folder).fingerprint != before.fingerprint
    assert tokenizer_identity(folder) != tokenizer_identity(good)


def test_other_tokens_are_another_tokenizer(folder: Path, good: Path) -> None:
    change(folder / "tokenizer.json", normalizer={"type": "NFC"})
    assert tokenizer_identity(folder) != tokenizer_identity(good)


def test_a_chat_template_or_a_size_makes_no_other_tokenizer(folder: Path, good: Path) -> None:
    before = Vocabulary.from_pretrained(good).fingerprint
    change(folder / "tokenizer_config.json", chat_template="{{ messages }}", model_max_length=7)
    change(folder / "config.json", hidden_size=64)
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    assert Vocabulary.from_pretrained(folder).fingerprint == before
    assert tokenizer_identity(folder) == tokenizer_identity(good)


def test_a_role_that_changes_in_place_is_looked_at_again(written: Written, folder: Path) -> None:
    recipe = load_recipe(written(second=folder))
    prepare(recipe)
    planned = Corpus.open(recipe.corpus_folder).record["vocabularies"]
    change(
        folder / "tokenizer_config.json",
        eos_token=json.loads((folder / "tokenizer_config.json").read_text())["bos_token"],
    )
    prepare(recipe)
    again = Corpus.open(recipe.corpus_folder).record["vocabularies"]
    assert {name for name in planned if planned[name] != again[name]} == {"sources[1]"}
