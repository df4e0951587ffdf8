"""Items of suites in documents, against a slow count of covered words."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.base.errors import SettingError
from services.corpus.cleaning.config import DecontaminateConfig
from services.corpus.cleaning.steps.contamination import SuiteIndex, read_items
from tests.fakes.heap.oracles import cover

WORDS = st.lists(st.sampled_from("abcd"), min_size=4, max_size=24).map(" ".join)


def index_of(tmp_path: Path, items: list[str], **changes: object) -> SuiteIndex:
    path = tmp_path / "suite.jsonl"
    path.write_text("".join(json.dumps({"prompt": item}) + "\n" for item in items))
    return SuiteIndex(DecontaminateConfig.model_validate({"suites": [str(path)], **changes}))


@given(items=st.lists(WORDS, min_size=1, max_size=4), text=WORDS, share=st.sampled_from([0.3, 0.5, 0.8, 1.0]))
def test_the_best_item_is_the_one_that_is_covered_most(
    tmp_path_factory: pytest.TempPathFactory, items: list[str], text: str, share: float
) -> None:
    found = index_of(tmp_path_factory.mktemp("suite"), items, ngram=5, share=share).find(text)
    covers = [cover(item, text, 5) for item in items]
    if max(covers) >= share:
        assert found is not None
        assert found[1] == pytest.approx(max(covers))
        assert covers[int(found[0].split("#")[1].split(".")[0])] == max(covers)
    else:
        assert found is None


def test_case_punctuation_and_lines_do_not_hide_an_item(tmp_path: Path) -> None:
    rng = random.Random(0)
    item = " ".join("".join(rng.choices("abcdefgh", k=5)) for _ in range(20))
    index = index_of(tmp_path, [item])
    written = item.upper().replace(" ", ",\n  ")
    found = index.find(f"Before this, {written}; and after.")
    assert found == ("suite.jsonl#0.prompt", 1.0)
    assert index.find(" ".join(item.split(" ")[:9])) is None
    assert index.find("") is None


def test_a_short_item_must_occur_as_a_whole(tmp_path: Path) -> None:
    index = index_of(tmp_path, ["who wrote the odyssey", "no"], min_words=3)
    assert index.num_too_short == 1
    assert index.find("She asked: who wrote the Odyssey?") == ("suite.jsonl#0.prompt", 1.0)
    assert index.find("who wrote the iliad, and the odyssey") is None
    assert index.find("no no no") is None


def test_suites_of_several_forms_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("first item of it\nsecond item of it\n")
    (tmp_path / "b.jsonl").write_text('{"question": "q words", "answer": "a words"}\n')
    config = DecontaminateConfig(suites=(f"{tmp_path}/*",), fields=("question", "answer"))
    assert [text.strip() for _, text in read_items(config)] == [
        "first item of it",
        "second item of it",
        "q words",
        "a words",
    ]
    with pytest.raises(SettingError, match=r"decontaminate.fields: b.jsonl, row 0 has none of prompt, text"):
        list(read_items(DecontaminateConfig(suites=(f"{tmp_path}/*.jsonl",), fields=("prompt", "text"))))
