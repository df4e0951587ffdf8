"""Scoring requests as vLLM's front end registers them."""

from __future__ import annotations

from typing import Any


def scoring_request(
    name: str, prompt_ids: list[int], top_k: int, *, extra_args: dict[str, Any] | None = None, flat: bool = True
) -> Any:
    """An EngineCoreRequest for the prompt's log-probabilities."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind
    from vllm.v1.engine import EngineCoreRequest

    parameters = SamplingParams(
        max_tokens=1,
        prompt_logprobs=top_k,
        flat_logprobs=flat,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
        extra_args=extra_args,
    )
    return EngineCoreRequest(
        request_id=name,
        external_req_id=name,
        prompt_token_ids=prompt_ids,
        mm_features=None,
        sampling_params=parameters,
        pooling_params=None,
        arrival_time=0.0,
        lora_request=None,
        cache_salt=None,
        data_parallel_rank=None,
    )
