"""Prompt log-probabilities as the arrays in which they leave vLLM's engine, without a Python object per entry.

vLLM's front end receives a prompt's log-probabilities as two arrays and turns every entry into Python objects
(`LogprobsProcessor._update_prompt_logprobs`). The tap puts a subclass in that class's place, which keeps the arrays of
requests that carry a mark; all other requests go the usual way. The arrays travel on the request's own output, so a
request that is cancelled leaves nothing behind.

This method is not part of vLLM's public interface. `open_tap` checks that it is still there and the same, and
`VllmEngine` scores one prompt both ways before it trusts the tap.
"""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np

from fusion_core.arrays import Float32, Int32

MARK = {"raw_prompt_logprobs": True}
"""The `extra_args` of a request whose arrays are wanted."""


class RawPromptLogprobs:
    """Arrays of one prompt, in the chunks in which the engine sent them.

    Column 0 is the prompt's own token, the others are always the K likeliest, the prompt's own among them or not.
    """

    def __init__(self) -> None:
        self._chunks: list[tuple[Int32, Float32]] = []

    def append(self, token_ids: Any, logprobs: Any) -> None:
        self._chunks.append((token_ids.numpy(), logprobs.numpy()))

    def columns(self) -> tuple[Int32, Float32]:
        """Return ids and log-probabilities, both of shape [T, K + 1]."""
        if len(self._chunks) == 1:
            return self._chunks[0]
        ids, logprobs = zip(*self._chunks, strict=True)
        return np.concatenate(ids), np.concatenate(logprobs)


def open_tap() -> str | None:
    """Replace vLLM's class in this process and return None; return why and change nothing where it is unexpected."""
    try:
        from vllm.v1.engine import output_processor
        from vllm.v1.engine.logprobs import LogprobsProcessor
    except ImportError as error:
        return str(error)
    current: Any = getattr(output_processor, "LogprobsProcessor", None)
    if getattr(current, "keeps_raw_prompt_logprobs", False):
        return None
    if current is not LogprobsProcessor:
        return "output_processor does not use logprobs.LogprobsProcessor"
    if (problem := _unexpected(LogprobsProcessor)) is None:
        setattr(output_processor, "LogprobsProcessor", _tapped(LogprobsProcessor))  # noqa: B010  # mypy: not exported
    return problem


def _unexpected(processor: Any) -> str | None:
    """Return what differs from the vLLM that this tap was written for; None if nothing does."""
    from vllm import SamplingParams
    from vllm.v1.outputs import LogprobsTensors

    expected = {"from_new_request": ["tokenizer", "request"], "_update_prompt_logprobs": ["self", "*"]}
    for name, parameters in expected.items():
        found = list(inspect.signature(getattr(processor, name, lambda: None)).parameters)
        if len(found) != len(parameters) or any(p not in {"*", f} for p, f in zip(parameters, found, strict=True)):
            return f"LogprobsProcessor.{name} takes {found}"
    if LogprobsTensors._fields[:2] != ("logprob_token_ids", "logprobs"):
        return f"LogprobsTensors has the fields {LogprobsTensors._fields}"
    if "prompt_logprobs" not in getattr(processor, "__dataclass_fields__", {}):
        return "LogprobsProcessor has no field prompt_logprobs"
    if "extra_args" not in inspect.signature(SamplingParams).parameters:
        return "SamplingParams takes no extra_args"
    return None


def _tapped(base: Any) -> type:
    class TappedLogprobsProcessor(base):  # type: ignore[misc]
        keeps_raw_prompt_logprobs = True

        @classmethod
        def from_new_request(cls, tokenizer: Any, request: Any) -> Any:
            processor = super().from_new_request(tokenizer, request)
            if (request.sampling_params.extra_args or {}).get("raw_prompt_logprobs"):
                processor.prompt_logprobs = RawPromptLogprobs()
            return processor

        def _update_prompt_logprobs(self, prompt_logprobs_tensors: Any) -> None:
            if isinstance(self.prompt_logprobs, RawPromptLogprobs):
                self.prompt_logprobs.append(*prompt_logprobs_tensors[:2])
            else:
                super()._update_prompt_logprobs(prompt_logprobs_tensors)

    return TappedLogprobsProcessor
