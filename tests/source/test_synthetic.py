"""The synthetic engine: valid, causal, reproducible rows, at the pace that was asked for."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.source.config import SourceConfig
from services.source.engines.base import PromptScores
from services.source.engines.config import SyntheticConfig
from services.source.engines.synthetic import SyntheticEngine
from services.source.scorer import Scorer
from services.wire.passage import Passage
from tests.fakes.tiny_model import make_tiny_model, sentences


def scored(engine: SyntheticEngine, prompt: list[int], top_k: int) -> PromptScores:
    return asyncio.run(engine.score(prompt, top_k))


@given(vocabulary_size=st.integers(4, 5000), seed=st.integers(0, 5), data=st.data())
@settings(deadline=None, max_examples=40)
def test_rows_are_distributions_that_the_realised_token_belongs_to(
    vocabulary_size: int, seed: int, data: st.DataObject
) -> None:
    top_k = data.draw(st.integers(1, min(64, vocabulary_size)))
    prompt = data.draw(st.lists(st.integers(0, vocabulary_size - 1), min_size=2, max_size=50))
    engine = SyntheticEngine(SyntheticConfig(seed=seed), vocabulary_size, top_k)
    scores = scored(engine, prompt, top_k)
    ids, logprobs = scores.topk_ids_TK, scores.topk_logprobs_TK.astype(np.float64)
    assert all(len(set(row)) == top_k for row in ids.tolist())
    assert (ids >= 0).all()
    assert (ids < vocabulary_size).all()
    assert (np.diff(logprobs, axis=1) <= 1e-6).all()
    outside = 1 - np.exp(logprobs).sum(axis=1)
    assert (outside >= -1e-5).all()
    for row, token in enumerate(prompt[1:]):
        place = np.flatnonzero(ids[row] == token)
        if len(place):
            assert scores.gold_T[row] == scores.topk_logprobs_TK[row, place[0]]
        else:  # an equal part of what the candidates leave, and no likelier than the last of them
            assert np.exp(scores.gold_T[row]) * (vocabulary_size - top_k) == pytest.approx(outside[row], abs=1e-5)
            assert scores.gold_T[row] <= logprobs[row, -1] + 1e-5


def test_rows_depend_on_what_stands_before_them_only() -> None:
    engine = SyntheticEngine(SyntheticConfig(), 1000, 16)
    rng = np.random.default_rng(0)
    prompt = rng.integers(0, 1000, 40).tolist()
    whole, start = scored(engine, prompt, 16), scored(engine, prompt[:20], 16)
    np.testing.assert_array_equal(whole.topk_ids_TK[:19], start.topk_ids_TK)
    np.testing.assert_array_equal(whole.gold_T[:19], start.gold_T)
    np.testing.assert_array_equal(scored(engine, prompt, 4).topk_logprobs_TK, whole.topk_logprobs_TK[:, :4])
    again, other = (SyntheticEngine(SyntheticConfig(seed=seed), 1000, 16) for seed in (0, 1))
    np.testing.assert_array_equal(scored(again, prompt, 16).topk_ids_TK, whole.topk_ids_TK)
    assert (scored(other, prompt, 16).topk_ids_TK != whole.topk_ids_TK).any()


def test_pace_and_delay() -> None:
    """Ten texts of 100 tokens at 5,000 tokens/s take 0.2 s, and the delay of 0.1 s once more, not ten times."""

    async def run() -> float:
        engine = SyntheticEngine(SyntheticConfig(tokens_per_second=5000, delay_seconds=0.1), 1000, 4)
        start = time.monotonic()
        await asyncio.gather(*(engine.score([1] * 100, 4) for _ in range(10)))
        return time.monotonic() - start

    assert 0.2 < asyncio.run(run()) < 0.9


def test_a_folder_with_a_tokenizer_is_enough(tmp_path: Path) -> None:
    tiny = make_tiny_model(tmp_path / "tiny", vocabulary_size=400, seed=2)
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    for file in tiny.glob("*token*"):
        (folder / file.name).write_bytes(file.read_bytes())
    assert not list(folder.glob("*.safetensors"))
    config = SourceConfig(name="made-up", model=str(folder), engine="synthetic", top_k=16)
    text = sentences(300, seed=1).encode()

    async def run() -> None:
        from services.models.catalogue import resolve_model

        scorer = await Scorer.load(config, resolve_model(config.model))
        [prompt] = scorer.encode([Passage(text)])
        block = await scorer.score(prompt, 16)
        block.validate()
        assert block.text_bytes == text

    asyncio.run(run())
