"""Section `recall` of a recipe: the recall service."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from services.base.settings import MEMORY_PATTERN, Settings
from services.recall.training_config import JudgeTrainingConfig
from services.rpc.client_limits import PerClient
from services.rpc.tls import ADDRESS_PATTERN

MOST_HOPS, MOST_KEPT = 8, 64
"""Most hops of a selection, and most blocks that are kept after one."""

Hops = Annotated[tuple[Annotated[int, Field(ge=1, le=MOST_KEPT)], ...], Field(min_length=1, max_length=MOST_HOPS)]


class RecallConfig(Settings):
    """The recall service: its judge, where it runs, its limits, and how blocks are selected by default."""

    judge: str | None = Field(
        None, min_length=1, description="Folder of the judge, as `fusion recall train` makes it; null serves none."
    )
    address: str | None = Field(
        None,
        pattern=ADDRESS_PATTERN,
        description="host:port of a service that runs already; else it is deployed.",
    )
    application: str = Field("recall", pattern=r"^[a-z0-9]([a-z0-9-]{0,38}[a-z0-9])?$")
    num_replicas: int = Field(1, ge=1)
    num_cpus: float = Field(1, ge=0, description="CPUs of a replica.")
    num_gpus: float = Field(0, ge=0, le=1, description="GPUs of a replica; the judge runs on the CPU without one.")
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "float32", description="Of products of matrices; auto: bfloat16 where the device computes with it."
    )
    memory: str | None = Field(None, pattern=MEMORY_PATTERN, description="Memory of a replica's pod.")
    max_ongoing_requests: int = Field(64, ge=1, description="Calls and streams that a replica holds at once.")
    max_queued_requests: int = Field(256, ge=1, description="Calls that wait for a replica; more are refused.")
    max_documents: int = Field(16, ge=1, le=256, description="Texts in one call.")
    max_text_bytes: int = Field(2**20, ge=1, le=2**24, description="Longest text in bytes.")
    max_question_bytes: int = Field(4096, ge=1, le=2**16, description="Longest question in bytes.")
    per_client: PerClient = Field(PerClient(), description="What one client may hold of a replica.")
    budget_bytes: int = Field(4096, ge=1, le=2**20, description="Bytes of all key blocks of a text.")
    hops: Hops = Field((3, 5), description="Blocks that the judge keeps in mind after each hop.")
    rehearsal: bool = Field(True, description="Whether the judge reads the best of a hop together once more.")
    train: JudgeTrainingConfig | None = Field(None, description="How `fusion recall train` makes a judge.")
