"""Settings of alignment and fusion."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from fusion_core.alignment.byte.projection import ByteConfig
from fusion_core.alignment.method import AlignmentConfig

DEFAULT_DOMAIN = "default"


class FusionConfig(BaseModel):
    """The `fusion` section of a recipe.

    Attributes:
        alignment: method that brings a source's distributions into the target's vocabulary: `byte`, or for comparison
            the published `min_edit` and `transport`; or a mapping with `method` and that method's own settings.
        strategy: `min_ce` takes the source with the lowest loss; `avg_ce` weighs by softmax(-loss / tau); `fixed` uses
            `weights`; `online` begins every window with `prior` and follows the text, see `fusion_core.fusion.online`.
            Losses are nats per byte over the same bytes (FuseLLM, Wan et al. 2024, section 3.3, there per token).
        tau: temperature of `avg_ce`, in nats per byte.
        scope: `window` compares the losses over the whole window, `span` over each span of `span_tokens` target tokens.
        span_tokens: length of a span in target tokens, used when scope is `span`.
        weights: one weight per source for `fixed`, by name; they are normalised over the sources that answered.
        rate: share of a token's posterior in the next token's weights, for `online`.
        prior: weight of each source at a window's start for `online`, by name, normalised over the sources that
            answered; all alike when empty.
        min_weight: weight m that each of the n sources that take part has at least: a weight w becomes
            m + (1 - n m) w. Those with a row in the window or span take part; with `online` those that have the row.
        soften: power of the fused probabilities: a row's candidates, and its tail as one outcome, are raised to it and
            scaled to sum to one; 1 leaves them, less makes them flatter.
        k_out: candidates kept per fused row, the realised token always among them; the rest goes to the tail.
        min_sources: a window with fewer sources than that is refused.
        sources_by: names of the sources that score a document, by its domain; `all` stands for every source, and the
            entry `default` is for the domains that are not named, and for documents without one.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    alignment: AlignmentConfig = ByteConfig()
    strategy: Literal["min_ce", "avg_ce", "fixed", "online"] = "avg_ce"
    tau: float = Field(default=0.05, gt=0, allow_inf_nan=False)
    scope: Literal["window", "span"] = "window"
    span_tokens: int = Field(default=64, ge=1)
    weights: dict[str, float] = Field(default_factory=dict)
    rate: float = Field(default=0.05, gt=0, lt=1)
    prior: dict[str, float] = Field(default_factory=dict)
    min_weight: float = Field(default=0.0, ge=0, le=0.5)
    soften: float = Field(default=1.0, gt=0, le=1)
    k_out: int = Field(default=32, ge=1)
    min_sources: int = Field(default=1, ge=1)
    sources_by: dict[str, Literal["all"] | tuple[str, ...]] = Field(default_factory=dict)

    def sources_of(self, domain: str, names: Sequence[str]) -> tuple[str, ...]:
        """Return those of `names` that score a document of this domain; LookupError where no entry is for it."""
        if not self.sources_by:
            return tuple(names)
        chosen = self.sources_by.get(domain or DEFAULT_DOMAIN, self.sources_by.get(DEFAULT_DOMAIN))
        if chosen is None:
            raise LookupError(
                f"sources_by: no sources for domain {domain!r}; there are {', '.join(self.sources_by)}, and no "
                f"`{DEFAULT_DOMAIN}`"
            )
        return tuple(name for name in names if chosen == "all" or name in chosen)

    @field_validator("sources_by", mode="before")
    @classmethod
    def _names_are_lists(cls, value: Any) -> Any:
        for domain, names in value.items() if isinstance(value, dict) else ():
            if isinstance(names, str) and names != "all":
                raise ValueError(f"{domain}: expected a list of names, or all, got {names!r}")
        return value

    @model_validator(mode="after")
    def _each_domain_has_sources(self) -> Self:
        for domain, names in self.sources_by.items():
            if not names:
                raise ValueError(f"sources_by.{domain}: name at least one source, or all")
            if names != "all" and len(set(names)) < len(names):
                raise ValueError(f"sources_by.{domain}: names a source twice")
        return self

    @model_validator(mode="after")
    def _weights_fit_the_strategy(self) -> Self:
        if self.strategy == "fixed" and not self.weights:
            raise ValueError("weights: strategy 'fixed' needs a weight for every source, for example {a: 0.7, b: 0.3}")
        if self.strategy != "fixed" and self.weights:
            raise ValueError(f"weights: only allowed with strategy 'fixed', not with {self.strategy!r}")
        for name, weight in self.weights.items():
            if not 0 <= weight < float("inf"):
                raise ValueError(f"weights.{name}: must be a number of at least 0, got {weight}")
        if self.strategy == "fixed" and not any(self.weights.values()):
            raise ValueError("weights: at least one weight must be above 0")
        if self.strategy == "fixed" and self.min_weight:
            raise ValueError("min_weight: not with strategy 'fixed', whose weights are given")
        return self

    @model_validator(mode="after")
    def _prior_fits_the_strategy(self) -> Self:
        if self.prior and self.strategy != "online":
            raise ValueError(f"prior: only allowed with strategy 'online', not with {self.strategy!r}")
        if self.strategy == "online" and self.scope != "window":
            raise ValueError("scope: must be 'window' with strategy 'online', which follows the text token by token")
        for name, weight in self.prior.items():
            if not 0 < weight < float("inf"):
                raise ValueError(f"prior.{name}: must be a number above 0, got {weight}")
        return self
