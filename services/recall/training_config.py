"""Section `recall.train` of a recipe: how a judge learns."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from fusion_core.recall.labels import LabelConfig
from services.base.settings import Settings


class InterventionConfig(Settings):
    """Labels without spans: blocks are taken away, and a source says what its loss of the answer does."""

    source: str = Field(min_length=1, description="Name of a source of the recipe.")
    every_steps: int = Field(50, ge=1, description="Steps between two rounds of interventions.")
    documents: int = Field(16, ge=1, description="Documents of a round.")
    blocks: int = Field(6, ge=3, le=32, description="Blocks of a document that are taken away, one at a time.")
    levels: LabelConfig = Field(LabelConfig(), description="How the levels of blocks start and move.")


class JudgeTrainingConfig(Settings):
    """Training of the judge on questions whose relevant blocks are marked, or found by intervention."""

    files: tuple[str, ...] = Field(min_length=1, description="JSON lines of text, question, and spans or answer.")
    held_out: tuple[str, ...] = Field((), description="Such files that `fusion recall eval` reads.")
    labels: InterventionConfig | None = Field(None, description="Learn without spans, from a source.")
    encoder: str = Field("all-minilm-l6-v2", min_length=1, description="Catalogue name, URL or folder of an encoder.")
    steps: int = Field(300, ge=1)
    batch_windows: int = Field(4, ge=1, description="Windows of a step.")
    block_tokens: int = Field(63, ge=4, le=63, description="Tokens of a block at most.")
    window_tokens: int = Field(512, ge=16, le=512, description="Tokens of a window; as many are read later.")
    learning_rate: float = Field(4e-4, gt=0, le=1, description="Highest learning rate of AdamW.")
    warmup_share: float = Field(
        0.1, ge=0, lt=1, description="Share of the steps in which it rises; then it falls to 0."
    )
    weight_decay: float = Field(0.01, ge=0)
    dropout: float = Field(0.0, ge=0, lt=1, description="Of the encoder's layers; short trainings do without.")
    clip_norm: float = Field(1.0, gt=0, description="Largest norm of a gradient.")
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="Of products of matrices; auto: bfloat16 where the device computes with it."
    )
    seed: int = Field(0, ge=0, lt=2**31)
    num_workers: Literal[0, 1] = Field(1, description="1: a worker of Ray Train; 0: in this process.")
    cpus_per_worker: float = Field(1, gt=0)
    torch_threads: int = Field(1, ge=1)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    checkpoint_every_steps: int = Field(50, ge=1)
    max_failures: int = Field(2, ge=0, description="Attempts after the first one that a worker may take.")
