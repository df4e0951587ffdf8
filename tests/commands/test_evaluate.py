from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest

from fusion_core.blocks import Block
from services.commands.evaluate import evaluate_sources
from services.corpus.config import CorpusConfig
from services.corpus.prepare import plan_corpus, read_text
from tests.fakes.fusion_stream import FakeFusion, corpus, tiny_target


class BlindAtTimes(FakeFusion):
    """The source `right` has a row in the first window only."""

    def block(self, text: bytes, *, tokens_only: bool, k: int) -> Block:
        block = super().block(text, tokens_only=tokens_only, k=k)
        left, right = block.shares
        losses = (1.0, 3.0) if text == self.splits["held_out"][0] else (2.0, math.nan)
        shares = (replace(left, nats_per_byte=losses[0]), replace(right, nats_per_byte=losses[1]))
        return replace(block, shares=shares)


def test_a_window_without_a_source_does_not_spoil_its_figure(tmp_path: Path) -> None:
    texts = corpus(2)
    files = [tmp_path / f"{number}.txt" for number in range(2)]
    for file, text in zip(files, texts, strict=True):
        file.write_bytes(text)
    config = CorpusConfig.model_validate({"name": "toy", "files": [str(file) for file in files]})
    prepared = plan_corpus(read_text(config, tmp_path / "corpus"))
    nats, _ = evaluate_sources(BlindAtTimes(tiny_target(tmp_path), [], held_out=texts), prepared, "held_out")
    sizes = [len(text) for text in texts]
    assert nats["left"] == pytest.approx((sizes[0] + 2 * sizes[1]) / sum(sizes))
    assert nats["right"] == pytest.approx(3.0)
