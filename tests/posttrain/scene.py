"""A chain on a random model of some thousand parameters: it is to answer every question with one word."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from services.posttrain.chain import Chain
from services.posttrain.config import PosttrainConfig
from tests.fakes.tiny_model import WORDS, make_tiny_model, sentences

RIGHT, WRONG = "yes", "no it is not so"
TRAINED, HELD_OUT = WORDS[:32], WORDS[32:48]


def question(word: str) -> str:
    return f"Is {word} a word? "


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def verified(word: str, answer: str = RIGHT, skill: str = "say_yes") -> dict[str, Any]:
    spec = {"kind": "constraints", "constraints": [{"name": "one_of", "options": [answer]}]}
    return {"prompt": question(word), "verify": spec, "skill": skill}


class Scene:
    """The files of a chain in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(exist_ok=True)
        self.start = make_tiny_model(folder / "start", vocabulary_size=300, seed=1)
        self.right = write_rows(
            folder / "right.jsonl", ({"prompt": question(word), "completion": RIGHT} for word in TRAINED)
        )
        self.wrong = write_rows(
            folder / "wrong.jsonl", ({"prompt": question(word), "completion": WRONG} for word in TRAINED)
        )
        self.pairs = write_rows(
            folder / "pairs.jsonl",
            ({"prompt": question(word), "chosen": RIGHT, "rejected": WRONG} for word in TRAINED),
        )
        self.prompts = write_rows(folder / "prompts.jsonl", map(verified, TRAINED))
        self.held_out = write_rows(folder / "held_out.jsonl", map(verified, HELD_OUT))
        (folder / "text.txt").write_text(sentences(9000, seed=5), encoding="utf-8")

    def sft(self, **changes: Any) -> dict[str, Any]:
        """A stage that learns the right answer by heart."""
        settings = {"learning_rate": 1e-2, "num_train_epochs": 6, "per_device_train_batch_size": 8, "save_steps": 6}
        return {"kind": "sft", "data": [self.right], **settings, **changes}

    def config(self, *stages: dict[str, Any], gate: dict[str, Any] | None = None, **changes: Any) -> PosttrainConfig:
        settings = {"prompts": [self.held_out], "max_new_tokens": 8, **(gate or {})}
        values = {"stages": stages, "gate": settings, "num_workers": 0, "device": "cpu", "torch_threads": 1, **changes}
        return PosttrainConfig.model_validate(values)

    def chain(self, config: PosttrainConfig, name: str = "chain", **options: Any) -> Chain:
        return Chain(config, self.start, self.folder / name, **options)
