"""Speed of the `byte` projection and of fusion: real rows of two models brought to a third vocabulary."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from time import process_time
from typing import TYPE_CHECKING

import numpy as np

from fusion_core.alignment.byte.projection import ByteProjection
from fusion_core.blocks import Block
from fusion_core.fusion import FusionConfig, fuse
from fusion_core.vocabulary import Encoding, Vocabulary
from services.distill.target.tokenizer import train_tokenizer
from services.models.fetch import fetch
from tests.bench.parts.fidelity_models import Model
from tests.bench.parts.report import Report, in_turn
from tests.fusion_core.alignment.byte.oracle import FollowOracle

if TYPE_CHECKING:
    from tests.bench.alignment_speed import Case

K = 64
WINDOW = 2048
_TARGET_SIZE = 4096
_SAMPLE_BYTES = 90


def measure_byte(report: Report, case: Case) -> None:
    """Alignment, projection and fusion of a window; the oracle does a short text with dictionaries."""
    with tempfile.TemporaryDirectory() as folder:
        train_tokenizer([case.text.decode()], _TARGET_SIZE, Path(folder), max_tokens=WINDOW)
        target = Vocabulary.from_pretrained(Path(folder))
    models = (
        Model("SmolLM2", fetch("smollm2-135m-instruct"), "<|endoftext|>"),
        Model("Gemma 3", fetch("gemma-3-270m"), "<bos>"),
    )
    projections = [ByteProjection(model.vocabulary, target) for model in models]
    for projection in projections:
        projection.warm()

    def work(texts: list[bytes], copies: int = 1) -> tuple[Callable[[], Block], int]:
        """Return the call to measure, for a text of several windows, and its number of target tokens."""
        windows = [(text, target.encode(text), [model.read(text).block(K) for model in models]) for text in texts]
        config = FusionConfig(strategy="avg_ce", k_out=32)

        def call() -> Block:
            for text, encoding, blocks in windows:
                rows = {
                    f"source {n}": projections[n % 2].project(blocks[n % 2], encoding)
                    for n in range(copies * len(models))
                }
                fused = fuse(text, encoding, rows, config, target.fingerprint)
            return fused

        return call, sum(encoding.num_tokens for _, encoding, _ in windows)

    _against_the_oracle(report, target, models, projections, case)
    ends_T = target.encode(case.text).byte_ends_T
    sizes = (512,) if case.quick else (512, 1024, WINDOW)
    speeds: dict[tuple[int, int], float] = {}
    for size in sizes:
        text = case.text[: int(ends_T[size - 1])].decode(errors="ignore").encode()
        for copies in (1, 2):
            call, num_tokens = work([text], copies)
            call()
            [seconds] = in_turn(5 if case.quick else 25, call)
            speeds[size, copies] = num_tokens / seconds
            report.row(
                operation="byte",
                size=f"{num_tokens:,} target tokens, {2 * copies} sources, k = {K}",
                ours=speeds[size, copies],
                unit="target tokens/s",
                note="projection of every source and fusion",
            )
    largest = sizes[-1]
    report.check(f"byte: two sources, k = {K}, {largest} tokens", speeds[largest, 1], "tokens/s", at_least=200_000)
    report.check(
        "byte: time per token at the largest window to that at 512",
        speeds[512, 1] / speeds[largest, 1],
        "",
        at_most=1.2,
    )
    report.check("byte: time with four sources to two", speeds[largest, 1] / speeds[largest, 2], "", at_most=2.2)


def _against_the_oracle(
    report: Report, target: Vocabulary, models: tuple[Model, ...], projections: list[ByteProjection], case: Case
) -> None:
    text = case.text[:_SAMPLE_BYTES].decode(errors="ignore").encode()
    encoding = target.encode(text)
    for model, projection in zip(models, projections, strict=True):
        block = model.read(text).block(K)
        source = model.vocabulary
        firsts = target.first_tokens([source.token_bytes(i) for i in range(source.size)]).tolist()
        expected: list[object] = []
        start = process_time()
        expected = FollowOracle(source, target, block, encoding).rows(firsts)
        oracle_seconds = process_time() - start
        rows = projection.project(block, encoding)
        [seconds] = in_turn(25, lambda projection=projection, block=block: projection.project(block, encoding))
        report.row(
            operation="byte",
            size=f"{model.name}, {encoding.num_tokens} target tokens, k = {K}",
            ours=encoding.num_tokens / seconds,
            oracle=encoding.num_tokens / oracle_seconds,
            unit="target tokens/s",
            times_faster=oracle_seconds / seconds,
            same_results=_same(rows.ids_TM, rows.probs_TM, expected, encoding),
            note="projection alone, so short a text that the call itself counts",
        )


def _same(ids_TM: np.ndarray, probs_TM: np.ndarray, expected: list, encoding: Encoding) -> bool:
    for t in range(encoding.num_tokens):
        found = {int(i): float(p) for i, p in zip(ids_TM[t], probs_TM[t], strict=True) if i >= 0}
        if expected[t] is None:
            if found:
                return False
            continue
        out, _, _ = expected[t]
        if any(abs(found.get(x, 0.0) - out.get(x, 0.0)) > 2e-3 * max(out.get(x, 0.0), 1e-3) for x in {*out, *found}):
            return False
    return True
