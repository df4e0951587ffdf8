"""Implicit fusion with real models: two sources answer, verifiers judge, the target learns by SFT and LN-DPO.

Sources are SmolLM2-135M-Instruct and the same model after SFT on one skill, answers in quotation marks. The target
starts from the first one, and never sees an answer that no source gave. Prompts are those of examples/skills.py.
"""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from services.evaluation.intervals import Interval, mean_difference
from services.posttrain.chain import Chain, read_data
from services.posttrain.config import PosttrainConfig
from services.posttrain.data.tokens import PromptTokens
from services.posttrain.gate import Measured
from services.posttrain.generate import load_for_answers, sample_answers

SKILLS = ("sums", "quotes")
_SCRIPT = Path(__file__).parents[3] / "examples" / "skills.py"
_PROMPTS_OF_SKILL, _NUM_ANSWERS, _MAX_TOKENS, _TEMPERATURE = 40, 2, 16, 0.5
_SFT = {
    "kind": "sft",
    "learning_rate": 5e-4,
    "per_device_train_batch_size": 8,
    "max_length": 96,
    "lora": {"rank": 16},
}
_DPO = {
    "kind": "dpo",
    "learning_rate": 1e-4,
    "per_device_train_batch_size": 8,
    "max_length": 96,
    "lora": {"rank": 16},
}


class Fusion:
    """One run in a folder: `models` are the folders of sources and target, `measured` their figures."""

    def __init__(self, folder: Path, start: Path, *, quick: bool) -> None:
        self.folder, self.quick = folder, quick
        subprocess.run([sys.executable, str(_SCRIPT), str(folder)], check=True, stdout=subprocess.DEVNULL)
        if quick:
            rows = self._rows("held_out")
            self._write(
                "held_out.jsonl", [row for skill in SKILLS for row in [r for r in rows if r["skill"] == skill][:8]]
            )
        self.prompts = self._prompts()
        self.models = {"source general": start}
        self.measured: dict[Path, Measured] = {}
        self.counts: dict[str, int] = {}

    def run(self) -> None:
        """Tune the second source, sample both, and train the target."""
        start = self.models["source general"]
        quotes = self._write("quotes.jsonl", (row for row in self._rows("answered") if row["skill"] == "quotes"))
        tuned = {**_SFT, "data": [quotes], "num_train_epochs": 3, "skill": "quotes"}
        self.models["source tuned"] = self._chain("tuned", start, tuned)
        sampled = [
            row
            for name in ("source general", "source tuned")
            for row in sample_source(name, self.models[name], self.prompts)
        ]
        answers = {
            "files": [self._write("answers.jsonl", sampled)],
            "prompts": [self._write("asked.jsonl", self.prompts)],
        }
        sft = {**_SFT, "answers": answers, "num_train_epochs": 2}
        dpo = {**_DPO, "answers": {**answers, "pairs": "right_and_wrong"}}
        after_dpo = self._chain("target", start, sft, dpo)
        self.models["target after SFT"] = after_dpo.parents[1] / "1-sft" / "model"
        self.models["target after LN-DPO"] = after_dpo

    def difference(self, one: str, other: str) -> Interval:
        """Return how much the mean score of a model is above another one's, paired over the held-out prompts."""
        return mean_difference(*(self.measured[self.models[name]].scores_P for name in (other, one)))

    def score(self, name: str, skill: str | None = None) -> float:
        """Return the mean score of a model on the held-out prompts, of one skill or of all."""
        scores_P = self.measured[self.models[name]].scores_P
        skills = np.array([row["skill"] for row in self._rows("held_out")])
        return float(scores_P.mean() if skill is None else scores_P[skills == skill].mean())

    def _chain(self, name: str, start: Path, *stages: dict[str, Any]) -> Path:
        steps: dict[str, Any] = {"max_steps": 1} if self.quick else {}
        config = PosttrainConfig.model_validate(
            {
                "stages": [{**stage, **steps} for stage in stages],
                "gate": {
                    "prompts": [str(self.folder / "held_out.jsonl")],
                    "max_new_tokens": _MAX_TOKENS,
                    "batch_size": 96,
                    "overlap_share": 1.0,
                },
                "num_workers": 0,
                "device": "cpu",
                "torch_threads": 1,
            }
        )
        _, data = read_data(config)
        self.counts |= {
            f"{name}_{stage.kind}_rows": len(rows.rows) for stage, rows in zip(config.stages, data, strict=True)
        }
        with contextlib.redirect_stdout(io.StringIO()):
            return Chain(config, start, self.folder / name, force=True, measured=self.measured).run()

    def _prompts(self) -> list[dict[str, Any]]:
        most = 12 if self.quick else _PROMPTS_OF_SKILL
        rows = self._rows("prompts")
        return [row for skill in SKILLS for row in [r for r in rows if r["skill"] == skill][:most]]

    def _rows(self, name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]

    def _write(self, name: str, rows: Any) -> str:
        (self.folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return str(self.folder / name)


def sample_source(name: str, model: Path, prompts: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield a source's answers in the form of `fusion sample --to`."""
    tokens = PromptTokens(model, None)
    asked = [(row, number) for row in prompts for number in range(_NUM_ANSWERS)]
    sampled = sample_answers(
        load_for_answers(model, "cpu"),
        tokens,
        [tokens.prompt_ids(row["messages"]) for row, _ in asked],
        max_new_tokens=_MAX_TOKENS,
        temperature=_TEMPERATURE,
        batch_size=96,
        seed=0,
    )
    for (row, number), ids in zip(asked, sampled, strict=True):
        text, ended = tokens.text_of(ids)
        yield {
            "messages": [*row["messages"], {"role": "assistant", "content": text}],
            "source": name,
            "answer": number,
            "finish_reason": "stop_token" if ended else "length",
        }
