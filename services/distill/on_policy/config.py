"""Configuration of on-policy distillation."""

from __future__ import annotations

from pydantic import Field, field_validator

from services.base.home import expand_user
from services.base.settings import Settings


class OnPolicyConfig(Settings):
    """Section `distill.on_policy`: rounds in which the target learns from answers of its own, beside the stream."""

    prompts: tuple[str, ...] = Field(
        min_length=1, description="files (globs), .jsonl or .parquet, with `prompt` or `messages` in every row"
    )
    rounds: int = Field(ge=1, description="rounds of the run, each with answers of the target as it is then")
    round_steps: int = Field(ge=1, description="steps of a round; the last of them learns from the oldest answers")
    share: float = Field(0.5, gt=0, le=1, description="share of a step's windows that are answers; 1 streams none")
    answers: int = Field(1, ge=1, description="answers to each prompt of a round")
    temperature: float = Field(1.0, ge=0.01, le=2, description="divides the target's logits where it answers")
    max_new_tokens: int = Field(128, ge=1, description="most tokens of an answer")
    answers_at_once: int = Field(16, ge=1, description="answers that a worker samples at once")
    in_flight: int = Field(16, ge=1, description="answers that a worker has the sources score at once")

    @field_validator("prompts")
    @classmethod
    def _from_any_working_directory(cls, prompts: tuple[str, ...]) -> tuple[str, ...]:
        # Ray gives a submitted job, and each of its workers, a working directory of their own.
        return tuple(str(expand_user(pattern, "prompts").absolute()) for pattern in prompts)
