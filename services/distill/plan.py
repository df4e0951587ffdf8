"""What the driver finds out before any worker starts, and what it refuses there."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from typing import Any

from fusion.v1 import fusion_pb2
from fusion_core.vocabulary import Vocabulary
from services.base.errors import FailedPreconditionError, NotFoundError
from services.distill.config import DistillConfig
from services.distill.data.feed import FusionStream
from services.distill.job import DistillJob
from services.jobs.run_record import RunRecord, claim_run_folder

_MAY_CHANGE = {
    "prefetch_windows", "checkpoint_every_steps", "keep_checkpoints", "eval_every_steps", "device", "dtype",
    "gradient_checkpointing", "num_workers", "cpus_per_worker", "memory_per_worker", "torch_threads", "max_failures",
    "micro_batch_windows", "pack_tokens", "parallel", "storage",
}  # fmt: skip
"""Settings that a resumed run may have otherwise; all others decide what is learned."""


@dataclass(frozen=True, slots=True)
class RunPlan:
    """The fixed quantities of a run.

    Attributes:
        vocabulary: fingerprint of the target's tokenizer; every block must carry it.
        vocabulary_size: number of ids.
        bos: the token in front of every window: BOS, or EOS where a tokenizer has none (GPT-2, Qwen).
        num_windows: windows of the split, so of one epoch.
        settings: what decides the outcome, by key; a checkpoint made under others is not resumed.
    """

    vocabulary: str
    vocabulary_size: int
    bos: int
    num_windows: int
    settings: dict[str, Any]

    @property
    def identity(self) -> str:
        """Hash of the settings."""
        return hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode()).hexdigest()[:16]

    def steps_per_epoch(self, config: DistillConfig) -> int:
        return math.ceil(self.num_windows / config.batch_windows)

    def total_steps(self, config: DistillConfig) -> int:
        return config.epochs * self.steps_per_epoch(config)


def make_plan(job: DistillJob, client: FusionStream) -> RunPlan:
    """Asks the fusion service and reads the target's tokenizer.

    Raises FailedPreconditionError when the service fuses into another vocabulary, NotFoundError for an unknown data
    set, split or source, ValueError for a split without windows or an unusable tokenizer, and what the client raises.
    """
    vocabulary = Vocabulary.from_pretrained(job.target_folder)
    bos = vocabulary.bos_id if vocabulary.bos_id is not None else vocabulary.eos_id
    if bos is None:
        raise ValueError(f"target: the tokenizer in {job.target_folder} has neither a BOS nor an EOS token")
    info = client.info()
    if info.vocabulary != vocabulary.fingerprint:
        raise FailedPreconditionError(
            f"vocabulary: the fusion service at {job.fusion_address} fuses into {info.vocabulary}, the target's "
            f"tokenizer in {job.target_folder} is {vocabulary.fingerprint}; start the service for this target"
        )
    split = _find_split(job, info)
    if split.num_windows == 0:
        raise ValueError(f"corpus: split {job.split} of {job.dataset} has no windows; nothing to train on")
    decisive = {key: value for key, value in job.config.model_dump(mode="json").items() if key not in _MAY_CHANGE}
    decisive["sources"] = [] if job.config.tokens_only else sorted(_find_sources(job, info))
    return RunPlan(
        vocabulary=vocabulary.fingerprint,
        vocabulary_size=vocabulary.size,
        bos=bos,
        num_windows=split.num_windows,
        settings={
            "target": _target_identity(job),
            "vocabulary": vocabulary.fingerprint,
            "corpus": f"{split.name}/{split.split}:{split.fingerprint}",
            "fusion.alignment": None if job.config.tokens_only else info.alignment,
            "fusion.strategy": None if job.config.tokens_only else info.strategy,
            **{f"distill.{key.rstrip('_')}": value for key, value in decisive.items()},
        },
    )


def claim_run(job: DistillJob, plan: RunPlan) -> None:
    """Writes the run's record and recipe into its folder; raises FailedPreconditionError, see `claim_run_folder`."""
    details = {
        "config": job.config.model_dump(mode="json", by_alias=True),
        "total_steps": plan.total_steps(job.config),
        "dataset": f"{job.dataset}/{job.split}",
    }
    record = RunRecord(job.run_name, plan.settings, plan.identity, details, job.recipe)
    claim_run_folder(record, job.files, job.checkpoints)


def _find_split(job: DistillJob, info: fusion_pb2.GetFusionInfoResponse) -> fusion_pb2.DatasetInfo:
    for dataset in info.datasets:
        if (dataset.name, dataset.split) == (job.dataset, job.split):
            return dataset
    known = ", ".join(f"{dataset.name}/{dataset.split}" for dataset in info.datasets) or "none"
    raise NotFoundError(f"dataset: {job.dataset}/{job.split} is not streamed by {job.fusion_address}; it has {known}")


def _find_sources(job: DistillJob, info: fusion_pb2.GetFusionInfoResponse) -> tuple[str, ...]:
    """Names of the sources whose rows are fused."""
    known = tuple(source.name for source in info.sources)
    for name in job.config.sources or ():
        if name not in known:
            raise NotFoundError(f"distill.sources: {job.fusion_address} has no source {name}, only {', '.join(known)}")
    return job.config.sources or known


def _target_identity(job: DistillJob) -> str:
    digest = hashlib.sha256()
    for name in ("config.json", "target.json"):
        file = job.target_folder / name
        digest.update(file.read_bytes() if file.exists() else b"")
    return digest.hexdigest()[:16]
