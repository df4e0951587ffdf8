"""Requests and answers of a server's completion endpoint, as JSON values: what differs between vLLM and SGLang.

Shape legend: T rows (prompt tokens after the first), K candidates, E entries of all rows.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from fusion_core.arrays import Float32, Int32, Int64
from services.base.errors import UnavailableError
from services.source.engines.base import PromptScores, TokenSampling


class MalformedAnswerError(UnavailableError):
    """A server's answer is not what was asked for: rows or ids are missing, or are those of another prompt."""


class Flavour(ABC):
    """The interface of one kind of server.

    Attributes:
        path: of the endpoint, below the server's URL.
        version_path: where the server says its version.
        enough_candidates: how a server is started that gives `top_k` candidates; a format string.
        seeds: what a seed means to this server, for people.
    """

    path: ClassVar[str]
    version_path: ClassVar[str]
    enough_candidates: ClassVar[str]
    seeds: ClassVar[str]

    @abstractmethod
    def score_request(
        self, model: str, prompt_ids: Sequence[int], top_k: int, *, with_texts: bool = False
    ) -> dict[str, Any]:
        """Return the request for T rows of a prompt of T + 1 tokens; with_texts also asks for the candidates' texts."""

    @abstractmethod
    def scores(self, answer: Any, prompt_ids: Sequence[int], top_k: int) -> PromptScores:
        """Return the rows in an answer; raises MalformedAnswerError."""

    @abstractmethod
    def texts(self, answer: Any) -> Iterable[tuple[int, str | None]]:
        """Return ids and their texts in an answer that has them, for the check at the start."""

    @abstractmethod
    def sample_request(self, model: str, prompt_ids: Sequence[int], how: TokenSampling) -> dict[str, Any]:
        """Return the request for the tokens of one sampled answer."""

    @abstractmethod
    def sampled_ids(self, answer: Any) -> list[int]:
        """Return the ids of a sampled answer; raises MalformedAnswerError."""


def checked_rows(rows: Any, prompt_ids: Sequence[int], name: str) -> list[Any]:
    """Return the T rows of a list that holds nothing for the first token; raises MalformedAnswerError."""
    if not isinstance(rows, list) or not rows:
        raise MalformedAnswerError(
            f"the server answers without {name}: it gives no log-probabilities of a prompt's tokens, as most hosted "
            "endpoints do not, and cannot be a source"
        )
    if len(rows) != len(prompt_ids):
        raise MalformedAnswerError(f"{name} has {len(rows)} entries for a prompt of {len(prompt_ids)} tokens")
    return rows[1:]


def padded(ids_E: Int32, logprobs_E: Float32, counts_T: Int64, width: int) -> tuple[Int32, Float32]:
    """Return the entries of rows of unequal length as two arrays of shape [T, width]; padding is id -1, -inf."""
    if counts_T.size and (counts_T.max() > width or counts_T.min() < 1):
        raise MalformedAnswerError(f"rows have {counts_T.min()} to {counts_T.max()} entries; 1 to {width} are expected")
    filled = np.arange(width) < counts_T[:, None]
    ids = np.full(filled.shape, -1, dtype=np.int32)
    logprobs = np.full(filled.shape, -np.inf, dtype=np.float32)
    ids[filled], logprobs[filled] = ids_E, logprobs_E
    return ids, logprobs


def likeliest(ids: Int32, logprobs: Float32, top_k: int) -> tuple[Int32, Float32]:
    """Return the K likeliest entries of each row, by falling log-probability; raises MalformedAnswerError for fewer."""
    if ids.size and ((ids >= 0).sum(axis=1).min() < top_k):
        raise MalformedAnswerError(f"rows have fewer than the {top_k} candidates that were asked for")
    order = np.argsort(-logprobs, axis=1, kind="stable")[:, :top_k]
    return np.take_along_axis(ids, order, axis=1), np.take_along_axis(logprobs, order, axis=1)


def field(answer: Any, *path: str | int) -> Any:
    """Return a value inside a JSON answer, None where there is none."""
    for key in path:
        if isinstance(key, str):
            answer = answer.get(key) if isinstance(answer, Mapping) else None
        else:
            answer = answer[key] if isinstance(answer, list) and len(answer) > key else None
    return answer
