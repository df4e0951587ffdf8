"""The sources' losses and weights in plain Python, straight from the definition in `fusion_core.fusion.weights`."""

from __future__ import annotations

import itertools
import math

import numpy as np

from fusion_core.alignment.projected_rows import ProjectedRows
from fusion_core.fusion import FusionConfig
from fusion_core.vocabulary import Encoding


def oracle_losses(sources: dict[str, ProjectedRows], encoding: Encoding, span: range) -> dict[str, float] | None:
    """Losses of the sources that have a row in the span, but for a constant; None where its bytes tell nothing."""
    num_bytes = np.diff(encoding.byte_ends_T, prepend=0)
    text = [t for t in span if t < encoding.num_tokens - encoding.ends_document]
    active = [name for name, rows in sources.items() if any(rows.mask_T[t] for t in span)]
    if not sum(int(num_bytes[t]) for t in text):
        return None

    def nats(name: str, rows: list[int]) -> float:
        return -sum(float(sources[name].gold_T[t]) for t in rows)

    pairs = []
    for one, other in itertools.combinations(active, 2):
        common = [t for t in text if sources[one].mask_T[t] and sources[other].mask_T[t]]
        length = sum(int(num_bytes[t]) for t in common)
        if length:
            pairs.append((one, other, length, (nats(one, common) - nats(other, common)) / length))
    loss = {}
    for island in islands(active, [(one, other) for one, other, *_ in pairs]):
        inside = [pair for pair in pairs if pair[0] in island]
        matrix = np.zeros((len(inside) + 1, len(island)))
        differences = np.zeros(len(inside) + 1)
        for row, (one, other, length, difference) in enumerate(inside):
            matrix[row, island.index(one)], matrix[row, island.index(other)] = math.sqrt(length), -math.sqrt(length)
            differences[row] = math.sqrt(length) * difference
        matrix[-1] = 1.0
        whole = [nats(name, text) / sum(int(num_bytes[t]) for t in text) for name in island]
        solved = np.linalg.lstsq(matrix, differences, rcond=None)[0] + np.mean(whole)
        loss |= dict(zip(island, solved.tolist(), strict=True))
    return loss


def islands(names: list[str], links: list[tuple[str, str]]) -> list[list[str]]:
    """Groups of names that a chain of links connects."""
    found = [{name} for name in names]
    for link in links:
        near = [group for group in found if group & set(link)]
        found = [group for group in found if group not in near] + [set[str]().union(*near)]
    return [sorted(group, key=names.index) for group in found]


def oracle_weights(
    sources: dict[str, ProjectedRows], encoding: Encoding, config: FusionConfig
) -> list[dict[str, float]]:
    """Per target token the weight of every source before masks."""
    num_tokens = encoding.num_tokens
    if config.strategy == "online":
        return oracle_online(sources, num_tokens, config)
    window = oracle_losses(sources, encoding, range(num_tokens))
    step = config.span_tokens if config.scope == "span" else num_tokens
    weights: list[dict[str, float]] = []
    last = num_tokens - encoding.ends_document
    starts = list(range(0, max(1, last), step))
    for start in starts:
        span = range(start, num_tokens if start == starts[-1] else start + step)
        active = [name for name, rows in sources.items() if any(rows.mask_T[t] for t in span)]
        if not active and config.scope == "span":
            span_loss, everyone = window, [n for n, rows in sources.items() if rows.mask_T.any()]
        else:
            span_loss, everyone = oracle_losses(sources, encoding, span) or window, active
        taking_part, everyone = len(everyone), everyone or list(sources)
        loss = {name: (span_loss or {}).get(name, 0.0) for name in everyone}
        if config.strategy == "fixed":
            raw = {name: config.weights[name] for name in everyone}
        elif config.strategy == "min_ce":
            best = next(name for name in sources if name in loss and loss[name] <= min(loss.values()) + 1e-9)
            raw = {name: float(name == best) for name in everyone}
        else:
            raw = {name: math.exp(-(x - min(loss.values())) / config.tau) for name, x in loss.items()}
        total = sum(raw.values())
        normalised = {name: x / total for name, x in raw.items()}
        if taking_part and config.strategy != "fixed":
            normalised = floored(normalised, config.min_weight)
        weights += [{name: normalised.get(name, 0.0) for name in sources}] * len(span)
    return weights


def floored(weights: dict[str, float], least: float) -> dict[str, float]:
    return {name: least + (1 - len(weights) * least) * weight for name, weight in weights.items()}


def oracle_online(sources: dict[str, ProjectedRows], num_tokens: int, config: FusionConfig) -> list[dict[str, float]]:
    """Every row's weights from the start: the posterior by Bayes' rule among the sources that have the row."""
    taking_part = [name for name, rows in sources.items() if rows.mask_T.any()] or list(sources)
    prior = {name: config.prior.get(name, 1.0) for name in taking_part}
    now = {name: x / sum(prior.values()) for name, x in prior.items()}
    weights = []
    for t in range(num_tokens):
        having = [name for name in taking_part if sources[name].mask_T[t]]
        held = sum(now[name] for name in having)
        row = floored({name: now[name] / held for name in having}, config.min_weight) if having else now
        weights.append({name: row.get(name, 0.0) for name in sources})
        likely = {name: now[name] * math.exp(float(sources[name].gold_T[t])) for name in having}
        if sum(likely.values()) > 0:
            posterior = {name: now[name] for name in taking_part}
            posterior |= {name: held * x / sum(likely.values()) for name, x in likely.items()}
            now = {name: (1 - config.rate) * now[name] + config.rate * posterior[name] for name in taking_part}
    return weights
