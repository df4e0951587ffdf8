"""The first lines of a report: is the fused target better than its controls, at what cost, and what would tell more."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from services.evaluation.controls import CLM_ONLY, FUSED, Training, comparisons
from services.evaluation.intervals import ALL, MIN_DOCUMENTS
from services.evaluation.report.run_summary import RunSummary


def opening(
    scores: Mapping[str, float],
    evaluation: Mapping[str, Any],
    trainings: Mapping[str, Training],
    totals: Mapping[str, RunSummary],
) -> list[str]:
    """Return the lines of the opening; none where there is neither a verdict nor a cost.

    Args:
        scores: nats per byte of models without intervals, used where `evaluation` compares none.
        evaluation: content of evaluation.json, empty for none.
        trainings: kind of training of each scored model.
        totals: of each training run.
    """
    result = evaluation.get("domains", {}).get(ALL)
    lines = paired_verdicts(result, trainings) if result else []
    sentence = None if lines else verdict(dict(scores))
    if sentence:
        lines = [sentence, ""]
    costs = [f"- {_cost(name, run)}" for name, run in totals.items()]
    if costs:
        lines += ["Cost of training:", "", *costs, *_ratio(totals)]
    return ["## In short", "", *lines] if lines else []


def verdict(nats_per_byte: dict[str, float]) -> str | None:
    """Return in a sentence whether the fused target beats the same target without fusion; None when one is missing."""
    clm_only, fused = nats_per_byte.get(CLM_ONLY), nats_per_byte.get(FUSED)
    if clm_only is None or fused is None:
        return None
    difference = f"{abs(clm_only - fused):.4f} nats per byte ({100 * abs(clm_only - fused) / clm_only:.2f} %)"
    if fused < clm_only:
        return (
            f"**The fused target is better than CLM only by {difference}.** This is one seed: a difference of this "
            "size needs several before anyone builds on it."
        )
    if fused == clm_only:
        return "**The fused target is NOT better than CLM only: both score the same.**"
    return f"**The fused target is NOT better than CLM only: it is worse by {difference}.**"


def paired_verdicts(result: Mapping[str, Any], trainings: Mapping[str, Training]) -> list[str]:
    """Return a line, and an empty one, for each model of a domain that has a control there."""
    lines: list[str] = []
    for name, control in comparisons(trainings):
        if name in result["models"] and control in result["models"][name]["difference_from"]:
            difference = result["models"][name]["difference_from"][control]
            lines += [_paired_verdict(name, control, difference, result["documents"]), ""]
    return lines


def with_interval(score: Mapping[str, Any], num_documents: int) -> tuple[str, str]:
    """Return a value and its interval as text, `-` where there are too few documents for one."""
    if num_documents < MIN_DOCUMENTS:
        return f"{score['value']:.4f}", "-"
    return f"{score['value']:.4f}", f"{score['low']:.4f} to {score['high']:.4f}"


def _paired_verdict(name: str, control: str, difference: Mapping[str, Any], num_documents: int) -> str:
    value, interval = with_interval(difference, num_documents)
    if num_documents < MIN_DOCUMENTS:
        reason = f"no verdict from {num_documents} documents, {MIN_DOCUMENTS} are needed"
        return f"**{name} minus {control}: {value} nats per byte: {reason}.** Of one seed."
    verdict, more = "no difference beyond the interval", ""
    if difference["high"] < 0:
        verdict = "better beyond the interval"
    elif difference["low"] > 0:
        verdict = "WORSE beyond the interval"
    else:
        more = _what_would_tell(difference, num_documents)
    return f"**{name} minus {control}: {value} nats per byte ({interval}): {verdict}.** Of one seed.{more}"


def _what_would_tell(difference: Mapping[str, float], num_documents: int) -> str:
    """Return how many documents would tell a difference of this size from none: intervals shrink with the root."""
    half = (difference["high"] - difference["low"]) / 2
    if abs(difference["value"]) < half / 10:
        return " A difference this small would take over a hundred times as many documents to tell."
    needed = num_documents * (half / abs(difference["value"])) ** 2
    return f" If the difference is real, some {needed:,.0f} documents would tell it; there are {num_documents:,}."


def _cost(name: str, run: RunSummary) -> str:
    return (
        f"{name}: {run.tokens:,} tokens in {run.train_seconds:,.0f} s ({run.tokens_per_second:,.0f} tokens/s), "
        f"{100 * run.wait_share:.1f} % of the time waiting for data"
    )


def _ratio(totals: Mapping[str, RunSummary]) -> list[str]:
    """Return how much longer a token takes with fused rows than without; nothing where one of the two is missing."""
    fused = [run for run in totals.values() if run.fusion is not None]
    plain = [run for run in totals.values() if run.fusion is None]
    if not fused or not plain:
        return []
    slow, fast = (sum(run.train_seconds for run in runs) / sum(run.tokens for run in runs) for runs in (fused, plain))
    return ["", f"A token takes {slow / fast:.2f} times as long with fused rows as without."]
