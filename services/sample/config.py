"""Section `sample` of a recipe: which prompts the sources answer, and how."""

from __future__ import annotations

from pydantic import Field

from services.base.settings import Settings
from services.wire.answer import Sampling


class SampleConfig(Settings):
    """Section `sample` of a recipe: prompts, the sources that answer them, and how."""

    prompts: tuple[str, ...] = Field(
        min_length=1, description="Files (globs), .jsonl or .parquet, with `prompt` or `messages` in every row."
    )
    sources: tuple[str, ...] | None = Field(None, min_length=1, description="Names of sources; all when not set.")
    sampling: Sampling = Field(Sampling(), description="How answers are sampled; log-probabilities are always kept.")
    store: str | None = Field(
        None, min_length=1, description="Folder or URL of the answers; default service.store, which takes both."
    )
    in_flight: int = Field(64, ge=1, description="Prompts that a source is asked at once.")
    timeout_seconds: float = Field(
        600, gt=0, description="A source that owes answers and sends none for so long fails."
    )
    answers_per_shard: int = Field(1024, ge=1, description="Answers in one file.")
