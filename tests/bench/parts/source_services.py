"""The sources that source.py measures, and the bare engine beside them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from fusion_core.vocabulary import Vocabulary
from services.deploy.local_ray import free_port
from services.models.catalogue import resolve_model

MODEL = "smollm2-135m-instruct"
TOP_K = 64
WINDOWS = (256, 512)
_BOS = "<|endoftext|>"


@dataclass(frozen=True)
class Case:
    """Text and vocabulary that all measurements share."""

    vocabulary: Vocabulary
    text: bytes
    quick: bool

    def windows(self, num_tokens: int, count: int | None = None) -> list[bytes]:
        """Consecutive texts of exactly `num_tokens` tokens each."""
        ends, start, windows = self.vocabulary.encode(self.text).byte_ends_T, 0, []
        for last in range(num_tokens - 1, len(ends), num_tokens):
            text = self.text[start : int(ends[last])]
            start = int(ends[last])
            if self.vocabulary.encode(text).num_tokens == num_tokens:
                windows.append(text)
            if len(windows) == count:
                break
        return windows

    def prompts(self, windows: Sequence[bytes]) -> list[list[int]]:
        bos_id = self.vocabulary.special_tokens[_BOS]
        return [[bos_id, *self.vocabulary.encode(text).token_ids_T.tolist()] for text in windows]


def source(name: str, **values: Any) -> Any:
    from services.source.config import SourceConfig

    return SourceConfig.model_validate({"name": name, "model": MODEL, "top_k": TOP_K, "bos_token": _BOS} | values)


def vllm_source() -> Any:
    engine_args = {"enforce_eager": True, "max_num_seqs": 8, "max_num_batched_tokens": 1024}
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": _all_cores()}
    return source(
        "smollm2",
        dtype="float32",
        max_tokens=max(WINDOWS),
        max_tokens_in_flight=2052,
        engine_args=engine_args,
        env=environment,
    )


def _all_cores() -> str:
    return ",".join(map(str, sorted(os.sched_getaffinity(0))))


@contextmanager
def served(*configs: Any) -> Iterator[str]:
    """Sources on a Ray cluster of their own; gives the address of Serve's gRPC proxy."""
    import ray
    from ray import serve

    from services.source.app import SERVICER, build

    for config in configs:
        os.environ.update(config.env)  # the cluster is started by this process and inherits it
    ray.init(address="local", num_cpus=len(configs) + 2, include_dashboard=False, log_to_driver=False)
    try:
        port = free_port()
        serve.start(
            proxy_location="HeadOnly",
            http_options={"host": "127.0.0.1", "port": free_port()},
            grpc_options={"port": port, "grpc_servicer_functions": [SERVICER]},
        )
        for config in configs:
            serve.run(build(config.model_dump(mode="json")), name=config.name, route_prefix=f"/{config.name}")
        yield f"127.0.0.1:{port}"
    finally:
        serve.shutdown()
        ray.shutdown()


class BareEngine:
    """`vllm.LLM` with the settings that the source gives its engine; what its engine core sends can be recorded."""

    def __init__(self) -> None:
        config = vllm_source()
        os.environ.update(config.env)
        from vllm import LLM

        self._llm = LLM(
            model=str(resolve_model(MODEL)),
            dtype=config.dtype,
            max_model_len=config.max_tokens + 2,
            max_logprobs=TOP_K,
            skip_tokenizer_init=True,
            enable_prefix_caching=False,
            disable_log_stats=True,
            **config.engine.engine_args,
        )

    def generate(self, prompts: Sequence[list[int]]) -> Any:
        from vllm import SamplingParams

        parameters = SamplingParams(
            max_tokens=1, temperature=0.0, prompt_logprobs=TOP_K, flat_logprobs=True, detokenize=False
        )
        return self._llm.generate([{"prompt_token_ids": p} for p in prompts], parameters, use_tqdm=False)

    def recorded(self, prompts: Sequence[list[int]]) -> list[Any]:
        """The engine core's outputs for some prompts, as they arrive at the front end."""
        outputs: list[Any] = []
        processor = self._llm.llm_engine.output_processor
        process = processor.process_outputs

        def record(core_outputs: list[Any], *args: Any, **kwargs: Any) -> Any:
            outputs.extend(core_outputs)
            return process(core_outputs, *args, **kwargs)

        processor.process_outputs = record
        self.generate(prompts)
        processor.process_outputs = process
        with_rows = [output for output in outputs if output.new_prompt_logprobs_tensors is not None]
        by_prompt = {tuple(o.new_prompt_logprobs_tensors.logprob_token_ids[:, 0].tolist()): o for o in with_rows}
        return [by_prompt[tuple(prompt[1:])] for prompt in prompts]

    def close(self) -> None:
        self._llm.llm_engine.engine_core.shutdown()
