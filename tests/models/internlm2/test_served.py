"""A converted checkpoint as a source: rows of both engines, and of vLLM's own code for the published layout."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fusion_core.blocks import Block
from services.models.internlm2.convert import to_llama
from services.models.internlm2.reference import reference_logits
from services.source.config import parse_source
from services.source.scorer import Scorer
from services.wire.passage import Passage
from tests.fakes.files.tiny_internlm2 import write_checkpoint
from tests.fakes.tiny_model import sentences

TEXTS = [
    b"The capital of France is Paris.",
    "Zwölf Boxkämpfer 日本語 👍\r\n\tdone <|im_end|>\n".encode(),
    sentences(250, seed=5).encode(),
]
SIZES = {"hidden_size": 128, "intermediate_size": 96, "max_position_embeddings": 256}
CONFIGURATION = """
from transformers import PretrainedConfig


class InternLM2Config(PretrainedConfig):
    model_type = "internlm2"
"""


def rows(folder: Path, **engine: Any) -> list[Block]:
    values = {"name": "tiny", "model": str(folder), "top_k": 16, "max_tokens": 255}

    async def score() -> list[Block]:
        scorer = await Scorer.load(parse_source({**values, "engine": {"dtype": "float32", **engine}}), folder)
        try:
            return [await scorer.score(prompt, 16) for prompt in scorer.encode(list(map(Passage, TEXTS)))]
        finally:
            scorer.engine.close()

    return asyncio.run(score())


def check_equal(found: list[Block], expected: list[Block], atol: float) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.vocabulary == other.vocabulary
        np.testing.assert_array_equal(one.token_ids_T, other.token_ids_T)
        np.testing.assert_allclose(one.gold_T, other.gold_T, atol=atol)
        np.testing.assert_allclose(one.topk_logprobs_TK, other.topk_logprobs_TK, atol=atol)
        np.testing.assert_allclose(np.exp(one.tail_T), np.exp(other.tail_T), atol=atol)
        assert (one.topk_ids_TK != other.topk_ids_TK).mean() < 0.02  # equal candidates may swap places


def test_rows_are_the_reference_s_log_probabilities(tmp_path: Path) -> None:
    original = write_checkpoint(tmp_path / "original", shards=2, **SIZES)
    to_llama(original, tmp_path / "llama")
    for block in rows(tmp_path / "llama", kind="transformers", torch_threads=1):
        block.validate()
        ids = block.token_ids_T.tolist()
        logprobs = reference_logits(original, torch.tensor([[1, *ids]]))[0, :-1].log_softmax(-1).numpy()
        np.testing.assert_allclose(block.gold_T, logprobs[np.arange(len(ids)), ids], atol=1e-4)
        np.testing.assert_allclose(block.topk_logprobs_TK, np.sort(logprobs)[:, :-17:-1], atol=1e-4)


@pytest.mark.drill
@pytest.mark.timeout(900)
@pytest.mark.parametrize("scaling", [{"type": "dynamic", "factor": 2.0}, {"type": "linear", "factor": 2.0}], ids=str)
def test_vllm_agrees_on_the_converted_and_on_the_published_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scaling: dict[str, Any]
) -> None:
    """vLLM has code of its own for the published layout; only the configuration's class is missing there."""
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    original = write_checkpoint(tmp_path / "original", shards=2, rope_scaling=scaling, **SIZES)
    to_llama(original, tmp_path / "llama")
    here = rows(tmp_path / "llama", kind="transformers", torch_threads=1)
    vllm: dict[str, Any] = {"kind": "vllm", "engine_args": {"enforce_eager": True, "max_num_seqs": 4}}
    check_equal(rows(tmp_path / "llama", **vllm), here, atol=1e-3)

    (original / "configuration_internlm2.py").write_text(CONFIGURATION)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (original / name).write_bytes((tmp_path / "llama" / name).read_bytes())
    check_equal(rows(original, **vllm, trust_remote_code=True), here, atol=1e-3)
