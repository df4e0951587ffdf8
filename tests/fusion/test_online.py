"""Strategy `online` through the service: rows, shares and streams of weights that follow the text."""

from __future__ import annotations

import json
from collections.abc import Iterator

import numpy as np
import pytest

from fusion_core.blocks import Block
from services.fusion.client import StreamRequest
from tests.fakes.services.plain_fusion import PlainFusion, plain_fusion
from tests.fakes.tiny_model import sentences

PRIOR, RATE = {"source-0": 0.9, "source-1": 0.1}, 0.5


@pytest.fixture(scope="module")
def fusion(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PlainFusion]:
    section = {"strategy": "online", "prior": PRIOR, "rate": RATE}
    folder = tmp_path_factory.mktemp("online")
    with plain_fusion(folder, fusion=section, windows={"context_bytes": 0}) as running:
        yield running


def expected(fusion: PlainFusion, text: bytes) -> tuple[np.ndarray, np.ndarray]:
    """The realised tokens' fused probabilities, and the mean weight of each source, from each source alone."""
    alone: list[Block] = [fusion.client().fuse([text], sources=[name])[0] for name in PRIOR]
    probs_ST, now_S = np.exp([block.gold_T.astype(np.float64) for block in alone]), np.array(list(PRIOR.values()))
    assert all(block.mask_T.all() for block in alone)
    fused, weights = [], []
    for probs_S in probs_ST.T:
        weights.append(now_S)
        fused.append(now_S @ probs_S)
        now_S = (1 - RATE) * now_S + RATE * now_S * probs_S / (now_S @ probs_S)
    return np.array(fused), np.mean(weights, axis=0)


def test_a_text_is_weighed_token_by_token(fusion: PlainFusion) -> None:
    text = sentences(120, seed=5).encode()
    [block] = fusion.client().fuse([text])
    fused_T, weight_S = expected(fusion, text)
    assert np.exp(block.gold_T) == pytest.approx(fused_T, rel=1e-3)
    assert [share.weight for share in block.shares] == pytest.approx(weight_S.tolist(), abs=1e-4)


def test_every_window_of_a_stream_begins_with_the_prior(fusion: PlainFusion) -> None:
    windows = fusion.client().stream(StreamRequest("words", "train", seed=1))
    for window in [next(windows) for _ in range(3)]:
        text = window.block.text_bytes
        alone = [fusion.client().fuse([text], sources=[name])[0] for name in PRIOR]
        first = sum(w * np.exp(block.gold_T[0]) for w, block in zip(PRIOR.values(), alone, strict=True))
        assert np.exp(window.block.gold_T[0]) == pytest.approx(first, rel=1e-3)


def test_the_service_says_what_it_weighs_by(fusion: PlainFusion) -> None:
    info = fusion.client().info()
    found = {key: json.loads(value) for key, value in info.settings.items() if key.startswith("fusion.")}
    assert info.strategy == "online" and found["fusion.rate"] == RATE
    assert {name: found[f"fusion.prior.{name}"] for name in PRIOR} == PRIOR
