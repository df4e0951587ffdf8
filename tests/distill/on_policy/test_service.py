"""Rounds against a real fusion service, with texts and with conversations as prompts; and on two workers."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from fusion_core.vocabulary import Vocabulary
from services.base.errors import FailedPreconditionError, InvalidArgumentError, UnavailableError
from services.distill.job import DistillJob
from services.distill.on_policy.feed import AnswerFeed
from services.distill.on_policy.ledger import RoundLedger
from services.distill.plan import make_plan
from services.distill.workers.parallel import parallelise
from services.distill.workers.worker import DistillWorker
from services.distill.workers.world import World
from services.jobs.step_log import read_rows
from services.wire.passage import Passage
from tests.fakes.fusion_stream import FakeFusion, corpus
from tests.fakes.services.plain_fusion import plain_fusion
from tests.fakes.tiny_model import sentences
from tests.fakes.training import job_in, run_workers, train

pytestmark = pytest.mark.usefixtures("one_thread")

TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


def write_prompts(folder: Path, rows: list[dict]) -> str:
    file = folder / "prompts.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(file)


def ledgers_of(job: DistillJob) -> list[RoundLedger]:
    found = [RoundLedger.open(folder) for folder in sorted(job.files.rounds.iterdir())]
    return [ledger for ledger in found if ledger is not None]


def test_answers_to_texts_and_messages_are_scored_by_all_sources_and_learned_from(tmp_path):
    """Every block is what the service fuses behind the prompt; the target read the prompt before it answered."""
    chats = [
        {
            "messages": [
                {"role": r, "content": sentences(60, seed=2 * n + i)} for i, r in enumerate(["user", "assistant"])
            ]
        }
        for n in range(8)
    ]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    windows = {"files": [f"{tmp_path}/chats.jsonl"], "format": "conversations", "shared_run_bytes": None}
    prompts = write_prompts(
        tmp_path, [{"prompt": "the words"}, {"messages": [{"role": "user", "content": "how many words?"}]}]
    )
    with plain_fusion(tmp_path, windows=windows, chat_templates=["plain", TEMPLATE, TEMPLATE]) as fusion:
        on_policy = {"prompts": [prompts], "rounds": 1, "round_steps": 2, "share": 1, "answers": 2, "max_new_tokens": 9}
        job = job_in(
            tmp_path / "run", fusion.recipe.target_folder, on_policy=on_policy, epochs=1, loss="jsd", batch_windows=2
        )
        job = DistillJob("run", job.run_folder, job.target_folder, "words", "train", fusion.address, job.config)
        client = fusion.client()
        DistillWorker(job, make_plan(job, client), client, World()).run()
        [ledger] = ledgers_of(job)
        answers = ledger.answers
        blocks = client.fuse([answer.passage for answer in answers])
    assert {answer.is_messages for answer in answers} == {False, True}
    rows = read_rows(job.files.metrics)
    assert [row["source_weights"].keys() for row in rows] == [{"source-0", "source-1"}] * 2
    assert sum(row["tokens"] for row in rows) == sum(block.num_tokens for block in blocks)
    assert all(row["on_policy"]["reverse_kl"] is not None for row in rows)
    target = Vocabulary.from_pretrained(job.target_folder)
    for answer, block in zip(answers, blocks, strict=True):
        assert block.context_ids_C.size and block.ends_document == answer.ends
        if not answer.is_messages:
            np.testing.assert_array_equal(block.context_ids_C, target.encode(b"the words").token_ids_T)


def two_workers(rank: int, target: Path, jobs: list[DistillJob]) -> None:
    for job in jobs:
        parallel = partial(parallelise, kind=job.config.parallel, device=torch.device("cpu"))
        fusion, world = FakeFusion(target, corpus(18)), World(rank, dist.get_world_size(), parallel=parallel)
        DistillWorker(job, make_plan(job, fusion), fusion, world).run()
        dist.barrier()


def test_two_workers_write_and_learn_from_the_same_rounds_as_one(tmp_path, target):
    """With whole weights each answers its part of the prompts, with sharded ones rank 0 answers all of them."""
    prompts = write_prompts(tmp_path, [{"prompt": text.decode()[:15]} for text in corpus(5)])
    on_policy = {"prompts": [prompts], "rounds": 2, "round_steps": 2, "answers": 2, "max_new_tokens": 8}
    settings = {"on_policy": on_policy, "epochs": 1, "loss": "reverse_kl", "batch_windows": 6}
    alone = job_in(tmp_path / "alone", target, **settings)
    train(alone, FakeFusion(target, corpus(18)))
    both = [
        job_in(tmp_path / parallel, target, **settings, num_workers=2, parallel=parallel)
        for parallel in ("ddp", "fsdp")
    ]
    assert run_workers(two_workers, target, both, num_workers=2, meeting=tmp_path / "meeting") == [0, 0]
    expected = ledgers_of(alone)
    assert len(expected) == 2 and all(len(ledger.answers) > 1 for ledger in expected)
    for job in both:
        # The first round is of the same weights. Those of the second differ by rounding, and so does its name.
        assert ledgers_of(job)[0].name == expected[0].name
        for ours, theirs in zip(ledgers_of(job), expected, strict=True):
            assert ours.answers == theirs.answers
        for mine, row in zip(read_rows(job.files.ledger), read_rows(alone.files.ledger), strict=True):
            assert mine["answers"] == row["answers"]
        for mine, row in zip(read_rows(job.files.metrics), read_rows(alone.files.metrics), strict=True):
            assert mine["on_policy"] == pytest.approx(row["on_policy"], abs=1e-4)
            assert mine["loss"] == pytest.approx(row["loss"], abs=1e-4)


class Moody:
    """Fuses the passage b"flaky" only when it is asked again, and never b"odd"."""

    def __init__(self, block) -> None:
        self.block, self.asked = block, []

    def fuse(self, texts, *, k=None, sources=()):
        [passage] = texts
        self.asked.append(passage.text)
        if passage.text == b"odd":
            raise InvalidArgumentError("texts: the target's tokenizer keeps nothing of this text")
        if passage.text == b"flaky" and self.asked.count(b"flaky") == 1:
            raise UnavailableError("1 of 2 sources answers")
        return [self.block(passage.text, tokens_only=False, k=k)]


def test_the_feed_asks_again_and_leaves_out_what_cannot_be_fused(target):
    fusion = FakeFusion(target, [])
    moody, settings = Moody(fusion.block), {"k": 4, "sources": (), "vocabulary": fusion.vocabulary.fingerprint}
    feed = AnswerFeed(moody, **settings, in_flight=2)
    feed.put([Passage(text) for text in (b"one", b"flaky", b"odd", b"two")])
    texts = [None if block is None else block.text_bytes for block in feed.take(3)]
    assert texts == [b"one", b"flaky", None] and moody.asked.count(b"flaky") == 2 and feed.wait_seconds > 0
    [last] = feed.take(1)
    assert last is not None and last.text_bytes == b"two"
    feed.close()
    hopeless = AnswerFeed(moody, **settings, in_flight=1, patience_seconds=0)
    moody.asked.clear()
    hopeless.put([Passage(b"flaky")])
    with pytest.raises(UnavailableError, match="1 of 2 sources"):
        hopeless.take(1)
    hopeless.close()


def test_rows_in_the_vocabulary_of_another_target_are_refused(target):
    fusion = FakeFusion(target, [])
    feed = AnswerFeed(fusion, k=4, sources=(), vocabulary="another", in_flight=1)
    feed.put([Passage(b"one")])
    with pytest.raises(FailedPreconditionError, match=rf"come in {fusion.vocabulary.fingerprint}, .* is another"):
        feed.take(1)
    feed.close()
