"""Reinforcement learning with verified rewards on addition: a target of 0.1M parameters, from scratch.

The target learns sums of two numbers below 20 by SFT for a short while, so that it is right now and then; then a stage
of GRPO trains it on the prompts alone. The held-out sums are in neither.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from services.distill.target.config import TargetConfig
from services.distill.target.prepare import prepare_target
from services.posttrain.chain import Chain
from services.posttrain.config import PosttrainConfig
from tests.fakes.tiny_model import sentences

_BELOW = 20
_HELD_OUT = 120


@dataclass(frozen=True, slots=True)
class Sums:
    """The files of one seed, in a folder."""

    folder: Path
    seed: int
    start: Path
    train: str
    prompts: str
    held_out: str


def write_sums(folder: Path, seed: int) -> Sums:
    """Write prompts and specs, and make the random target."""
    folder.mkdir(parents=True)
    pairs = [(a, b) for a in range(_BELOW) for b in range(_BELOW)]
    random.Random(seed).shuffle(pairs)
    target = TargetConfig.model_validate(
        {
            "config": {"hidden_size": 64, "num_layers": 2, "num_heads": 4, "intermediate_size": 128},
            "tokenizer": {"train": {"vocabulary_size": 300}},
        }
    )
    start = prepare_target(target, [sentences(4000, seed)], folder / "start", seed)
    answered = ({**_row(pair), "completion": str(sum(pair))} for pair in pairs[_HELD_OUT:])
    train = _write(folder / "train.jsonl", answered)
    prompts = _write(folder / "prompts.jsonl", map(_row, pairs[_HELD_OUT:]))
    held_out = _write(folder / "held_out.jsonl", map(_row, pairs[:_HELD_OUT]))
    return Sums(folder, seed, start, train, prompts, held_out)


def _row(pair: tuple[int, int]) -> dict[str, Any]:
    a, b = pair
    return {"prompt": f"{a}+{b}=", "verify": {"kind": "answer", "expected": a + b}}


def _write(path: Path, rows: Iterable[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def chain_of(sums: Sums, *stages: dict[str, Any], start: Path | None = None, name: str = "chain") -> Chain:
    """Return a chain in this process; a stage that the gate holds back is forced, so that its figures are seen."""
    gate = {"prompts": [sums.held_out], "max_new_tokens": 6, "batch_size": 256, "overlap_share": 1.0}
    config = PosttrainConfig.model_validate(
        {"stages": stages, "gate": gate, "num_workers": 0, "device": "cpu", "torch_threads": 1}
    )
    return Chain(config, start or sums.start, sums.folder / name, force=True)


BASE = {
    "kind": "sft",
    "learning_rate": 3e-3,
    "num_train_epochs": 25,
    "per_device_train_batch_size": 32,
    "lr_scheduler_type": "cosine",
}
"""The settings of the stage that half-teaches the target; `data` is the seed's."""
STILL = {**BASE, "learning_rate": 1e-8, "max_steps": 2}
"""The same with steps too small to change an answer."""
GRPO = {
    "kind": "grpo",
    "learning_rate": 1e-3,
    "max_steps": 600,
    "per_device_train_batch_size": 512,
    "num_generations": 16,
    "max_completion_length": 4,
}
"""The settings of the stage of verified rewards; `prompts` are the seed's."""


def wrong_sums(sums: Sums) -> str:
    """Write the rows with answers that are one too many, and return their file."""
    rows = [json.loads(line) for line in Path(sums.train).read_text().splitlines()]
    return _write(sums.folder / "wrong.jsonl", ({**row, "completion": str(int(row["completion"]) + 1)} for row in rows))
