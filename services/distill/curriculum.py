"""Configuration of a curriculum: stages of a run, each with a mixture of the corpus' pools."""

from __future__ import annotations

from decimal import Decimal
from typing import Annotated

from pydantic import Field, model_validator

from services.base.settings import Settings

WHOLE_TRAIN = "train"
"""The split that `train` stands for, and the first part of the names of the pools' splits."""
_DECIMALS = 4
Share = Annotated[float, Field(gt=0, le=1)]


class Stage(Settings):
    """A stage of a run: its share of the windows, and the pools that they come from (InternLM2, Cai et al. 2024)."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    share: Share = Field(description="share of the run's windows")
    mixture: dict[str, Share] = Field(
        {WHOLE_TRAIN: 1.0},
        min_length=1,
        description="shares of the stage's windows by pool of corpus.pools; `train` is the whole train split",
    )
    learning_rate: float | None = Field(
        None, gt=0, description="peak of the schedule in this stage, in place of distill.learning_rate"
    )
    rope_theta: float | None = Field(
        None, gt=0, description="RoPE base from this stage on; the one before stays where not set"
    )

    @model_validator(mode="after")
    def _whole(self) -> Stage:
        check_shares(list(self.mixture.values()), "mixture")
        return self

    @property
    def weights(self) -> tuple[tuple[str, int], ...]:
        """Pairs of a split of the corpus and its weight, whole numbers, in the order of the recipe."""
        return tuple((split_of(pool), round(share * 10**_DECIMALS)) for pool, share in self.mixture.items())


def split_of(pool: str) -> str:
    """Return the split of the corpus that holds the windows of a pool."""
    return pool if pool == WHOLE_TRAIN else f"{WHOLE_TRAIN}/{pool}"


def check_stages(stages: tuple[Stage, ...]) -> None:
    """Raise ValueError unless the stages have different names and share the run's windows among them."""
    names = [stage.name for stage in stages]
    if len(set(names)) < len(names):
        raise ValueError(f"stages: names must differ, got {', '.join(names)}")
    check_shares([stage.share for stage in stages], "stages.share")


def stage_windows(stages: tuple[Stage, ...], num_windows: int) -> tuple[int, ...]:
    """Return the number of windows of each stage, together `num_windows`; ValueError for a stage without any."""
    ends, before = [], 0
    for stage in stages:
        before += round(stage.share * 10**_DECIMALS)
        ends.append((2 * num_windows * before + 10**_DECIMALS) // (2 * 10**_DECIMALS))  # the nearest, halves up
    sizes = tuple(end - start for start, end in zip([0, *ends], ends, strict=False))
    for stage, size in zip(stages, sizes, strict=True):
        if size < 1:
            raise ValueError(
                f"distill.stages: stage {stage.name} has no window, with a share of {stage.share:g} of {num_windows}; "
                "raise distill.num_windows"
            )
    return sizes


def check_shares(shares: list[float], key: str) -> None:
    """Raise ValueError unless shares have at most four decimals, so that they can be kept exactly, and sum to one."""
    exact = [Decimal(str(share)) for share in shares]
    if any(share != round(share, _DECIMALS) for share in exact):
        raise ValueError(f"{key}: shares must have at most {_DECIMALS} decimals, got {', '.join(map(str, shares))}")
    if sum(exact) != 1:
        raise ValueError(f"{key}: shares must sum to 1, they sum to {sum(exact)}")
