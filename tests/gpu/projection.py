"""Projection and fusion of windows on one core and on all of them, as the service's threads do it.

The tokenizers are small ones that are trained here, so the rate is no figure for real ones.
"""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from fusion_core.alignment.byte.projection import ByteProjection
from fusion_core.fusion import FusionConfig, fuse
from tests.bench.parts.report import Report
from tests.fakes.tokenizers import CORPUS, vocabulary
from tests.fusion_core.alignment.byte.test_real_families import sparse_block

_TEXT = " ".join(CORPUS[:5]).encode()


def check(report: Report, device: object, *, quick: bool) -> None:
    target = vocabulary("byte_level")
    projections = {name: ByteProjection(vocabulary(name), target) for name in ("llama", "unigram")}
    encoding = target.encode(_TEXT)
    blocks = {name: sparse_block(vocabulary(name), _TEXT, seed) for seed, name in enumerate(projections)}

    def window(_number: int) -> float:
        rows = {name: projections[name].project(block, encoding) for name, block in blocks.items()}
        block = fuse(_TEXT, encoding, rows, FusionConfig(), target.fingerprint)
        return float(
            np.abs(np.exp(block.topk_logprobs_TK.astype(np.float64)).sum(axis=1) + np.exp(block.tail_T) - 1).max()
        )

    window(0)
    num_windows, cores = 50 if quick else 400, len(os.sched_getaffinity(0))
    rates = {}
    for threads in sorted({1, cores}):
        with ThreadPoolExecutor(threads) as pool:
            started = time.perf_counter()
            off = max(pool.map(window, range(num_windows)))
            rates[threads] = num_windows * encoding.num_tokens / (time.perf_counter() - started)
        report.row(table="projection", threads=threads, tokens_per_second=rates[threads], largest_error_of_a_sum=off)
        report.check(f"{threads} threads: largest error of a row's sum", off, "", at_most=1e-4)
    report.row(table="projection", threads=cores, times_one_thread=rates[cores] / rates[1])
