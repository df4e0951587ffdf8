"""Interface of engines: exact next-token log-probabilities along a prompt.

Shape legend: T rows (prompt tokens after the first), K candidates.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from fusion_core.arrays import Float32, Int32
from services.base.errors import UnavailableError


class EngineDiedError(UnavailableError):
    """The engine's process is gone: another replica will answer the call when it is tried again."""


@dataclass(frozen=True, slots=True)
class PromptScores:
    """Log-probabilities of the tokens of a prompt, each from the tokens before it.

    Attributes:
        gold_T: float32, log-probabilities of the prompt's own tokens.
        topk_ids_TK: int32, ids of the K likeliest tokens, by falling log-probability.
        topk_logprobs_TK: float32, log-probabilities of `topk_ids_TK`.
    """

    gold_T: Float32
    topk_ids_TK: Int32
    topk_logprobs_TK: Float32


class Engine(ABC):
    """A loaded model. Created on the event loop that it serves.

    Attributes:
        name_and_version: such as "vllm 0.32.0".
        dtype: the type that the model computes in.
        path: the way of the log-probabilities: "tap" or "flat" for vllm, "arrays" for engines in this process.
        determinism: a sentence on what may differ when a text is scored again.
    """

    name_and_version: str
    dtype: str
    path: str
    determinism: str

    @abstractmethod
    async def score(self, prompt_ids: Sequence[int], top_k: int) -> PromptScores:
        """Return T rows for a prompt of T + 1 tokens: the first is context. Cancelling the call frees the engine.

        Raises EngineDiedError when the engine's process is gone.
        """

    @abstractmethod
    async def check_health(self) -> None:
        """Raise an exception when the engine can no longer answer."""

    @abstractmethod
    def close(self) -> None:
        """End the engine and its processes. May be called twice."""
