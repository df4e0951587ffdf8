"""A captured split on disk: shard n holds windows n * S to (n + 1) * S - 1, so that a place needs no index."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass

from pydantic import Field, ValidationError

from services.base.files import Files
from services.base.settings import Settings

_PLAN, _COMPLETE = "capture.json", "complete.json"


@dataclass(frozen=True, slots=True)
class Place:
    """The place of a window: fingerprint of its split, and its index there."""

    split_fingerprint: str
    index: int


class CapturePlan(Settings):
    """The split that a capture scores, and how its windows are divided into shards."""

    corpus: str
    split: str
    fingerprint: str
    num_windows: int = Field(ge=1)
    windows_per_shard: int = Field(ge=1)

    @property
    def num_shards(self) -> int:
        return -(-self.num_windows // self.windows_per_shard)

    def windows(self, shard: int) -> range:
        """Return the indices of a shard's windows."""
        start = shard * self.windows_per_shard
        return range(start, min(start + self.windows_per_shard, self.num_windows))


def capture_folder(identity: str, split_fingerprint: str) -> str:
    return f"{identity}/captures/{split_fingerprint[:16]}"


def shard_path(folder: str, shard: int) -> str:
    return f"{folder}/{shard:07}"


def read_plan(files: Files, folder: str) -> CapturePlan | None:
    """Return the plan of a capture; None when there is none, or when it cannot be read."""
    data = files.read(f"{folder}/{_PLAN}")
    try:
        return CapturePlan.model_validate_json(data) if data is not None else None
    except ValidationError:
        return None


def write_plan(files: Files, folder: str, plan: CapturePlan) -> None:
    files.write(f"{folder}/{_PLAN}", plan.model_dump_json(indent=2).encode() + b"\n")


def digest_of(hashes: Iterable[str]) -> str:
    """Return the hash over the hashes of a capture's shards, in order."""
    return hashlib.sha256("".join(hashes).encode()).hexdigest()


def write_complete(files: Files, folder: str, digest: str) -> None:
    """Write the file that marks a capture as complete."""
    files.write(f"{folder}/{_COMPLETE}", json.dumps({"sha256": digest}).encode() + b"\n")


def read_complete(files: Files, folder: str) -> str | None:
    """Return the digest of a complete capture; None when it is not complete."""
    data = files.read(f"{folder}/{_COMPLETE}")
    try:
        return str(json.loads(data)["sha256"]) if data is not None else None
    except (ValueError, KeyError, TypeError):
        return None
