"""The measurements of source.py: the engine's front end, the way over gRPC, the service's ceiling, memory, formats."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from services.wire.passage import Passage
from tests.bench.parts.report import Report, in_turn
from tests.bench.parts.source_services import TOP_K, WINDOWS, BareEngine, Case, served, source, vllm_source
from tests.fakes.vllm_requests import scoring_request


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

    from services.models.prompt import encode_passages
    from services.source.engines.vllm import prompt_scores
    from services.source.engines.vllm_tap import MARK, open_tap
    from services.source.scorer import to_block
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
    """One replica and one proxy carry as much as they can: the engine costs next to nothing."""
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
