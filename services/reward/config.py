"""Section `reward` of a recipe: the training of a conditional reward model, and the service that scores with it."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field, model_validator

from services.base.settings import MEMORY_PATTERN, Settings
from services.rpc.client_limits import PerClient
from services.rpc.tls import ADDRESS_PATTERN


class RewardServiceConfig(Settings):
    """Section `reward.serve`: where the model scores, and the limits on what it is sent."""

    address: str | None = Field(
        None,
        pattern=ADDRESS_PATTERN,
        description="host:port of a reward service that runs already; else it is deployed.",
    )
    application: str = Field("reward", pattern=r"^[a-z0-9]([a-z0-9-]{0,38}[a-z0-9])?$")
    model: str | None = Field(
        None, min_length=1, description="Folder of a reward model; default the one that `fusion reward train` leaves."
    )
    num_replicas: int = Field(1, ge=1)
    num_cpus: float = Field(1, ge=0, description="CPUs of a replica.")
    num_gpus: float = Field(0, ge=0, description="GPUs of a replica.")
    memory: str | None = Field(None, pattern=MEMORY_PATTERN, description="Memory of a pod on Kubernetes, such as 16Gi.")
    torch_threads: int | None = Field(None, ge=1, description="Threads of a replica; num_cpus when not set.")
    max_ongoing_requests: int = Field(64, ge=1, description="Calls and streams that a replica holds at once.")
    max_queued_requests: int = Field(256, ge=1, description="Calls that wait for a replica; more are refused.")
    max_items: int = Field(256, ge=1, le=4096, description="Answers in one Score request.")
    max_text_bytes: int = Field(2**20, ge=1, le=2**24, description="Most bytes of an answer with its messages.")
    batch_tokens: int = Field(8192, ge=1, description="Tokens that go through the model at once, padding included.")
    per_client: PerClient = Field(PerClient(), description="What one client may hold of a replica.")

    @property
    def threads(self) -> int:
        """Torch's threads in a replica."""
        return self.torch_threads or max(1, math.floor(self.num_cpus))


class PatchConfig(Settings):
    """Section `reward.patch`: how a model is tuned against reward hacks that samples brought to light."""

    least_pairs: int = Field(20, ge=1, description="Fewest pairs of an incident that is patched.")
    most_pairs: int = Field(100, ge=1, description="Most pairs taken of an incident.")
    replay: float = Field(
        2.0, ge=0, description="Pairs of the data that are trained on again, to each pair of a patch."
    )
    epochs: int = Field(4, ge=1, description="Passes over the pairs of a patch and those replayed.")


class RewardConfig(Settings):
    """A conditional reward model: its data, its domains with their prompts, its training, and its service."""

    start: str = Field(min_length=1, description="Causal language model or reward model that training starts from.")
    data: tuple[str, ...] = Field(
        min_length=1,
        description="Globs of .jsonl files: rows with `prompt` or `messages`, `chosen`, `rejected`, `domain`.",
    )
    domains: dict[str, str] = Field(
        min_length=1, description="System prompt by domain: it tells the model which wish counts."
    )
    chat_template: Literal["model", "plain"] = Field(
        "model", description="The model's own, or `plain` for models without one."
    )
    held_out_share: float = Field(
        0.1, ge=0, lt=1, description="Share of the prompts that is kept for `fusion reward eval`."
    )
    max_tokens: int = Field(
        2048, ge=8, description="Most tokens of a conversation; pairs with a longer one are left out."
    )
    gamma: float = Field(2.0, ge=0, description="Exponent of the focal ranking loss; 0 is the plain ranking loss.")
    barrier: float = Field(0.02, ge=0, description="Weight of the log barrier that keeps scores within -5 and 5.")
    epochs: int = Field(1, ge=1)
    batch_pairs: int = Field(32, ge=1, description="Pairs of a step, all workers together.")
    learning_rate: float = Field(1e-5, gt=0)
    warmup_share: float = Field(0.03, ge=0, lt=1, description="Share of the steps over which the rate rises.")
    weight_decay: float = Field(0.01, ge=0)
    clip_norm: float = Field(1.0, gt=0, description="Largest norm of a gradient.")
    seed: int = Field(0, ge=0, lt=2**32)
    checkpoint_every_steps: int = Field(100, ge=1)
    keep_checkpoints: int = Field(2, ge=1)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="Of the computation; weights stay float32.")
    num_workers: int = Field(1, ge=0, description="Workers of Ray Train; 0 trains in the job's own process.")
    cpus_per_worker: float = Field(1.0, gt=0)
    torch_threads: int | None = Field(None, ge=1, description="Threads per worker; cpus_per_worker when not set.")
    max_failures: int = Field(3, ge=-1, description="Restarts from the last checkpoint; -1 for no limit.")
    patch: PatchConfig = PatchConfig()
    serve: RewardServiceConfig | None = Field(None, description="The reward service, deployed where it is set.")

    @model_validator(mode="after")
    def _workers_share_the_batch(self) -> RewardConfig:
        if self.batch_pairs % max(1, self.num_workers):
            raise ValueError(f"batch_pairs: must be a multiple of num_workers = {self.num_workers}")
        if empty := [name for name, prompt in self.domains.items() if not (name.strip() and prompt.strip())]:
            raise ValueError(f"domains: {empty[0]!r} needs a name and a system prompt")
        prompts = list(self.domains.values())
        if len(set(prompts)) < len(prompts):
            raise ValueError("domains: two of them have the same system prompt, so that nothing tells them apart")
        return self

    @property
    def threads(self) -> int:
        """Torch's threads in a worker."""
        return self.torch_threads or max(1, math.floor(self.cpus_per_worker))
