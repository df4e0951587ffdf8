"""Train a judge: checks that can be made beforehand, and then a worker, on Ray Train or in this process.

A checkpoint counts once its manifest is there. A run goes on from the newest one; one that has ended is not run again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import time
from contextlib import closing
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from services.base.atomic import sweep_partial, whole_folder
from services.jobs.cluster import join_cluster
from services.jobs.lease import held_leases
from services.jobs.ray_workers import run_workers
from services.jobs.run_folder import RunFolder
from services.jobs.run_record import RunRecord, check_same_settings, claim_run_folder
from services.jobs.step_log import StepLog
from services.jobs.storage import MANIFEST, newest_complete
from services.jobs.tracking import Trackers, Tracking
from services.models.catalogue import resolve_model
from services.models.revision import weights_revision
from services.recall.examples import Example, read_examples
from services.recall.training_config import JudgeTrainingConfig

if TYPE_CHECKING:
    from services.recall.intervene import Interventions
    from services.recall.train import JudgeTrainer

logger = logging.getLogger(__name__)

_MAY_CHANGE = {
    *("files", "held_out", "encoder", "num_workers", "cpus_per_worker", "torch_threads", "device"),
    *("checkpoint_every_steps", "max_failures"),
}
"""Settings that do not decide the result, or that are known by what they name."""
_KEPT_CHECKPOINTS = 2
_LEVELS = "levels.json"
"""Name of the file in a checkpoint with the levels of all blocks, where a source gives the labels."""


@dataclass(frozen=True, slots=True)
class JudgeJob:
    """The settings of driver and worker, who see the folders and files under the same paths.

    Attributes:
        run_name: name of the run.
        run_folder: folder of checkpoints, metrics and the judge; see `RunFolder`.
        config: section `recall.train` of the recipe.
        recipe: the resolved recipe, YAML, to be kept in the run's folder; empty for none.
        source: address and Serve application of the source of `config.labels`.
        tracking: where the run's curves go.
    """

    run_name: str
    run_folder: Path
    config: JudgeTrainingConfig
    recipe: str = ""
    source: tuple[str, str] | None = None
    tracking: Tracking = field(default_factory=Tracking)

    @property
    def files(self) -> RunFolder:
        """The files of the run folder."""
        return RunFolder(self.run_folder)

    def examples(self) -> list[Example]:
        """Return the examples to train on; raises SettingError."""
        return read_examples([Path(file) for file in self.config.files], "recall.train.files")


def run(job: JudgeJob, *, start_over: bool = False) -> bool:
    """Train to the end; return False when the same run has ended already. The judge is in `job.files.model` then.

    Raises FailedPreconditionError while another process trains the run, or for a run of other settings under this name;
    ServiceError or ValueError when something does not fit; ArithmeticError when training diverges;
    ray.train.TrainingFailedError when the worker failed more often than `max_failures`.
    """
    job.tracking.check()
    record = _record(job, job.examples())
    checkpoints = str(job.files.checkpoints.absolute())
    with held_leases((str(job.run_folder.absolute()),), job.run_name):
        sweep_partial(job.run_folder)
        if start_over:
            job.files.clear()
        if job.files.model.is_dir():
            check_same_settings(record, job.files)
            return False
        claim_run_folder(record, job.files, checkpoints)
        if job.config.num_workers == 0:
            work(job, record.identity, use_gpu=job.config.device == "cuda")
        else:
            config = job.config
            use_gpu = join_cluster("recall.train", device=config.device, cpus_per_worker=config.cpus_per_worker)
            on_worker = partial(work, job, record.identity, use_gpu=use_gpu)
            run_workers(on_worker, job.run_folder, config, use_gpu=use_gpu)
    return True


def work(job: JudgeJob, identity: str, *, use_gpu: bool) -> None:
    """Train from the newest checkpoint to the end, in this process."""
    import torch

    from services.recall.intervene import Interventions, SourceLoss
    from services.recall.judge import Judge
    from services.recall.train import JudgeTrainer, label

    config = job.config
    torch.set_num_threads(config.torch_threads)
    torch.manual_seed(config.seed)
    judge = Judge.load(config.encoder, fresh=True, device="cuda" if use_gpu else "cpu", precision=config.precision)
    examples = job.examples()
    interventions = None
    if config.labels is not None:
        assert job.source is not None, "labels of a source need its address"
        interventions = Interventions(
            judge, examples, config.labels, SourceLoss(*job.source), block_tokens=config.block_tokens, seed=config.seed
        )
        labelled = interventions.labelled()
    else:
        labelled = [label(judge, example, config.block_tokens) for example in examples]
    trainer = JudgeTrainer(judge, labelled, config)
    newest = newest_complete(job.files.checkpoints)
    if newest is not None:
        with newest.local() as folder:
            trainer.restore(folder)
            if interventions is not None:
                levels = json.loads((folder / _LEVELS).read_text())
                interventions.levels = [np.array(levels_B, dtype=np.int8) for levels_B in levels]
                _relabel(trainer, interventions)
    name, after_step = f"recall/{job.run_name}", trainer.steps
    with (
        closing(StepLog(job.files.metrics, after_step=after_step)) as metrics,
        Trackers(job.tracking, name, job.files, after_step=after_step) as trackers,
    ):
        _run_steps(job, identity, trainer, interventions, metrics, trackers)
    judge.block_tokens = config.block_tokens
    with whole_folder(job.files.model) as folder:
        judge.save(folder)


def _relabel(trainer: JudgeTrainer, interventions: Interventions) -> None:
    """Have the trainer learn from the newest labels, unless they call no block relevant."""
    labelled = interventions.labelled()
    if any(example.relevant for example in labelled):
        trainer.use(labelled)
    else:
        logger.warning("no block is relevant any more; the labels before stay in use")


def _run_steps(
    job: JudgeJob,
    identity: str,
    trainer: JudgeTrainer,
    interventions: Interventions | None,
    metrics: StepLog,
    trackers: Trackers,
) -> None:
    total, every = job.config.steps, job.config.checkpoint_every_steps
    while trainer.steps < total:
        began = time.monotonic()
        if interventions is not None and job.config.labels is not None:
            number, left = divmod(trainer.steps, job.config.labels.every_steps)
            if number and not left:
                interventions.round(number)
                _relabel(trainer, interventions)
        step = trainer.step()
        figures = {key: value for key, value in asdict(step).items() if key != "number"}
        figures["seconds"] = time.monotonic() - began
        row = {"step": step.number, **figures}
        metrics.write(row)
        trackers.write(row)
        if step.number % every == 0 or step.number == total:
            metrics.sync()
            _keep(job.files.checkpoints, trainer, interventions, identity)
        if step.number % max(1, total // 20) == 0 or step.number == total:
            print(f"[recall {job.run_name}] step {step.number}/{total}  loss {step.loss:.4f}", flush=True)


def _keep(checkpoints: Path, trainer: JudgeTrainer, interventions: Interventions | None, identity: str) -> None:
    """Write a checkpoint, the manifest last, and delete those before the last two."""
    with whole_folder(checkpoints / f"step-{trainer.steps:08d}", replace=True) as folder:
        trainer.save(folder)
        if interventions is not None:
            (folder / _LEVELS).write_text(json.dumps([levels_B.tolist() for levels_B in interventions.levels]))
        sizes = {
            path.relative_to(folder).as_posix(): path.stat().st_size for path in folder.rglob("*") if path.is_file()
        }
        manifest = {"step": trainer.steps, "plan": identity, "files": sizes}
        (folder / MANIFEST).write_text(json.dumps(manifest))
    for old in sorted(checkpoints.glob("step-*"))[:-_KEPT_CHECKPOINTS]:
        shutil.rmtree(old)


def _record(job: JudgeJob, examples: list[Example]) -> RunRecord:
    content = hashlib.sha256("".join(example.model_dump_json() for example in examples).encode()).hexdigest()[:32]
    settings: dict[str, Any] = {
        "recall.train.encoder": weights_revision(resolve_model(job.config.encoder)),
        "recall.train.files": content,
        **{f"recall.train.{k}": v for k, v in job.config.model_dump(mode="json", exclude=_MAY_CHANGE).items()},
    }
    identity = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
    details = {"encoder": job.config.encoder, "examples": len(examples)}
    return RunRecord(job.run_name, settings, identity, details, job.recipe)
