"""What source.py measures."""

from __future__ import annotations

import asyncio
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from fusion_core.vocabulary import Vocabulary
from services.deploy.local_ray import free_port
from services.models.catalogue import resolve_model
from services.wire.passage import Passage
from tests.bench.parts.report import Report, in_turn
from tests.fakes.vllm_requests import scoring_request

MODEL = "smollm2-135m-instruct"
TOP_K = 64
WINDOWS = (256, 512)
_BOS = "<|endoftext|>"


@dataclass(frozen=True)
class Case:
    """What all measurements share."""

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
            **config.engine_args,
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


def measure_front_end(report: Report, case: Case, bare: BareEngine) -> None:
    """From the engine core's output to the message for the wire: through the tap, flat lists, a list of dicts."""
    for num_tokens in WINDOWS:
        windows = case.windows(num_tokens, 4 if case.quick else 8)
        outputs = bare.recorded(case.prompts(windows))
        sides = {name: _front_end(case, windows, outputs, name) for name in ("tap", "flat", "dicts")}
        messages = [side() for side in sides.values()]
        same = all(message == messages[0] for message in messages)
        seconds = in_turn(3 if case.quick else 9, *sides.values())
        speeds = {
            name: len(windows) * num_tokens / value for name, value in zip(sides, seconds, strict=True)
        }  # tokens/s of one core
        for name, speed in speeds.items():
            report.row(
                measurement="front end",
                window=num_tokens,
                side=name,
                tokens_per_second=speed,
                ratio=speed / speeds["dicts"],
                note="same messages on all sides" if same else "MESSAGES DIFFER",
            )
        report.check(f"front end, tap, {num_tokens}", speeds["tap"], "tokens/s per core", at_least=600_000)
        report.check(f"tap over dicts, {num_tokens}", speeds["tap"] / speeds["dicts"], "times", at_least=50)


def _front_end(case: Case, windows: list[bytes], outputs: list[Any], side: str) -> Callable[[], list[bytes]]:
    """vLLM's own front end fed with recorded outputs, and what makes messages of what it gives."""
    from vllm.v1.engine import output_processor as front_end

    from services.source.engines.vllm import prompt_scores
    from services.source.engines.vllm_tap import MARK, open_tap
    from services.source.scorer import encode_passages, to_block
    from services.wire.block import encode_block

    assert (problem := open_tap()) is None, problem
    prompts = encode_passages(case.vocabulary, [Passage(text) for text in windows])
    prompt_ids = case.prompts(windows)
    mark = MARK if side == "tap" else None
    requests = [
        scoring_request(output.request_id, ids, TOP_K, extra_args=mark, flat=side != "dicts")
        for output, ids in zip(outputs, prompt_ids, strict=True)
    ]
    processor = front_end.OutputProcessor(None, log_stats=False)

    def run() -> list[bytes]:
        messages = []
        for request, output, prompt in zip(requests, outputs, prompts, strict=True):
            processor.add_request(request, None)
            [done] = processor.process_outputs([output]).request_outputs
            found, num_rows = done.prompt_logprobs, len(request.prompt_token_ids) - 1
            scores = from_dicts(found, request.prompt_token_ids) if side == "dicts" else None
            scores = scores or prompt_scores(found, num_rows, TOP_K)
            messages.append(encode_block(to_block(prompt, scores, case.vocabulary)).SerializeToString())
        return messages

    return run


def from_dicts(rows: Any, prompt_ids: Sequence[int]) -> Any:
    """PromptScores from the list of dictionaries that `prompt_logprobs` gives by default."""
    from services.source.engines.base import PromptScores

    gold = [row[token].logprob for row, token in zip(rows[1:], prompt_ids[1:], strict=True)]
    best = [sorted(row.items(), key=lambda item: -item[1].logprob)[:TOP_K] for row in rows[1:]]
    ids = [[token for token, _ in row] for row in best]
    logprobs = [[entry.logprob for _, entry in row] for row in best]
    return PromptScores(np.float32(gold), np.int32(ids), np.float32(logprobs))


def measure_end_to_end(report: Report, case: Case, bare: BareEngine) -> None:
    """Scored over gRPC through Ray Serve, beside `LLM.generate` with the same settings, in turn on the same machine."""
    from services.source.client import ScoreStream

    async def over_grpc(address: str, windows: list[bytes]) -> float:
        stream = ScoreStream(address, "smollm2", top_k=TOP_K)
        start = time.perf_counter()
        blocks = await asyncio.gather(*(stream.score(Passage(text)) for text in windows))
        seconds = time.perf_counter() - start
        assert sum(block.num_tokens for block in blocks) == sum(map(len, case.prompts(windows))) - len(windows)
        await stream.close()
        return seconds

    with served(vllm_source()) as address:
        for num_tokens in WINDOWS:
            windows = case.windows(num_tokens, (2048 if case.quick else 6144) // num_tokens)
            prompts = case.prompts(windows)
            asyncio.run(over_grpc(address, windows[:1]))
            seconds: dict[str, list[float]] = {"LLM.generate": [], "over gRPC": []}
            for _ in range(1 if case.quick else 3):
                start = time.perf_counter()
                bare.generate(prompts)
                seconds["LLM.generate"].append(time.perf_counter() - start)
                seconds["over gRPC"].append(asyncio.run(over_grpc(address, windows)))
            speeds = {side: len(windows) * num_tokens / statistics.median(found) for side, found in seconds.items()}
            ratio = speeds["over gRPC"] / speeds["LLM.generate"]
            for side, speed in speeds.items():
                report.row(
                    measurement="end to end",
                    window=num_tokens,
                    side=side,
                    tokens_per_second=speed,
                    ratio=speed / speeds["LLM.generate"],
                    note=f"{len(windows)} windows, {len(seconds[side])} times",
                )
            report.check(f"over gRPC to LLM.generate, {num_tokens}", ratio, "of its tokens/s", at_least=0.95)


def measure_ceiling(report: Report, case: Case) -> None:
    """What one replica and one proxy carry when the engine costs next to nothing."""
    from tests.bench.parts.source_load import Consumer, replica_of

    with served(source("made-up", engine="synthetic")) as address:
        for num_tokens in WINDOWS:
            consumers = [Consumer(address, "made-up", case.windows(num_tokens, 200), TOP_K) for _ in range(3)]
            replica = replica_of("made-up")
            time.sleep(2)
            before, start, cpu = [c.received for c in consumers], time.perf_counter(), sum(replica.cpu_times()[:2])
            time.sleep(5 if case.quick else 20)
            seconds, busy = time.perf_counter() - start, sum(replica.cpu_times()[:2]) - cpu
            tokens, wire_bytes = (
                sum(after[at] - earlier[at] for earlier, after in zip(before, received, strict=True))
                for received in [[c.received for c in consumers]]
                for at in (0, 1)
            )
            for consumer in consumers:
                consumer.stop()
            report.row(
                measurement="ceiling",
                window=num_tokens,
                side="synthetic engine",
                tokens_per_second=tokens / seconds,
                note=f"{wire_bytes / tokens:.0f} bytes per token, {wire_bytes / seconds / 1e6:.0f} MB/s, "
                f"replica {busy / seconds:.2f} cores",
            )
            report.check(f"ceiling, {num_tokens}", tokens / seconds, "tokens/s", at_least=150_000)


def measure_memory(report: Report, case: Case) -> None:
    """The replica's own memory (shared pages apart) under load, while one consumer stops reading for a while."""
    from tests.bench.parts.source_load import Consumer, replica_of

    duration, stall = (40, 10) if case.quick else (600, 60)
    paced = source("paced", engine="synthetic", synthetic={"tokens_per_second": 50_000})
    with served(paced) as address:
        consumers = [Consumer(address, "paced", case.windows(256, 200), TOP_K) for _ in range(2)]
        replica, used = replica_of("paced"), []
        start = time.perf_counter()
        while (now := time.perf_counter() - start) < duration:
            if now > duration / 3:
                consumers[0].stall(stall)  # once
            time.sleep(0.5)
            if now > duration / 10:  # buffers have found their size
                used.append(replica.memory_full_info().uss / 2**20)
        stalled = consumers[0].longest_pause_seconds
        tokens = sum(consumer.received[0] for consumer in consumers)
        for consumer in consumers:
            consumer.stop()
    spread = (max(used) - min(used)) / statistics.median(used)
    report.row(
        measurement="memory",
        window=256,
        side="replica",
        tokens_per_second=tokens / duration,
        note=f"{min(used):.0f} to {max(used):.0f} MiB over {duration} s; one consumer stopped for {stalled:.0f} s",
    )
    report.check("replica memory, largest less smallest", spread * 100, "% of the median", at_most=10)


def measure_formats(report: Report, case: Case) -> None:
    """Bytes per token on the wire and in the store, see store_formats.py."""
    from tests.bench.store_formats import measure, real_blocks

    measure(report, "smollm2", real_blocks("smollm2", 4 if case.quick else 24), 1 if case.quick else 5)


MEASUREMENTS = (measure_formats, measure_ceiling, measure_memory)
WITH_BARE_ENGINE = (measure_front_end, measure_end_to_end)
