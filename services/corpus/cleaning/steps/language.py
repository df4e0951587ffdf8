"""The language of each text, and the choice of those that stay."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

from services.corpus.cleaning.config import LanguageConfig
from services.corpus.cleaning.filtering import Judge
from services.corpus.cleaning.shards import Drop, RawDocument
from services.corpus.cleaning.tally import Tally

_CHARACTERS = 2000
"""Characters at a document's beginning that decide its language."""


@dataclass(frozen=True, slots=True)
class ChooseLanguages:
    """Writes the language of every text to it. A language that a row names is believed."""

    config: LanguageConfig

    def open(self, task: int) -> Judge:
        identifier, keep = _identifier(), self.config.keep

        def judge(documents: list[RawDocument], tally: Tally) -> list[Drop | None]:
            return [self._judged(document, identifier, keep) for document in documents]

        return judge

    def _judged(self, document: RawDocument, identifier: Any, keep: tuple[str, ...] | None) -> Drop | None:
        if document.kind == "code":
            return None
        if not document.language:
            found, probability = identifier.classify(document.text[:_CHARACTERS])
            document.language = str(found)
            if probability < self.config.min_probability:
                return Drop("unsure_language", f"{found} with {probability:.2f}")
        if keep is not None and document.language not in keep:
            return Drop("other_language", document.language)
        return None


@cache
def _identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
