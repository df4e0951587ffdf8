"""The judge against its encoder run by hand, one window at a time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForTokenClassification

from fusion_core.recall.memory import MemoryConfig
from services.recall.judge import Judge
from tests.fakes.files.tiny_encoder import write_encoder

TEXT = "Anna lives in the city. The founder works, and Boris was in a river.\n\nCarla is 木 blue? Dora lives."
QUESTION = "Where is the founder?"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    encoder = write_encoder(tmp_path_factory.mktemp("encoder"))
    torch.manual_seed(1)
    made = tmp_path_factory.mktemp("judge")
    Judge.load(encoder, fresh=True).save(made)
    return made


def test_scores_are_the_highest_probabilities_of_a_blocks_tokens(folder: Path) -> None:
    judge = Judge.load(folder)
    document = judge.read(TEXT, 7)
    assert "".join(document.blocks) == TEXT
    assert document.tokens_in_window == [len(ids) + 1 for ids in document.token_ids_B]
    model = AutoModelForTokenClassification.from_pretrained(folder).eval()
    start = judge.question(QUESTION)
    assert start[0] == 2 and start[-1] == 3 and len(start) == 7
    packed = [[2, 0], [1], list(range(len(document.spans)))]
    scores = judge.scorer(start, document)(packed)
    for window, found in zip(packed, scores, strict=True):
        ids, owners = list(start), [-1] * len(start)
        for block in window:
            ids += [*document.token_ids_B[block], 3]
            owners += [block] * len(document.token_ids_B[block]) + [-1]
        types = [0] * len(start) + [1] * (len(ids) - len(start))
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids]), token_type_ids=torch.tensor([types])).logits[0, :, 0]
        chances = torch.sigmoid(logits).numpy()
        expected = [np.max([c for c, owner in zip(chances, owners, strict=True) if owner == block]) for block in window]
        np.testing.assert_allclose(found, expected, atol=1e-6)


def test_bfloat16_is_near(folder: Path) -> None:
    exact, fast = Judge.load(folder), Judge.load(folder, precision="bfloat16")
    scores, near = (judge.score(QUESTION, judge.read(TEXT * 3, 9)) for judge in (exact, fast))
    assert not np.array_equal(scores, near)
    np.testing.assert_allclose(near, scores, atol=0.02)


def test_batches_change_no_score(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    judge = Judge.load(folder)
    document = judge.read(TEXT * 6, 9)
    whole = judge.score(QUESTION, document)
    assert len(whole) == len(document.spans)
    monkeypatch.setattr("services.recall.judge._BATCH_TOKENS", 1)
    np.testing.assert_allclose(judge.score(QUESTION, document), whole, atol=1e-6)


def test_key_blocks_fit_the_budget_and_the_judges_window(folder: Path) -> None:
    judge = Judge.load(folder)
    document = judge.read(TEXT * 6, 9)
    found = judge.recall(QUESTION, document, MemoryConfig(window_tokens=64, hops=(2, 3), budget_tokens=30))
    assert 0 < sum(document.tokens_in_window[block.block] for block in found) <= 30
    with pytest.raises(ValueError, match="window_tokens: must be at most 64"):
        judge.recall(QUESTION, document, MemoryConfig(window_tokens=65))


def test_an_encoder_is_no_judge_until_it_is_trained(folder: Path, tmp_path: Path) -> None:
    encoder = write_encoder(tmp_path)
    with pytest.raises(ValueError, match=r"judge: .* was not trained as a judge; `fusion recall train` makes one"):
        Judge.load(encoder)
    with pytest.raises(ValueError, match=r"model folder /nowhere does not exist"):
        Judge.load("/nowhere")


def test_texts_without_tokens(folder: Path) -> None:
    judge = Judge.load(folder)
    assert judge.score(QUESTION, judge.read("")).tolist() == []
    assert judge.score(QUESTION, judge.read(" \n ")).shape == (1,)
    assert judge.recall(QUESTION, judge.read(""), MemoryConfig(window_tokens=64)) == []
