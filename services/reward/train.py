"""Train a reward model: the checks that can be made beforehand, and then the workers, on Ray Train or in this process.

Checkpoints are written into the run's folder, which all workers see, and count once their manifest is there. A run goes
on from the newest one; a run that has ended is not trained again.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from services.base.atomic import sweep_partial
from services.base.errors import SettingError
from services.jobs.cluster import join_cluster
from services.jobs.lease import held_leases
from services.jobs.ray_workers import run_workers
from services.jobs.run_folder import RunFolder
from services.jobs.run_record import RunRecord, check_same_settings, claim_run_folder
from services.jobs.tracking import Tracking
from services.models.revision import weights_revision
from services.reward.config import RewardConfig
from services.reward.pairs import Pair, fingerprint, read_pairs, split_pairs

_MAY_CHANGE = {
    *("start", "data", "serve", "device", "num_workers", "cpus_per_worker", "torch_threads", "max_failures", "patch"),
    *("checkpoint_every_steps", "keep_checkpoints"),
}
"""Settings that do not decide the result, or decide it by what they name: start and data are known by their content."""


@dataclass(frozen=True, slots=True)
class RewardJob:
    """The settings of driver and workers. All workers must see the folders under the same path.

    Attributes:
        run_name: name of the run.
        run_folder: folder of checkpoints, metrics and the final model; see `RunFolder`.
        start: Hugging Face folder that training starts from.
        config: section `reward` of the recipe.
        recipe: the resolved recipe, YAML, to be kept in the run's folder; empty for none.
        tracking: where the run's curves go.
    """

    run_name: str
    run_folder: Path
    start: Path
    config: RewardConfig
    recipe: str = ""
    tracking: Tracking = field(default_factory=Tracking)

    @property
    def files(self) -> RunFolder:
        """The files of the run folder."""
        return RunFolder(self.run_folder)

    @property
    def checkpoints(self) -> str:
        """The folder of the checkpoints."""
        return str(self.files.checkpoints.absolute())

    def pairs(self) -> list[Pair]:
        """Return the pairs to train on; raises SettingError."""
        config = self.config
        train, _ = split_pairs(read_pairs(config.data, config.domains), config.held_out_share)
        return train


def run(job: RewardJob, *, start_over: bool = False) -> bool:
    """Train to the end; return False when the same run has ended already. The model is in `job.files.model` then.

    Raises FailedPreconditionError while another process trains the run, or for a run of other settings under this name;
    ServiceError or ValueError when something does not fit; ray.train.TrainingFailedError when workers failed more often
    than `max_failures`.
    """
    job.tracking.check()
    pairs = job.pairs()
    if not pairs:
        raise SettingError("reward.data", "there is no pair to train on; lower reward.held_out_share, or give more")
    record = _record(job, pairs)
    with held_leases((str(job.run_folder.absolute()),), job.run_name):
        sweep_partial(job.run_folder)
        if start_over:
            job.files.clear()
        if job.files.model.is_dir():
            check_same_settings(record, job.files)
            return False
        claim_run_folder(record, job.files, job.checkpoints)
        if job.config.num_workers == 0:
            work_here(job, record.identity)
        else:
            use_gpu = join_cluster("reward", device=job.config.device, cpus_per_worker=job.config.cpus_per_worker)
            run_workers(partial(work_here, job, record.identity), job.run_folder, job.config, use_gpu=use_gpu)
    return True


def work_here(job: RewardJob, identity: str) -> None:
    """Train in this process, which is one of the workers where there are several."""
    import torch

    from services.reward.trainer import train_to_end

    torch.set_num_threads(job.config.threads)
    train_to_end(job, identity)


def _record(job: RewardJob, pairs: list[Pair]) -> RunRecord:
    decisive = job.config.model_dump(mode="json", exclude=_MAY_CHANGE)
    settings: dict[str, Any] = {
        "reward.start": weights_revision(job.start),
        "reward.data": fingerprint(pairs),
        **{f"reward.{key}": value for key, value in decisive.items()},
    }
    identity = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
    details = {"start": str(job.start), "pairs": len(pairs)}
    return RunRecord(job.run_name, settings, identity, details, job.recipe)
