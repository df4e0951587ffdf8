"""The training data of the gain benchmark's variants: one corpus, each source's rows captured once, and fused blocks.

Everything is the product's own: rows by engine `transformers`, kept in the block store (so that a run that was broken
off goes on), alignment and fusion by `fusion_core`, windows in the order of the service's stream.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache

import numpy as np

from fusion.v1 import fusion_pb2
from fusion_core.alignment.byte.projection import ByteProjection
from fusion_core.alignment.projected_rows import ProjectedRows
from fusion_core.alignment.published.min_edit import MinEditConfig, MinEditProjection
from fusion_core.alignment.published.transport import TransportConfig, TransportProjection
from fusion_core.blocks import PADDING_ID, Block
from fusion_core.fusion import FusionConfig, fuse
from fusion_core.vocabulary import Encoding, Vocabulary
from services.corpus.ledger import Window
from services.fusion.client import FusedWindow, StreamRequest
from services.fusion.order import StreamPlan
from services.models.catalogue import resolve_model
from services.models.prompt import encode_passages
from services.source.config import SourceConfig
from services.source.engines.load import load_engine
from services.source.scorer import to_block
from services.store.identity import SourceIdentity, window_key
from services.store.store import BlockStore

PUBLISHED_TOP_K = 10
_log = logging.getLogger(__name__)


def vocabulary_of(source: SourceConfig) -> Vocabulary:
    return Vocabulary.from_pretrained(resolve_model(source.model), eos_token=source.eos_token)


def capture(source: SourceConfig, windows: Sequence[Window], store_folder: str) -> list[Block]:
    """The source's block of every window, from the store where it is there already."""
    vocabulary = vocabulary_of(source)
    names = {token_id: name for name, token_id in vocabulary.special_tokens.items()}
    bos = vocabulary.special_tokens[source.bos_token] if source.bos_token else vocabulary.bos_id
    assert bos is not None, f"{source.name}: name its bos_token"
    identity = SourceIdentity(
        model=source.model,
        revision="",
        vocabulary=vocabulary.fingerprint,
        bos_token=names[bos],
        eos_token=names.get(-1 if vocabulary.eos_id is None else vocabulary.eos_id, ""),
        engine=source.engine.kind,
        dtype=source.dtype,
        top_k=source.top_k,
    )
    store = BlockStore(store_folder).source(identity)
    keys = [window_key(window.passage) for window in windows]
    missing = [(key, window) for key, window in zip(keys, windows, strict=True) if store.find(key) is None]
    if missing:
        found = score(source, vocabulary, bos, [window for _, window in missing])
        for number, ((key, window), block) in enumerate(zip(missing, found, strict=True)):
            store.put(key, block)
            if number % 50 == 0:
                _log.info("%s: %d of %d windows, %d bytes", source.name, number, len(missing), len(window.text))
        store.flush()
    blocks = [store.find(key) for key in keys]
    assert all(block is not None for block in blocks)
    return [block for block in blocks if block is not None]


def score(source: SourceConfig, vocabulary: Vocabulary, bos: int, windows: Sequence[Window]) -> Iterator[Block]:
    """Yields the block of every window, scored now."""
    loop = asyncio.new_event_loop()
    engine = loop.run_until_complete(load_engine(source, resolve_model(source.model), vocabulary.size))
    try:
        for prompt in encode_passages(vocabulary, [window.passage for window in windows]):
            ids = [bos, *prompt.encoding.token_ids_T.tolist()]
            yield to_block(prompt, loop.run_until_complete(engine.score(ids, source.top_k)), vocabulary)
    finally:
        engine.close()
        loop.close()


def encode(target: Vocabulary, windows: Sequence[Window]) -> list[Encoding]:
    """The target's tokens of every window, with EOS behind the last one of a document."""
    assert target.eos_id is not None
    return [
        encoding.with_end(target.eos_id) if window.ends_document else encoding
        for window, encoding in zip(windows, target.encode_batch([w.text for w in windows]), strict=True)
    ]


def token_blocks(target: Vocabulary, windows: Sequence[Window]) -> list[Block]:
    """The windows without any distribution, for CLM only."""
    return [
        Block(
            text_bytes=window.text,
            token_ids_T=encoding.token_ids_T,
            byte_ends_T=encoding.byte_ends_T,
            topk_ids_TK=np.empty((encoding.num_tokens, 0), dtype=np.int32),
            topk_logprobs_TK=np.empty((encoding.num_tokens, 0), dtype=np.float32),
            tail_T=np.zeros(encoding.num_tokens, dtype=np.float32),
            gold_T=np.zeros(encoding.num_tokens, dtype=np.float32),
            vocabulary=target.fingerprint,
            mask_T=encoding.lossless_T,
            ends_document=encoding.ends_document,
        )
        for window, encoding in zip(windows, encode(target, windows), strict=True)
    ]


class Fusing:
    """Fuses the sources' blocks of windows into the target's vocabulary, by any of the methods."""

    def __init__(
        self,
        target: Vocabulary,
        sources: Mapping[str, Vocabulary],
        windows: Sequence[Window],
        captured: Mapping[str, Sequence[Block]],
    ) -> None:
        self._target, self._sources = target, sources
        self._windows, self._captured = windows, captured
        self._encodings = encode(target, windows)

    def byte(self, names: Sequence[str], config: FusionConfig) -> list[Block]:
        """The product's own alignment."""
        return [
            self._fuse(index, {name: self._byte_rows(name)[index] for name in names}, config)
            for index in range(len(self._windows))
        ]

    @lru_cache  # noqa: B019 - all methods share these rows
    def _byte_rows(self, name: str) -> list[ProjectedRows]:
        projection = ByteProjection(self._sources[name], self._target)
        return [projection.project(*both) for both in zip(self._captured[name], self._encodings, strict=True)]

    def min_edit(self) -> list[Block]:
        """Return rows as FuseLLM published them, with the shift put right: see `as_published`."""
        config = MinEditConfig(match="soft", carry_realised=False)
        projections = {name: MinEditProjection(v, self._target, config) for name, v in self._sources.items()}
        return self._published(lambda name, _, block, encoding: projections[name].project(block, encoding))

    def transport(self, own: Sequence[Block]) -> list[Block]:
        """Return rows as PTA-LLM published them; it chooses among the candidates of `own`, the target's rows."""
        config = TransportConfig(match="soft", carry_realised=False, top_k=PUBLISHED_TOP_K)
        projections = {name: TransportProjection(v, self._target, config) for name, v in self._sources.items()}
        return self._published(
            lambda name, index, block, encoding: projections[name].project(block, encoding, own[index])
        )

    def _published(self, project: Projector) -> list[Block]:
        """Return for every window the rows of the source with the lowest loss (min_ce, by its own nats per byte)."""
        fused = []
        for index, encoding in enumerate(self._encodings):
            best = min(self._captured, key=lambda name: self._captured[name][index].nats_per_byte)
            cut = first_candidates(self._captured[best][index], PUBLISHED_TOP_K)
            config = FusionConfig(strategy="fixed", weights={best: 1.0}, k_out=PUBLISHED_TOP_K + 1)
            fused.append(as_published(self._fuse(index, {best: project(best, index, cut, encoding)}, config)))
        return fused

    def _fuse(self, index: int, rows: Mapping[str, ProjectedRows], config: FusionConfig) -> Block:
        return fuse(self._windows[index].text, self._encodings[index], rows, config, self._target.fingerprint)


Projector = Callable[[str, int, Block, Encoding], ProjectedRows]
"""From a source's name, the place of a window, the source's block and the target's encoding."""


def first_candidates(block: Block, k: int) -> Block:
    """The block with its k likeliest candidates only, the mass of the others in the tail."""
    dropped_T = np.exp(block.topk_logprobs_TK[:, k:].astype(np.float64)).sum(axis=1)
    with np.errstate(divide="ignore"):
        tail_T = np.log(np.exp(block.tail_T.astype(np.float64)) + dropped_T).astype(np.float32)
    return replace(
        block,
        topk_ids_TK=np.ascontiguousarray(block.topk_ids_TK[:, :k]),
        topk_logprobs_TK=np.ascontiguousarray(block.topk_logprobs_TK[:, :k]),
        tail_T=tail_T,
    )


def as_published(block: Block) -> Block:
    """Return the published methods' rows: candidates scaled to sum to one, no tail, and a row without any is the
    realised token (the reference writes the one before it, which is the shift that is put right here)."""
    ids_TK, probs_TK = block.topk_ids_TK.copy(), np.exp(block.topk_logprobs_TK.astype(np.float64))
    probs_TK[ids_TK == PADDING_ID] = 0.0
    sum_T = probs_TK.sum(axis=1)
    bare_T = ~block.mask_T | (sum_T < 1e-6)
    ids_TK[bare_T], probs_TK[bare_T] = PADDING_ID, 0.0
    ids_TK[bare_T, 0], probs_TK[bare_T, 0] = block.token_ids_T[bare_T], 1.0
    with np.errstate(divide="ignore"):
        logprobs_TK = np.log(probs_TK / np.where(bare_T, 1.0, sum_T)[:, None]).astype(np.float32)
    return replace(
        block,
        topk_ids_TK=ids_TK,
        topk_logprobs_TK=logprobs_TK,
        tail_T=np.full(block.num_tokens, -np.inf, dtype=np.float32),
        mask_T=np.ones_like(block.mask_T),
        covered_mass=float(1.0 - bare_T.mean()),
    )


def rows_with_distribution(blocks: Sequence[Block]) -> float | None:
    """Share of the tokens about which a source says more than that they come; None where nobody was asked."""
    if not blocks[0].k:
        return None
    told = sum(int((b.mask_T & ((b.topk_logprobs_TK[:, 0] < 0) | (b.tail_T > -np.inf))).sum()) for b in blocks)
    return told / sum(block.num_tokens for block in blocks)


class BlocksInMemory:
    """In place of the fusion service's client: the same windows in the same order, fused beforehand."""

    def __init__(self, vocabulary: Vocabulary, blocks: Mapping[str, Sequence[Block]]) -> None:
        self._vocabulary, self._blocks = vocabulary, blocks
        self._fingerprints = {
            split: hashlib.sha256(b"\0".join(block.text_bytes for block in of_split)).hexdigest()
            for split, of_split in blocks.items()
        }

    def info(self) -> fusion_pb2.GetFusionInfoResponse:
        return fusion_pb2.GetFusionInfoResponse(
            vocabulary=self._vocabulary.fingerprint,
            vocabulary_size=self._vocabulary.size,
            datasets=[
                fusion_pb2.DatasetInfo(
                    name="gain", split=split, num_windows=len(blocks), fingerprint=self._fingerprints[split]
                )
                for split, blocks in self._blocks.items()
            ],
        )

    def stream(self, request: StreamRequest, *, prefetch_windows: int = 32) -> Iterator[FusedWindow]:
        blocks = self._blocks[request.split]
        plan = StreamPlan(
            self._fingerprints[request.split],
            len(blocks),
            request.seed,
            request.rank,
            request.world_size,
            request.num_epochs,
        )
        for step in plan.windows(request.cursor):
            yield FusedWindow(blocks[step.index], "", 0, step.index, step.cursor)
