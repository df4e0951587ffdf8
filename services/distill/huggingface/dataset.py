"""The fused stream as a torch data set that resumes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch.utils.data import IterableDataset, get_worker_info

from fusion_core.vocabulary import Vocabulary
from services.distill.data.feed import FusionStream
from services.distill.huggingface.example import example_of, first_token
from services.fusion.client import SkippedWindow, StreamRequest
from services.wire.cursor import Cursor


class FusedDataset(IterableDataset[dict[str, Any]]):
    """Windows of a fused stream as examples (see `example`), in the order of the stream.

    `state_dict` is the position behind the last example that was handed out: a data loader that reads ahead is ahead of
    what was trained on by as much. The stream reads ahead by itself, so that a loader's workers are refused.

    Args:
        client: of the fusion service.
        request: data set, split, seed, epochs, rank and world size.
        tokenizer: folder of the target's tokenizer, in whose vocabulary the windows must come.
        prefetch_windows: most windows on their way.

    Attributes:
        skipped: the number of windows that came without distributions.
    """

    def __init__(
        self, client: FusionStream, request: StreamRequest, *, tokenizer: Path | str, prefetch_windows: int = 32
    ) -> None:
        vocabulary = Vocabulary.from_pretrained(tokenizer)
        self._client, self._prefetch_windows = client, prefetch_windows
        self._request = replace(request, expected_vocabulary=vocabulary.fingerprint)
        self._first = first_token(vocabulary)
        self._cursor = request.cursor
        self.skipped = 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yield the windows that are left; the next pass begins anew."""
        if get_worker_info() is not None:
            raise ValueError("num_workers: must be 0, the fused stream reads ahead in a thread of its own")
        request = replace(self._request, cursor=self._cursor)
        for window in self._client.stream(request, prefetch_windows=self._prefetch_windows):
            self._cursor = window.cursor
            if isinstance(window, SkippedWindow):
                self.skipped += 1
            else:
                yield example_of(window.block, self._first)
        self._cursor = None

    def state_dict(self) -> dict[str, Any]:
        """Return the position, as plain values."""
        return {"cursor": None if self._cursor is None else self._cursor.to_json(), "skipped": self.skipped}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a position; one of another data set, seed or world size is refused by the service."""
        self._cursor = None if state["cursor"] is None else Cursor.from_json(state["cursor"])
        self.skipped = state["skipped"]
