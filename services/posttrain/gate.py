"""The gate behind a stage: its model is let through when it is better than the start, and nothing that is guarded fell.

Shape legend: P held-out prompts, N answers to each, D documents of a task.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fusion_core.arrays import Float64
from fusion_core.verify.pass_at import pass_at_k
from services.evaluation.harness import score_tasks
from services.evaluation.intervals import ALL, Interval, compare, mean_difference
from services.evaluation.nats_per_byte import Scores, nats_per_byte
from services.posttrain.config import GateConfig, PosttrainConfig, TrainingSettings
from services.posttrain.data.judge import Judge
from services.posttrain.data.rows import VerifiedPrompt, prompt_text
from services.posttrain.data.tokens import PromptTokens
from services.posttrain.generate import load_for_answers, sample_answers
from services.posttrain.held_out import HeldOut

_SHOWN_ANSWERS = 10


@dataclass(frozen=True, slots=True, eq=False)
class Measured:
    """The figures of one model.

    Attributes:
        answers: the first answer to each held-out prompt.
        scores_P: score of each prompt: the mean of its answers' scores, or pass@k.
        ended_P, lengths_P: share of a prompt's answers that ended by themselves; mean length in tokens.
        texts: scores of the texts, None without texts.
        tasks: scores of each task's documents, by the name of the task.
    """

    answers: list[str]
    scores_P: Float64
    ended_P: Float64
    lengths_P: Float64
    texts: Scores | None
    tasks: dict[str, Float64] = field(default_factory=dict)


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


def measure(folder: Path, config: PosttrainConfig, held_out: HeldOut) -> Measured:
    """Have a model answer the held-out prompts, and score the texts and the tasks."""
    gate = config.gate
    tokens = PromptTokens(folder, config.chat_template)
    asked = [prompt for prompt in held_out.prompts for _ in range(gate.samples)]
    sampled = sample_answers(
        load_for_answers(folder, config.device),
        tokens,
        [tokens.prompt_ids(prompt.prompt) for prompt in asked],
        max_new_tokens=gate.max_new_tokens,
        temperature=gate.temperature,
        batch_size=gate.batch_size,
        seed=gate.seed,
    )
    answers = [tokens.text_of(ids) for ids in sampled]
    verdicts = Judge(config.verifier).verdicts(asked, [text for text, _ in answers])
    right_PN, scores_PN, ended_PN, lengths_PN = (
        np.array(list(values), dtype=np.float64).reshape(-1, gate.samples)
        for values in (
            (verdict.right for verdict in verdicts),
            (verdict.score for verdict in verdicts),
            (ended for _, ended in answers),
            map(len, sampled),
        )
    )
    scored, tasks = None, {}
    if held_out.texts:
        scored = nats_per_byte(folder, held_out.texts, device=config.device, torch_threads=config.threads)
    if gate.tasks is not None:
        tasks = score_tasks(folder, Path(gate.tasks), device=config.device, batch_size=gate.batch_size)
    if gate.pass_at is None:
        scores_P = scores_PN.mean(axis=1)
    else:
        scores_P = pass_at_k(right_PN.sum(axis=1), gate.samples, gate.pass_at)
    return Measured(
        answers=[text for text, _ in answers[:: gate.samples]],
        scores_P=scores_P,
        ended_P=ended_PN.mean(axis=1),
        lengths_P=lengths_PN.mean(axis=1),
        texts=scored,
        tasks=tasks,
    )


def decide(before: Measured, after: Measured, held_out: HeldOut, gate: GateConfig, stage: TrainingSettings) -> Decision:
    """Return whether a stage is let through.

    The metric, the score of the stage's task, or of the prompts of its skill, or of all prompts, must rise beyond its
    95 % interval. Guards are the scores of other skills and tasks, nats per byte, the share of ended answers, and the
    answers' length.
    """
    guards = gate.guards
    metric, *others = _scores(before, after, held_out, gate, stage)
    lines = [_metric(*metric, gate.seed)]
    lines += [_guard(*other, fall=guards.score, seed=gate.seed) for other in others]
    lines.append(_guard("share of ended answers", before.ended_P, after.ended_P, fall=guards.ended, seed=gate.seed))
    allowed = (guards.length_ratio - 1) * float(before.lengths_P.mean())
    lines.append(
        _guard("tokens per answer", -before.lengths_P, -after.lengths_P, fall=allowed, seed=gate.seed, sign=-1)
    )
    if before.texts is not None and after.texts is not None:
        lines.append(_texts_line(before.texts, after.texts, held_out.documents, gate))
    return Decision(all(line.ok for line in lines), lines, _examples(before, after, held_out.prompts))


def _scores(
    before: Measured, after: Measured, held_out: HeldOut, gate: GateConfig, stage: TrainingSettings
) -> Iterator[tuple[str, Float64, Float64]]:
    """Yield the name of every score with its values before and after; the first one is the stage's metric."""
    tasks = sorted(before.tasks, key=lambda name: (name != stage.task, name))
    of_tasks = [(f"score of task {name}", before.tasks[name], after.tasks[name]) for name in tasks]
    if stage.task is not None:
        yield of_tasks.pop(0)
    word = "mean score" if gate.pass_at is None else f"pass@{gate.pass_at}"
    skills = np.array([prompt.skill for prompt in held_out.prompts])
    if stage.task is None and stage.skill is None:
        yield word, before.scores_P, after.scores_P
    else:
        for skill in sorted(set(skills.tolist()), key=lambda name: (name != stage.skill, name)):
            of_skill_P = skills == skill
            yield f"{word} of {skill or 'other prompts'}", before.scores_P[of_skill_P], after.scores_P[of_skill_P]
    yield from of_tasks


def _metric(name: str, before_P: Float64, after_P: Float64, seed: int) -> Line:
    difference = mean_difference(before_P, after_P, seed=seed)
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
