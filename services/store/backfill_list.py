"""Windows that went out without some of their sources, or not at all, for `fusion backfill` to complete.

backfill/SPLIT/HASH.json    some windows of a split, each with the sources that it lacks: `BackfillPart`

A replica writes a part before it sends the frame with those windows, so that a replica that dies loses none;
writing the same part again changes nothing. A part is deleted when all its windows are in the store.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

from pydantic import Field, ValidationError

from services.base.files import Files
from services.base.settings import Settings

_FOLDER = "backfill"


class BackfillWindow(Settings):
    """The index of a window in its split, and the names of the sources that it lacks."""

    index: int = Field(ge=0)
    missing: tuple[str, ...]


class BackfillPart(Settings):
    """Incomplete windows of one split."""

    corpus: str
    split: str
    fingerprint: str
    windows: tuple[BackfillWindow, ...]


class BackfillList:
    """The parts of the back-fill list in a store."""

    def __init__(self, files: Files) -> None:
        self._files = files

    def add(self, corpus: str, split: str, fingerprint: str, windows: Sequence[BackfillWindow]) -> None:
        """Write a part; OSError when it cannot be written."""
        part = BackfillPart(corpus=corpus, split=split, fingerprint=fingerprint, windows=tuple(windows))
        data = part.model_dump_json().encode()
        self._files.write(f"{_FOLDER}/{fingerprint[:16]}/{hashlib.sha256(data).hexdigest()[:32]}.json", data)

    def parts(self, fingerprint: str) -> Iterator[tuple[str, BackfillPart]]:
        """Yield path and content of each part of a split; ValueError naming one that is damaged."""
        folder = f"{_FOLDER}/{fingerprint[:16]}"
        for name in sorted(self._files.sizes(folder)):
            path = f"{folder}/{name}"
            data = self._files.read(path)
            if data is None:
                continue  # another back-fill has just completed it
            try:
                yield path, BackfillPart.model_validate_json(data)
            except ValidationError as error:
                raise ValueError(f"{self._files.location(path)}: damaged; delete it: {error}") from error

    def done(self, path: str) -> None:
        """Delete a part whose windows are complete."""
        self._files.delete(path)
