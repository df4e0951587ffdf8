"""Engine `vllm`: prompt log-probabilities from a vLLM engine that runs in processes of its own."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from services.source.config import SourceConfig
from services.source.engine import Engine, PromptScores

_OWN_ARGUMENTS = {
    "max_model_len",
    "model",
    "tokenizer",
    "dtype",
    "max_logprobs",
    "skip_tokenizer_init",
    "enable_prefix_caching",
}


class VllmEngine(Engine):
    """vLLM's asynchronous engine. Text becomes tokens outside it, so that bytes and ids are known to agree."""

    def __init__(self, engine: Any, version: str, dtype: str) -> None:
        self._engine = engine
        self.name_and_version = f"vllm {version}"
        self.dtype = dtype

    @classmethod
    async def load(cls, config: SourceConfig, folder: Path) -> VllmEngine:
        if clash := _OWN_ARGUMENTS & config.engine_args.keys():
            raise ValueError(f"engine_args: {', '.join(sorted(clash))} is set from the source's own keys; leave it out")
        import vllm
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        arguments: dict[str, Any] = {
            "max_num_batched_tokens": config.max_tokens_in_flight,
            "disable_log_stats": True,
            **config.engine_args,
        }
        try:
            engine_args = AsyncEngineArgs(
                model=str(folder),
                dtype=config.dtype,
                max_model_len=config.max_tokens + 2,  # BOS in front, and the one token that generate insists on
                max_logprobs=config.largest_top_k,
                skip_tokenizer_init=True,
                enable_prefix_caching=False,  # prompt scoring skips the cache anyway
                **arguments,
            )
        except TypeError as error:
            raise ValueError(f"engine_args: {error}") from error
        engine = AsyncLLM.from_engine_args(engine_args)
        dtype = str(engine.model_config.dtype).removeprefix("torch.")
        return cls(engine, vllm.__version__, dtype)

    async def score(self, prompt_ids: Sequence[int], top_k: int) -> PromptScores:
        from vllm import SamplingParams

        parameters = SamplingParams(
            max_tokens=1, temperature=0.0, prompt_logprobs=top_k, flat_logprobs=True, detokenize=False
        )
        request = self._engine.generate({"prompt_token_ids": list(prompt_ids)}, parameters, uuid.uuid4().hex)
        flat = None
        async for output in request:
            flat = output.prompt_logprobs if output.prompt_logprobs is not None else flat
        assert flat is not None
        num_rows = len(prompt_ids) - 1
        # Position 0 holds nothing; each later one the prompt's own token first, then the top_k likeliest.
        ids = np.asarray(flat.token_ids, dtype=np.int32).reshape(num_rows, top_k + 1)
        logprobs = np.asarray(flat.logprobs, dtype=np.float32).reshape(num_rows, top_k + 1)
        return PromptScores(gold_T=logprobs[:, 0], topk_ids_TK=ids[:, 1:], topk_logprobs_TK=logprobs[:, 1:])

    async def check_health(self) -> None:
        await self._engine.check_health()

    def close(self) -> None:
        self._engine.shutdown()
