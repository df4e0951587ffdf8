"""The captured windows of a split: shard n holds windows n * S to (n + 1) * S - 1, so a place needs no index."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from pydantic import Field, ValidationError

from services.common.settings import Settings
from services.common.store.files import Files

_PLAN = "capture.json"


class Place(NamedTuple):
    """Where a window stands: fingerprint of its split, and its index there."""

    split_fingerprint: str
    index: int


class CapturePlan(Settings):
    """Which windows a capture holds, and how many a shard."""

    corpus: str
    split: str
    fingerprint: str
    num_windows: int = Field(ge=1)
    windows_per_shard: int = Field(ge=1)

    @property
    def num_shards(self) -> int:
        return -(-self.num_windows // self.windows_per_shard)

    def windows(self, shard: int) -> range:
        """Indices of a shard's windows."""
        start = shard * self.windows_per_shard
        return range(start, min(start + self.windows_per_shard, self.num_windows))


def capture_folder(identity: str, split_fingerprint: str) -> str:
    return f"{identity}/captures/{split_fingerprint[:16]}"


def shard_path(folder: str, shard: int) -> str:
    return f"{folder}/{shard:07}"


def read_plan(files: Files, folder: str) -> CapturePlan | None:
    """The plan of a capture; None when there is none, or when it cannot be read."""
    data = files.read(f"{folder}/{_PLAN}")
    try:
        return CapturePlan.model_validate_json(data) if data is not None else None
    except ValidationError:
        return None


def write_plan(files: Files, folder: str, plan: CapturePlan) -> None:
    files.write(f"{folder}/{_PLAN}", plan.model_dump_json(indent=2).encode() + b"\n")


def is_complete(files: Files, folder: str, plan: CapturePlan) -> bool:
    """Whether every shard and its record are there; says nothing about their bytes."""
    names: Sequence[str] = list(files.sizes(folder))
    return {f"{shard:07}{suffix}" for shard in range(plan.num_shards) for suffix in (".parquet", ".json")} <= set(names)
