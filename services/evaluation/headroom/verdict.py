"""One sentence on whether fusing can help, from the comparison of sources, their best mixture and the fused rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from services.evaluation.intervals import ALL, MIN_DOCUMENTS


def verdict(names: Sequence[str], domains: Mapping[str, Any], strategy: str) -> dict[str, Any]:
    """Return `answer` and `sentence`, and `leave_out`, the sources that can be left out by domain.

    `answer` is "yes" where the fused rows are better than the best source outside the interval; "not as configured"
    where only the best fixed mixture is; "no" where neither is; "unclear" where the documents are too few for an
    interval.
    """
    everything = domains[ALL]
    models = everything["models"]
    best = min(names, key=lambda name: models[f"source {name}"]["nats_per_byte"]["value"])
    of_best = models[f"source {best}"]["nats_per_byte"]["value"]
    fused = models["fused"]["difference_from"][f"source {best}"]
    mixture = models["best mixture"]["difference_from"][f"source {best}"]
    leave_out = _where_to_leave_out(domains)
    if len(names) == 1:
        answer, sentence = "no", f"There is one source, {best}: nothing to fuse"
    elif fused["low"] is None:
        answer = "unclear"
        sentence = (
            f"Too few documents for an interval ({everything['documents']}, at least {MIN_DOCUMENTS} are needed): the "
            f"fused rows lose {_signed(fused)} nats/byte against the best source, {best}"
        )
    elif fused["high"] < 0:
        answer = "yes"
        sentence = (
            f"Fusing can help here: the fused rows lose {_gain(fused, of_best)} less than the best source, {best}"
        )
    elif mixture["high"] < 0:
        answer = "not as configured"
        weights = ", ".join(f"{name} {weight:.2f}" for name, weight in everything["mixture"]["weights"].items())
        sentence = (
            f"Fusing can help here, but strategy {strategy} does not: fixed weights ({weights}) lose "
            f"{_gain(mixture, of_best)} less than the best source, {best}, the fused rows {_signed(fused)}"
        )
    else:
        answer = "no"
        sentence = (
            f"Fusing can hardly help here: against the best source, {best}, the fused rows lose {_signed(fused)} "
            f"nats/byte and the best fixed mixture {_signed(mixture)}; train on {best} alone"
        )
    return {"answer": answer, "sentence": f"{sentence}{_rest(models, leave_out)}.", "leave_out": leave_out}


def _rest(models: Mapping[str, Any], leave_out: Mapping[str, Sequence[str]]) -> str:
    """Return what follows the first part of the sentence: the target's own level, and the sources to leave out."""
    rest = ""
    if "target" in models:
        against = models["fused"]["difference_from"]["target"]
        if against["value"] >= 0:
            rest += f"; the target itself is better than the fused rows by {against['value']:.4f} nats/byte"
    if leave_out:
        where = "; ".join(f"{', '.join(sources)} {_place(domain)}" for domain, sources in leave_out.items())
        rest += f"; can be left out: {where}"
    return rest


def _where_to_leave_out(domains: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return the sources to leave out by domain; under `all` those that no domain needs."""
    single = {domain: values["leave_out"] for domain, values in domains.items() if domain != ALL or len(domains) == 1}
    everywhere = [name for name in domains[ALL]["leave_out"] if all(name in gone for gone in single.values())]
    where = {ALL: everywhere} | {
        domain: [name for name in gone if name not in everywhere] for domain, gone in single.items() if domain != ALL
    }
    return {domain: gone for domain, gone in where.items() if gone}


def _place(domain: str) -> str:
    return "everywhere" if domain == ALL else f"in {domain}"


def _gain(difference: Mapping[str, float], level: float) -> str:
    less, low, high = -difference["value"], -difference["high"], -difference["low"]
    return f"{less:.4f} nats/byte ({less / level:.1%}; 95 %: {low:.4f} to {high:.4f})"


def _signed(difference: Mapping[str, float | None]) -> str:
    value, low, high = (difference[key] for key in ("value", "low", "high"))
    return f"{value:+.4f}" if low is None else f"{value:+.4f} ({low:+.4f} to {high:+.4f})"
