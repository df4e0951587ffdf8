"""`corpus.recall`: long records become conversations of key blocks, question and answer, once."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from services.base.errors import UnavailableError
from services.commands.prepare import corpus_and_target
from services.commands.recall.corpus import DONE
from services.corpus.ledger import Corpus
from services.recall.config import RecallConfig
from services.recipes.recipe import Recipe, RecipeError
from services.wire.messages import read_messages
from tests.fakes.services.plain_recall import ScriptedJudge, plain_recall
from tests.fakes.tiny_model import make_tiny_model

FILLER = "nothing of this says so\n"


def long_text(number: int) -> str:
    key = f"the key {number} is XZX😀Q 木\n"
    return FILLER * 20 + key + FILLER * 20


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model") / "tiny", vocabulary_size=400, seed=1)


Made = Callable[..., Recipe]


@pytest.fixture
def made(tmp_path: Path, model: Path) -> Made:
    """Makes the recipe of a corpus of key blocks from rows."""

    def make(rows: list[dict[str, Any]], address: str, recall: dict[str, Any] | None = None, **corpus: Any) -> Recipe:
        (tmp_path / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return Recipe.model_validate(
            {
                "name": "long",
                "output_dir": str(tmp_path / "runs"),
                "corpus": {
                    "files": [f"{tmp_path}/long.jsonl"],
                    "recall": {"question": "asked", "answer": "said", "budget_bytes": 128, **(recall or {})},
                    "held_out_share": 0.3,
                    "shared_run_bytes": None,
                    **corpus,
                },
                "sources": [{"name": "one", "model": str(model), "address": "127.0.0.1:1", "chat_template": "plain"}],
                "target": {"model": str(model), "chat_template": "plain"},
                "recall": {"address": address, "hops": [1]},
            }
        )

    return make


def turns_of(corpus: Corpus) -> dict[str, str]:
    """The answers by what they answer."""
    found = {}
    for split in ("train", "held_out"):
        for index in range(corpus.num_windows(split)):
            window = corpus.window(split, index)
            [message] = read_messages(window.messages).messages
            assert message["role"] == "user"
            found[message["content"]] = window.text.decode()
    return found


def test_records_become_conversations_of_key_blocks_once(made: Made) -> None:
    rows = [{"text": long_text(n), "asked": "QXZ", "said": f"answer {n}"} for n in range(8)]
    lines: list[str] = []
    with plain_recall(RecallConfig(), ScriptedJudge()) as address:
        recipe = made(rows, address)
        corpus = corpus_and_target(recipe, lines.append)
    found = turns_of(corpus)
    assert sorted(found.values()) == [f"answer {n}" for n in range(8)]
    for content, answer in found.items():
        number = int(answer.split()[1])
        assert f"the key {number} is XZX😀Q" in content
        assert content.endswith("\n\nQXZ")
        assert len(content.encode()) < 128 + 3 * 5 + 5  # the text has above 900 bytes
    assert "key blocks: 8 conversations" in lines
    again = corpus_and_target(recipe)  # without the service
    assert again.record == corpus.record
    assert recipe.recall is not None
    other = recipe.model_copy(update={"recall": recipe.recall.model_copy(update={"precision": "bfloat16"})})
    with pytest.raises(UnavailableError):  # its scores are others
        corpus_and_target(other)
    with pytest.raises(UnavailableError):
        corpus_and_target(made([*rows, rows[0]], address))


def test_a_run_that_was_interrupted_asks_only_for_the_rest(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.commands.recall.corpus._TEXTS_PER_FILE", 3)
    rows = [{"text": long_text(n), "asked": "QXZ", "said": f"answer {n}"} for n in range(8)]
    judge = ScriptedJudge()
    with plain_recall(RecallConfig(), judge) as address:
        recipe = made(rows, address)
        corpus_and_target(recipe)
        whole, per_text = judge.scored, judge.scored // 8
        [folder] = recipe.recalled_folder.glob("[0-9a-f]*")
        before = {path.name: path.read_bytes() for path in folder.glob("*.jsonl")}
        (folder / DONE).unlink()
        (folder / "000001.jsonl").unlink()
        corpus_and_target(recipe)
        assert judge.scored == whole + 3 * per_text
    assert {path.name: path.read_bytes() for path in folder.glob("*.jsonl")} == before
    assert len(before) == 3


def test_labels_and_lists_ask_several_questions_of_a_text(made: Made) -> None:
    labels = {"a": "QXZ", "b": "ZXQ?"}
    tagged = [{"text": long_text(n), "said": ["a"] if n % 2 else ["b", "a"]} for n in range(4)]
    several = [{"text": long_text(n), "asked": ["Q?", "X?"], "said": [f"{n} q", f"{n} x"]} for n in range(4)]
    with plain_recall(RecallConfig(), ScriptedJudge()) as address:
        found = turns_of(corpus_and_target(made(tagged, address, {"question": None, "labels": labels})))
        assert sorted(found.values()) == ["no"] * 2 + ["yes"] * 6
        assert all(content.endswith("ZXQ?") for content, answer in found.items() if answer == "no")
        answers = turns_of(corpus_and_target(made(several, address)))
    assert {(content[-2:], answer[-1]) for content, answer in answers.items()} == {("Q?", "q"), ("X?", "x")}
    assert len(answers) == 8


def test_parquet_and_domains_are_read_and_a_refused_text_is_left_out(made: Made, tmp_path: Path) -> None:
    rows = [{"text": long_text(n), "asked": "QXZ", "said": f"answer {n}", "kind": f"k{n % 2}"} for n in range(6)]
    rows[2]["text"] *= 4
    table = pa.Table.from_pylist(rows)
    pq.write_table(table, tmp_path / "long.parquet")
    lines: list[str] = []
    with plain_recall(RecallConfig(max_text_bytes=3000), ScriptedJudge()) as address:
        recipe = made(rows, address, files=[f"{tmp_path}/long.parquet"], domain_field="kind")
        corpus = corpus_and_target(recipe, lines.append)
    assert sorted(turns_of(corpus).values()) == [f"answer {n}" for n in range(6) if n != 2]
    assert [line for line in lines if "1 left out" in line and "at most 3000 are allowed" in line]
    domains = {
        corpus.window(split, index).domain
        for split in ("train", "held_out")
        for index in range(corpus.num_windows(split))
    }
    assert domains == {"k0", "k1"}


@pytest.mark.parametrize(
    ("row", "recall", "message"),
    [
        ({"text": "a"}, {}, r"corpus.recall.answer: .*long.jsonl, line 1 has no text under 'said'"),
        ({"text": 1}, {}, r"corpus.text_field: .*line 1 has no text under 'text'"),
        ({"text": "a", "said": "b"}, {}, r"corpus.recall.question: .*line 1 has no text under 'asked'"),
        ({"text": "a", "said": ["b"], "asked": ["c", "d"]}, {}, r"corpus.recall.answer: .* has 1 answers to 2"),
        (
            {"text": "a", "said": ["b"]},
            {"question": None, "labels": {"c": "C?"}},
            r"corpus.recall.labels: .*line 1 has the label 'b'; there are c",
        ),
    ],
)
def test_a_record_without_its_parts_is_named_before_the_service_is_asked(
    made: Made, row: dict[str, Any], recall: dict[str, Any], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        corpus_and_target(made([row], "127.0.0.1:1", recall))


@pytest.mark.parametrize(
    ("recall", "corpus", "message"),
    [
        ({"labels": {"a": "A?"}}, {}, "give exactly one of `question` and `labels`"),
        ({"budget_bytes": 20_000}, {}, "recall.budget_bytes: 20000 is more than half of max_history_bytes = 16384"),
        ({}, {"format": "jsonl"}, "format: not read with recall; leave it out"),
        ({}, {"separator": "x"}, "separator: not read with recall"),
    ],
)
def test_settings_that_do_not_fit_are_named(
    made: Made, recall: dict[str, Any], corpus: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValidationError, match=message):
        made([], "127.0.0.1:1", recall, **corpus)


def test_somebody_has_to_select_the_blocks(made: Made) -> None:
    values = made([], "127.0.0.1:1").model_dump(mode="json", by_alias=True)
    with pytest.raises(ValidationError, match=r"corpus\.recall: needs a section `recall`"):
        Recipe.model_validate({**values, "recall": {"hops": [1]}})
