"""Quality by a classifier that the user's examples train: hashed words and pairs of words, logistic regression."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from services.base.errors import SettingError
from services.corpus.cleaning.config import CurateConfig, QualityConfig
from services.corpus.cleaning.filtering import Judge
from services.corpus.cleaning.inputs import input_files
from services.corpus.cleaning.reading import read_files
from services.corpus.cleaning.shards import Drop, RawDocument, StepFiles
from services.corpus.cleaning.tally import Tally

WEIGHTS, RECORD = "weights.npy", "model.json"
_CHARACTERS = 20_000
"""Characters at a document's beginning that are looked at."""
_FEWEST = 10


def train_quality(config: QualityConfig, curate: CurateConfig, task: int, folder: Path) -> None:
    """Write the classifier's weights, and its accuracy on a fifth of the examples that it was not trained on."""
    texts, labels = [], []
    for label, setting in ((1, "good"), (0, "bad")):
        files = input_files(getattr(config, setting), f"quality.{setting}")
        found = [document.text for document, drop in read_files(files, curate) if drop is None]
        if len(found) < _FEWEST:
            raise SettingError(f"quality.{setting}", f"{len(found)} examples are too few; at least {_FEWEST}")
        texts += found
        labels += [label] * len(found)
    features, labels_N = _features(texts), np.array(labels)
    apart = np.random.default_rng(0).permutation(len(texts)) % 5 == 0
    tried = _fitted(features[~apart], labels_N[~apart])
    accuracy = float((tried.predict(features[apart]) == labels_N[apart]).mean())
    model = _fitted(features, labels_N)
    np.save(folder / WEIGHTS, np.append(model.coef_[0], model.intercept_[0]))
    record = {"good": int(labels_N.sum()), "bad": int((labels_N == 0).sum()), "held_out_accuracy": round(accuracy, 4)}
    (folder / RECORD).write_text(json.dumps(record) + "\n")


def _fitted(features: Any, labels_N: np.ndarray) -> Any:
    """Return a model; the same examples in the same order give the same weights."""
    from sklearn.linear_model import SGDClassifier

    model = SGDClassifier(
        loss="log_loss", alpha=1e-5, max_iter=20, tol=None, random_state=0, average=True, class_weight="balanced"
    )
    return model.fit(features, labels_N)


def _features(texts: Sequence[str]) -> Any:
    from sklearn.feature_extraction.text import HashingVectorizer

    hashing = HashingVectorizer(n_features=2**18, ngram_range=(1, 2), token_pattern=r"(?u)\w+|[^\w\s]")
    return hashing.transform([text[:_CHARACTERS] for text in texts])


@dataclass(frozen=True, slots=True)
class Quality:
    """Drops the documents of kind text that the classifier takes for bad ones."""

    trained: StepFiles
    threshold: float

    def open(self, task: int) -> Judge:
        weights = self.trained.load(0, WEIGHTS)

        def judge(documents: list[RawDocument], tally: Tally) -> list[Drop | None]:
            texts = [document for document in documents if document.kind == "text"]
            logits = _features([d.text for d in texts]) @ weights[:-1] + weights[-1] if texts else ()
            good = {id(document): 1 / (1 + np.exp(-logit)) for document, logit in zip(texts, logits, strict=True)}
            probabilities = (good.get(id(document), 1.0) for document in documents)
            return [Drop("low_quality", f"{p:.2f}") if p < self.threshold else None for p in probabilities]

        return judge
