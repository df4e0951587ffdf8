"""Fused blocks computed again without any service, by an oracle in plain Python: slow, and obvious."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from fusion_core.blocks import Block
from fusion_core.vocabulary import Vocabulary
from services.source.config import SourceConfig
from services.source.scorer import Scorer
from services.wire.passage import Passage
from tests.fusion_core.alignment.byte.oracle import FollowOracle

_TOTAL_VARIATION = 5e-3
_WEIGHT_TOLERANCE = 5e-3
"""Both: float16 on the wire, from the sources and to the consumer."""


class Recomputation:
    """Computes fused blocks again from the sources' engines, with an oracle in plain Python for projection and mixture.

    Only for `avg_ce` over whole windows, and for windows that are read without context.
    """

    def __init__(self, sources: Sequence[SourceConfig], target: Vocabulary, tau: float) -> None:
        self._target, self._tau, self._sources = target, tau, {source.name: source for source in sources}
        self._scorers = {s.name: asyncio.run(Scorer.load(s, Path(s.model))) for s in sources}
        self._firsts = {
            name: target.first_tokens(
                [scorer.vocabulary.token_bytes(x) for x in range(scorer.vocabulary.size)]
            ).tolist()
            for name, scorer in self._scorers.items()
        }

    def wrong_with(self, block: Block) -> str:
        """Compares the rows of the text and the weights with those that the sources in its shares make together."""
        rows, losses = {}, {}
        num_text = block.num_text_tokens
        encoding = self._target.encode(block.text_bytes)
        for name in [share.name for share in block.shares if share.present]:
            own = self._score(name, block.text_bytes)
            rows[name] = FollowOracle(self._scorers[name].vocabulary, self._target, own, encoding).rows(
                self._firsts[name]
            )
            losses[name] = -float(own.gold_T.sum(dtype=np.float64)) / len(block.text_bytes)
        scale = {name: math.exp(-(loss - min(losses.values())) / self._tau) for name, loss in losses.items()}
        weights = {name: value / sum(scale.values()) for name, value in scale.items()}
        for share in block.shares:
            if share.present and abs(share.weight - weights[share.name]) > _WEIGHT_TOLERANCE:
                return f"weight {share.weight:.4f} of {share.name}, computed again {weights[share.name]:.4f}"
        for t in range(num_text):
            mixed: dict[int, float] = {}
            for name, weight in weights.items():
                row = rows[name][t]
                if row is None:
                    return f"row {t} of {name} should be masked"
                for token, probability in row[0].items():
                    mixed[token] = mixed.get(token, 0.0) + weight * probability
            ids, logprobs = block.topk_ids_TK[t], block.topk_logprobs_TK[t]
            differs = sum(
                abs(mixed.get(int(i), 0.0) - math.exp(p)) for i, p in zip(ids, logprobs, strict=True) if i >= 0
            )
            if differs > 2 * _TOTAL_VARIATION:
                return f"row {t} differs by {differs / 2:.4f} from the row computed again"
        return ""

    def _score(self, name: str, text: bytes) -> Block:
        """The source's own block, rounded as the wire rounds it."""
        scorer = self._scorers[name]
        [prompt] = scorer.encode([Passage(text)])
        block = asyncio.run(scorer.score(prompt, self._sources[name].top_k))
        rounded = block.topk_logprobs_TK.astype(np.float16).astype(np.float32)
        return replace(block, topk_logprobs_TK=rounded)
