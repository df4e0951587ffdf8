"""A real recall service without Ray: the servicer on a plain gRPC server in this process, with a scripted judge."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from fusion.v1 import recall_pb2_grpc
from fusion_core.recall.split import Span
from services.recall.config import RecallConfig
from services.recall.judge import Document
from services.recall.selector import BlockJudge
from services.recall.servicer import RecallServicer
from tests.fakes.services.on_thread import served


class ScriptedJudge:
    """A judge whose blocks are lines and whose tokens are characters; a block's score is the share of the question's
    letters in it.

    Attributes:
        window_tokens, block_tokens: as `judge.Judge` has it.
        before: called before windows are scored, with their number.
        scored: the number of windows that were scored.
    """

    window_tokens = 200
    block_tokens = 63

    def __init__(self, before: Callable[[int], None] = lambda num_windows: None) -> None:
        self.before, self.scored = before, 0

    def read(self, text: str, block_tokens: int, /) -> Document:
        lines, start, spans = text.splitlines(keepends=True), 0, []
        for line in lines:
            spans.append(Span(start, start + len(line), len(line)))
            start += len(line)
        return Document(text, spans, [[1] * len(line) for line in lines])

    def question(self, question: str, /) -> list[int]:
        return [ord(letter) for letter in question]

    def scorer(self, start: list[int], document: Document, /) -> Callable[[Sequence[Sequence[int]]], list[Any]]:
        wanted = set(map(chr, start))

        def score(windows: Sequence[Sequence[int]]) -> list[Any]:
            self.before(len(windows))
            self.scored += len(windows)
            shares = [[len(wanted & set(document.blocks[b])) / len(wanted) for b in window] for window in windows]
            return [np.array(share) for share in shares]

        return score


@contextmanager
def plain_recall(config: RecallConfig, judge: BlockJudge | None = None, *, port: int = 0) -> Iterator[str]:
    """Serves as long as the block takes; gives the address."""
    add = recall_pb2_grpc.add_RecallServiceServicer_to_server
    with served(RecallServicer, add, config, judge, port=port) as running:
        yield running.address
