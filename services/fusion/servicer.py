"""The alignment-fusion service as a Ray Serve deployment."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Iterable
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fusion.v1 import block_pb2, fusion_pb2
from services.base.errors import FailedPreconditionError, InvalidArgumentError, NotFoundError, UnavailableError
from services.corpus.ledger import Corpus
from services.fusion.config import FusionServiceConfig
from services.fusion.fuser import Fuser, QuorumLostError
from services.fusion.order import Step, StreamPlan
from services.fusion.result_settings import result_settings
from services.rpc.client_limits import ClientLimits
from services.rpc.draining import Draining
from services.rpc.health import health_response
from services.rpc.methods import bidirectional, public_unary, unary
from services.rpc.pipeline import Pipeline
from services.store.backfill_list import BackfillWindow
from services.store.capture_plan import Place
from services.wire.block import check_dtype, encode_block
from services.wire.cursor import Cursor
from services.wire.passage import passages_of
from services.wire.protocol import PROTOCOL_VERSION

logger = logging.getLogger("ray.serve")

_SKIPPED_BYTES = 128


@dataclass(frozen=True, slots=True)
class _Sent:
    """What goes out for a window: a block, or the sources that were missed; and the cursor after it."""

    where: block_pb2.WindowRef
    cursor: Cursor
    block: block_pb2.TokenBlock | None
    missing: tuple[str, ...]

    def num_bytes(self) -> int:
        return _SKIPPED_BYTES if self.block is None else self.block.ByteSize()


class FusionServicer:
    """Methods of fusion.v1.FusionService and grpc.health.v1.Health."""

    async def __init__(self, config: FusionServiceConfig) -> None:  # type: ignore[misc]  # Serve awaits constructors
        self._config = config
        self.client_limits = ClientLimits(config.service.per_client, "service.per_client")
        self._fuser = Fuser(config)
        self._corpora = {corpus.name: corpus for corpus in map(_open_corpus, config.corpora)}
        self._splits = {
            f"{corpus.name}/{split}": corpus.fingerprint(split)
            for corpus in self._corpora.values()
            for split in corpus.splits
        }
        self._draining = Draining()
        logger.info("fusing %s into %s", ", ".join(s.name for s in config.sources), config.tokenizer)

    @unary
    async def GetFusionInfo(self, request: fusion_pb2.GetFusionInfoRequest) -> fusion_pb2.GetFusionInfoResponse:
        config = self._config
        self._report_flow()
        statuses = await self._fuser.statuses(self._splits)
        return fusion_pb2.GetFusionInfoResponse(
            vocabulary=self._fuser.target.fingerprint,
            vocabulary_size=self._fuser.target.size,
            sources=statuses,
            alignment=config.fusion.alignment.method,
            strategy=config.fusion.strategy,
            max_k=config.fusion.k_out,
            max_text_bytes=config.service.max_text_bytes,
            max_texts=config.service.max_texts,
            datasets=[
                fusion_pb2.DatasetInfo(
                    name=corpus.name,
                    split=split,
                    num_windows=corpus.num_windows(split),
                    num_bytes=corpus.num_bytes(split),
                    fingerprint=corpus.fingerprint(split),
                )
                for corpus in self._corpora.values()
                for split in corpus.splits
            ],
            min_sources=config.fusion.min_sources,
            protocol_version=PROTOCOL_VERSION,
            below_quorum=config.service.below_quorum,
            counts=self._fuser.metrics.counts,
            settings=result_settings(config, self._fuser.identities()),
        )

    @unary
    async def Fuse(self, request: fusion_pb2.FuseRequest) -> fusion_pb2.FuseResponse:
        service = self._config.service
        if not 1 <= len(request.texts) <= service.max_texts:
            raise InvalidArgumentError(f"texts: 1 to {service.max_texts} texts are allowed, got {len(request.texts)}")
        passages = passages_of(request.texts, request.contexts, max_text_bytes=service.max_text_bytes)
        k, dtype = self._answer_settings(request)
        names = self._fuser.check_names(request.sources)
        blocks = await asyncio.gather(*(self._fuser.fuse(passage, names=names, k=k) for passage in passages))
        return fusion_pb2.FuseResponse(blocks=[encode_block(block, dtype) for block in blocks])

    @bidirectional
    async def StreamFused(
        self, requests: AsyncIterator[fusion_pb2.StreamFusedRequest]
    ) -> AsyncGenerator[fusion_pb2.StreamFusedResponse, None]:
        first = await anext(requests, None)
        if first is None or first.WhichOneof("message") != "open":
            raise InvalidArgumentError("message: a stream starts with `open`")
        if first.open.protocol_version not in {0, PROTOCOL_VERSION}:
            raise FailedPreconditionError(
                f"protocol_version: the client speaks {first.open.protocol_version}, this service {PROTOCOL_VERSION}"
            )
        async with AsyncExitStack() as stack:
            pipeline = await self._pipeline(first.open, stack)

            async def read() -> None:
                async for message in requests:
                    if message.WhichOneof("message") != "credit":
                        raise InvalidArgumentError("message: after `open` only credits are expected")
                    pipeline.credits.grant(message.credit.blocks)

            await stack.enter_async_context(self._draining.holding(pipeline))
            # The stack closes them first: what is under way must end before the streams that it uses.
            frames = await stack.enter_async_context(aclosing(pipeline.frames(read())))
            yield fusion_pb2.StreamFusedResponse(protocol_version=PROTOCOL_VERSION)
            async for frame in frames:
                await self._note(first.open, frame)
                self._report_flow()
                yield _response(frame)
        self._report_flow()

    @public_unary
    async def Check(self, request: Any) -> Any:
        return await health_response(request, "fusion.v1.FusionService", lambda: self._fuser.problem(self._splits))

    def __del__(self) -> None:
        if fuser := getattr(self, "_fuser", None):
            fuser.flush()

    async def _pipeline(self, request: fusion_pb2.StreamFusedOpen, stack: AsyncExitStack) -> Pipeline[Step, _Sent]:
        corpus = self._corpus(request.dataset)
        if request.split not in corpus.splits:
            raise NotFoundError(f"split: {request.split!r} is not known; {corpus.name} has {_listed(corpus.splits)}")
        k, dtype = self._answer_settings(request)
        plan = StreamPlan(
            split_fingerprint=corpus.fingerprint(request.split),
            num_windows=corpus.num_windows(request.split),
            seed=request.seed,
            rank=request.rank,
            world_size=request.world_size,
            num_epochs=request.num_epochs if request.HasField("num_epochs") else 1,
        )
        steps = plan.steps(Cursor.from_proto(request.cursor) if request.HasField("cursor") else None)
        if not request.tokens_only:
            stack.push_async_callback(asyncio.to_thread, self._fuser.flush)
        names = self._fuser.check_names(request.sources)
        streams = {} if request.tokens_only else await self._fuser.open_streams(stack, names)

        async def compute(step: Step) -> _Sent:
            window = corpus.window(request.split, step.index)
            passage = window.passage
            where = block_pb2.WindowRef(document=window.document, start_byte=window.start_byte, index=window.index)
            if request.tokens_only:
                block = self._fuser.realised_tokens(passage)
                return _Sent(where, step.cursor, encode_block(block, dtype, where), ())
            place = Place(plan.split_fingerprint, step.index)
            try:
                block = await self._fuser.fuse(passage, names=names, k=k, streams=streams, place=place)
            except QuorumLostError as error:
                if self._config.service.below_quorum == "wait":
                    raise
                return _Sent(where, step.cursor, None, error.missing)
            missing = tuple(share.name for share in block.shares if not share.present)
            return _Sent(where, step.cursor, encode_block(block, dtype, where), missing)

        async def items() -> AsyncIterator[Step]:
            for step in steps:
                yield step

        return Pipeline(
            items(),
            compute,
            size=_Sent.num_bytes,
            may_share=lambda before, after: before.cursor.epoch == after.cursor.epoch,
            heartbeat_seconds=self._config.service.heartbeat_seconds,
        )

    async def _note(self, request: fusion_pb2.StreamFusedOpen, frame: list[_Sent]) -> None:
        """Puts a frame's windows that lack sources on the back-fill list, before the client takes them as done."""
        windows = [BackfillWindow(index=sent.where.index, missing=sent.missing) for sent in frame if sent.missing]
        skipped = sum(sent.block is None for sent in frame)
        fingerprint = self._corpus(request.dataset).fingerprint(request.split)
        try:
            await self._fuser.note(request.dataset, request.split, fingerprint, windows)
        except UnavailableError as error:
            if skipped:
                raise
            logger.warning("%s", error)
        for _ in range(skipped):
            self._fuser.metrics.skipped()

    def _report_flow(self) -> None:
        self._fuser.metrics.flowing(self._draining.streams, self._draining.in_flight)

    def _answer_settings(self, request: fusion_pb2.FuseRequest | fusion_pb2.StreamFusedOpen) -> tuple[int, int]:
        """Number of candidates and encoding of the answer; checks the vocabulary that the client expects."""
        target, max_k = self._fuser.target, self._config.fusion.k_out
        if request.expected_vocabulary not in {"", target.fingerprint}:
            raise FailedPreconditionError(
                f"expected_vocabulary: {request.expected_vocabulary} was asked for, but this service fuses into "
                f"{target.fingerprint}"
            )
        k = request.k if request.HasField("k") else max_k
        if not 1 <= k <= max_k:
            raise InvalidArgumentError(f"k: must be 1 to {max_k}, got {k}")
        return k, check_dtype(request.dtype)

    def _corpus(self, name: str) -> Corpus:
        if name not in self._corpora:
            raise NotFoundError(f"dataset: {name!r} is not known; this service has {_listed(self._corpora)}")
        return self._corpora[name]


def _response(frame: list[_Sent]) -> fusion_pb2.StreamFusedResponse:
    """A frame on the wire; one without windows is a heartbeat."""
    if not frame:
        return fusion_pb2.StreamFusedResponse()
    blocks = [sent.block for sent in frame if sent.block is not None]
    return fusion_pb2.StreamFusedResponse(
        blocks=blocks,
        cursor=frame[-1].cursor.to_proto(),
        skipped=[
            fusion_pb2.SkippedWindow(window=sent.where, position=position, missing=sent.missing)
            for position, sent in enumerate(frame)
            if sent.block is None
        ],
        degraded=sum(sent.block is not None and bool(sent.missing) for sent in frame),
    )


def _open_corpus(folder: str) -> Corpus:
    return Corpus.open(Path(folder))


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)) or "none"
