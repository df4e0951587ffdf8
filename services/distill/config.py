"""Configuration of training. Defaults are those of the FuseLLM paper."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field, field_validator, model_validator

from fusion_core.losses import FusionLoss, LambdaSchedule, lambda_at
from services.base.settings import MEMORY_PATTERN, Settings
from services.distill.curriculum import Stage, check_stages
from services.distill.on_policy.config import OnPolicyConfig
from services.distill.target.config import LoraConfig, MoeConfig, Text


class DistillConfig(Settings):
    """Section `distill` of a recipe: training by lambda * CLM + (1 - lambda) * fusion, with AdamW.

    Both terms are means over the tokens of a step's global batch. Batches do not cross the end of an epoch or a stage;
    the last one of an epoch may be short, and its gradient is scaled by its share of `batch_windows`.
    """

    lambda_: float = Field(0.9, alias="lambda", ge=0, le=1, description="share of CLM; 1 asks no source at all")
    lambda_schedule: LambdaSchedule = "constant"
    lambda_end: float | None = Field(None, ge=0, le=1, description="where a linear or cosine lambda moves to")
    reward_weighting: bool = Field(
        False, description="the fusion term of a window counts by exp(-loss per token) of its best source"
    )
    sources: tuple[Text, ...] | None = Field(
        None, min_length=1, description="fuse these sources only, such as a single one as a control; all when not set"
    )
    loss: FusionLoss = "cross_entropy"
    jsd_beta: float = Field(0.5, gt=0, lt=1, description="of loss jsd: towards 0 forward KL, towards 1 reverse KL")
    temperature: float = Field(1.0, gt=0, description="of the fusion term, on both sides")
    lora: LoraConfig | None = None
    moe: MoeConfig | None = Field(
        None, description="turn the dense target into a mixture of experts when the run starts"
    )
    epochs: int = Field(1, ge=1)
    stages: tuple[Stage, ...] | None = Field(
        None, min_length=1, description="a curriculum, instead of epochs: stages with a mixture of pools each"
    )
    num_windows: int | None = Field(
        None, ge=1, description="windows of all stages together; as many as the train split has when not set"
    )
    on_policy: OnPolicyConfig | None = Field(
        None, description="learn from the target's own answers too, in rounds instead of epochs"
    )
    batch_windows: int = Field(128, ge=1, description="windows per step, over all workers")
    micro_batch_windows: int | None = Field(
        None, ge=1, description="windows per forward pass of a worker; its whole share of a step when not set"
    )
    pack_tokens: int | None = Field(
        None, ge=16, description="put windows behind each other in rows of so many tokens; each sees only itself"
    )
    learning_rate: float = Field(1e-5, gt=0)
    weight_decay: float = Field(0.1, ge=0, description="on matrices; vectors (norms, biases) have none")
    betas: tuple[float, float] = (0.9, 0.95)
    clip_norm: float | None = Field(1.0, gt=0, description="largest norm of the gradient; null for no clipping")
    warmup_share: float = Field(0.008, ge=0, lt=1, description="share of all steps")
    schedule: Literal["cosine", "constant"] = "cosine"
    seed: int = Field(0, ge=0, lt=2**63)
    k: int | None = Field(None, ge=1, description="candidates per row; the service's own when not set")
    prefetch_windows: int | None = Field(None, ge=1, description="per worker; two batches when not set")

    storage: Text | None = Field(
        None,
        description="folder or URL (s3://, gs://, ...) for the checkpoints of runs; the run folder if unset",
    )
    checkpoint_every_steps: int = Field(100, ge=1)
    keep_checkpoints: int = Field(2, ge=1)
    eval_every_steps: int | None = Field(None, ge=1, description="score the held-out split every so many steps")

    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="of the computation; weights stay float32")
    gradient_checkpointing: bool = False
    num_workers: int | tuple[int, int] = Field(1, description="a number, or [least, most] for an elastic run")
    parallel: Literal["ddp", "fsdp"] = Field("ddp", description="fsdp shards weights, gradients and optimiser (FSDP2)")
    cpus_per_worker: float = Field(1.0, gt=0, description="what Ray reserves")
    memory_per_worker: str | None = Field(
        None, pattern=MEMORY_PATTERN, description="memory of a pod on Kubernetes, such as 48Gi; default the manifests'"
    )
    torch_threads: int | None = Field(None, ge=1, description="threads per worker; cpus_per_worker when not set")
    max_failures: int = Field(3, ge=-1, description="restarts from the last checkpoint; -1 for no limit")

    @field_validator("betas")
    @classmethod
    def _betas_in_range(cls, betas: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError("must be two numbers, each from 0 to below 1")
        return betas

    @model_validator(mode="after")
    def _workers_share_the_batch(self) -> DistillConfig:
        least, most = self.worker_range
        if not 1 <= least <= most:
            raise ValueError(f"num_workers: must be at least 1, and [least, most] in this order, got {least}, {most}")
        if least == most and self.batch_windows % most:
            raise ValueError(f"batch_windows: must be a multiple of num_workers = {most}, got {self.batch_windows}")
        if self.batch_windows < most:
            raise ValueError(f"batch_windows: must be at least the {most} workers of num_workers")
        return self

    @model_validator(mode="after")
    def _nothing_idle(self) -> DistillConfig:
        if (self.lambda_schedule == "constant") != (self.lambda_end is None):
            raise ValueError("lambda_end: required with lambda_schedule linear or cosine, and only then")
        if self.loss != "jsd" and self.jsd_beta != 0.5:
            raise ValueError("jsd_beta: only loss jsd has it")
        if self.sources is not None and len(set(self.sources)) < len(self.sources):
            raise ValueError(f"sources: names a source twice: {', '.join(self.sources)}")
        if self.sources is not None and self.tokens_only:
            raise ValueError("sources: no source is asked with lambda 1; leave it out")
        if self.reward_weighting and self.tokens_only:
            raise ValueError("reward_weighting: there is no fusion term with lambda 1")
        return self

    @model_validator(mode="after")
    def _experts_are_trained(self) -> DistillConfig:
        if self.moe is not None and self.lora is not None:
            raise ValueError(
                "moe: lora trains adapters alone, on a target that stays as it is; make the mixture with "
                "`fusion upcycle` and give its folder as target.model, or leave lora out"
            )
        return self

    @model_validator(mode="after")
    def _stages_fit(self) -> DistillConfig:
        if self.stages is None:
            if self.num_windows is not None:
                raise ValueError("num_windows: only with stages; a run without takes epochs")
            return self
        if self.epochs != 1:
            raise ValueError(f"epochs: a run has either epochs or stages, got epochs = {self.epochs} with stages")
        check_stages(self.stages)
        if self.lora is not None and any(stage.rope_theta is not None for stage in self.stages):
            raise ValueError("stages.rope_theta: adapters leave the target as it is; leave it out, or lora")
        return self

    @model_validator(mode="after")
    def _rounds_fit(self) -> DistillConfig:
        if self.on_policy is None:
            return self
        if self.stages is not None or self.epochs != 1:
            raise ValueError("on_policy: a run has rounds, epochs or stages; leave out epochs and stages")
        if self.loss not in {"reverse_kl", "jsd"}:
            raise ValueError(f"loss: reverse_kl or jsd with on_policy, got {self.loss}")
        if self.tokens_only:
            raise ValueError("lambda: below 1 with on_policy: own answers are learned from by the sources' rows alone")
        if self.reward_weighting:
            raise ValueError("reward_weighting: not with on_policy, where an answer is no text to be learned by heart")
        if self.own_windows < 1:
            raise ValueError(
                f"on_policy.share: {self.on_policy.share:g} of batch_windows = {self.batch_windows} is no whole window"
            )
        if self.on_policy.share < 1 and self.stream_windows < 1:
            raise ValueError(
                f"on_policy.share: {self.on_policy.share:g} of batch_windows = {self.batch_windows} leaves the stream "
                "no whole window; 1 streams none"
            )
        return self

    @property
    def own_windows(self) -> int:
        """The number of a step's windows that are answers of the target, as long as none is left out."""
        return round(self.on_policy.share * self.batch_windows) if self.on_policy else 0

    @property
    def stream_windows(self) -> int:
        """The number of a step's windows that come from the fused stream."""
        return self.batch_windows - self.own_windows

    def rope_theta_at(self, part: int) -> float | None:
        """Return the RoPE base that the target has in a stage; None for the target's own."""
        bases = [stage.rope_theta for stage in (self.stages or ())[: part + 1] if stage.rope_theta is not None]
        return bases[-1] if bases else None

    @property
    def worker_range(self) -> tuple[int, int]:
        """The least and the largest number of workers."""
        return (self.num_workers, self.num_workers) if isinstance(self.num_workers, int) else self.num_workers

    @property
    def prefetch_per_worker(self) -> int:
        """The most windows that a worker asks for ahead of its training."""
        return self.prefetch_windows or 2 * math.ceil(self.batch_windows / self.worker_range[0])

    @property
    def tokens_only(self) -> bool:
        """True when the run is CLM only, and asks no source at all."""
        return self.lambda_ == 1.0 and self.lambda_end in {None, 1.0}

    def lambda_at(self, step: int, total_steps: int) -> float:
        """Return lambda of a step, counted from 0."""
        end = self.lambda_ if self.lambda_end is None else self.lambda_end
        return lambda_at(self.lambda_schedule, self.lambda_, end, step, total_steps)

    @property
    def threads(self) -> int:
        """Torch's threads in a worker."""
        return self.torch_threads or max(1, math.floor(self.cpus_per_worker))
