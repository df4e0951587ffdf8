"""Interface of engines: exact next-token log-probabilities along a prompt, and tokens sampled behind one.

Shape legend: T rows (prompt tokens after the first), K candidates.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

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


@dataclass(frozen=True, slots=True)
class TokenSampling:
    """Settings by which an engine samples the tokens of one answer.

    Attributes:
        temperature: divides the logits; 0 takes the likeliest token.
        top_p: only the likeliest tokens with this much probability together are sampled.
        max_new_tokens: most tokens of the answer.
        seed: decides all that is random.
        stop_ids: the answer ends behind one of these.
        piecewise: whether tokens are wanted as they come; otherwise they may all come at the end.
    """

    temperature: float
    top_p: float
    max_new_tokens: int
    seed: int
    stop_ids: tuple[int, ...]
    piecewise: bool = False


class SampledTokens(NamedTuple):
    """Tokens that an engine has sampled, one behind the other, each with the model's own log-probability.

    The log-probabilities are those of temperature 1 without top_p.
    """

    token_ids: list[int]
    logprobs: list[float]


class Engine(ABC):
    """A loaded model. Created on the event loop that it serves.

    Attributes:
        name_and_version: such as "vllm 0.32.0".
        dtype: the type that the model computes in.
        path: the way of the log-probabilities: "tap" or "flat" for vllm, "arrays" for engines in this process, "json"
            for a server elsewhere.
        determinism: a sentence on what may differ when a text is scored again.
        shares_batches: whether texts that are asked for at once may run in one batch.
        runs_here: whether another replica would help when `check_health` fails.
        revision: stands for the weights where they are not in the model's folder; else None.
    """

    runs_here: bool = True
    shares_batches: bool = True
    revision: str | None = None
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
    def generate(self, prompt_ids: Sequence[int], how: TokenSampling) -> AsyncGenerator[SampledTokens, None]:
        """Yield the tokens of an answer to a prompt, up to a stop id or `max_new_tokens`.

        Closing the generator frees the engine. Raises EngineDiedError when the engine's process is gone.
        """

    @abstractmethod
    async def check_health(self) -> None:
        """Raise an exception when the engine can no longer answer."""

    @abstractmethod
    def close(self) -> None:
        """End the engine and its processes. May be called twice."""
