"""Mixtures of experts as sources: tiny random models of every family through both engines, alone and together."""

from __future__ import annotations

import asyncio
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from services.source.canary import BatchEffect
from services.source.config import SourceConfig
from services.source.engines.base import PromptScores
from services.source.engines.transformers import TransformersEngine
from services.source.engines.vllm import VllmEngine
from tests.bench.parts.report import Report
from tests.fakes.files.tiny_mixtures import LATENT, REFUSED, write_mixture

_TOP_K = 8
_PROMPTS = [list(range(2 + n, 62 + n)) for n in (0, 71, 150, 233)]


@dataclass(frozen=True, slots=True)
class Engines:
    """One folder in both engines.

    Attributes:
        apart: largest difference of a log-probability between them, in nats; NaN where one has none.
        company: difference between prompts alone and together in vLLM.
        rounding: largest difference of a log-probability in transformers between float32 and float64.
    """

    apart: float
    company: BatchEffect
    rounding: float

    @property
    def bound(self) -> float:
        """The difference in nats that two engines in float32 may have."""
        return max(1e-4, self.rounding)


def both_engines(folder: Path, *, latent: bool = True) -> Engines:
    """Score prompts with both engines in float32, past the checks that refuse a folder.

    With `latent` vLLM uses its kernels for latent attention (DeepSeek), else those for ordinary attention.
    """
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ["VLLM_MLA_DISABLE"] = str(int(not latent))
    alone, together = asyncio.run(_in_vllm(folder))
    plain = asyncio.run(_in_transformers(folder))
    pairs = [(a, b) for one, other in zip(alone, plain, strict=True) for a, b in _columns(one, other)]
    apart = max(float(np.abs(a - b).max()) for a, b in pairs) if _numbers(alone) else float("nan")
    return Engines(apart, BatchEffect.between(alone, together), own_rounding(folder))


@torch.no_grad()
def own_rounding(folder: Path) -> float:
    """Return how far transformers' float32 is from its float64, over the likeliest tokens of every position."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.set_experts_implementation("eager")  # grouped products have no float64
    ids_BL = torch.tensor(_PROMPTS)
    low_BLV = torch.log_softmax(model(ids_BL).logits, dim=-1)
    high_BLV = torch.log_softmax(model.double()(ids_BL).logits, dim=-1)
    best_BLK = high_BLV.topk(_TOP_K).indices
    return float((low_BLV - high_BLV).gather(-1, best_BLK).abs().max())


async def _in_vllm(folder: Path) -> tuple[list[PromptScores], list[PromptScores]]:
    config = _config(folder, {"kind": "vllm", "engine_args": {"enforce_eager": True, "max_num_seqs": 4}})
    engine = await VllmEngine.load(config, config.engine, folder)  # type: ignore[arg-type]
    try:
        alone = [await engine.score(prompt, _TOP_K) for prompt in _PROMPTS]
        return alone, list(await asyncio.gather(*(engine.score(prompt, _TOP_K) for prompt in _PROMPTS)))
    finally:
        engine.close()


async def _in_transformers(folder: Path) -> list[PromptScores]:
    config = _config(folder, {"kind": "transformers"})
    engine = await TransformersEngine.load(config, config.engine, folder)  # type: ignore[arg-type]
    try:
        return [await engine.score(prompt, _TOP_K) for prompt in _PROMPTS]
    finally:
        engine.close()


def _config(folder: Path, engine: dict[str, Any]) -> SourceConfig:
    return SourceConfig.model_validate(
        {
            "name": "tiny",
            "model": str(folder),
            "max_tokens": 128,
            "top_k": _TOP_K,
            "engine": engine | {"dtype": "float32"},
        }
    )


def _columns(one: PromptScores, other: PromptScores) -> list[tuple[Any, Any]]:
    return [(one.gold_T, other.gold_T), (one.topk_logprobs_TK, other.topk_logprobs_TK)]


def _numbers(scores: list[PromptScores]) -> bool:
    return all(np.isfinite(one.gold_T).all() and np.isfinite(one.topk_logprobs_TK).all() for one in scores)


def measure_source(report: Report, family: str, *, refused: bool, latent: bool) -> None:
    """Compare the engines on the folder of a family that is served, or on the one that is refused."""
    changes = REFUSED[family] if refused else {}
    with tempfile.TemporaryDirectory() as scratch:
        found = both_engines(write_mixture(Path(scratch) / "tiny", family, **changes), latent=latent)
    has_numbers = not np.isnan(found.apart)
    report.row(
        table="sources, vLLM and transformers",
        model=family,
        vllm="VLLM_MLA_DISABLE=1" if family in LATENT and not latent else "",
        refused=", ".join(f"{key}: {str(value).lower()}" for key, value in changes.items()),
        largest_difference_nats=found.apart if has_numbers else "NaN",
        alone_and_together_nats=found.company.largest_nats if has_numbers else "NaN",
        same_candidates=found.company.same_candidates,
        float32_to_float64_nats=found.rounding,
    )
    if not refused and family not in LATENT:  # which are refused on a CPU
        report.check(f"vLLM and transformers apart, {family}", found.apart, "nats", at_most=found.bound)
