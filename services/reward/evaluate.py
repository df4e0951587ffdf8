"""How often a reward model prefers the better answer: by domain, under its own system prompt and under the others'.

A model that is told apart by its prompts follows each wish under its prompt alone: on pairs where two wishes contradict
each other it is right under the right prompt, and wrong under the other.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fusion_core.arrays import Float64
from services.base.atomic import write_whole
from services.models.chat_template import TurnRefusedError
from services.reward.model import RewardModel
from services.reward.pairs import Pair

_Z = 1.959964
"""Normal quantile of a 95 % interval."""


@dataclass(frozen=True, slots=True)
class Share:
    """A share of `number` pairs, with Wilson's 95 % interval (1927)."""

    right: int
    number: int

    @property
    def value(self) -> float:
        return self.right / self.number if self.number else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """The lower and the upper end; 0 and 1 without pairs."""
        if not self.number:
            return 0.0, 1.0
        weight = _Z**2 / self.number
        middle = (self.value + weight / 2) / (1 + weight)
        half = math.sqrt(self.value * (1 - self.value) / self.number + _Z**2 / (4 * self.number**2)) * _Z / (1 + weight)
        low = 0.0 if self.right == 0 else max(0.0, middle - half)
        return low, 1.0 if self.right == self.number else min(1.0, middle + half)

    def to_json(self) -> dict[str, Any]:
        low, high = self.interval
        return {"value": self.value if self.number else None, "low": low, "high": high, "pairs": self.number}


@dataclass(frozen=True, slots=True)
class RewardEvaluation:
    """The result on some pairs.

    Attributes:
        shares: share of a domain's pairs in the right order under the system prompt of a domain, by (pairs', prompt's).
        least_score, largest_score: of all answers under all prompts.
        left_out: pairs that are longer than the model's `max_tokens`, or that its template refuses.
    """

    shares: dict[tuple[str, str], Share]
    least_score: float
    largest_score: float
    left_out: int

    def right(self) -> Share:
        """Return the share over all pairs, each under the prompt of its own domain."""
        return _sum([share for (domain, prompt), share in self.shares.items() if domain == prompt])

    def swapped(self, partners: dict[str, str]) -> Share:
        """Return the share over all pairs, each under the prompt of its domain's partner."""
        return _sum([self.shares[pair] for pair in partners.items() if pair in self.shares])

    def to_json(self) -> dict[str, Any]:
        """Return the figures by domain of the pairs and of the prompt."""
        table: dict[str, dict[str, Any]] = {}
        for (domain, prompt), share in self.shares.items():
            table.setdefault(domain, {})[prompt] = share.to_json()
        scores = {"least": self.least_score, "largest": self.largest_score}
        return {"shares": table, "right": self.right().to_json(), "scores": scores, "left_out": self.left_out}

    def save(self, path: Path) -> None:
        """Write the figures to a file."""
        write_whole(path, json.dumps(self.to_json(), indent=2, ensure_ascii=False) + "\n")


def evaluate(model: RewardModel, pairs: Sequence[Pair], *, batch_tokens: int = 8192) -> RewardEvaluation:
    """Score both answers of all pairs under every domain's prompt. Equal scores count as wrong."""
    prompts = list(model.card.domains)
    kept, conversations = [], []
    for pair in pairs:
        try:
            ids = [
                model.tokens.encode(pair.messages, answer, prompt)
                for prompt in prompts
                for answer in (pair.chosen, pair.rejected)
            ]
        except TurnRefusedError:
            continue
        if max(map(len, ids)) <= model.card.max_tokens:
            kept.append(pair)
            conversations += ids
    if not kept:
        return RewardEvaluation({}, math.nan, math.nan, len(pairs))
    scores_NP2: Float64 = model.score(conversations, batch_tokens=batch_tokens).reshape(len(kept), len(prompts), 2)
    right_NP = scores_NP2[:, :, 0] > scores_NP2[:, :, 1]
    domain_N = np.array([pair.domain for pair in kept])
    shares = {
        (domain, prompt): Share(int(right_NP[domain_N == domain, at].sum()), int((domain_N == domain).sum()))
        for domain in prompts
        if (domain_N == domain).any()
        for at, prompt in enumerate(prompts)
    }
    return RewardEvaluation(shares, float(scores_NP2.min()), float(scores_NP2.max()), len(pairs) - len(kept))


def _sum(shares: Sequence[Share]) -> Share:
    return Share(sum(share.right for share in shares), sum(share.number for share in shares))
