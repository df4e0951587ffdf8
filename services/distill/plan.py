"""The fixed quantities and the identity of a run, which the driver checks before any worker starts."""

from __future__ import annotations

import hashlib
import json
import math
import time
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from fusion.v1 import fusion_pb2
from fusion_core.vocabulary import Vocabulary
from services.base.errors import FailedPreconditionError, NotFoundError, UnavailableError
from services.base.retry import Backoff
from services.distill.config import DistillConfig
from services.distill.curriculum import stage_windows
from services.distill.data.feed import FusionStream
from services.distill.job import DistillJob
from services.distill.on_policy.prompts import PromptFiles
from services.distill.target.moe import check_moe
from services.fusion.client import StreamPart
from services.jobs.run_record import RunRecord, claim_run_folder

_MAY_CHANGE = {
    "prefetch_windows", "checkpoint_every_steps", "keep_checkpoints", "eval_every_steps", "device", "dtype",
    "gradient_checkpointing", "num_workers", "cpus_per_worker", "memory_per_worker", "torch_threads", "max_failures",
    "micro_batch_windows", "pack_tokens", "parallel", "storage",
}  # fmt: skip
"""Settings that may differ when a run is resumed; all others decide the result."""
_BY_SOURCE = ("fusion.weights.", "fusion.prior.")
"""Settings with one value per source: those of sources that are not asked decide nothing."""


_MAY_CHANGE_ON_POLICY = {"answers_at_once", "in_flight"}
"""As `_MAY_CHANGE`, of section `on_policy`."""


@dataclass(frozen=True, slots=True)
class RunPlan:
    """The fixed quantities of a run.

    Attributes:
        vocabulary: fingerprint of the target's tokenizer; every block must carry it.
        vocabulary_size: number of ids.
        bos: the token in front of every window: BOS, or EOS where a tokenizer has none (GPT-2, Qwen).
        part_windows: windows of every part of the stream: of every epoch, every stage of the curriculum, or every round
            of on-policy distillation, whose answers are no part of the stream.
        block_windows: windows that the stream keeps together, and deals to the workers together.
        stream_parts: the stages of the curriculum, or the rounds, as the stream is asked for them; none for epochs.
        settings: everything that decides the result, by dotted key: target, corpus, training, and the service's models
            and settings of fusion. A checkpoint made under others is not resumed.
    """

    vocabulary: str
    vocabulary_size: int
    bos: int
    part_windows: tuple[int, ...]
    block_windows: int
    stream_parts: tuple[StreamPart, ...]
    settings: dict[str, Any]

    @property
    def identity(self) -> str:
        """The hash of the settings, which every checkpoint carries."""
        return hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode()).hexdigest()[:16]

    def steps_until(self, epoch: int, config: DistillConfig) -> int:
        """Return the number of optimiser steps before an epoch or stage, the short last one of each included."""
        return sum(self._steps(config)[:epoch])

    def total_steps(self, config: DistillConfig) -> int:
        """Return the number of optimiser steps in all epochs or stages."""
        return self.steps_until(len(self.part_windows), config)

    def epoch_of(self, step: int, config: DistillConfig) -> tuple[int, bool]:
        """Return the epoch or stage of a step, counted from 0, and whether the step is its last one."""
        ends = list(accumulate(self._steps(config)))
        epoch = bisect_right(ends, step)
        return epoch, step + 1 == ends[epoch]

    def _steps(self, config: DistillConfig) -> list[int]:
        """Return the number of optimiser steps of each epoch, stage or round."""
        if config.on_policy is not None:
            return [config.on_policy.round_steps] * config.on_policy.rounds
        return [math.ceil(windows / config.batch_windows) for windows in self.part_windows]


def make_plan(job: DistillJob, client: FusionStream, *, patience_seconds: float = 60.0) -> RunPlan:
    """Return the plan of a run, from the fusion service's description and the target's tokenizer.

    A source whose model the service does not know yet is waited for as long as `patience_seconds`.

    Raises FailedPreconditionError when the service fuses into another vocabulary, or with other settings than
    `job.expected`, or does not name its settings; UnavailableError when it does not know the model behind a source;
    NotFoundError for an unknown data set, split or source; ValueError for a split without windows, an unusable
    tokenizer, or a target that `distill.moe` cannot turn into a mixture of experts; and what the client raises.
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
    sources = () if job.config.tokens_only else _find_sources(job, info)
    if sources:
        info = _with_known_sources(sources, info, client, patience_seconds)
    check_expected(job.expected, info.settings, job.fusion_address)
    if job.config.moe is not None:
        check_moe(job.target_folder, job.config.moe)
    unset = {"moe"} if job.config.moe is None else set()  # runs of earlier versions did not record it
    decisive = job.config.model_dump(mode="json", exclude=_MAY_CHANGE | unset)
    decisive["sources"] = sorted(sources)
    if job.config.moe is not None and not job.config.moe.balance.bias:  # nor did they record this
        del decisive["moe"]["balance"]["bias"]
    parts, pools = _stages(job, split, info)
    corpus: dict[str, Any] = {"corpus.pools": pools} if parts else {}
    if not parts:  # earlier runs did not record these
        del decisive["stages"], decisive["num_windows"]
    rounds = _rounds(job)
    decisive |= _identity_of_rounds(job, info, decisive.pop("on_policy"))
    if split.block_windows > 1:
        corpus["corpus.block_windows"] = split.block_windows
    return RunPlan(
        vocabulary=vocabulary.fingerprint,
        vocabulary_size=vocabulary.size,
        bos=bos,
        part_windows=rounds or tuple(part.num_windows for part in parts) or (split.num_windows,) * job.config.epochs,
        block_windows=split.block_windows or 1,
        stream_parts=parts or tuple(StreamPart(windows, ((job.split, 1),)) for windows in rounds if windows),
        settings={
            "target": _target_identity(job),
            "vocabulary": vocabulary.fingerprint,
            "corpus": f"{split.name}/{split.split}:{split.fingerprint}",
            "fusion.alignment": None if job.config.tokens_only else info.alignment,
            "fusion.strategy": None if job.config.tokens_only else info.strategy,
            **corpus,
            **{f"distill.{key.rstrip('_')}": value for key, value in decisive.items()},
            **settings_of_rows(info.settings, sources),
        },
    )


def settings_of_rows(served: Mapping[str, str], sources: Sequence[str]) -> dict[str, Any]:
    """Return the settings of a fusion service that decide the blocks which it makes from these sources.

    Without sources these are the settings of section `corpus`: what the target reads.
    """
    chosen = {}
    for key, value in served.items():
        section, _, rest = key.partition(".")
        if section != "corpus" and not sources:
            continue
        if section == "sources" and not any(rest.startswith(f"{name}.") for name in sources):
            continue
        if any(key.startswith(each) and key.removeprefix(each) not in sources for each in _BY_SOURCE):
            continue
        chosen[key] = json.loads(value)
    return dict(sorted(chosen.items()))


def check_expected(expected: Mapping[str, str], served: Mapping[str, str], address: str) -> None:
    """Raise FailedPreconditionError naming the first setting that the service at `address` runs otherwise.

    Both are dotted recipe keys and values in JSON. Keys of section `fusion` that change nothing may be missing, so one
    that only the service has is a difference. A service that names no settings can only stream tokens.
    """
    for key, value in expected.items() if served else ():
        if json.loads(served.get(key, "null")) != json.loads(value):
            raise FailedPreconditionError(
                f"{key}: the recipe says {value}, the fusion service at {address} runs with "
                f"{served.get(key, 'no such setting')}; leave it as it runs, or start the service with this recipe"
            )
    for key in sorted(served.keys() - expected.keys()) if expected else ():
        if key.startswith("fusion."):
            raise FailedPreconditionError(
                f"{key}: the recipe leaves it out, the fusion service at {address} runs with {served[key]}; set it as "
                "it runs, or start the service with this recipe"
            )


def _with_known_sources(
    sources: Sequence[str], info: fusion_pb2.GetFusionInfoResponse, client: FusionStream, patience_seconds: float
) -> fusion_pb2.GetFusionInfoResponse:
    """Return the service's description once it knows the model behind each of the sources."""
    backoff = Backoff(0.5, longest_seconds=5.0, patience_seconds=patience_seconds)
    while True:
        if not info.settings:
            raise FailedPreconditionError(
                "fusion: the fusion service does not name the settings that it fuses with, so that a run could not be "
                "told from one under others; it is older than this trainer, update it"
            )
        unknown = [name for name in sources if f"sources.{name}.revision" not in info.settings]
        if not unknown:
            return info
        if backoff.exhausted:
            raise UnavailableError(
                f"sources.{unknown[0]}: has not answered yet and nothing of it is stored; which model it serves is "
                "part of a run's identity, so start it, or leave it out (distill.sources)"
            )
        time.sleep(backoff.next_pause())
        info = client.info()


def claim_run(job: DistillJob, plan: RunPlan) -> None:
    """Write the run's record and recipe into its folder; raises FailedPreconditionError, see `claim_run_folder`."""
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


def _stages(
    job: DistillJob, split: fusion_pb2.DatasetInfo, info: fusion_pb2.GetFusionInfoResponse
) -> tuple[tuple[StreamPart, ...], dict[str, str]]:
    """Return the parts of the stream that the curriculum asks for, and the fingerprints of the splits in them."""
    stages = job.config.stages or ()
    known = {dataset.split: dataset for dataset in info.datasets if dataset.name == job.dataset}
    for stage in stages:
        for pool, (name, _) in zip(stage.mixture, stage.weights, strict=True):
            if name not in known or known[name].num_windows == 0:
                raise NotFoundError(
                    f"distill.stages: stage {stage.name} draws from {pool}, and {job.fusion_address} streams no window "
                    f"of {job.dataset}/{name}; it has {', '.join(sorted(known))}"
                )
    sizes = stage_windows(stages, job.config.num_windows or split.num_windows)
    parts = tuple(StreamPart(size, stage.weights) for size, stage in zip(sizes, stages, strict=True))
    return parts, {name: known[name].fingerprint for part in parts for name, _ in part.weights}


def _rounds(job: DistillJob) -> tuple[int, ...]:
    """Return the windows of the stream in every round of on-policy distillation; none for a run without rounds."""
    on_policy = job.config.on_policy
    return () if on_policy is None else (job.config.stream_windows * on_policy.round_steps,) * on_policy.rounds


def _identity_of_rounds(
    job: DistillJob, info: fusion_pb2.GetFusionInfoResponse, settings: dict[str, Any] | None
) -> dict[str, Any]:
    """Return what decides the result of section `on_policy`: nothing where a run has none, as those before it.

    Raises SettingError for prompts that cannot be read, FailedPreconditionError when the target would not read them.
    """
    if job.config.on_policy is None or settings is None:
        return {}
    prompts = PromptFiles.read(job.config.on_policy.prompts)
    prompts.check_template(json.loads(info.settings.get("target.chat_template", "null")))
    if json.loads(info.settings.get("corpus.target_context", "true")) is False:
        raise FailedPreconditionError(
            "corpus.target_context: false lets the target read no prompt, and distill.on_policy is about answers to "
            "prompts; start the service with target_context: true"
        )
    kept = {key: value for key, value in settings.items() if key not in _MAY_CHANGE_ON_POLICY}
    return {"on_policy": kept | {"prompts": prompts.fingerprint}}


def _find_sources(job: DistillJob, info: fusion_pb2.GetFusionInfoResponse) -> tuple[str, ...]:
    """Return the names of the sources whose rows are fused."""
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
