"""The rows of a stage: read or made of judged answers, without what is held out, and written beside the stage."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fusion_core.preference.overlap import HeldOutPrompts
from fusion_core.preference.pairs import Candidate, best_of, capped, preference_pairs
from services.base.atomic import write_whole
from services.base.errors import SettingError
from services.posttrain.config import AnswersConfig, DpoStage, GrpoStage, SftStage
from services.posttrain.data.judge import Judge
from services.posttrain.data.rows import (
    VerifiedPrompt,
    answered_rows,
    pair_rows,
    prompt_key,
    prompt_text,
    read_rows,
    split_answer,
    verified_prompts,
)
from services.posttrain.data.tokens import Prompt

MANIFEST, ROWS = "data.json", "data.jsonl"


@dataclass(slots=True)
class StageData:
    """The rows that a stage learns from.

    Attributes:
        rows: `prompt` and `completion` (SFT), `chosen` and `rejected` (DPO) or `verify` (GRPO), with their provenance.
        held_out: rows that were left out because they hold a prompt of the gate.
        counts: rows by origin, for the report.
    """

    rows: list[dict[str, Any]]
    held_out: int = 0
    counts: dict[str, int] = field(default_factory=dict)

    @property
    def identity(self) -> str:
        """Hash of the rows as the stage reads them; places of files do not count."""
        digest = hashlib.sha256()
        for row in self.rows:
            kept = {key: value for key, value in row.items() if key != "origin"}
            digest.update(json.dumps(kept, sort_keys=True, ensure_ascii=False).encode() + b"\n")
        return digest.hexdigest()[:32]

    def write(self, folder: Path) -> None:
        """Write the rows, and how many there are, into the stage's folder."""
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in self.rows)
        write_whole(folder / ROWS, "".join(lines))
        facts = {"rows": len(self.rows), "held_out": self.held_out, "counts": self.counts, "identity": self.identity}
        write_whole(folder / MANIFEST, json.dumps(facts, indent=2, ensure_ascii=False) + "\n")


def stage_data(
    stage: SftStage | DpoStage | GrpoStage, held_out: Sequence[VerifiedPrompt], *, overlap_share: float, judge: Judge
) -> StageData:
    """Return the rows of a stage, those apart that hold a prompt of the gate.

    Raises SettingError, named as below the stage, when files are missing, a row is wrong, or no row is left.
    """
    if isinstance(stage, GrpoStage):
        prompts = verified_prompts("prompts", stage.prompts)
        judge.check(prompts)
        rows: list[dict[str, Any]] = [
            {"prompt": p.prompt, "verify": p.verify, "skill": p.skill, "origin": "prompts"} for p in prompts
        ]
    elif stage.answers is not None:
        rows = _judged_rows(stage.kind, stage.answers, judge)
    else:
        assert stage.data is not None
        rows = (answered_rows if stage.kind == "sft" else pair_rows)("data", stage.data)
    index = HeldOutPrompts((prompt_text(prompt.prompt) for prompt in held_out), share=overlap_share)
    kept = [row for row in rows if not index.found_in(prompt_text(row["prompt"]))]
    if not kept:
        setting = "prompts" if isinstance(stage, GrpoStage) else "answers" if stage.answers else "data"
        why = "all of them hold prompts of the gate" if rows else "there are none"
        raise SettingError(setting, f"no row is left to learn from: {why}")
    counts: dict[str, int] = {}
    for row in kept:
        name = str(row.get("source", "data"))
        counts[name] = counts.get(name, 0) + 1
    return StageData(kept, len(rows) - len(kept), counts)


def _judged_rows(kind: str, config: AnswersConfig, judge: Judge) -> list[dict[str, Any]]:
    """Return rows made of the sources' answers; each says which source gave it and which judge chose it."""
    candidates, prompts = _candidates(config, judge)
    rows: list[dict[str, Any]] = []
    if kind == "sft":
        for best in best_of(candidates, least_score=config.least_score, per_prompt=config.per_prompt):
            about = {"source": best.source, "answer": best.number, "judge": config.judge, "score": best.score}
            rows.append({"prompt": prompts[best.prompt], "completion": best.text, **about})
    else:
        pairs = preference_pairs(
            candidates,
            config.pairs,
            least_gap=config.least_gap,
            most_gap=config.most_gap,
            per_prompt=config.per_prompt,
        )
        for pair in pairs:
            better, worse = pair.chosen, pair.rejected
            about = {"source": better.source, "answer": better.number, "judge": config.judge, "score": better.score}
            other = {"rejected_source": worse.source, "rejected_answer": worse.number, "rejected_score": worse.score}
            sides = {"chosen": better.text, "rejected": worse.text}
            rows.append({"prompt": prompts[better.prompt], **sides, **about, **other})
    places = capped([prompt_key(row["prompt"]) for row in rows], config.most_rows)
    return [rows[place] for place in places]


def _candidates(config: AnswersConfig, judge: Judge) -> tuple[list[Candidate], dict[str, Prompt]]:
    specs = {}
    if config.judge == "verifier":
        if not config.prompts:
            raise SettingError("answers.prompts", "needed by judge verifier: the files with the prompts' specs")
        asked = verified_prompts("answers.prompts", config.prompts)
        judge.check(asked)
        specs = {prompt_key(prompt.prompt): prompt for prompt in asked}
    prompts: dict[str, Prompt] = {}
    rows: list[tuple[str, dict[str, Any], str]] = []
    for where, row in read_rows("answers.files", config.files):
        prompt, answer = split_answer("answers.files", where, row)
        key, source = prompt_key(prompt), str(row.get("source", ""))
        if answer is None:
            raise SettingError("answers.files", f"{where}: no answer")
        if (config.sources is not None and source not in config.sources) or (specs and key not in specs):
            continue
        if not isinstance(row.get("answer", 0), int):
            raise SettingError("answers.files", f"{where}: answer: expected the number of the answer")
        scored = isinstance(row.get("num_tokens"), int) and isinstance(row.get("logprob"), int | float)
        if config.judge == "logprob" and not (scored and row["num_tokens"] > 0):
            raise SettingError("answers.files", f"{where}: judge logprob needs `logprob` and `num_tokens`, two numbers")
        if row.get("finish_reason") == "length":  # cut off: as a row it would end where the answer does not
            continue
        prompts[key] = prompt
        rows.append((key, row, answer))
    if config.judge == "logprob":
        return [
            _candidate(key, row, text, row["logprob"] / row["num_tokens"], None) for key, row, text in rows
        ], prompts
    verdicts = judge.verdicts([specs[key] for key, _, _ in rows], [text for _, _, text in rows])
    judged = zip(rows, verdicts, strict=True)
    return [_candidate(key, row, text, verdict.score, verdict.right) for (key, row, text), verdict in judged], prompts


def _candidate(key: str, row: dict[str, Any], text: str, score: float, right: bool | None) -> Candidate:
    return Candidate(key, str(row.get("source", "")), int(row.get("answer", 0)), text, score, right)
