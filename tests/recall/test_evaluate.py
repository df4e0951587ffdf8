"""The baselines on texts where their answer is plain, and the measures against values by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fusion_core.recall.memory import MemoryConfig
from services.recall.evaluate import (
    at_random,
    by_bm25,
    by_bm25_twice,
    by_memory,
    dense,
    exact_match,
    f1,
    head,
    interval,
    sliding_window,
)
from services.recall.judge import Document, Judge
from tests.fakes.files.tiny_encoder import write_encoder

LINES = [
    "red city .",
    "anna lives in boris .",
    "blue river .",
    "boris was founder .",
    "dora of the city .",
    "blue river .",
]


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Judge:
    torch.manual_seed(0)
    return Judge.load(write_encoder(tmp_path_factory.mktemp("encoder")), fresh=True)


@pytest.fixture(scope="module")
def document(judge: Judge) -> Document:
    document = judge.read("\n".join(LINES), 6)
    assert [block.strip() for block in document.blocks] == LINES
    return document


def test_baselines_return_what_they_say(judge: Judge, document: Document) -> None:
    assert head("anna", document, 2) == [0, 1]
    assert head("anna", document, 99) == [0, 1, 2, 3, 4, 5]
    assert by_bm25("where is anna", document, 1) == [1]
    assert by_bm25_twice("where is anna", document, 3) == [0, 1, 3]  # boris leads on; a tie goes to the first block
    assert sliding_window("river founder", document, 2) == [2, 3]
    assert sliding_window("river", document, 99) == [0, 1, 2, 3, 4, 5]
    assert at_random("anna", document, 3) == at_random("anna", document, 3)
    assert len(set(at_random("anna", document, 3))) == 3


def test_dense_retrieval_is_the_cosine_of_mean_states(judge: Judge, document: Document) -> None:
    def vector(ids: list[int]) -> np.ndarray:
        with torch.no_grad():
            ids_T = torch.tensor([[2, *ids, 3]])
            states = judge.model.bert(input_ids=ids_T, token_type_ids=torch.tensor([[0] + [1] * (len(ids) + 1)]))
        mean = states.last_hidden_state[0].mean(0).numpy()
        return mean / np.linalg.norm(mean)

    question = vector(judge.question("blue river")[1:-1])
    scores = [float(vector(ids) @ question) for ids in document.token_ids_B]
    expected = sorted(np.argsort(scores)[::-1][:2].tolist())
    assert dense(judge)("blue river", document, 2) == expected


def test_memory_names_at_most_the_blocks_asked_for(judge: Judge, document: Document) -> None:
    find = by_memory(judge, MemoryConfig(window_tokens=64, hops=(1, 2)))
    assert len(find("anna", document, 2)) == 2
    assert len(find("anna", document, 4)) == 4


def test_measures() -> None:
    assert exact_match("The City of Ludlow.", "city of ludlow") and not exact_match("Ludlow", "Ripon")
    assert f1("in the city", "city hall") == pytest.approx(0.5)
    assert f1("a", "the") == 1.0 and f1("x", "y") == 0.0
    mean, low, high = interval([1.0] * 30 + [0.0] * 10)
    assert mean == 0.75 and 0.6 < low < 0.7 and 0.8 < high < 0.9
