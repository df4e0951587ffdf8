"""A source that lies beside a sound one: it is left out, the breaker says why, and nothing that it sends does harm."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from fusion.v1 import fusion_pb2
from fusion_core.alignment.method import Alignment
from fusion_core.blocks import Block
from fusion_core.fusion import FusionConfig, fuse
from fusion_core.vocabulary import Vocabulary
from services.base.errors import InvalidArgumentError
from services.fusion.client import FusedWindow, StreamRequest
from services.fusion.sources.remote import problem_with
from services.source.config import SourceConfig
from services.source.scorer import Scorer
from services.wire.block import decode_block, encode_block
from services.wire.passage import Passage
from tests.fakes.lies import LIES, mutation
from tests.fakes.services.plain_fusion import PlainFusion, plain_fusion
from tests.fakes.tiny_model import make_tiny_model, sentences

METHODS = ("byte", "min_edit", "transport")
TOP_K = 8
NUM_MUTATIONS = 10_000


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("lying")


@pytest.fixture(scope="module", params=METHODS)
def fusion(folder: Path, request: pytest.FixtureRequest) -> Iterator[PlainFusion]:
    with plain_fusion(folder, alignment=request.param, native=True, source_attempts=1, breaker_failures=3) as running:
        yield running


def test_every_lie_leaves_its_source_out_and_the_stream_goes_on(fusion: PlainFusion) -> None:
    """One long stream; the second source tells one lie after the other, and is believed again after each."""
    client = fusion.client()
    stream = client.stream(StreamRequest("words", "train", seed=1, num_epochs=1000), prefetch_windows=4)
    for lie, said in LIES.values():
        fusion.sources[1].lie = lie
        windows = [next(stream) for _ in range(4)]  # asked for before
        while not (problem := client.info().sources[1].problem):
            windows.append(next(stream))
        assert said in problem, problem
        windows += [next(stream) for _ in range(8)]
        assert all(isinstance(window, FusedWindow) and window.block.shares[0].present for window in windows)
        assert [share.present for share in windows[-1].block.shares] == [True, False]
        fusion.sources[1].lie = None
        while breaker(fusion) != fusion_pb2.BREAKER_STATE_CLOSED:
            next(stream)
        window = [next(stream) for _ in range(6)][-1]
        assert [share.present for share in window.block.shares] == [True, True]


def test_blocks_with_changed_bytes_never_end_the_stream(fusion: PlainFusion) -> None:
    fusion.sources[1].lie = mutation(random.Random(5))
    stream = fusion.client().stream(StreamRequest("words", "train", seed=2, num_epochs=1000), prefetch_windows=8)
    for _ in range(100):
        block = next(stream).block
        block.validate()
        assert block.shares[0].present
    fusion.sources[1].lie = None


def breaker(fusion: PlainFusion) -> fusion_pb2.BreakerState:
    return fusion.client().info().sources[1].breaker


def test_what_passes_of_ten_thousand_mutated_blocks_can_be_fused(folder: Path) -> None:
    """Whatever is let through is projected and mixed to rows that are distributions, by every method."""
    models = [folder / f"mutated-{number}" for number in range(2)]
    for number, model in enumerate(models):
        make_tiny_model(model, vocabulary_size=400 + 50 * number, seed=number)
    passage = Passage(sentences(90, seed=3).encode(), ends_document=True)
    native, lying = (scored(model, passage) for model in models)
    target, vocabulary = (Vocabulary.from_pretrained(model) for model in models)
    encoding = target.encode(passage.text)
    assert target.eos_id is not None
    encoding = encoding.with_end(target.eos_id)
    alignments = {
        method: Alignment({"native": target, "lying": vocabulary}, target, FusionConfig(alignment=method).alignment)
        for method in METHODS
    }
    message, rng, passed = encode_block(lying), random.Random(0), 0
    for _ in range(NUM_MUTATIONS):
        try:
            block = decode_block(mutation(rng)(message))
        except InvalidArgumentError:
            continue
        if problem_with(block, passage, vocabulary, TOP_K) is not None or encode_block(block) == message:
            continue
        passed += 1
        for method, alignment in alignments.items():
            rows = alignment.project({"native": native, "lying": block}, encoding)
            fused = fuse(passage.text, encoding, rows, FusionConfig(alignment=method, k_out=TOP_K), target.fingerprint)
            fused.validate()
            assert np.isfinite(fused.gold_T).all()
    assert 10 < passed < NUM_MUTATIONS / 2


def scored(model: Path, passage: Passage) -> Block:
    """The block of a sound source."""
    config = SourceConfig(name="sound", model=str(model), engine="synthetic", top_k=TOP_K)

    async def score() -> Block:
        scorer = await Scorer.load(config, model)
        [prompt] = scorer.encode([passage])
        return await scorer.score(prompt, TOP_K)

    return asyncio.run(score())
