"""Labels from a source: the planted block is found from a loss that needs it, and losses are those of the source."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from fusion_core.recall.labels import LabelConfig
from services.recall.examples import gold_blocks
from services.recall.intervene import Interventions, SourceLoss
from services.recall.job import JudgeJob, run
from services.recall.judge import Judge
from services.recall.training_config import InterventionConfig, JudgeTrainingConfig
from services.source.client import SourceClient
from services.source.config import SourceConfig
from services.wire.passage import Passage
from tests.fakes.files.tiny_encoder import write_encoder
from tests.fakes.services.plain_source import plain_source
from tests.fakes.tiny_model import make_tiny_model
from tests.recall.questions import example


def needs_the_fact(passages: Sequence[Passage]) -> np.ndarray:
    """A loss of 1 nat with the sentence about the person in sight, of 3 without; and a little by length."""
    return np.array([1.0 + 2 * (b"lives in" not in p.context) + len(p.context) / 1e4 for p in passages])


def test_levels_move_to_the_block_that_the_answer_needs(tmp_path: Path) -> None:
    torch.manual_seed(0)
    judge = Judge.load(write_encoder(tmp_path), fresh=True)
    examples = [example(seed) for seed in range(6)]
    config = InterventionConfig(source="any", documents=6, blocks=13, levels=LabelConfig(start=0))
    found = Interventions(judge, examples, config, needs_the_fact, block_tokens=8, seed=0)
    assert [one.relevant for one in found.labelled()] == [[]] * 6
    found.round(1)
    for one, labelled in zip(examples, found.labelled(), strict=True):
        assert labelled.relevant == gold_blocks(one, labelled.document.spans)
        assert len(labelled.likely) == len(labelled.document.spans) - 1
    again = Interventions(judge, examples, config, needs_the_fact, block_tokens=8, seed=0)
    again.round(1)
    assert all(np.array_equal(a, b) for a, b in zip(found.levels, again.levels, strict=True))


def test_examples_without_an_answer_are_refused(tmp_path: Path) -> None:
    judge = Judge.load(write_encoder(tmp_path), fresh=True)
    silent = [example(0).model_copy(update={"answer": " "})]
    with pytest.raises(ValueError, match=r"recall.train.files: no example has an answer"):
        Interventions(judge, silent, InterventionConfig(source="any"), needs_the_fact, block_tokens=8, seed=0)


def test_a_served_source_gives_the_losses_and_a_run_learns_from_them(tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path / "model", vocabulary_size=300, seed=0)
    config = SourceConfig(name="a", model=str(model), engine="synthetic", top_k=4)
    with plain_source(config) as source:
        loss = SourceLoss(source.address, config.application_name)
        passages = [Passage(b" city", b"anna lives\nAnswer:"), Passage(b" river", b"Answer:")]
        first = loss([passages[0], *passages])
        assert loss(passages).tolist() == first[1:].tolist()
        assert source.scored == 2  # each once

        async def gold(passage: Passage) -> float:
            client = SourceClient(source.address, config.application_name)
            try:
                [block] = await client.score([passage], top_k=4)
                return float(-block.gold_T.sum())
            finally:
                await client.close()

        np.testing.assert_allclose(first[1:], [asyncio.run(gold(passage)) for passage in passages], rtol=1e-5)
        (tmp_path / "train.jsonl").write_text("".join(example(seed).model_dump_json() + "\n" for seed in range(4)))
        training = JudgeTrainingConfig(
            files=(str(tmp_path / "train.jsonl"),), encoder=str(write_encoder(tmp_path / "encoder")), steps=3,
            block_tokens=8, window_tokens=64, num_workers=0, checkpoint_every_steps=2,
            labels=InterventionConfig(source="a", every_steps=2, documents=2, blocks=3),
        )  # fmt: skip
        job = JudgeJob("judge", tmp_path / "run", training, source=(source.address, config.application_name))
        assert run(job)
        assert source.scored > 2
    assert (job.files.checkpoints / "step-00000003" / "levels.json").is_file()
