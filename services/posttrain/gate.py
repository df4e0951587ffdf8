"""The gate behind a stage: its model is let through when it is better than the start, and nothing that is guarded fell.

Shape legend: P held-out prompts.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fusion_core.arrays import Float64
from services.base.errors import SettingError
from services.corpus.readers import local_files
from services.evaluation.intervals import ALL, MIN_DOCUMENTS, Interval, compare, mean_difference
from services.evaluation.nats_per_byte import Scores, nats_per_byte
from services.posttrain.config import GateConfig, PosttrainConfig
from services.posttrain.data.judge import Judge
from services.posttrain.data.rows import VerifiedPrompt, prompt_text, read_rows, verified_prompts
from services.posttrain.data.tokens import PromptTokens
from services.posttrain.generate import load_for_answers, sample_answers

_WINDOW_BYTES = 1024
_SHOWN_ANSWERS = 10


@dataclass(frozen=True, slots=True, eq=False)
class HeldOut:
    """The prompts and texts that no stage learns from; `documents` names the document of each text."""

    prompts: list[VerifiedPrompt]
    texts: list[str]
    documents: list[str]


@dataclass(frozen=True, slots=True, eq=False)
class Measured:
    """The answers of one model to the held-out prompts, and its scores on the texts (None without texts)."""

    answers: list[str]
    scores_P: Float64
    ended_P: Float64
    lengths_P: Float64
    texts: Scores | None


@dataclass(frozen=True, slots=True)
class Line:
    """One figure before and after a stage; `ok` says whether it lets the stage through."""

    name: str
    is_metric: bool
    before: float
    after: float
    difference: Interval
    ok: bool


@dataclass(frozen=True, slots=True)
class Decision:
    """The gate's decision on a stage; `forced` when it was let through all the same."""

    promoted: bool
    lines: list[Line]
    examples: list[dict[str, Any]] = field(default_factory=list)
    forced: bool = False

    @property
    def failed(self) -> list[str]:
        """The names of the figures that keep the stage back."""
        return [line.name for line in self.lines if not line.ok]

    def to_json(self) -> dict[str, Any]:
        """Return the decision with all figures."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Decision:
        lines = [Line(**{**line, "difference": Interval(**line["difference"])}) for line in values["lines"]]
        return cls(values["promoted"], lines, values["examples"], values["forced"])


def read_held_out(gate: GateConfig) -> HeldOut:
    """Return the gate's prompts and texts; SettingError naming file and line, or when the prompts are too few."""
    prompts = verified_prompts("gate.prompts", gate.prompts)
    if len(prompts) < MIN_DOCUMENTS:
        raise SettingError("gate.prompts", f"{len(prompts)} prompts give no interval; at least {MIN_DOCUMENTS}")
    texts, documents = [], []
    for name, text in _documents(gate.texts):
        for start in range(0, len(text), _WINDOW_BYTES):
            if window := text[start : start + _WINDOW_BYTES].strip():
                texts.append(window)
                documents.append(name)
    return HeldOut(prompts, texts, documents)


def _documents(patterns: Sequence[str]) -> Iterator[tuple[str, str]]:
    if not patterns:
        return
    try:
        files = local_files(patterns)
    except SettingError as error:
        raise SettingError("gate.texts", error.problem) from error
    for path in files:
        if path.suffix == ".jsonl":
            for where, row in read_rows("gate.texts", [str(path)]):
                if not isinstance(row.get("text"), str):
                    raise SettingError("gate.texts", f"{where}: needs `text`, a string")
                yield where, row["text"]
        else:
            yield str(path), path.read_text(encoding="utf-8", errors="replace")


def check_skill(skill: str | None, held_out: HeldOut) -> None:
    """Raise SettingError unless there are enough held-out prompts of a stage's skill."""
    there = sum(prompt.skill == skill for prompt in held_out.prompts)
    if skill is not None and there < MIN_DOCUMENTS:
        known = ", ".join(sorted({prompt.skill for prompt in held_out.prompts if prompt.skill})) or "none"
        raise SettingError(
            "skill",
            f"gate.prompts has {there} prompts of {skill!r}, at least {MIN_DOCUMENTS} are needed; known: {known}",
        )


def measure(folder: Path, config: PosttrainConfig, held_out: HeldOut) -> Measured:
    """Have a model answer the held-out prompts and score the texts."""
    gate = config.gate
    tokens = PromptTokens(folder, config.chat_template)
    model = load_for_answers(folder, config.device)
    sampled = sample_answers(
        model,
        tokens,
        [tokens.prompt_ids(prompt.prompt) for prompt in held_out.prompts],
        max_new_tokens=gate.max_new_tokens,
        temperature=gate.temperature,
        batch_size=gate.batch_size,
        seed=gate.seed,
    )
    del model
    texts = [tokens.text_of(ids) for ids in sampled]
    verdicts = Judge(config.verifier).verdicts(held_out.prompts, [text for text, _ in texts])
    scored = None
    if held_out.texts:
        scored = nats_per_byte(folder, held_out.texts, device=config.device, torch_threads=config.threads)
    return Measured(
        answers=[text for text, _ in texts],
        scores_P=np.array([verdict.score for verdict in verdicts], dtype=np.float64),
        ended_P=np.array([ended for _, ended in texts], dtype=np.float64),
        lengths_P=np.array([len(ids) for ids in sampled], dtype=np.float64),
        texts=scored,
    )


def decide(before: Measured, after: Measured, held_out: HeldOut, gate: GateConfig, skill: str | None) -> Decision:
    """Return whether a stage is let through.

    The metric is the mean score on the prompts of the stage's skill, and must rise beyond its 95 % interval. Guards
    are the scores of other skills, nats per byte, the share of ended answers, and the answers' length.
    """
    skills = np.array([prompt.skill for prompt in held_out.prompts])
    chosen_P = np.ones(len(skills), dtype=bool) if skill is None else skills == skill
    lines = [_metric(before.scores_P[chosen_P], after.scores_P[chosen_P], skill, gate.seed)]
    for other in sorted(set(skills[~chosen_P].tolist())):
        of_skill_P = skills == other
        pair = before.scores_P[of_skill_P], after.scores_P[of_skill_P]
        lines.append(_guard(f"score of {other or 'other prompts'}", *pair, fall=gate.guards.score, seed=gate.seed))
    lines.append(
        _guard("share of ended answers", before.ended_P, after.ended_P, fall=gate.guards.ended, seed=gate.seed)
    )
    allowed = (gate.guards.length_ratio - 1) * float(before.lengths_P.mean())
    lines.append(
        _guard("tokens per answer", -before.lengths_P, -after.lengths_P, fall=allowed, seed=gate.seed, sign=-1)
    )
    if before.texts is not None and after.texts is not None:
        lines.append(_texts_line(before.texts, after.texts, held_out.documents, gate))
    return Decision(all(line.ok for line in lines), lines, _examples(before, after, held_out.prompts))


def _metric(before_P: Float64, after_P: Float64, skill: str | None, seed: int) -> Line:
    difference = mean_difference(before_P, after_P, seed=seed)
    name = "mean score" if skill is None else f"mean score of {skill}"
    ok = difference.low is not None and difference.low > 0
    return Line(name, True, float(before_P.mean()), float(after_P.mean()), difference, ok)


def _guard(name: str, before_P: Float64, after_P: Float64, *, fall: float, seed: int, sign: int = 1) -> Line:
    """Return the line of a guard that may not fall; `sign` -1 for one that is given, and guarded, upside down."""
    difference = mean_difference(before_P, after_P, seed=seed)
    fell = difference.value < -fall and (difference.high is None or difference.high < 0)
    if sign == -1:
        ends = (None if end is None else -end for end in (difference.high, difference.low))
        difference = Interval(-difference.value, *ends)
        before_P, after_P = -before_P, -after_P
    return Line(name, False, float(before_P.mean()), float(after_P.mean()), difference, not fell)


def _texts_line(before: Scores, after: Scores, documents: Sequence[str], gate: GateConfig) -> Line:
    models = compare({"before": before, "after": after}, documents, seed=gate.seed)[ALL]["models"]
    difference = Interval(**models["after"]["difference_from"]["before"])
    rose = difference.value > gate.guards.nats_per_byte and (difference.low is None or difference.low > 0)
    return Line("nats per byte of texts", False, before.mean, after.mean, difference, not rose)


def _examples(before: Measured, after: Measured, prompts: Sequence[VerifiedPrompt]) -> list[dict[str, Any]]:
    """Return ten prompts with both answers; those whose scores changed first."""
    order = sorted(
        range(len(prompts)),
        key=lambda p: (before.scores_P[p] == after.scores_P[p], before.answers[p] == after.answers[p], p),
    )
    return [
        {
            "prompt": prompt_text(prompts[p].prompt),
            "before": before.answers[p],
            "after": after.answers[p],
            "score_before": float(before.scores_P[p]),
            "score_after": float(after.scores_P[p]),
        }
        for p in sorted(order[:_SHOWN_ANSWERS])
    ]


def gate_identity(gate: GateConfig, held_out: HeldOut, skill: str | None) -> str:
    """Return what decides a gate's decision on a given stage, as text."""
    settings = gate.model_dump(mode="json", exclude={"prompts", "texts", "batch_size", "overlap_share"})
    prompts = [[prompt.prompt, prompt.verify, prompt.skill] for prompt in held_out.prompts]
    return json.dumps([settings, skill, prompts, held_out.texts], sort_keys=True)
