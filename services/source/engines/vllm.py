"""Engine `vllm`: prompt log-probabilities and answers from a vLLM engine that runs in processes of its own."""

from __future__ import annotations

import logging
import os
import uuid
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any

import numpy as np

from services.source.config import SourceConfig
from services.source.engines.base import Engine, EngineDiedError, PromptScores, SampledTokens, TokenSampling
from services.source.engines.config import OWN_VALUES, VllmConfig
from services.source.engines.identity import counted_variables, engine_name
from services.source.engines.memory import rows_at_once
from services.source.engines.vllm_tap import MARK, RawPromptLogprobs, open_tap

logger = logging.getLogger("ray.serve")

_OWN_ARGUMENTS = {
    "max_model_len",
    "model",
    "tokenizer",
    "dtype",
    "max_logprobs",
    "skip_tokenizer_init",
    "enable_prefix_caching",
}
_PROBE_TOP_K = 2


class VllmEngine(Engine):
    """vLLM's asynchronous engine. Texts are tokenised outside it, so that bytes and ids are known to agree."""

    def __init__(self, engine: Any, name_and_version: str, dtype: str) -> None:
        self._engine = engine
        self.name_and_version = name_and_version
        self.dtype = dtype
        self.path = "flat"
        batch_invariant = os.environ.get("VLLM_BATCH_INVARIANT") == "1"
        self.determinism = (
            "the same text scores the same, and the same seed gives the same answer, on the same machine, whatever "
            "shares the batch"
            if batch_invariant
            else "the same text scores the same but for rounding, which depends on the batch that it shares; the same "
            "seed gives the same answer unless rounding turns a choice between tokens that are almost equally likely"
        )

    @classmethod
    async def load(cls, config: SourceConfig, settings: VllmConfig, folder: Path) -> VllmEngine:
        if clash := _OWN_ARGUMENTS & settings.engine_args.keys():
            raise ValueError(f"engine_args: {', '.join(sorted(clash))} is set from the source's own keys; leave it out")
        name = full_name(config, dict(os.environ))  # before vLLM adds to it
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        problem = open_tap()
        arguments: dict[str, Any] = {
            "max_num_batched_tokens": rows_at_once(settings, folder, max_tokens_in_flight=config.max_tokens_in_flight),
            **OWN_VALUES,
            "disable_log_stats": True,
            **({"distributed_executor_backend": "ray"} if config.places_workers else {}),
            **settings.engine_args,
        }
        try:
            engine_args = AsyncEngineArgs(
                model=str(folder),
                dtype=settings.dtype,
                max_model_len=config.max_tokens + 2,  # BOS in front, and the one token that generate insists on
                max_logprobs=max(config.largest_top_k, _PROBE_TOP_K),
                skip_tokenizer_init=True,
                trust_remote_code=settings.trust_remote_code,
                enable_prefix_caching=False,  # prompt scoring skips the cache anyway
                **arguments,
            )
        except TypeError as error:
            raise ValueError(f"engine_args: {error}") from error
        async_llm = AsyncLLM.from_engine_args(engine_args)
        engine = cls(async_llm, name, str(async_llm.model_config.dtype).removeprefix("torch."))
        try:
            problem = problem or await engine._probe(config)
        except BaseException:
            engine.close()
            raise
        if problem is None:
            engine.path = "tap"
        else:
            logger.warning(
                "source %s: vLLM's arrays cannot be tapped (%s); its flat lists are used, which is slower",
                config.name,
                problem,
            )
        return engine

    async def score(self, prompt_ids: Sequence[int], top_k: int) -> PromptScores:
        return await self._score(prompt_ids, top_k, tapped=self.path == "tap")

    async def _score(self, prompt_ids: Sequence[int], top_k: int, *, tapped: bool) -> PromptScores:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind
        from vllm.v1.engine.exceptions import EngineDeadError

        parameters = SamplingParams(
            max_tokens=1,
            temperature=0.0,
            prompt_logprobs=top_k,
            flat_logprobs=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
            extra_args=MARK if tapped else None,
        )
        try:
            request = self._engine.generate({"prompt_token_ids": list(prompt_ids)}, parameters, uuid.uuid4().hex)
            [output] = [output async for output in request]
        except EngineDeadError as error:
            raise EngineDiedError("the engine's process died; the replica is being replaced") from error
        if tapped and not isinstance(output.prompt_logprobs, RawPromptLogprobs):
            raise TypeError("a marked request came back without its arrays")
        return prompt_scores(output.prompt_logprobs, len(prompt_ids) - 1, top_k)

    async def generate(self, prompt_ids: Sequence[int], how: TokenSampling) -> AsyncGenerator[SampledTokens, None]:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind
        from vllm.v1.engine.exceptions import EngineDeadError

        parameters = SamplingParams(
            max_tokens=how.max_new_tokens,
            temperature=how.temperature,
            top_p=how.top_p,
            seed=how.seed,
            ignore_eos=True,  # all that ends an answer is in stop_ids
            stop_token_ids=list(how.stop_ids),
            logprobs=0,  # of the sampled token alone
            flat_logprobs=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA if how.piecewise else RequestOutputKind.FINAL_ONLY,
        )
        prompt = {"prompt_token_ids": list(prompt_ids)}
        try:
            async with aclosing(self._engine.generate(prompt, parameters, uuid.uuid4().hex)) as outputs:
                async for output in outputs:
                    [completion] = output.outputs
                    yield SampledTokens(list(completion.token_ids), list(completion.logprobs.logprobs))
        except EngineDeadError as error:
            raise EngineDiedError("the engine's process died; the replica is being replaced") from error

    async def _probe(self, config: SourceConfig) -> str | None:
        """Score one prompt through the tap and through the public interface; return how the two differ, None if not."""
        prompt_ids = list(range(min(6, config.max_tokens + 1)))
        public = await self._score(prompt_ids, _PROBE_TOP_K, tapped=False)
        try:
            tapped = await self._score(prompt_ids, _PROBE_TOP_K, tapped=True)
        except EngineDiedError:
            raise
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        for name in PromptScores.__slots__:
            ours, theirs = getattr(tapped, name), getattr(public, name)
            if ours.dtype != theirs.dtype or ours.shape != theirs.shape:
                return f"{name}: {ours.dtype} {ours.shape} instead of {theirs.dtype} {theirs.shape}"
            if name != "topk_ids_TK" and not np.allclose(ours, theirs, atol=0.05, equal_nan=True):
                return f"{name}: other numbers than through the public interface"
        return None

    async def check_health(self) -> None:
        await self._engine.check_health()

    def close(self) -> None:
        self._engine.shutdown()


def full_name(config: SourceConfig, environment: Mapping[str, str]) -> str:
    """Return the engine's name with every setting, and every variable that vLLM reads, that may change an answer.

    Other variables may look alike: Kubernetes describes a Service `vllm` to every pod in VLLM_* variables.
    """
    import vllm
    from vllm import envs

    known = {name: environment[name] for name in envs.environment_variables if name in environment}
    return engine_name("vllm", config.counted | counted_variables(known), vllm.__version__)


def prompt_scores(found: Any, num_rows: int, top_k: int) -> PromptScores:
    """Return the scores of a request: from the tap's arrays or from vLLM's flat lists.

    Flat lists hold nothing at position 0; every later position has the prompt's own token first, then the top_k
    likeliest, all of them.
    """
    shape = (num_rows, top_k + 1)
    if isinstance(found, RawPromptLogprobs):
        ids, logprobs = found.columns()
        assert ids.shape == logprobs.shape == shape, (ids.shape, logprobs.shape, shape)
    else:
        ids = np.asarray(found.token_ids, dtype=np.int32).reshape(shape)
        logprobs = np.asarray(found.logprobs, dtype=np.float32).reshape(shape)
    return PromptScores(gold_T=logprobs[:, 0].copy(), topk_ids_TK=ids[:, 1:], topk_logprobs_TK=logprobs[:, 1:])
