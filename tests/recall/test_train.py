"""The labels of tokens, and the loss of a step, against values by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from services.recall.examples import Example
from services.recall.judge import Judge
from services.recall.train import JudgeTrainer, Labelled, draw_window, label
from services.recall.training_config import JudgeTrainingConfig
from tests.fakes.files.tiny_encoder import write_encoder

TEXT = "the red founder was a founder . anna lives in the city . the river .\nboris works . the city was blue ."
FACT = "anna lives in the city ."


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Judge:
    torch.manual_seed(3)
    return Judge.load(write_encoder(tmp_path_factory.mktemp("encoder")), fresh=True)


@pytest.fixture(scope="module")
def labelled(judge: Judge) -> Labelled:
    start = TEXT.index(FACT)
    return label(judge, Example(text=TEXT, question="where is anna ?", spans=((start, start + len(FACT)),)), 17)


def test_of_a_relevant_block_the_tokens_of_the_passage_are_relevant(judge: Judge, labelled: Labelled) -> None:
    [block] = labelled.relevant
    ids, marked = labelled.document.token_ids_B[block], labelled.marked[block]
    assert len(ids) == len(marked)
    relevant = [token for token, within in zip(ids, marked, strict=True) if within]
    assert relevant == judge.question(FACT)[1:-1]
    assert 0 < len(relevant) < len(ids)
    assert set(labelled.marked) == {block}


@pytest.mark.parametrize("whole_block", [False, True])
def test_the_loss_is_cross_entropy_with_relevant_tokens_thrice(
    judge: Judge, labelled: Labelled, whole_block: bool
) -> None:
    config = JudgeTrainingConfig(files=("-",), batch_windows=1, window_tokens=48, steps=2, precision="float32")
    one = labelled if not whole_block else replace(labelled, marked={})
    draw = np.random.default_rng((config.seed, 0))
    draw.integers(1)
    window = draw_window(one, config.window_tokens, draw)
    batch = judge.batch([(one.start, [one.document.token_ids_B[block] for block in window])])
    with torch.no_grad():
        logits_T = judge.logits(batch)[0].numpy().astype(np.float64)
    chances_T, places_T = 1 / (1 + np.exp(-logits_T)), batch.block_WT[0].numpy()
    losses = []
    for place, block in enumerate(window):
        relevant = np.zeros(len(one.document.token_ids_B[block]), dtype=bool)
        if block in one.relevant:
            relevant = np.ones_like(relevant) if whole_block else labelled.marked[block]
        chances = chances_T[places_T == place]
        losses += np.where(relevant, -3 * np.log(chances), -np.log(1 - chances)).tolist()
    assert JudgeTrainer(judge, [one], config).step().loss == pytest.approx(np.mean(losses), rel=1e-5)


def test_a_passage_without_tokens_leaves_its_whole_block_relevant(judge: Judge) -> None:
    text = "anna lives .   boris works ."
    found = label(judge, Example(text=text, question="anna ?", spans=((13, 14),)), 4)
    assert len(found.relevant) == 1 and found.marked == {}
