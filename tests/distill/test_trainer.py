"""The training loop, from the stream to the model on disk, without Ray."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import random
import shutil
import signal
from collections import Counter
from collections.abc import Iterator

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from services.base.errors import FailedPreconditionError, NotFoundError, UnavailableError
from services.distill.checkpoint import load_position
from services.distill.job import DistillJob
from services.distill.plan import claim_run, make_plan
from services.distill.workers.worker import DistillWorker
from services.distill.workers.world import World
from services.evaluation.controls import Training, training_of
from services.evaluation.nats_per_byte import nats_per_byte
from services.fusion.client import FusedWindow, StreamRequest
from services.jobs.step_log import read_rows
from services.jobs.storage import newest_complete
from services.models.weights import load_model
from services.wire.cursor import Cursor
from tests.fakes.fusion_stream import FakeFusion, corpus
from tests.fakes.training import job_in, numbers, train, weights

pytestmark = pytest.mark.usefixtures("one_thread")

TIMES = ("tokens_per_second", "step_seconds", "data_wait_seconds")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, target):
    torch.set_num_threads(1)
    job = job_in(tmp_path_factory.mktemp("undisturbed"), target)
    train(job, FakeFusion(target, corpus(18)))
    return job


def test_a_run_learns_and_leaves_a_model_that_transformers_loads(undisturbed, target):
    rows = read_rows(undisturbed.files.metrics)
    assert [row["step"] for row in rows] == list(range(1, 11))
    assert [row["epoch"] for row in rows] == [0] * 5 + [1] * 5
    assert rows[-1]["clm"] < rows[0]["clm"] - 0.1
    assert rows[0]["clm"] == pytest.approx(math.log(300), rel=0.05)
    for row in rows:
        assert row["loss"] == pytest.approx(0.3 * row["clm"] + 0.7 * row["fusion"])
        assert 0.1 < row["masked_share"] < 0.25
        assert row["covered_mass"] == pytest.approx(0.97)
        assert row["source_weights"] == pytest.approx({"left": 0.25, "right": 0.75})
        assert row["tokens_per_second"] > 0 and 0 <= row["data_wait_seconds"] < row["step_seconds"]
    assert rows[-1]["total_tokens"] == sum(row["tokens"] for row in rows)
    model = AutoModelForCausalLM.from_pretrained(undisturbed.files.model)
    tokenizer = AutoTokenizer.from_pretrained(undisturbed.files.model)
    assert tokenizer.decode(tokenizer("what comes next").input_ids, skip_special_tokens=True) == "what comes next"
    assert not torch.equal(model.lm_head.weight, load_model(target).lm_head.weight)


def test_the_ledger_holds_every_window_once_per_epoch(undisturbed):
    ledger = read_rows(undisturbed.files.ledger)
    for epoch in range(2):
        seen = Counter(index for row in ledger if row["epoch"] == epoch for index in row["windows"])
        assert seen == Counter(range(18))


def test_skipped_windows_are_accounted_for_and_not_trained_on(tmp_path, target):
    job, skipped = job_in(tmp_path, target), frozenset({3, 11, 12})
    train(job, FakeFusion(target, corpus(18), skipped=skipped))
    ledger, rows = read_rows(job.files.ledger), read_rows(job.files.metrics)
    for epoch in range(2):
        of_epoch = [row for row in ledger if row["epoch"] == epoch]
        assert Counter(index for row in of_epoch for index in row["skipped"]) == Counter(skipped)
        assert Counter(i for row in of_epoch for i in row["windows"] + row["skipped"]) == Counter(range(18))
    assert [row["skipped"] for row in rows] == [len(row["skipped"]) for row in ledger]
    assert sum(row["windows"] for row in rows) == 2 * (18 - len(skipped))
    assert rows[-1]["total_windows"] == 36


def test_a_step_without_any_window_ends_the_run(tmp_path, target):
    with pytest.raises(UnavailableError, match="every window was left out for want of sources"):
        train(job_in(tmp_path, target), FakeFusion(target, corpus(18), skipped=frozenset(range(18))))


def same_run(ours: DistillJob, theirs: DistillJob) -> None:
    """Same windows in every step, same losses and same weights within 1e-6."""
    mine, reference = read_rows(ours.files.metrics), read_rows(theirs.files.metrics)
    assert len(mine) == len(reference)
    for row, expected in zip(mine, reference, strict=True):
        for key in expected.keys() - set(TIMES):
            assert numbers(row[key]) == pytest.approx(numbers(expected[key]), abs=1e-6), key
    assert read_rows(ours.files.ledger) == read_rows(theirs.files.ledger)
    trained = weights(ours.files.model)
    for name, weight in weights(theirs.files.model).items():
        torch.testing.assert_close(trained[name], weight, rtol=0, atol=1e-6)


@pytest.mark.parametrize("break_after", [5, 19, 33])
def test_a_broken_run_goes_on_as_if_nothing_had_happened(tmp_path, target, undisturbed, break_after):
    job = job_in(tmp_path, target)
    fusion = FakeFusion(target, corpus(18), break_after=break_after)
    with pytest.raises(FailedPreconditionError, match="the stream broke"):
        train(job, fusion)
    # What a killed writer leaves behind: steps after the checkpoint, and half a line.
    with job.files.metrics.open("a") as stream:
        stream.write('{"step": 9, "lo')
    train(job, fusion)

    same_run(job, undisturbed)


class DeadlyFusion(FakeFusion):
    """Kills this process, as the kernel would, where the windows of the run reach `last`."""

    last = 0

    def stream(self, request: StreamRequest, *, prefetch_windows: int = 32) -> Iterator[FusedWindow]:
        for window in super().stream(request, prefetch_windows=prefetch_windows):
            if window.cursor.epoch * 18 + window.cursor.dealt + window.cursor.received == self.last:
                os.kill(os.getpid(), signal.SIGKILL)
            yield window


def test_killed_three_times_a_run_ends_with_the_same_losses_and_weights(tmp_path, target, undisturbed):
    """The stream is read ahead by a thread, so that the kill meets the trainer wherever it is."""
    job, fusion = job_in(tmp_path, target), DeadlyFusion(target, corpus(18))
    kills = sorted(random.SystemRandom().sample(range(1, 35), 3))
    for fusion.last in kills:
        attempt = multiprocessing.get_context("fork").Process(target=train, args=(job, fusion))
        attempt.start()
        attempt.join(120)
        assert attempt.exitcode == -signal.SIGKILL, kills
    train(job, FakeFusion(target, corpus(18)))
    same_run(job, undisturbed)


def test_a_checkpoint_is_a_model_folder_with_the_position(undisturbed):
    folder = newest_complete(undisturbed.files.checkpoints)
    assert folder is not None and folder.name == "step-10"
    with folder.local() as local:
        AutoModelForCausalLM.from_pretrained(local)
    position = load_position(undisturbed.files.checkpoints / "step-3")
    assert (position.step, position.windows) == (3, 12)
    assert position.cursor is not None
    after_epoch = load_position(undisturbed.files.checkpoints / "step-10")
    assert after_epoch.cursor == Cursor(epoch=2, dealt=0, received=0, plan=position.cursor.plan)
    assert position.cursor == Cursor(epoch=0, dealt=12, received=0, plan=position.cursor.plan)


def test_an_incomplete_checkpoint_is_passed_over(undisturbed, tmp_path):
    shutil.copytree(undisturbed.files.checkpoints, tmp_path / "checkpoints")
    (tmp_path / "checkpoints" / "step-10" / "model.safetensors").write_bytes(b"cut off")
    (tmp_path / "checkpoints" / "step-9" / "trainer_state.json").unlink()
    newest = newest_complete(tmp_path / "checkpoints")
    assert newest is not None and newest.name == "step-6"
    assert newest_complete(tmp_path / "nothing") is None


def test_clm_only_asks_for_tokens_and_equals_plain_training(tmp_path, target):
    """Against a loop written with transformers' own loss, on the same windows; the last batch is half a batch."""
    texts = corpus(10)
    job = job_in(tmp_path, target, **{"lambda": 1.0}, epochs=1, schedule="constant", warmup_share=0.0, weight_decay=0.0)
    fusion = FakeFusion(target, texts)
    train(job, fusion)
    assert [request.tokens_only for request in fusion.requests] == [True]

    model = AutoModelForCausalLM.from_pretrained(target)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0)
    expected = []
    for row in read_rows(job.files.ledger):
        nats, count = torch.zeros(()), 0
        for index in row["windows"]:
            tokens = torch.tensor([[0, *fusion.vocabulary.encode(texts[index]).token_ids_T.tolist()]])
            nats = nats + model(input_ids=tokens, labels=tokens).loss * (tokens.shape[1] - 1)
            count += tokens.shape[1] - 1
        (nats / count * len(row["windows"]) / 4).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        expected.append(float(nats.detach() / count))
    rows = read_rows(job.files.metrics)
    assert [row["clm"] for row in rows] == pytest.approx(expected, abs=1e-5)
    assert [row["loss"] for row in rows] == pytest.approx([row["clm"] for row in rows])
    assert all(row["fusion"] is None and row["masked_share"] is None for row in rows)
    trained = weights(job.files.model)
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(trained[name], weight, rtol=1e-4, atol=1e-5)


def test_held_out_scores_are_written_while_training(tmp_path, target):
    job = job_in(tmp_path, target, eval_every_steps=2, epochs=1)
    train(job, FakeFusion(target, corpus(18), held_out=corpus(5, seed=9)))
    scores = read_rows(job.files.evaluations)
    assert [score["step"] for score in scores] == [2, 4]
    assert 0 < scores[1]["nats_per_byte"] < scores[0]["nats_per_byte"]


def test_a_target_learns_to_stop_and_held_out_scores_count_text_only(tmp_path, target):
    texts = corpus(4, seed=7)
    job = job_in(tmp_path, target, **{"lambda": 1.0, "epochs": 100, "eval_every_steps": 100, "learning_rate": 1e-2})
    fusion = FakeFusion(target, texts, held_out=texts, ends=True)
    train(job, fusion)
    model = AutoModelForCausalLM.from_pretrained(job.files.model)
    bos, eos = fusion.vocabulary.bos_id, fusion.vocabulary.eos_id
    for text in texts:
        ids = fusion.vocabulary.encode(text).token_ids_T.tolist()
        with torch.no_grad():
            probs = torch.softmax(model(torch.tensor([[bos, *ids]])).logits[0], dim=-1)[:, eos]
        assert probs[-1] > 0.5 > probs[:-1].max()
    [evaluation] = read_rows(job.files.evaluations)
    assert evaluation["nats_per_byte"] == pytest.approx(nats_per_byte(job.files.model, texts).mean, rel=1e-4)


def test_bfloat16_and_gradient_checkpointing_train(tmp_path, target):
    job = job_in(tmp_path, target, dtype="bfloat16", gradient_checkpointing=True, epochs=1, eval_every_steps=3)
    train(job, FakeFusion(target, corpus(18), held_out=corpus(3, seed=9)))
    rows = read_rows(job.files.metrics)
    assert rows[-1]["clm"] < rows[0]["clm"]
    assert weights(job.files.model)["lm_head.weight"].dtype == torch.float32


def test_divergence_stops_the_run_and_leaves_the_checkpoint_alone(tmp_path, target):
    job = job_in(tmp_path, target, learning_rate=1e30, clip_norm=None)
    with pytest.raises(ArithmeticError, match="training has diverged"):
        train(job, FakeFusion(target, corpus(18)))
    assert newest_complete(job.files.checkpoints) is None


def test_a_stream_that_lost_windows_is_noticed(tmp_path, target):
    fusion = FakeFusion(target, corpus(18))
    job = job_in(tmp_path, target)
    plan = make_plan(job, fusion)
    fusion.splits["train"] = corpus(17)
    with pytest.raises(FailedPreconditionError, match="17 windows came until the end of epoch 0, not 18"):
        DistillWorker(job, plan, fusion, World()).run()


def test_other_settings_are_not_resumed(tmp_path, target, undisturbed):
    folder = tmp_path / "run"
    shutil.copytree(undisturbed.run_folder, folder)
    fusion = FakeFusion(target, corpus(18))
    claim_run(job_in(folder, target), make_plan(undisturbed, fusion))
    other = job_in(folder, target, **{"lambda": 0.5})
    with pytest.raises(FailedPreconditionError, match=r"distill\.lambda: run run was started with 0\.3, now 0\.5"):
        claim_run(other, make_plan(other, fusion))
    with pytest.raises(FailedPreconditionError, match="belongs to another target, data set or training settings"):
        train(other, fusion)
    harmless = job_in(folder, target, checkpoint_every_steps=7, cpus_per_worker=2)
    claim_run(harmless, make_plan(harmless, fusion))
    other.files.clear()
    claim_run(other, make_plan(other, fusion))
    assert json.loads(other.files.record.read_text())["config"]["lambda"] == 0.5


def test_one_source_alone_is_another_run(tmp_path, target, undisturbed):
    fusion = FakeFusion(target, corpus(18))
    alone = job_in(tmp_path / "right", target, sources=["right"], epochs=1)
    claim_run(alone, make_plan(alone, fusion))
    train(alone, fusion)
    assert {request.sources for request in fusion.requests} == {("right",)}
    assert all(set(row["source_weights"]) == {"right"} for row in read_rows(alone.files.metrics))
    assert training_of(alone.run_folder) == Training("single", ("right",))

    for sources in (None, ["left"]):
        other = job_in(alone.run_folder, target, sources=sources, epochs=1)
        with pytest.raises(FailedPreconditionError, match=r"distill\.sources: .* was started with \['right'\], now"):
            claim_run(other, make_plan(other, fusion))
    with pytest.raises(NotFoundError, match=r"distill\.sources: nowhere:1 has no source middle, only left, right"):
        make_plan(job_in(tmp_path, target, sources=["middle"]), fusion)


def test_what_the_service_does_not_fit_is_refused_before_training(tmp_path, target):
    fusion = FakeFusion(target, corpus(4))
    job = job_in(tmp_path, target)
    fusion.splits["train"] = []
    with pytest.raises(ValueError, match="split train of toy has no windows"):
        make_plan(job, fusion)
    del fusion.splits["train"]
    with pytest.raises(NotFoundError, match="toy/train is not streamed by nowhere:1; it has toy/held_out"):
        make_plan(job, fusion)
    fusion.vocabulary.fingerprint = "0123"
    with pytest.raises(FailedPreconditionError, match="fuses into 0123"):
        make_plan(job, fusion)
