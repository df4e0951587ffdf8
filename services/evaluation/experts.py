"""The experts of scored models: their load on a split, and what it tells of domains and of the sources' strengths.

Shape legend: W windows, D documents, L layers, E experts of a layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fusion_core.arrays import Float64, Int32
from fusion_core.moe.specialisation import Specialisation, specialisation
from services.evaluation.intervals import domain_of
from services.evaluation.nats_per_byte import Scores

_DIGITS = 5


def describe_experts(
    scores: Mapping[str, Scores], documents: Sequence[str], domains: Sequence[str], *, sources: Sequence[str] = ()
) -> dict[str, Any]:
    """Return the routing of every model that has experts, by its name.

    Args:
        scores: of all models on the same W windows.
        documents, domains: of each window, as `intervals.compare` takes them.
        sources: names of the models in `scores` that are sources; of two or more, the one that loses the fewest nats on
            a document is the preferred source there.

    Each entry has `layers`, `load` (1 when even), `load_cv` and `dead_experts` by layer, and `domain` and `source`
    where documents differ in these: `kinds`, `load` (layer by kind by expert), `information_nats`, `shuffled_nats` and
    `shuffled_95_percent` by layer (see `fusion_core.moe.specialisation`).
    """
    numbers = {document: number for number, document in enumerate(dict.fromkeys(documents))}
    number_W = np.array([numbers[document] for document in documents])
    kinds = {"domain": _domains(documents, domains)}
    if len(sources) > 1:
        kinds["source"] = _preferred({name: scores[name] for name in sources}, number_W)
    return {
        name: _describe(model.layers, _per_document(model.experts_WHE, number_W), kinds)
        for name, model in scores.items()
        if model.experts_WHE is not None
    }


def _domains(documents: Sequence[str], domains: Sequence[str]) -> list[str]:
    """Return the domain of every document, in the order in which documents appear."""
    of_document: dict[str, str] = {}
    for document, domain in zip(documents, domains, strict=True):
        of_document.setdefault(document, domain or domain_of(document))
    return list(of_document.values())


def _preferred(scores: Mapping[str, Scores], number_W: np.ndarray) -> list[str]:
    """Return the source with the fewest nats on each document, of those that spell it byte for byte."""
    nats_SW = (np.where(each.lossless_W, each.nats_W, np.inf) for each in scores.values())
    nats_SD = np.stack([np.bincount(number_W, weights=nats_W) for nats_W in nats_SW])
    names = [name.removeprefix("source ") for name in scores]
    return [names[best] for best in nats_SD.argmin(axis=0)]


def _per_document(counts_WLE: Int32, number_W: np.ndarray) -> Float64:
    counts_DLE = np.zeros((int(number_W.max()) + 1, *counts_WLE.shape[1:]))
    np.add.at(counts_DLE, number_W, counts_WLE)
    return counts_DLE


def _describe(layers: Sequence[int], counts_DLE: Float64, kinds: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    counts_LE = counts_DLE.sum(axis=0)
    load_LE = counts_LE / counts_LE.mean(axis=1, keepdims=True)
    return {
        "layers": list(layers),
        "load": _rounded(load_LE),
        "load_cv": _rounded(load_LE.std(axis=1)),
        "dead_experts": (counts_LE == 0).sum(axis=1).tolist(),
        **{key: _kinds(specialisation(counts_DLE, names)) for key, names in kinds.items() if len(set(names)) > 1},
    }


def _kinds(found: Specialisation) -> dict[str, Any]:
    return {
        "kinds": list(found.kinds),
        "load": _rounded(found.load_LKE),
        "information_nats": _rounded(found.information_L),
        "shuffled_nats": _rounded(found.shuffled_L),
        "shuffled_95_percent": _rounded(found.shuffled_high_L),
    }


def _rounded(values: Float64) -> Any:
    return values.round(_DIGITS).tolist()
