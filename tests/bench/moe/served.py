"""An upcycled folder in vLLM beside the dense model in transformers."""

from __future__ import annotations

import asyncio
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fusion_core.moe.upcycle import Init, Upcycling
from services.commands.upcycle import upcycle_folder
from services.source.config import SourceConfig
from services.source.engines.load import load_engine
from tests.bench.moe.models import MODEL, dense_model, logits
from tests.bench.parts.report import Report

_INITS: tuple[Init, ...] = ("residual", "split")


async def vllm_scores(folder: Path, ids: list[int]) -> Any:
    """Return the log-probability of every token but the first."""
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    engine_args = {"enforce_eager": True, "max_num_seqs": 2}
    settings = {"kind": "vllm", "dtype": "float32", "engine_args": engine_args}
    engine = await load_engine(
        SourceConfig.model_validate({"name": "moe", "model": str(folder), "max_tokens": len(ids), "engine": settings}),
        folder,
        49152,
    )
    try:
        return (await engine.score(ids, 1)).gold_T
    finally:
        engine.close()


def measure_vllm(report: Report, ids_BL: Tensor) -> None:
    ids = ids_BL[0].tolist()
    logprobs_TV = torch.log_softmax(logits(dense_model(), ids_BL[:1])[0, :-1], dim=-1)
    expected_T = logprobs_TV[torch.arange(len(ids) - 1), ids_BL[0, 1:]]
    for init in _INITS:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "moe"
            upcycle_folder(MODEL, folder, Upcycling(init=init), seed=0)
            served_T = torch.from_numpy(asyncio.run(vllm_scores(folder, ids)))
        largest = float((served_T.double() - expected_T).abs().max())
        report.row(table="vLLM", init=init, tokens=len(ids) - 1, largest_difference_nats=largest)
        report.check(f"mixture in vLLM against dense in transformers, {init}", largest, "nats", at_most=1e-4)
