"""Batches from the stream.

`FakeFusion` stands in for the fusion service in all tests of distillation: the order of its windows is the service's
own, its fused rows are made up from the text.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from itertools import chain, islice
from pathlib import Path

import numpy as np
import pytest

from fusion.v1 import fusion_pb2
from fusion_core.blocks import Block, SourceShare
from fusion_core.vocabulary import Vocabulary
from services.common.errors import FailedPreconditionError
from services.distill.config import TargetConfig
from services.distill.feed import WindowFeed
from services.distill.target import prepare_target
from services.fusion.client import FusedWindow, SkippedWindow, StreamRequest
from services.fusion.plan import StreamPlan

WORDS = [
    "the",
    "fused",
    "row",
    "of",
    "a",
    "source",
    "says",
    "what",
    "comes",
    "next",
    "and",
    "the",
    "target",
    "learns",
    "from",
    "all",
    "of",
    "them",
    "at",
    "once",
]
SHARES = (SourceShare("left", True, 0.25, 1.0), SourceShare("right", True, 0.75, 0.9))


def corpus(num_windows: int, seed: int = 0) -> list[bytes]:
    """Windows of different length with characters of one to four bytes."""
    generator = np.random.default_rng(seed)
    marks = [".", "é", "\n", "→", "𝛼", " 42"]
    return [
        "".join(
            f" {WORDS[generator.integers(len(WORDS))]}"
            + (marks[generator.integers(6)] if generator.random() < 0.2 else "")
            for _ in range(generator.integers(3, 25))
        ).encode()
        for _ in range(num_windows)
    ]


@cache
def tiny_target(folder: Path) -> Path:
    """A target of some thousand parameters with a tokenizer of its own."""
    config = TargetConfig.model_validate(
        {
            "config": {
                "hidden_size": 32,
                "num_layers": 2,
                "num_heads": 2,
                "intermediate_size": 48,
                "max_positions": 256,
            },
            "tokenizer": {"train": {"vocabulary_size": 300}},
        }
    )
    return prepare_target(config, [text.decode() for text in corpus(50)], folder / "target", seed=1)


class FakeFusion:
    """In place of `FusionClient`. The stream of the train split breaks once, after `break_after` windows. Every seventh
    row is masked. With `ends` every window is a whole document and has the end row. Windows in `skipped` come
    without distributions."""

    def __init__(
        self,
        tokenizer: Path,
        texts: list[bytes],
        *,
        held_out: list[bytes] | None = None,
        break_after: int | None = None,
        ends: bool = False,
        skipped: frozenset[int] = frozenset(),
    ) -> None:
        self.vocabulary = Vocabulary.from_pretrained(tokenizer)
        self.splits = {"train": texts, "held_out": held_out or []}
        self.break_after = break_after
        self.ends = ends
        self.skipped = skipped
        self.requests: list[StreamRequest] = []

    def info(self) -> fusion_pb2.GetFusionInfoResponse:
        return fusion_pb2.GetFusionInfoResponse(
            vocabulary=self.vocabulary.fingerprint,
            vocabulary_size=self.vocabulary.size,
            datasets=[
                fusion_pb2.DatasetInfo(name="toy", split=split, num_windows=len(texts), fingerprint=f"toy-{len(texts)}")
                for split, texts in self.splits.items()
            ],
            sources=[fusion_pb2.SourceStatus(name=share.name, serving=True) for share in SHARES],
            strategy="fixed",
        )

    def stream(self, request: StreamRequest, *, prefetch_windows: int = 32) -> Iterator[FusedWindow | SkippedWindow]:
        self.requests.append(request)
        texts = self.splits[request.split]
        plan = StreamPlan(request.split, len(texts), request.seed, request.rank, request.world_size, request.num_epochs)
        for sent, step in enumerate(plan.steps(request.cursor)):
            if sent == self.break_after and request.split == "train":
                self.break_after = None
                raise FailedPreconditionError("the stream broke")
            if step.index in self.skipped and request.split == "train" and not request.tokens_only:
                yield SkippedWindow(("left",), f"document {step.index}", 0, step.index, step.cursor)
                continue
            block = self.block(texts[step.index], tokens_only=request.tokens_only, k=request.k or 8)
            if request.sources:
                block = replace(block, shares=tuple(share for share in SHARES if share.name in request.sources))
            yield FusedWindow(block, f"document {step.index}", 0, step.index, step.cursor)

    def block(self, text: bytes, *, tokens_only: bool, k: int) -> Block:
        encoding = self.vocabulary.encode(text)
        if self.ends:
            assert self.vocabulary.eos_id is not None
            encoding = encoding.with_end(self.vocabulary.eos_id)
        num_tokens, k = encoding.num_tokens, 0 if tokens_only else k
        generator = np.random.default_rng(list(text))
        ids = np.array([generator.choice(self.vocabulary.size, k, replace=False) for _ in range(num_tokens)])
        logprobs = generator.normal(size=(num_tokens, k + 1))
        logprobs -= np.log(np.exp(logprobs).sum(axis=1, keepdims=True))
        mask = np.ones(num_tokens, dtype=np.bool_)
        mask[::7] = False
        return Block(
            text_bytes=text,
            token_ids_T=encoding.token_ids_T,
            byte_ends_T=encoding.byte_ends_T,
            topk_ids_TK=ids.reshape(num_tokens, k).astype(np.int32),
            topk_logprobs_TK=-np.sort(-logprobs[:, :k], axis=1).astype(np.float32),
            tail_T=logprobs[:, k].astype(np.float32),
            gold_T=np.full(num_tokens, -2.0, dtype=np.float32),
            vocabulary=self.vocabulary.fingerprint,
            mask_T=mask,
            shares=() if tokens_only else SHARES,
            covered_mass=float("nan") if tokens_only else 0.97,
            ends_document=self.ends,
        )


@pytest.fixture(scope="session")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_target(tmp_path_factory.mktemp("distill"))


def _request(fusion: FakeFusion, **changes: object) -> StreamRequest:
    base = StreamRequest("toy", "train", seed=3, expected_vocabulary=fusion.vocabulary.fingerprint)
    return replace(base, **changes)  # type: ignore[arg-type]


def test_batches_stop_at_the_end_of_an_epoch_and_cover_it(target):
    fusion = FakeFusion(target, corpus(11))
    feed = WindowFeed(fusion, _request(fusion, num_epochs=2), batch_windows=4)
    for epoch in range(2):
        batches = [[window.index for window in feed.take(epoch).windows] for _ in range(3)]
        assert [len(batch) for batch in batches] == [4, 4, 3]
        assert sorted(chain(*batches)) == list(range(11))
        assert len(feed.take(epoch)) == 0
    assert feed.wait_seconds > 0


def test_the_cursor_resumes_behind_what_was_taken_not_behind_what_was_read_ahead(target):
    fusion = FakeFusion(target, corpus(10))
    feed = WindowFeed(fusion, _request(fusion, num_epochs=2), batch_windows=4)
    taken = [window.index for epoch in (0, 0, 0, 1) for window in feed.take(epoch).windows]
    rest = [window.index for window in fusion.stream(_request(fusion, num_epochs=2, cursor=feed.cursor))]
    whole = [window.index for window in fusion.stream(_request(fusion, num_epochs=2))]
    assert taken + rest == whole
    feed.close()


@pytest.mark.parametrize("world_size", [2, 4])
def test_workers_together_take_the_windows_that_one_worker_takes(target, world_size):
    fusion = FakeFusion(target, corpus(14))
    alone = WindowFeed(fusion, _request(fusion), batch_windows=4)
    shards = [
        WindowFeed(fusion, _request(fusion, rank=rank, world_size=world_size), batch_windows=4 // world_size)
        for rank in range(world_size)
    ]
    for _ in range(4):
        together = {window.index for shard in shards for window in shard.take(0).windows}
        assert together == {window.index for window in alone.take(0).windows}


def test_skipped_windows_are_part_of_their_batch(target):
    fusion = FakeFusion(target, corpus(11), skipped=frozenset({2, 5, 7}))
    feed = WindowFeed(fusion, _request(fusion), batch_windows=4)
    batches = [feed.take(0) for _ in range(3)]
    assert [len(batch) for batch in batches] == [4, 4, 3]
    assert sorted(window.index for batch in batches for window in batch.skipped) == [2, 5, 7]
    assert sorted(window.index for batch in batches for window in batch.windows) == [0, 1, 3, 4, 6, 8, 9, 10]


def test_a_block_in_another_vocabulary_is_refused(target):
    fusion = FakeFusion(target, corpus(3))
    feed = WindowFeed(fusion, _request(fusion, expected_vocabulary="another"), batch_windows=2)
    with pytest.raises(FailedPreconditionError, match="the target's tokenizer is another"):
        feed.take(0)


def test_the_fake_keeps_the_contract_of_blocks(target):
    for ends in (False, True):
        fusion = FakeFusion(target, corpus(5), ends=ends)
        for window in islice(fusion.stream(_request(fusion)), 3):
            window.block.validate()
