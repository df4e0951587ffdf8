"""Section `posttrain` of a recipe: the stages, their data, and the gate that lets a stage through.

Settings of training have the names and the meaning that they have in TRL.
"""

from __future__ import annotations

from collections import Counter
from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from fusion_core.preference.pairs import PairRule
from services.base.settings import Settings
from services.distill.target.config import LoraConfig, Text
from services.models.chat_template import read_chosen

Files = tuple[Text, ...]


class AnswersConfig(Settings):
    """Answers that sources gave, as the origin of training data."""

    files: Files = Field(min_length=1, description="Globs of JSON lines, as `fusion sample --to` writes them.")
    prompts: Files = Field((), description="Globs of JSON lines: the prompts, with their specs under `verify`.")
    judge: Literal["verifier", "logprob"] = Field(
        "verifier",
        description="`verifier` scores by the specs; `logprob` by the mean log-probability of the source that answered",
    )
    sources: tuple[Text, ...] | None = Field(None, min_length=1, description="Take these only; all when not set.")
    least_score: float | None = Field(
        None, description="SFT: the score that an answer needs; when not set, the judge must not call it wrong."
    )
    pairs: PairRule = Field("within_source", description="DPO: which answers make a pair.")
    least_gap: float = Field(0.0, ge=0, description="DPO: least difference of scores in a pair; a tie makes none.")
    most_gap: float | None = Field(None, gt=0, description="DPO: largest difference of scores in a pair.")
    per_prompt: int = Field(1, ge=1, description="Most rows of one prompt.")
    most_rows: int | None = Field(None, ge=1, description="Most rows in all, chosen by hash of their prompts.")

    @model_validator(mode="after")
    def _judge_has_specs(self) -> AnswersConfig:
        if self.judge == "logprob" and self.pairs == "right_and_wrong":
            raise ValueError("pairs: right_and_wrong needs judge verifier; log-probabilities call nothing right")
        return self


class TrainingSettings(Settings):
    """The settings that all stages share."""

    name: str | None = Field(None, pattern=r"^[a-z0-9][a-z0-9_]{0,30}$", description="Name of the stage; its kind.")
    skill: str | None = Field(
        None, description="Judge the stage by held-out prompts of this `skill`; the others are guards. All by default."
    )
    task: Text | None = Field(None, description="Judge the stage by this task of `gate.tasks`; all else are guards.")
    learning_rate: float = Field(1e-5, gt=0)
    num_train_epochs: float = Field(1.0, gt=0)
    max_steps: int = Field(-1, ge=-1, description="Steps in all; -1 for whole epochs.")
    per_device_train_batch_size: int = Field(8, ge=1)
    gradient_accumulation_steps: int = Field(1, ge=1)
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "linear"
    warmup_steps: float = Field(0.0, ge=0, description="Steps; below 1 a share of all steps.")
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    seed: int = Field(0, ge=0, lt=2**32)
    bf16: bool = False
    gradient_checkpointing: bool = False
    save_steps: int = Field(100, ge=1, description="Steps between checkpoints.")
    save_total_limit: int = Field(2, ge=2, description="Checkpoints that are kept.")
    lora: LoraConfig | None = Field(None, description="Train adapters only; the model has them merged in the end.")

    @model_validator(mode="after")
    def _one_aim(self) -> Self:
        if self.skill is not None and self.task is not None:
            raise ValueError("task: give either skill or task; a stage is judged by one figure")
        return self


class RowsSettings(TrainingSettings):
    """The settings of stages that learn from rows."""

    data: Files | None = Field(None, min_length=1, description="Globs of JSON lines with the rows.")
    answers: AnswersConfig | None = Field(None, description="Or answers of sources, to be judged.")
    max_length: int = Field(1024, ge=2, description="Tokens of prompt and answer; longer rows are left out.")

    @model_validator(mode="after")
    def _one_origin(self) -> RowsSettings:
        if (self.data is None) == (self.answers is None):
            raise ValueError("data: give either data or answers")
        return self


class SftStage(RowsSettings):
    """Supervised tuning on the answers' tokens."""

    kind: Literal["sft"]


class DpoStage(RowsSettings):
    """Direct preference optimisation against the stage's start (Rafailov et al. 2023)."""

    kind: Literal["dpo"]
    learning_rate: float = Field(1e-6, gt=0)
    loss_type: Literal["sigmoid", "sigmoid_norm", "hinge", "ipo"] = Field(
        "sigmoid_norm", description="sigmoid_norm is TÜLU 3's: log-probabilities are means over the answer's tokens"
    )
    beta: float = Field(5.0, gt=0)

    @model_validator(mode="after")
    def _beta_fits_loss(self) -> DpoStage:
        normalised = self.loss_type == "sigmoid_norm"
        if normalised and self.beta < 1:
            raise ValueError(
                f"beta: {self.beta:g} is of the scale of summed log-probabilities; sigmoid_norm takes means per token, "
                "with a beta of 1 or more, such as 5"
            )
        if not normalised and self.beta > 1:
            raise ValueError(
                f"beta: {self.beta:g} is of the scale of means per token; {self.loss_type} takes at most 1, such as 0.1"
            )
        return self


class StopConfig(Settings):
    """Conditions under which a GRPO stage ends before its last step."""

    unmixed_steps: int | None = Field(
        10, ge=1, description="No group of answers had different rewards for so many steps."
    )
    max_kl: float | None = Field(None, gt=0, description="KL from the start in nats per token; needs beta above 0.")
    length_ratio: float | None = Field(
        3.0, gt=1, description="Mean length of answers beyond this multiple of the first steps' mean."
    )


class GrpoStage(TrainingSettings):
    """Reinforcement learning with verified rewards by GRPO (Shao et al. 2024)."""

    kind: Literal["grpo"]
    prompts: Files = Field(min_length=1, description="Globs of JSON lines with prompts and their specs under `verify`.")
    learning_rate: float = Field(1e-6, gt=0)
    num_generations: int = Field(8, ge=2, description="Answers to one prompt: a group.")
    max_completion_length: int = Field(256, ge=1)
    temperature: float = Field(1.0, ge=1, le=1, description="Fixed: the loss takes samples of the policy itself.")
    top_p: float = Field(1.0, ge=1, le=1, description="Fixed, as the temperature.")
    beta: float = Field(0.0, ge=0, description="Weight of the KL from the stage's start; 0 loads no reference.")
    epsilon: float = Field(0.2, gt=0, description="Bound of the ratio in the clipped objective.")
    num_iterations: int = Field(1, ge=1, description="Steps that each batch of answers is used for.")
    scale_rewards: Literal["group", "batch", "none"] = "group"
    loss_type: Literal["grpo", "dapo", "bnpo", "dr_grpo"] = "dapo"
    pilot_prompts: int = Field(32, ge=0, description="Prompts that are answered before the run; 0 for no pilot.")
    least_mixed_share: float = Field(
        0.05, ge=0, le=1, description="Share of the pilot's groups that must have different rewards."
    )
    stop: StopConfig = StopConfig()

    def prompts_per_step(self, num_workers: int) -> int:
        """Return the number of prompts whose answers one step of all workers learns from."""
        answers = self.per_device_train_batch_size * self.gradient_accumulation_steps * max(1, num_workers)
        return answers // self.num_generations

    @model_validator(mode="after")
    def _batches_fit(self) -> GrpoStage:
        answers = self.per_device_train_batch_size * self.gradient_accumulation_steps
        if answers % self.num_generations:
            raise ValueError(
                f"num_generations: {answers} answers a step (per_device_train_batch_size times "
                f"gradient_accumulation_steps) are no multiple of {self.num_generations}"
            )
        if self.save_steps % self.num_iterations:
            raise ValueError(
                f"save_steps: {self.save_steps} is no multiple of num_iterations = {self.num_iterations}; a checkpoint "
                "does not hold the answers of a batch that is used again"
            )
        if self.stop.max_kl is not None and self.beta == 0:
            raise ValueError("stop.max_kl: needs beta above 0; without a reference no KL is measured")
        return self


Stage = Annotated[SftStage | DpoStage | GrpoStage, Field(discriminator="kind")]


class GuardConfig(Settings):
    """How far a guard may get worse; it fails where it is worse than that, and the 95 % interval excludes no change."""

    nats_per_byte: float = Field(0.02, ge=0, description="Rise on the held-out texts.")
    score: float = Field(0.02, ge=0, description="Fall of the mean score of another skill or task.")
    ended: float = Field(0.05, ge=0, description="Fall of the share of answers that end by themselves.")
    length_ratio: float = Field(2.0, gt=1, description="Mean length of answers as a multiple of the length before.")


class GateConfig(Settings):
    """Which prompts and texts decide whether a stage is let through."""

    prompts: Files = Field(min_length=1, description="Globs of JSON lines: held-out prompts with `verify`, `skill`.")
    texts: Files = Field((), description="Globs of .txt and .jsonl files (`text`): held-out texts for nats per byte.")
    tasks: Text | None = Field(None, description="Folder of lm-evaluation-harness tasks on local files.")
    max_new_tokens: int = Field(256, ge=1)
    temperature: float = Field(0.0, ge=0, le=2, description="0 takes the likeliest tokens.")
    samples: int = Field(1, ge=1, description="Answers to a prompt, whose score is their mean; needs a temperature.")
    pass_at: int | None = Field(
        None, ge=1, description="k: a prompt's score is pass@k instead, estimated without bias from its answers."
    )
    batch_size: int = Field(32, ge=1, description="Prompts that are answered at once.")
    seed: int = Field(0, ge=0, lt=2**32)
    guards: GuardConfig = GuardConfig()
    overlap_share: float = Field(
        0.8, gt=0, le=1, description="A row that covers so much of a held-out prompt by 8-grams is left out."
    )

    @model_validator(mode="after")
    def _samples_differ(self) -> GateConfig:
        if self.samples > 1 and self.temperature == 0:
            raise ValueError("samples: several answers to a prompt need a temperature above 0; at 0 all are the same")
        if self.pass_at is not None and self.pass_at > self.samples:
            raise ValueError(f"pass_at: pass@{self.pass_at} needs as many answers to a prompt; samples: {self.samples}")
        return self


class VerifierAddress(Settings):
    """A verifier that is served, which programs need."""

    address: str = Field(description="host:port")
    application: str = "verify"


class PosttrainConfig(Settings):
    """Section `posttrain` of a recipe."""

    start: Text = Field(
        "model",
        description="Model of the first stage: `model` for the recipe's target before training, the name of a training "
        "run of the recipe, a folder, or a model of the catalogue.",
    )
    stages: tuple[Stage, ...] = Field(min_length=1)
    gate: GateConfig
    chat_template: str | None = Field(None, description="As a source's; the model's own when not set.")
    verifier: VerifierAddress | None = Field(None, description="Judge of programs; needed where a spec has one.")
    num_workers: int = Field(1, ge=0, description="Workers of Ray Train; 0 trains in the command's own process.")
    device: Literal["auto", "cpu", "cuda"] = "auto"
    cpus_per_worker: float = Field(1.0, gt=0, description="what Ray reserves")
    torch_threads: int | None = Field(None, ge=1, description="threads per worker; cpus_per_worker when not set")
    max_failures: int = Field(3, ge=-1, description="restarts from the last checkpoint; -1 for no limit")

    @field_validator("chat_template")
    @classmethod
    def _template_is_read(cls, chat_template: str | None) -> str | None:
        return read_chosen(chat_template)

    @property
    def threads(self) -> int:
        """The threads of torch in a worker."""
        return self.torch_threads or max(1, int(self.cpus_per_worker))

    @field_validator("stages")
    @classmethod
    def _names_differ(cls, stages: tuple[Stage, ...]) -> tuple[Stage, ...]:
        names = Counter(stage.name for stage in stages if stage.name is not None)
        if twice := [name for name, count in names.items() if count > 1]:
            raise ValueError(f"the name {twice[0]} is used twice")
        return stages

    def stage_names(self) -> list[str]:
        """Return the names of the stages' folders, such as `1-sft`."""
        return [f"{number}-{stage.name or stage.kind}" for number, stage in enumerate(self.stages, 1)]
