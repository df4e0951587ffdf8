"""Rounds on Ray Train: two workers on gloo, one of which is killed."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import ray

from fusion_core.blocks import Block
from services.distill.driver import run
from services.distill.job import DistillJob
from services.distill.on_policy.ledger import RoundLedger
from services.jobs.step_log import read_rows
from services.wire.passage import Passage
from tests.fakes.fusion_stream import FakeFusion, corpus
from tests.fakes.training import job_in, weights

pytestmark = pytest.mark.drill

ROOT = Path(__file__).parents[3]


class DeadlyFuser(FakeFusion):
    """Kills the worker that is the first to be asked for its third text, once, and leaves a note."""

    def __init__(self, tokenizer: Path, note: Path) -> None:
        super().__init__(tokenizer, corpus(18))
        self.note = note

    def fuse(self, texts: Sequence[bytes | Passage], **settings: Any) -> list[Block]:
        if len(self.fused) == 2 and not self.note.exists():
            self.note.write_text("killed")
            os.kill(os.getpid(), signal.SIGKILL)
        return super().fuse(texts, **settings)


def open_deadly(tokenizer: Path, note: Path, _job: DistillJob) -> DeadlyFuser:
    return DeadlyFuser(tokenizer, note)


@pytest.fixture
def _ray() -> Iterator[None]:
    environment = {"env_vars": {"PYTHONPATH": str(ROOT)}}
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env=environment)
    yield
    ray.shutdown()


@pytest.mark.usefixtures("_ray")
def test_rounds_on_two_workers_one_killed_take_every_answer_once(tmp_path: Path, target: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text("".join(f'{{"prompt": "the row {n}"}}\n' for n in range(9)))
    on_policy = {"prompts": [f"{tmp_path}/prompts.jsonl"], "rounds": 2, "round_steps": 4, "in_flight": 1}
    on_policy |= {"answers": 2, "max_new_tokens": 8}
    settings = {"on_policy": on_policy, "loss": "jsd", "epochs": 1, "batch_windows": 8, "checkpoint_every_steps": 2}
    job = job_in(tmp_path / "run", target, num_workers=2, torch_threads=1, **settings)
    run(job, open_client=partial(open_deadly, target, tmp_path / "killed"))
    assert (tmp_path / "killed").exists()
    ledger = read_rows(job.files.ledger)
    assert [row["step"] for row in ledger] == list(range(1, 9))
    assert len({row["round"] for row in ledger}) == 2
    for name in {row["round"] for row in ledger}:
        written = RoundLedger.open(job.files.rounds / name)
        assert written is not None
        taken = [place for row in ledger if row["round"] == name for place in row["answers"]]
        assert sorted(taken) == list(range(len(written.answers)))
    assert any(job.files.events.iterdir()) and weights(job.files.model)
