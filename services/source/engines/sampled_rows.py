"""Log-probabilities of the tokens that transformers' `generate` samples, taken before temperature and top_p.

Shape legend: V ids of the model's head.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from transformers import LogitsProcessor, StoppingCriteria

from services.source.engines.base import SampledTokens


class SampledRows(LogitsProcessor):
    """Keeps each step's logits, which come here first, until `stop` is told which token was sampled from them.

    Args:
        put: takes the tokens, from the thread that generates.
        given_up: set when nobody waits for the answer any more; the next step is then the last.
        piecewise: whether every token is put at once; otherwise `finish` puts them all.
    """

    def __init__(self, put: Callable[[SampledTokens], None], given_up: threading.Event, *, piecewise: bool) -> None:
        self._put, self._given_up, self._piecewise = put, given_up, piecewise
        self._tokens = SampledTokens([], [])
        self._row_V: Any = None
        self.stop = _Stop(self)

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        self._row_V = scores[0].float()
        return scores

    def sampled(self, token_id: int) -> bool:
        """Take the token of this step; return whether generation is to end."""
        logprob = float(torch.log_softmax(self._row_V, dim=-1)[token_id])
        self._tokens.token_ids.append(token_id)
        self._tokens.logprobs.append(logprob)
        if self._piecewise:
            self.finish()
        return self._given_up.is_set()

    def finish(self) -> None:
        """Put the tokens that were not put yet."""
        if self._tokens.token_ids:
            self._put(self._tokens)
            self._tokens = SampledTokens([], [])


class _Stop(StoppingCriteria):
    def __init__(self, rows: SampledRows) -> None:
        self._rows = rows

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        ends = self._rows.sampled(int(input_ids[0, -1]))
        return torch.full((input_ids.shape[0],), ends, device=input_ids.device, dtype=torch.bool)
