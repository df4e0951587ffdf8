"""The routing of a trained mixture on text that it has not seen: load, and information on the domain of a text.

Shape legend: W windows, L layers, E experts of a layer, D domains.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fusion_core.moe.routing import RouterRecorder
from services.corpus.ledger import Window

_SHUFFLES = 200


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
    """Run a mixture over windows of known domains, and compare with the same windows under shuffled domains."""
    documents = list(dict.fromkeys(window.document for window in windows))
    of_document = {window.document: domain for window, domain in zip(windows, domains, strict=True)}
    counts_WLE = expert_counts(model, windows)
    rng = np.random.default_rng(0)
    named = np.array([of_document[document] for document in documents])
    draws = [named, *(rng.permutation(named) for _ in range(_SHUFFLES))]
    found = []
    for draw in draws:
        shuffled = dict(zip(documents, draw, strict=True))
        labels_W = np.array([shuffled[window.document] for window in windows])
        counts_DLE = np.stack([counts_WLE[labels_W == domain].sum(axis=0) for domain in sorted(set(domains))])
        found.append(float(np.mean([mutual_information(counts_DLE[:, layer]) for layer in range(counts_DLE.shape[1])])))
    load_LE = counts_WLE.sum(axis=0)
    return Routing(
        float((load_LE.std(axis=1) / load_LE.mean(axis=1)).mean()),
        float((load_LE == 0).sum(axis=1).mean()),
        found[0],
        float(np.mean(found[1:])),
        float(np.percentile(found[1:], 95)),
    )


def mutual_information(counts_DE: NDArray[np.float64]) -> float:
    """Return sum p(d, e) log(p(d, e) / (p(d) p(e))) in nats."""
    joint_DE = counts_DE / counts_DE.sum()
    independent_DE = joint_DE.sum(axis=1, keepdims=True) * joint_DE.sum(axis=0, keepdims=True)
    seen = joint_DE > 0
    return float((joint_DE[seen] * np.log(joint_DE[seen] / independent_DE[seen])).sum())


def expert_counts(folder: Path, windows: Sequence[Window]) -> NDArray[np.float64]:
    """Return how many tokens of every window were sent to every expert, [W, L, E]."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder).eval()
    recorder = RouterRecorder(model)
    counts = []
    for window in windows:
        ids_1T = torch.tensor([tokenizer(window.text.decode(), add_special_tokens=False).input_ids])
        with recorder.recording() as outputs, torch.no_grad():
            model(ids_1T)
        counts.append(recorder.sums(outputs, torch.ones_like(ids_1T, dtype=torch.bool)).counts_LE.numpy())
    return np.stack(counts)
