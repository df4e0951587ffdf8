"""The routing of a trained mixture on text that it has not seen: load, and information on the domain of a text.

Shape legend: W windows, L layers, E experts of a layer, D documents.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fusion_core.moe.specialisation import specialisation
from services.corpus.ledger import Window
from services.evaluation.nats_per_byte import nats_per_byte


@dataclass(frozen=True, slots=True)
class Routing:
    """Means over layers.

    Attributes:
        load_cv: standard deviation of the experts' loads over their mean.
        dead_experts: experts that got no token.
        information: mutual information between expert and domain in nats.
        shuffled, shuffled_high: mean and 95th percentile where documents got the domain of another one.
    """

    load_cv: float
    dead_experts: float
    information: float
    shuffled: float
    shuffled_high: float


def routing_of(model: Path, windows: Sequence[Window], domains: Sequence[str]) -> Routing:
    """Run a mixture over windows of known domains, and compare with the same documents under shuffled domains."""
    counts_WLE = nats_per_byte(model, [window.text for window in windows], device="cpu").experts_WHE
    assert counts_WLE is not None
    documents = list(dict.fromkeys(window.document for window in windows))
    counts_DLE = np.zeros((len(documents), *counts_WLE.shape[1:]))
    np.add.at(counts_DLE, [documents.index(window.document) for window in windows], counts_WLE)
    of_document = {window.document: domain for window, domain in zip(windows, domains, strict=True)}
    found = specialisation(counts_DLE, [of_document[document] for document in documents])
    load_LE = counts_DLE.sum(axis=0)
    return Routing(
        float((load_LE.std(axis=1) / load_LE.mean(axis=1)).mean()),
        float((load_LE == 0).sum(axis=1).mean()),
        float(found.information_L.mean()),
        float(found.shuffled_L.mean()),
        float(found.shuffled_high_L.mean()),
    )
