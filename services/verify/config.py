"""Section `verify` of a recipe: the verifier service."""

from __future__ import annotations

from pydantic import Field

from services.base.settings import MEMORY_PATTERN, Settings
from services.rpc.client_limits import PerClient
from services.rpc.tls import ADDRESS_PATTERN

_UNITS = {"Mi": 2**20, "Gi": 2**30, "Ti": 2**40}


class VerifyConfig(Settings):
    """The verifier: where it runs, and the limits on answers and on programs."""

    address: str | None = Field(
        None, pattern=ADDRESS_PATTERN, description="host:port of a verifier that runs already; else it is deployed."
    )
    application: str = Field("verify", pattern=r"^[a-z0-9]([a-z0-9-]{0,38}[a-z0-9])?$")
    num_replicas: int = Field(1, ge=1)
    num_cpus: float = Field(1, ge=0, description="CPUs of a replica; programs that run take their share of them.")
    max_ongoing_requests: int = Field(64, ge=1, description="Calls and streams that a replica holds at once.")
    max_queued_requests: int = Field(256, ge=1, description="Calls that wait for a replica; more are refused.")
    max_submissions: int = Field(256, ge=1, le=4096, description="Answers in one Verify request.")
    max_text_bytes: int = Field(2**20, ge=1, le=2**24, description="Longest answer in bytes.")
    max_spec_bytes: int = Field(2**18, ge=1, le=2**22, description="Longest spec in bytes.")
    per_client: PerClient = Field(PerClient(), description="What one client may hold of a replica.")
    programs_at_once: int = Field(2, ge=1, le=256, description="Programs that a replica runs at once; others wait.")
    program_seconds: float = Field(10, gt=0, le=600, description="Wall time of a program with its tests.")
    program_memory: str = Field(
        "512Mi", pattern=MEMORY_PATTERN, description="Memory of a program, and as much again of its tests."
    )
    bwrap: str | None = Field(None, min_length=1, description="Path of bubblewrap; default `bwrap` in PATH.")

    @property
    def program_memory_bytes(self) -> int:
        return int(self.program_memory[:-2]) * _UNITS[self.program_memory[-2:]]
