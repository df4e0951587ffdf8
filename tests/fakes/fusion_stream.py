"""A stand-in for the fusion service in the tests of distillation.

The windows come in the order of the real service; the fused rows are made up from the text.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np

from fusion.v1 import fusion_pb2
from fusion_core.blocks import Block, SourceShare
from fusion_core.vocabulary import Vocabulary
from services.base.errors import FailedPreconditionError
from services.distill.target.config import TargetConfig
from services.distill.target.prepare import prepare_target
from services.fusion.client import FusedWindow, SkippedWindow, StreamRequest
from services.fusion.order import StreamPlan
from services.fusion.parts import Part, Pool
from services.wire.passage import Passage

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
    without distributions. `block_windows` of them are kept together. `pools` are further splits."""

    def __init__(
        self,
        tokenizer: Path,
        texts: list[bytes],
        *,
        held_out: list[bytes] | None = None,
        break_after: int | None = None,
        ends: bool = False,
        skipped: frozenset[int] = frozenset(),
        block_windows: int = 1,
        pools: Mapping[str, list[bytes]] | None = None,
    ) -> None:
        self.vocabulary = Vocabulary.from_pretrained(tokenizer)
        self.splits = {"train": texts, "held_out": held_out or [], **(pools or {})}
        self.block_windows = block_windows
        self.break_after = break_after
        self.ends = ends
        self.skipped = skipped
        self.requests: list[StreamRequest] = []
        self.fused: list[Passage] = []
        self.settings: dict[str, object] = {
            "fusion.alignment.method": "byte", "fusion.strategy": "fixed", "fusion.k_out": 8, "fusion.tau": 0.05,
            "fusion.weights.left": 0.25, "fusion.weights.right": 0.75, "service.below_quorum": "skip",
            "corpus.target_context": True,
        }  # fmt: skip
        for share in SHARES:
            self.settings[f"sources.{share.name}.model"] = f"model of {share.name}"
            self.settings[f"sources.{share.name}.revision"] = f"revision of {share.name}"
            self.settings[f"sources.{share.name}.top_k"] = 16

    def info(self) -> fusion_pb2.GetFusionInfoResponse:
        return fusion_pb2.GetFusionInfoResponse(
            vocabulary=self.vocabulary.fingerprint,
            vocabulary_size=self.vocabulary.size,
            datasets=[
                fusion_pb2.DatasetInfo(
                    name="toy",
                    split=split,
                    num_windows=len(texts),
                    fingerprint=f"toy-{len(texts)}",
                    block_windows=self.block_windows,
                )
                for split, texts in self.splits.items()
            ],
            sources=[fusion_pb2.SourceStatus(name=share.name, serving=True) for share in SHARES],
            alignment="byte",
            strategy="fixed",
            settings={key: json.dumps(value) for key, value in self.settings.items()},
        )

    def stream(self, request: StreamRequest, *, prefetch_windows: int = 32) -> Iterator[FusedWindow | SkippedWindow]:
        self.requests.append(request)
        plan = self.plan(request)
        for sent, step in enumerate(plan.windows(request.cursor)):
            if sent == self.break_after and request.split == "train":
                self.break_after = None
                raise FailedPreconditionError("the stream broke")
            if step.index in self.skipped and request.split == "train" and not request.tokens_only:
                yield SkippedWindow(("left",), f"document {step.index}", 0, step.index, step.cursor)
                continue
            texts = self.splits[step.pool or request.split]
            block = self.block(texts[step.index], tokens_only=request.tokens_only, k=request.k or 8)
            if request.sources:
                block = replace(block, shares=tuple(share for share in SHARES if share.name in request.sources))
            place = f"document {step.index}", 0, step.index, step.cursor
            yield FusedWindow(block, *place, pool=step.pool, pass_number=step.pass_number)

    def fuse(
        self, texts: Sequence[bytes | Passage], *, k: int | None = None, sources: Sequence[str] = ()
    ) -> list[Block]:
        """The blocks of passages that continue a text; each is kept in `fused`."""
        blocks = []
        for passage in texts:
            assert isinstance(passage, Passage) and not passage.messages
            self.fused.append(passage)
            block = self.block(passage.text, tokens_only=False, k=k or 8, ends=passage.ends_document)
            context_ids_C = self.vocabulary.encode(passage.context).token_ids_T
            shares = tuple(share for share in SHARES if not sources or share.name in sources)
            blocks.append(replace(block, context_ids_C=context_ids_C, shares=shares))
        return blocks

    def plan(self, request: StreamRequest) -> StreamPlan:
        """The plan that the real service makes of a request."""
        names = {split: "" if split == request.split else split for split in self.splits}
        return StreamPlan(
            request.split,
            len(self.splits[request.split]),
            request.seed,
            request.rank,
            request.world_size,
            request.num_epochs,
            self.block_windows,
            tuple(
                Part(part.num_windows, tuple((names[split], weight) for split, weight in part.weights))
                for part in request.parts
            ),
            {split: Pool(split, len(texts)) for split, texts in self.splits.items() if split != request.split},
        )

    def block(self, text: bytes, *, tokens_only: bool, k: int, ends: bool | None = None) -> Block:
        encoding, ends = self.vocabulary.encode(text), self.ends if ends is None else ends
        if ends:
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
            ends_document=ends,
        )
