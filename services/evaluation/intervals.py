"""Held-out scores of several models with intervals, per domain: bootstrap over documents (Efron 1979), the same draws
for all models, so that differences between them are paired.

Shape legend: M models, D documents, R draws.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fusion_core.arrays import Float64, Int32
from services.evaluation.nats_per_byte import Scores

ALL = "all"
MIN_DOCUMENTS = 8
"""The fewest documents that give an interval: a bootstrap over one has no width, over a few far too little."""
_DRAWS = 2000
_PERCENTILES = (2.5, 97.5)


@dataclass(frozen=True, slots=True)
class Interval:
    """A value, and the 95 % interval around it; None for both ends where the documents are too few for one."""

    value: float
    low: float | None
    high: float | None

    def to_json(self) -> dict[str, float | None]:
        """Return the fields by name."""
        return {"value": self.value, "low": self.low, "high": self.high}


def mean_difference(before_P: Float64, after_P: Float64, *, seed: int = 0) -> Interval:
    """Return how much the mean of P values rose, with the bootstrap's interval over the pairs."""
    differences_P = np.asarray(after_P, dtype=np.float64) - np.asarray(before_P, dtype=np.float64)
    draws = _Draws([str(pair) for pair in range(len(differences_P))], seed)
    return draws.interval(float(differences_P.mean()), draws.draws_RD @ differences_P / len(differences_P))


def domain_of(document: str) -> str:
    """Return the domain of a document by its name in the corpus: the top folder, or else the file that holds many
    documents; whole files side by side in one folder are one domain."""
    folder, in_folder, _ = document.partition("/")
    file, in_file, _ = document.rpartition("#")
    if in_folder:
        return folder
    return file.partition(".")[0] if in_file else "files"


def compare(
    models: Mapping[str, Scores], documents: Sequence[str], domains: Sequence[str] = (), *, seed: int = 0
) -> dict[str, Any]:
    """Compare the scores of models on the same windows.

    `documents` names the document of each window, `domains` its domain where records name one: else it is empty, and
    the document's name decides.

    Returns, by domain and for `all`: the number of bytes and documents; by model `nats_per_byte` and `accuracy` with
    intervals (from `MIN_DOCUMENTS` documents on), and `difference_from` every other model in nats per byte (below 0
    where this one is better). Accuracy is the share of the positions where a token starts in every model's tokenisation
    at which the model's likeliest token is the real one.
    """
    return {
        name: _compare_windows(models, documents, windows, seed)
        for name, windows in windows_by_domain(documents, domains).items()
    }


def compare_nats(
    nats_MW: Mapping[str, Float64],
    bytes_W: npt.NDArray[np.int64],
    documents: Sequence[str],
    domains: Sequence[str] = (),
    *,
    seed: int = 0,
) -> dict[str, Any]:
    """Compare the nats that several ways of scoring the same windows lose on each, as `compare` does.

    `nats_MW` and `bytes_W` have an entry per window. Accuracies are left out.
    """
    result = {}
    for name, windows in windows_by_domain(documents, domains).items():
        draws = _Draws([documents[window] for window in windows], seed)
        bytes_D = draws.per_document(bytes_W[windows])
        nats_MD = {model: draws.per_document(nats_W[windows]) for model, nats_W in nats_MW.items()}
        result[name] = {
            "bytes": int(bytes_D.sum()),
            "documents": draws.num_documents,
            "models": draws.differences(nats_MD, bytes_D),
        }
    return result


def windows_by_domain(documents: Sequence[str], domains: Sequence[str] = ()) -> dict[str, list[int]]:
    """Return the places of the windows of each domain, and of `all`; the latter alone where there is one domain."""
    chosen: dict[str, list[int]] = {ALL: list(range(len(documents)))}
    named = domains or [""] * len(documents)
    by_domain = [domain or domain_of(document) for domain, document in zip(named, documents, strict=True)]
    if len(set(by_domain)) > 1:
        for domain in sorted(set(by_domain) - {ALL}):
            chosen[domain] = [index for index, name in enumerate(by_domain) if name == domain]
    return chosen


class _Draws:
    """Random draws of documents, the same for all models."""

    def __init__(self, document_of_window: Sequence[str], seed: int) -> None:
        names = list(dict.fromkeys(document_of_window))
        numbers = {name: number for number, name in enumerate(names)}
        self._document_W = np.array([numbers[document] for document in document_of_window])
        self.num_documents = len(names)
        even = np.full(len(names), 1 / len(names))
        self.draws_RD = np.random.default_rng(seed).multinomial(len(names), even, size=_DRAWS)

    def per_document(self, values_W: npt.NDArray[Any]) -> Float64:
        """Return the sums of the windows' values by document."""
        sums_D = np.bincount(self._document_W, weights=values_W, minlength=self.num_documents)
        return sums_D.astype(np.float64)

    def interval(self, value: float, drawn_R: Float64) -> Interval:
        """Return the interval of a value from what it is in each draw."""
        if self.num_documents < MIN_DOCUMENTS:
            return Interval(value, None, None)
        low, high = np.percentile(drawn_R, _PERCENTILES)
        return Interval(value, float(low), float(high))

    def differences(self, nats_MD: Mapping[str, Float64], bytes_D: Float64) -> dict[str, dict[str, Any]]:
        """Return nats per byte of every model, and the difference from every other, with intervals."""
        values = {model: float(nats_D.sum() / bytes_D.sum()) for model, nats_D in nats_MD.items()}
        drawn_MR = {model: self.draws_RD @ nats_D / (self.draws_RD @ bytes_D) for model, nats_D in nats_MD.items()}
        return {
            model: {
                "nats_per_byte": self.interval(values[model], drawn_MR[model]).to_json(),
                "difference_from": {
                    other: self.interval(values[model] - values[other], drawn_MR[model] - drawn_MR[other]).to_json()
                    for other in nats_MD
                    if other != model
                },
            }
            for model in nats_MD
        }


def _compare_windows(
    models: Mapping[str, Scores], documents: Sequence[str], windows: list[int], seed: int
) -> dict[str, Any]:
    draws = _Draws([documents[window] for window in windows], seed)
    any_model = next(iter(models.values()))
    bytes_D = draws.per_document(any_model.bytes_W[windows])
    nats_MD = {model: draws.per_document(scores.nats_W[windows]) for model, scores in models.items()}
    hits_MD, positions_D = _hits(models, windows, draws.per_document)
    compared = draws.differences(nats_MD, bytes_D)
    result: dict[str, Any] = {"bytes": int(bytes_D.sum()), "documents": draws.num_documents, "models": {}}
    for model, values in compared.items():
        accuracy_R = draws.draws_RD @ hits_MD[model] / np.maximum(1, draws.draws_RD @ positions_D)
        accuracy = draws.interval(float(hits_MD[model].sum() / max(1, positions_D.sum())), accuracy_R)
        result["models"][model] = {
            "nats_per_byte": values["nats_per_byte"],
            "accuracy": accuracy.to_json(),
            "difference_from": values["difference_from"],
        }
    return result


def _hits(
    models: Mapping[str, Scores], windows: Sequence[int], per_document: Any
) -> tuple[dict[str, Float64], Float64]:
    """Return hits per document of every model at the positions that all models share, and the number of these."""
    hits_MW: dict[str, list[int]] = {model: [] for model in models}
    positions_W = []
    for window in windows:
        shared: Int32 | None = None
        for scores in models.values():
            starts_T = np.unique(scores.token_starts_W[window])
            shared = starts_T if shared is None else np.intersect1d(shared, starts_T, assume_unique=True)
        assert shared is not None
        positions_W.append(len(shared))
        for model, scores in models.items():
            # Of tokens that start at the same byte (parts of a character) the last one counts: it ends the character.
            at_T = np.searchsorted(scores.token_starts_W[window], shared, side="right") - 1
            hits_MW[model].append(int(scores.hits_W[window][at_T].sum()))
    hits = {model: per_document(np.array(hits_W, dtype=np.float64)) for model, hits_W in hits_MW.items()}
    return hits, per_document(np.array(positions_W, dtype=np.float64))
