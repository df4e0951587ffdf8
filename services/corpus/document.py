"""A document: the unit that is split, deduplicated and cut into windows."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Document:
    """A whole document; `name` is unique in the corpus."""

    name: str
    text: bytes
