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
        everyone = everyone or list(sources)
        loss = {name: (span_loss or {}).get(name, 0.0) for name in everyone}
        if config.strategy == "fixed":
            raw = {name: config.weights[name] for name in everyone}
        elif config.strategy == "min_ce":
            best = next(name for name in sources if name in loss and loss[name] <= min(loss.values()) + 1e-9)
            raw = {name: float(name == best) for name in everyone}
        else:
            raw = {name: math.exp(-(x - min(loss.values())) / config.tau) for name, x in loss.items()}
        total = sum(raw.values())
        weights += [{name: raw.get(name, 0.0) / total for name in sources}] * len(span)
    return weights
