"""Engine `transformers`: the same answers from a plain forward pass, without the start-up time of a serving engine."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from services.models.pretrained import load_causal_lm
from services.source.config import SourceConfig
from services.source.engines.base import Engine, PromptScores, SampledTokens, TokenSampling
from services.source.engines.config import TransformersConfig
from services.source.engines.identity import engine_name

_ROWS_AT_ONCE = 256
"""Rows turned into float32 log-probabilities at one time, beside the model's own logits."""


class TransformersEngine(Engine):
    """A model on one device, one prompt at a time on a thread of its own."""

    path = "arrays"
    shares_batches = False
    determinism = (
        "the same text scores the same, and the same seed gives the same answer, on the same machine: each runs alone"
    )

    def __init__(self, model: Any, name_and_version: str, dtype: str) -> None:
        self._model = model
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="transformers-engine")
        self.name_and_version = name_and_version
        self.dtype = dtype

    @classmethod
    async def load(cls, config: SourceConfig, settings: TransformersConfig, folder: Path) -> TransformersEngine:
        import torch
        import transformers

        device = settings.device if settings.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
        if device.startswith("cuda") and not torch.cuda.is_available():
            raise ValueError(f"device: {device} is asked for, but torch sees no CUDA device; use auto or cpu")
        if settings.torch_threads:
            torch.set_num_threads(settings.torch_threads)
        dtype: Any = "auto" if settings.dtype == "auto" else getattr(torch, settings.dtype)
        model: Any = load_causal_lm(
            folder,
            dtype=dtype,
            trust_remote_code=settings.trust_remote_code,
            key=f"sources.{config.name}.trust_remote_code",
        )
        model = model.to(device).eval()
        # The folder's own settings (penalties, top_k) would be added to those that a request names.
        model.generation_config = transformers.GenerationConfig()  # type: ignore[no-untyped-call]
        name = engine_name("transformers", config.counted, transformers.__version__)
        return cls(model, name, str(model.dtype).removeprefix("torch."))

    async def score(self, prompt_ids: Sequence[int], top_k: int) -> PromptScores:
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._score, list(prompt_ids), top_k)

    def _score(self, prompt_ids: list[int], top_k: int) -> PromptScores:
        import torch

        with torch.inference_mode():
            ids_T1 = torch.tensor(prompt_ids, device=self._model.device)
            # The model's own logits include its caps and scales.
            logits_TV = self._model(input_ids=ids_T1[None, :-1], use_cache=False).logits[0]
            columns: list[tuple[Any, Any, Any]] = []
            for start in range(0, logits_TV.shape[0], _ROWS_AT_ONCE):
                rows = slice(start, start + _ROWS_AT_ONCE)
                logprobs_TV = torch.log_softmax(logits_TV[rows].float(), dim=-1)
                gold_T1 = logprobs_TV.gather(1, ids_T1[1:][rows, None])
                top = logprobs_TV.topk(top_k, dim=1)
                columns.append((gold_T1[:, 0], top.indices, top.values))
            gold_T, ids_TK, logprobs_TK = (torch.cat(column).cpu().numpy() for column in zip(*columns, strict=True))
        return PromptScores(gold_T=gold_T, topk_ids_TK=ids_TK.astype(np.int32), topk_logprobs_TK=logprobs_TK)

    async def generate(self, prompt_ids: Sequence[int], how: TokenSampling) -> AsyncGenerator[SampledTokens, None]:
        loop = asyncio.get_running_loop()
        sampled: asyncio.Queue[SampledTokens | None] = asyncio.Queue()
        given_up = threading.Event()

        def put(tokens: SampledTokens) -> None:
            loop.call_soon_threadsafe(sampled.put_nowait, tokens)

        running = loop.run_in_executor(self._thread, self._generate, list(prompt_ids), how, put, given_up)
        running.add_done_callback(lambda _: sampled.put_nowait(None))
        try:
            while (tokens := await sampled.get()) is not None:
                yield tokens
            await running
        finally:
            given_up.set()
            running.cancel()

    def _generate(
        self,
        prompt_ids: list[int],
        how: TokenSampling,
        put: Callable[[SampledTokens], None],
        given_up: threading.Event,
    ) -> None:
        import torch
        from transformers import GenerationConfig

        from services.source.engines.sampled_rows import SampledRows

        random = {"temperature": how.temperature, "top_p": how.top_p, "top_k": 0} if how.temperature else {}
        settings = GenerationConfig(  # type: ignore[no-untyped-call]
            do_sample=how.temperature > 0,
            max_new_tokens=how.max_new_tokens,
            eos_token_id=list(how.stop_ids) or None,
            pad_token_id=0,  # one prompt is never padded
            **random,
        )
        ids_1T = torch.tensor([prompt_ids], device=self._model.device)
        rows = SampledRows(put, given_up, piecewise=how.piecewise)
        with torch.inference_mode(), torch.random.fork_rng([ids_1T.device] if ids_1T.is_cuda else []):
            torch.manual_seed(how.seed)
            self._model.generate(
                ids_1T,
                attention_mask=torch.ones_like(ids_1T),
                generation_config=settings,
                logits_processor=[rows],
                stopping_criteria=[rows.stop],
            )
        rows.finish()

    async def check_health(self) -> None:
        return None

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)
