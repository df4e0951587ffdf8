"""The installed vLLM reads the requests that we write, and writes the answers that we read: by its own types."""

from __future__ import annotations

import json

import numpy as np
import pytest

from services.source.engines.base import TokenSampling
from services.source.engines.endpoint.vllm_server import VllmServer

protocol = pytest.importorskip("vllm.entrypoints.openai.completion.protocol")
logprobs = pytest.importorskip("vllm.logprobs")
PROMPT = [0, 5, 6]


def answer(**choice: object) -> object:
    """What vLLM's route makes of a choice."""
    usage = {"prompt_tokens": 3, "completion_tokens": 1, "total_tokens": 4}
    choices = [{"index": 0, "text": "x", "finish_reason": "length", **choice}]
    response = protocol.CompletionResponse(model="tiny", choices=choices, usage=usage)
    return json.loads(json.dumps(response.model_dump()))


def test_a_request_for_rows_asks_for_them_unchanged_by_the_server_s_defaults() -> None:
    request = protocol.CompletionRequest.model_validate(VllmServer().score_request("tiny", PROMPT, 2))
    defaults = {"temperature": 0.3, "top_p": 0.5, "top_k": 7, "min_p": 0.1, "repetition_penalty": 1.3}
    sampling = request.to_sampling_params(1, defaults)
    assert request.prompt == PROMPT and request.model_extra == {}
    assert (sampling.prompt_logprobs, sampling.max_tokens, sampling.repetition_penalty) == (2, 1, 1.0)


def test_a_request_for_an_answer_is_sampled_as_it_says() -> None:
    how = TokenSampling(temperature=0.7, top_p=0.9, max_new_tokens=5, seed=2**63 - 2, stop_ids=(1, 3))
    request = protocol.CompletionRequest.model_validate(VllmServer().sample_request("tiny", PROMPT, how))
    sampling = request.to_sampling_params(5, {"top_k": 7, "repetition_penalty": 1.3})
    assert request.model_extra == {} and request.return_token_ids and sampling.ignore_eos
    assert (sampling.temperature, sampling.top_p, sampling.seed) == (0.7, 0.9, 2**63 - 2)
    assert sampling.top_k in {0, -1} and sampling.repetition_penalty == 1.0
    assert set(sampling.stop_token_ids) == {1, 3}
    assert VllmServer().sampled_ids(answer(token_ids=[7, 1])) == [7, 1]


def test_rows_are_read_whether_the_own_token_is_among_the_likeliest_or_not() -> None:
    entry = logprobs.Logprob
    rows = [
        None,
        {5: entry(-9999.0, 40, "e"), 9: entry(-0.5, 1, "i"), 8: entry(-1.5, 2, "h")},
        {6: entry(-1.0, 2, "f"), 4: entry(-0.7, 1, "d")},
    ]
    value = answer(prompt_logprobs=rows)
    scores = VllmServer().scores(value, PROMPT, 2)
    np.testing.assert_allclose(scores.gold_T, [-9999.0, -1.0])
    np.testing.assert_array_equal(scores.topk_ids_TK, [[9, 8], [4, 6]])
    np.testing.assert_allclose(scores.topk_logprobs_TK, [[-0.5, -1.5], [-0.7, -1.0]])
    assert dict(VllmServer().texts(value)) == {5: "e", 9: "i", 8: "h", 6: "f", 4: "d"}
