"""Rounds of a run, from the target's own answers to the model on disk, without Ray."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import random
import signal
from collections import Counter
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import pytest
import torch

from fusion_core.blocks import Block
from services.base.errors import FailedPreconditionError, SettingError
from services.distill.checkpoint import load_position
from services.distill.config import DistillConfig
from services.distill.job import DistillJob
from services.distill.on_policy.ledger import RoundLedger
from services.distill.plan import make_plan
from services.distill.workers.worker import DistillWorker
from services.distill.workers.world import World
from services.evaluation.report.run_summary import summarise
from services.jobs.step_log import read_rows
from services.models.weights import load_model
from services.wire.passage import Passage
from tests.distill.test_trainer import same_run
from tests.fakes.fusion_stream import FakeFusion, corpus
from tests.fakes.training import job_in, train

pytestmark = pytest.mark.usefixtures("one_thread")

NUM_WINDOWS = 18
ON_POLICY = {"rounds": 3, "round_steps": 4, "share": 0.5, "answers": 2, "max_new_tokens": 12, "answers_at_once": 5}


@pytest.fixture(scope="module")
def prompts(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    texts = [text.decode()[:20].rstrip() for text in corpus(7, seed=3)]
    file.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts), encoding="utf-8")
    return file


def job_with(
    folder: Path, target: Path, prompts: Path, *, on_policy: dict | None = None, **changes: object
) -> DistillJob:
    settings = {**ON_POLICY, "prompts": [str(prompts)], **(on_policy or {})}
    return job_in(folder, target, on_policy=settings, **{"epochs": 1, "loss": "reverse_kl", **changes})


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, target, prompts):
    torch.set_num_threads(1)
    job = job_with(tmp_path_factory.mktemp("undisturbed"), target, prompts)
    train(job, FakeFusion(target, corpus(NUM_WINDOWS)))
    return job


def ledgers(job: DistillJob) -> list[RoundLedger]:
    found = [RoundLedger.open(folder) for folder in sorted(job.files.rounds.iterdir())]
    return [ledger for ledger in found if ledger is not None]


def test_every_round_learns_from_new_answers_each_of_them_once(undisturbed):
    rows, ledger = read_rows(undisturbed.files.metrics), read_rows(undisturbed.files.ledger)
    assert len(rows) == 12
    rounds = ledgers(undisturbed)
    assert [json.loads((undisturbed.files.rounds / r.name / "round.json").read_text())["round"] for r in rounds] == [
        0,
        1,
        2,
    ]
    for number, written in enumerate(rounds):
        steps = [row for row in ledger if row["epoch"] == number]
        assert {row["round"] for row in steps} == {written.name}
        taken = Counter(place for row in steps for place in row["answers"])
        assert taken == Counter(range(len(written.answers))) and not any(row["answers_skipped"] for row in steps)
        assert all(answer.text.decode() and answer.num_tokens <= 12 for answer in written.answers)
        assert any(a.num_tokens == 12 and not a.ends for a in written.answers)
    assert len({answer.text for written in rounds for answer in written.answers}) > 12
    # The stream goes on through the rounds: its windows come again only when all have come.
    streamed = [index for row in ledger for index in row["windows"]]
    assert Counter(streamed[:NUM_WINDOWS]) == Counter(range(NUM_WINDOWS)) and len(streamed) == 24
    draws = [answer.draw for written in rounds for answer in written.answers if answer.number == 0]
    assert len(set(draws)) == len(draws) and max(draws) <= 11


def test_metrics_show_the_answers_beside_the_stream(undisturbed):
    for row in read_rows(undisturbed.files.metrics):
        own, step = row["on_policy"], row["step"] - 1
        answers = ledgers(undisturbed)[step // 4].answers
        [places] = [r["answers"] for r in read_rows(undisturbed.files.ledger) if r["step"] == step + 1]
        assert (own["round"], own["staleness"], own["windows"], own["skipped"]) == (step // 4, step % 4, len(places), 0)
        assert own["ended_share"] == pytest.approx(sum(answers[place].ends for place in places) / len(places))
        assert row["windows"] == len(places) + 2
        assert 0 < own["share"] < 1 and own["mean_length"] >= 1
        assert own["reverse_kl"] is None or math.isfinite(own["reverse_kl"])  # no row of one token is fused
        assert row["data_wait_seconds"] < row["step_seconds"]
    assert read_rows(undisturbed.files.metrics)[-1]["total_windows"] == 24


def rows_of(model, fusion: FakeFusion, block: Block, before: bytes) -> tuple[torch.Tensor, torch.Tensor]:
    """Minus the target's log-probability of every token, and the reverse KL of every row, by transformers' logits."""
    context = [fusion.vocabulary.bos_id, *fusion.vocabulary.encode(before).token_ids_T.tolist()]
    tokens = torch.from_numpy(block.token_ids_T).long()
    with torch.no_grad():
        logits = model(torch.cat([torch.tensor(context), tokens])[None]).logits[0, len(context) - 1 : -1].double()
    logprobs = torch.log_softmax(logits, dim=-1)
    own = logprobs.gather(1, torch.from_numpy(block.topk_ids_TK).long())
    own = torch.cat([own, torch.log1p(-own.exp().sum(1, keepdim=True))], dim=1)
    fused = torch.from_numpy(np.concatenate([block.topk_logprobs_TK, block.tail_T[:, None]], axis=1)).double()
    return -logprobs.gather(1, tokens[:, None])[:, 0], (own.exp() * (own - torch.log_softmax(fused, dim=1))).sum(1)


def test_lambda_is_that_of_the_recipe_on_windows_and_0_on_answers(undisturbed, target):
    texts, fusion, model = corpus(NUM_WINDOWS), FakeFusion(target, []), load_model(target).eval()
    row, ledger = read_rows(undisturbed.files.metrics)[0], read_rows(undisturbed.files.ledger)[0]
    answers = [ledgers(undisturbed)[0].answers[place] for place in ledger["answers"]]
    parts = [(texts[index], b"", False, 0.3) for index in ledger["windows"]]
    parts += [(answer.text, answer.prompt, answer.ends, 0.0) for answer in answers]
    clm = kl = weighted = 0.0
    fused = tokens = 0
    for text, before, ends, lambda_ in parts:
        block = fusion.block(text, tokens_only=False, k=8, ends=ends)
        nats_T, kl_T = rows_of(model, fusion, block, before)
        kl_T = kl_T[torch.from_numpy(block.mask_T)]
        clm, weighted = clm + lambda_ * float(nats_T.sum()), weighted + (1 - lambda_) * float(kl_T.sum())
        kl, fused, tokens = kl + float(kl_T.sum()), fused + len(kl_T), tokens + block.num_tokens
    assert answers and (row["tokens"], row["fusion"]) == (tokens, pytest.approx(kl / fused, abs=1e-4))
    assert row["loss"] == pytest.approx(clm / tokens + weighted / fused, abs=1e-4)


def test_with_share_1_the_loss_is_that_of_the_fused_rows_whatever_lambda_says(tmp_path, target, prompts):
    fusion = FakeFusion(target, corpus(NUM_WINDOWS))
    job = job_with(tmp_path, target, prompts, on_policy={"share": 1, "rounds": 1, "round_steps": 1}, **{"lambda": 0.8})
    train(job, fusion)
    assert fusion.requests == []
    [row] = read_rows(job.files.metrics)
    [ledger] = ledgers(job)
    summary = summarise(job.files.metrics)
    assert summary is not None and summary.clm is None and summary.fusion == pytest.approx(row["fusion"])
    assert row["clm"] is None and row["loss"] == pytest.approx(row["fusion"], rel=1e-5)
    # The estimate of the reverse KL from what was sampled, by transformers' own logits, one answer at a time.
    model, nats, count = load_model(target).eval(), 0.0, 0
    for answer in ledger.answers:
        block = fusion.block(answer.text, tokens_only=False, k=8, ends=answer.ends)
        own = -rows_of(model, fusion, block, answer.prompt)[0]
        counted = torch.from_numpy(block.mask_T)
        nats += float((own - torch.from_numpy(block.gold_T))[counted].sum())
        count += int(counted.sum())
    assert row["on_policy"]["reverse_kl"] == pytest.approx(nats / count, abs=1e-4)
    assert {passage.text for passage in fusion.fused} == {answer.text for answer in ledger.answers}
    assert all(passage.context.decode() for passage in fusion.fused)


class DeadlyFusion(FakeFusion):
    """Kills this process, as the kernel would, where it is asked for a text for the `last`-th time."""

    last = 0

    def fuse(self, texts: Sequence[bytes | Passage], **settings: object) -> list[Block]:
        if len(self.fused) == self.last:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().fuse(texts, **settings)  # type: ignore[arg-type]


def killed_while_writing(job: DistillJob, fusion: FakeFusion) -> None:
    """Train until the first file of a round is half there."""
    import pyarrow.parquet as pq

    def half_written(_table: object, path: Path, **_settings: object) -> None:
        path.write_bytes(b"PAR1")
        os.kill(os.getpid(), signal.SIGKILL)

    pq.write_table = half_written
    train(job, fusion)


def test_killed_five_times_a_run_ends_with_the_same_answers_losses_and_weights(tmp_path, target, prompts, undisturbed):
    job = job_with(tmp_path, target, prompts, on_policy={"in_flight": 1})
    # Even the latest places leave the last attempt enough answers to ask for.
    places = [random.SystemRandom().randrange(1, 5) for _ in range(3)]
    context = multiprocessing.get_context("fork")

    def attempt(work: Callable[..., None], last: int) -> BaseProcess:
        fusion = DeadlyFusion(target, corpus(NUM_WINDOWS))
        fusion.last = last
        return context.Process(target=work, args=(job, fusion))

    # Checkpoints are made every third step, rounds every fourth: a kill meets both inside a round and between two.
    attempts = [attempt(killed_while_writing, 99), attempt(train, places[0]), attempt(killed_while_writing, 99)]
    attempts += [attempt(train, places[1]), attempt(train, places[2])]
    for process in attempts:
        process.start()
        process.join(120)
        assert process.exitcode == -signal.SIGKILL, places
    train(job, FakeFusion(target, corpus(NUM_WINDOWS)))
    same_run(job, undisturbed)
    assert [r.answers for r in ledgers(job)] == [r.answers for r in ledgers(undisturbed)]
    assert [r.name for r in ledgers(job)] == [r.name for r in ledgers(undisturbed)]


def test_a_run_that_broke_off_inside_a_round_reads_the_ledger_of_the_round(tmp_path, target, prompts):
    job = job_with(tmp_path, target, prompts, checkpoint_every_steps=2)
    with pytest.raises(FailedPreconditionError, match="the stream broke"):
        train(job, FakeFusion(target, corpus(NUM_WINDOWS), break_after=7))
    [begun] = ledgers(job)
    position = load_position(job.files.checkpoints / "step-2")
    assert (position.step, position.windows, position.round) == (2, 4, begun.name)
    for file in (job.files.rounds / begun.name).glob("*.parquet"):
        file.write_bytes(b"cut off")
    with pytest.raises(FailedPreconditionError, match="is damaged"):
        train(job, FakeFusion(target, corpus(NUM_WINDOWS)))
    for file in (job.files.rounds / begun.name).iterdir():
        file.unlink()
    with pytest.raises(FailedPreconditionError, match="is gone"):
        train(job, FakeFusion(target, corpus(NUM_WINDOWS)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 2}, "on_policy: a run has rounds, epochs or stages"),
        ({"stages": [{"name": "one", "share": 1.0}]}, "on_policy: a run has rounds, epochs or stages"),
        ({"loss": "cross_entropy"}, "loss: reverse_kl or jsd with on_policy, got cross_entropy"),
        ({"lambda": 1}, "lambda: below 1 with on_policy"),
        ({"reward_weighting": True}, "reward_weighting: not with on_policy"),
        ({"batch_windows": 1, "on_policy": {"share": 0.2}}, "on_policy.share: 0.2 of batch_windows = 1"),
        ({"batch_windows": 8, "on_policy": {"share": 0.95}}, "on_policy.share: 0.95 of batch_windows = 8 leaves"),
        ({"on_policy": {"tempo": 1}}, "on_policy.tempo"),
        ({"on_policy": {"answers": 0}}, "on_policy.answers"),
        ({"on_policy": {"temperature": 0}}, "on_policy.temperature"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(changes, message):
    on_policy = {"prompts": ["x"], "rounds": 1, "round_steps": 1, **changes.get("on_policy", {})}
    settings = {"loss": "jsd", **changes, "on_policy": on_policy}
    with pytest.raises(ValueError) as refused:
        DistillConfig.model_validate(settings)
    assert message.replace("on_policy.", "", 1) in str(refused.value) or message in str(refused.value)


def test_a_round_with_fewer_answers_than_steps_that_need_one_is_refused(tmp_path, target):
    rows = [{"prompt": "word " * 600}, *({"prompt": text.decode()[:20]} for text in corpus(2))]
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    on_policy = {"share": 1, "rounds": 1, "round_steps": 3, "answers": 1}
    job = job_with(tmp_path, target, prompts, on_policy=on_policy, batch_windows=1)
    with pytest.raises(FailedPreconditionError, match=r"round 0 has [012] answers with text, and needs 3: .* 1 were"):
        train(job, FakeFusion(target, corpus(NUM_WINDOWS)))


def test_prompts_that_changed_after_the_plan_are_refused(tmp_path, target, prompts):
    moved, fusion = tmp_path / "moved.jsonl", FakeFusion(target, corpus(NUM_WINDOWS))
    moved.write_bytes(prompts.read_bytes())
    job = job_with(tmp_path, target, moved)
    plan = make_plan(job, fusion)
    moved.write_text('{"prompt": "another"}\n')
    with pytest.raises(FailedPreconditionError, match=r"distill\.on_policy\.prompts: the files have changed"):
        DistillWorker(job, plan, fusion, World())


def test_relative_prompts_start_where_the_recipe_was_read(tmp_path, target, prompts, monkeypatch):
    fusion = FakeFusion(target, corpus(NUM_WINDOWS))
    monkeypatch.chdir(prompts.parent)
    job = job_with(tmp_path, target, Path(prompts.name))
    monkeypatch.chdir(tmp_path)  # Ray Train changes the working directory of its workers
    assert make_plan(job, fusion).identity == make_plan(job_with(tmp_path, target, prompts), fusion).identity


def test_prompts_are_part_of_a_run_and_checked_before_it(tmp_path, target, prompts):
    fusion = FakeFusion(target, corpus(NUM_WINDOWS))
    identity = make_plan(job_with(tmp_path, target, prompts), fusion).identity
    moved = tmp_path / "moved.jsonl"
    moved.write_bytes(prompts.read_bytes())
    same = job_with(tmp_path, target, moved, on_policy={"in_flight": 3, "answers_at_once": 1})
    assert make_plan(same, fusion).identity == identity
    assert make_plan(job_with(tmp_path, target, prompts, on_policy={"rounds": 4}), fusion).identity != identity
    moved.write_text('{"prompt": "another"}\n')
    assert make_plan(same, fusion).identity != identity
    moved.write_text('{"promt": "another"}\n')
    with pytest.raises(SettingError, match=r"distill\.on_policy\.prompts: .*moved\.jsonl, row 1"):
        make_plan(same, fusion)
    with pytest.raises(SettingError, match=r"distill\.on_policy\.prompts: no file matches"):
        make_plan(job_with(tmp_path, target, tmp_path / "none.jsonl"), fusion)
    moved.write_text('{"messages": [{"role": "user", "content": "hello"}]}\n')
    with pytest.raises(SettingError, match=r"set target\.chat_template"):
        train(same, fusion)
    fusion.settings["corpus.target_context"] = False
    with pytest.raises(FailedPreconditionError, match=r"corpus\.target_context"):
        make_plan(job_with(tmp_path, target, prompts), fusion)
