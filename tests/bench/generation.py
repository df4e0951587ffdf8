"""Answers of SmolLM2-135M-Instruct on vLLM and on transformers: do they agree, do seeds hold, are probabilities right.

    greedy      20 conversations, the likeliest tokens by both engines
    company     the same seeds on vLLM, each prompt alone and all at once
    logprobs    log-probabilities of sampled tokens against what the same engine scores along prompt and answer
    chi-square  the first token of many answers against exact probabilities from a forward pass of transformers

Speeds are tokens a second of wall-clock time, prompts all at once; they include reading the prompts.
"""

from __future__ import annotations

import asyncio
import os

from tests.bench.parts.report import Report, arguments


def main() -> None:
    options = arguments(__doc__ or "").parse_args()
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    # vLLM's worker cannot start where numba was imported: it is spawned, and imports this module, which is light.
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    from tests.bench.parts.generation_measurements import measure

    report = Report("generation")
    asyncio.run(measure(report, quick=options.quick))
    report.finish(options.json)


if __name__ == "__main__":
    main()
