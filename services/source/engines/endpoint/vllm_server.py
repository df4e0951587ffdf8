"""vLLM's `/v1/completions`: `prompt_logprobs` is a list of objects that map ids, as strings, to log-probabilities.

An object holds the prompt's own token first and then the K likeliest; where the own token is one of those it has K
entries, else K + 1.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain
from operator import itemgetter
from typing import Any

import numpy as np

from services.source.engines.base import PromptScores, TokenSampling
from services.source.engines.endpoint.flavour import (
    Flavour,
    MalformedAnswerError,
    checked_rows,
    field,
    likeliest,
    padded,
)

_PLAIN = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
"""Sampling as the model has it; without these a server takes the values in the model's generation_config.json."""


class VllmServer(Flavour):
    """The server that `vllm serve` starts, and those that speak like it."""

    path = "/v1/completions"
    version_path = "/version"
    enough_candidates = "vllm serve --max-logprobs {top_k}"
    seeds = "the same seed gives the same answer unless rounding turns a choice between tokens almost equally likely"

    def score_request(
        self, model: str, prompt_ids: Sequence[int], top_k: int, *, with_texts: bool = False
    ) -> dict[str, Any]:
        return {"model": model, "prompt": list(prompt_ids), "max_tokens": 1, "prompt_logprobs": top_k, **_PLAIN}

    def scores(self, answer: Any, prompt_ids: Sequence[int], top_k: int) -> PromptScores:
        rows = checked_rows(field(answer, "choices", 0, "prompt_logprobs"), prompt_ids, "prompt_logprobs")
        try:
            counts_T = np.fromiter(map(len, rows), np.int64, len(rows))
            ids_E = np.fromiter(map(int, chain.from_iterable(rows)), np.int32)
            entries = chain.from_iterable(map(dict.values, rows))
            logprobs_E = np.fromiter(map(itemgetter("logprob"), entries), np.float32)
        except (TypeError, ValueError, KeyError, OverflowError) as error:
            raise MalformedAnswerError(f"prompt_logprobs is not as vLLM writes it: {error!r}") from error
        ids, logprobs = padded(ids_E, logprobs_E, counts_T, top_k + 1)
        own = ids == np.asarray(prompt_ids[1:], dtype=np.int32)[:, None]
        if not (own.sum(axis=1) == 1).all():
            raise MalformedAnswerError("the prompt's own ids do not come back: the server has read another prompt")
        topk_ids_TK, topk_logprobs_TK = likeliest(ids, logprobs, top_k)
        return PromptScores(gold_T=logprobs[own], topk_ids_TK=topk_ids_TK, topk_logprobs_TK=topk_logprobs_TK)

    def texts(self, answer: Any) -> Iterable[tuple[int, str | None]]:
        for row in field(answer, "choices", 0, "prompt_logprobs")[1:]:
            for token_id, entry in row.items():
                yield int(token_id), entry.get("decoded_token")

    def sample_request(self, model: str, prompt_ids: Sequence[int], how: TokenSampling) -> dict[str, Any]:
        return {
            "model": model,
            "prompt": list(prompt_ids),
            "max_tokens": how.max_new_tokens,
            **_PLAIN,
            "temperature": how.temperature,
            "top_p": how.top_p,
            "seed": how.seed,
            "ignore_eos": True,  # all that ends an answer is in stop_ids
            "stop_token_ids": list(how.stop_ids),
            "return_token_ids": True,
        }

    def sampled_ids(self, answer: Any) -> list[int]:
        ids = field(answer, "choices", 0, "token_ids")
        if not isinstance(ids, list) or not ids:
            raise MalformedAnswerError("an answer came back without token_ids; vLLM gives them since 0.10.2")
        return list(map(int, ids))
