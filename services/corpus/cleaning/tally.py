"""Counts of a step: documents in = kept + dropped (+ joined to others), and some of the dropped ones to look at."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from services.corpus.cleaning.shards import Drop, RawDocument

_SAMPLES, _SAMPLE_CHARACTERS = 3, 600


@dataclass(slots=True)
class Tally:
    """Counts of one task or of a whole step.

    Attributes:
        dropped, dropped_bytes: by reason.
        joined: documents that became part of others.
        notes: further counts, such as replaced e-mail addresses.
        samples: by reason, dropped documents drawn by a hash of their id: `id`, `detail`, and the text's beginning.
    """

    documents_in: int = 0
    bytes_in: int = 0
    kept: int = 0
    bytes_kept: int = 0
    joined: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    dropped_bytes: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)
    samples: dict[str, list[dict[str, str]]] = field(default_factory=dict)

    def take(self, num_bytes: int) -> None:
        """Count a document that comes in."""
        self.documents_in += 1
        self.bytes_in += num_bytes

    def keep(self, num_bytes: int) -> None:
        self.kept += 1
        self.bytes_kept += num_bytes

    def drop(self, document: RawDocument, drop: Drop, num_bytes: int) -> None:
        """Count a dropped document that came in with `num_bytes`."""
        self.dropped[drop.reason] += 1
        self.dropped_bytes[drop.reason] += num_bytes
        sample = {
            "draw": hashlib.sha256(document.id.encode()).hexdigest(),
            "id": document.id,
            "detail": drop.detail,
            "text": document.text[:_SAMPLE_CHARACTERS],
        }
        self._add_samples(drop.reason, [sample])

    def _add_samples(self, reason: str, samples: list[dict[str, str]]) -> None:
        drawn = sorted(self.samples.get(reason, []) + samples, key=lambda sample: (sample["draw"], sample["id"]))
        self.samples[reason] = drawn[:_SAMPLES]

    def as_json(self) -> dict[str, Any]:
        """Return the counts as JSON has them, keys sorted."""
        values: dict[str, Any] = {name: getattr(self, name) for name in ("documents_in", "bytes_in", "kept")}
        values |= {"bytes_kept": self.bytes_kept, "joined": self.joined}
        values |= {name: dict(sorted(getattr(self, name).items())) for name in ("dropped", "dropped_bytes", "notes")}
        return values | {"samples": dict(sorted(self.samples.items()))}

    @classmethod
    def total(cls, parts: Iterable[dict[str, Any]]) -> Tally:
        """Return the sum of tallies as `as_json` returns them."""
        whole = cls()
        for part in parts:
            for name in ("documents_in", "bytes_in", "kept", "bytes_kept", "joined"):
                setattr(whole, name, getattr(whole, name) + part[name])
            for name in ("dropped", "dropped_bytes", "notes"):
                getattr(whole, name).update(part[name])
            for reason, samples in part["samples"].items():
                whole._add_samples(reason, samples)
        return whole
