"""SGLang's native `/generate`: lists of [log-probability, id, text or null], nothing for the prompt's first token.

Its `/v1/completions` names tokens by their texts, which do not tell ids apart. With `logprob_start_len` 0 all tokens of
a prompt have rows; by default none has.
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

_LOGPROB, _ID, _TEXT = itemgetter(0), itemgetter(1), itemgetter(2)


class SglangServer(Flavour):
    """The server that `python -m sglang.launch_server` starts. It serves one model and is asked for none by name."""

    path = "/generate"
    version_path = "/get_server_info"
    enough_candidates = "see the server's log"
    seeds = "a seed counts only where the server runs with --enable-deterministic-inference"

    def score_request(
        self, model: str, prompt_ids: Sequence[int], top_k: int, *, with_texts: bool = False
    ) -> dict[str, Any]:
        return {
            "input_ids": list(prompt_ids),
            "sampling_params": {"max_new_tokens": 1, "temperature": 1.0},
            "return_logprob": True,
            "logprob_start_len": 0,
            "top_logprobs_num": top_k,
            "return_text_in_logprobs": with_texts,
        }

    def scores(self, answer: Any, prompt_ids: Sequence[int], top_k: int) -> PromptScores:
        meta = field(answer, "meta_info")
        own = checked_rows(field(meta, "input_token_logprobs"), prompt_ids, "input_token_logprobs")
        rows = checked_rows(field(meta, "input_top_logprobs"), prompt_ids, "input_top_logprobs")
        try:
            gold_T = np.fromiter(map(_LOGPROB, own), np.float32, len(own))
            own_ids = list(map(_ID, own))
            counts_T = np.fromiter(map(len, rows), np.int64, len(rows))
            ids_E = np.fromiter(map(_ID, chain.from_iterable(rows)), np.int32)
            logprobs_E = np.fromiter(map(_LOGPROB, chain.from_iterable(rows)), np.float32)
        except (TypeError, ValueError, KeyError, IndexError, OverflowError) as error:
            raise MalformedAnswerError(f"meta_info is not as SGLang writes it: {error!r}") from error
        if own_ids != list(prompt_ids[1:]):
            raise MalformedAnswerError("the prompt's own ids do not come back: the server has read another prompt")
        ids, logprobs = padded(ids_E, logprobs_E, counts_T, top_k)
        topk_ids_TK, topk_logprobs_TK = likeliest(ids, logprobs, top_k)
        return PromptScores(gold_T=gold_T, topk_ids_TK=topk_ids_TK, topk_logprobs_TK=topk_logprobs_TK)

    def texts(self, answer: Any) -> Iterable[tuple[int, str | None]]:
        meta = answer["meta_info"]
        for entry in chain(meta["input_token_logprobs"][1:], chain.from_iterable(meta["input_top_logprobs"][1:])):
            yield int(_ID(entry)), _TEXT(entry)

    def sample_request(self, model: str, prompt_ids: Sequence[int], how: TokenSampling) -> dict[str, Any]:
        sampling = {
            "max_new_tokens": how.max_new_tokens,
            "temperature": how.temperature,
            "top_p": how.top_p,
            "top_k": -1,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "ignore_eos": True,  # all that ends an answer is in stop_ids
            "stop_token_ids": list(how.stop_ids),
            "no_stop_trim": True,
            "sampling_seed": how.seed,
        }
        return {"input_ids": list(prompt_ids), "sampling_params": sampling}

    def sampled_ids(self, answer: Any) -> list[int]:
        ids = field(answer, "output_ids")
        if not isinstance(ids, list) or not ids:
            raise MalformedAnswerError("an answer came back without output_ids")
        return list(map(int, ids))
