"""One fused stream: the windows of a rank in their order, computed under credits and packed into frames."""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass, replace

from fusion.v1 import block_pb2, fusion_pb2
from services.base.errors import FailedPreconditionError, InvalidArgumentError, NotFoundError, UnavailableError
from services.corpus.ledger import Corpus, Window
from services.fusion.config import ServiceConfig
from services.fusion.fuser import Fuser, QuorumLostError
from services.fusion.order import OrderedWindow, StreamPlan
from services.fusion.parts import Part, Pool
from services.fusion.target_text import UnfusableTextError
from services.models.prompt import Prompt
from services.rpc.draining import Draining
from services.rpc.pipeline import Pipeline
from services.store.backfill_list import BackfillWindow
from services.store.capture_plan import Place
from services.wire.block import encode_block, most_block_bytes
from services.wire.cursor import Cursor
from services.wire.protocol import MAX_BLOCK_BYTES, PROTOCOL_VERSION

logger = logging.getLogger("ray.serve")

_SKIPPED_BYTES = 512
"""Approximate bytes of a skipped window in a frame."""
_REASON_CHARACTERS = 300
_TURN_BLOCK = 8
"""Windows of a conversation's turns that come together, so that the target often reads several of them in one pass."""


def block_windows(corpus: Corpus, split: str) -> int:
    """Return the number of neighbours in a split that a stream keeps together: turns follow each other there."""
    return _TURN_BLOCK if "turns" in corpus.record["splits"][split] else 1


@dataclass(frozen=True, slots=True)
class AnswerSettings:
    """The answer that a client asks for: candidates per row, their encoding on the wire, and the sources."""

    k: int
    dtype: int
    names: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Sent:
    """A window as it goes out.

    Attributes:
        split: the split of the window.
        where: which window.
        cursor: position after it.
        block: None for a window that is skipped.
        lacking: sources that took no part in the window, for the client.
        missing: those of them that may still give it, for the back-fill list.
        reason: why it is skipped.
    """

    split: str
    where: block_pb2.WindowRef
    cursor: Cursor
    block: block_pb2.TokenBlock | None
    lacking: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    reason: str = ""

    def num_bytes(self) -> int:
        return _SKIPPED_BYTES if self.block is None else self.block.ByteSize()


class FusedStream:
    """The work of StreamFused for one call.

    Args:
        request: the client's first message; its split is one of the corpus.
        corpus: the data set.
        settings: of the answer that the client asks for.
        fuser: asks the sources.
        service: time between heartbeats, and behaviour below the quorum.

    Raises InvalidArgumentError or FailedPreconditionError naming the field of the request that does not fit.
    """

    def __init__(
        self,
        request: fusion_pb2.StreamFusedOpen,
        corpus: Corpus,
        settings: AnswerSettings,
        fuser: Fuser,
        service: ServiceConfig,
    ) -> None:
        self._corpus, self._split = corpus, request.split
        self._tokens_only = request.tokens_only
        self._settings = settings
        self._fuser = fuser
        self._service = service
        if request.parts and request.HasField("num_epochs"):
            raise InvalidArgumentError("num_epochs: a stream has either epochs or parts")
        self._plan = StreamPlan(
            split_fingerprint=corpus.fingerprint(request.split),
            num_windows=corpus.num_windows(request.split),
            seed=request.seed,
            rank=request.rank,
            world_size=request.world_size,
            num_epochs=request.num_epochs if request.HasField("num_epochs") else 1,
            block_windows=block_windows(corpus, request.split),
            parts=_parts(request),
            pools=_pools(request, corpus),
            windows_per_group=corpus.windows_per_group(request.split),
        )
        self._windows = self._plan.windows(Cursor.from_proto(request.cursor) if request.HasField("cursor") else None)

    async def responses(
        self, requests: AsyncIterator[fusion_pb2.StreamFusedRequest], draining: Draining
    ) -> AsyncGenerator[fusion_pb2.StreamFusedResponse, None]:
        """Yield the protocol's version, then frames as the credits in `requests` allow, and heartbeats between them.

        Raises ServiceError when the stream cannot go on.
        """
        pipeline = Pipeline(
            self._in_order(),
            self._send,
            size=_Sent.num_bytes,
            may_share=lambda before, after: before.cursor.epoch == after.cursor.epoch,
            heartbeat_seconds=self._service.heartbeat_seconds,
        )

        async def read() -> None:
            async for message in requests:
                if message.WhichOneof("message") != "credit":
                    raise InvalidArgumentError("message: after `open` only credits are expected")
                pipeline.credits.grant(message.credit.blocks)

        try:
            async with draining.holding(pipeline), aclosing(pipeline.frames(read)) as frames:
                yield fusion_pb2.StreamFusedResponse(protocol_version=PROTOCOL_VERSION)
                async for frame in frames:
                    await self._list_for_backfill(frame)
                    yield _response(frame)
        finally:
            if not self._tokens_only:
                await asyncio.to_thread(self._fuser.flush)

    async def _in_order(self) -> AsyncIterator[OrderedWindow]:
        for window in self._windows:
            yield window

    async def _send(self, ordered: OrderedWindow) -> _Sent:
        """Compute one window; one that can never be fused is skipped with the reason."""
        split = ordered.pool or self._split
        window = await asyncio.to_thread(self._corpus.window, split, ordered.index)
        where = block_pb2.WindowRef(
            document=window.document,
            start_byte=window.start_byte,
            index=window.index,
            split=ordered.pool,
            **{"pass": ordered.pass_number},
        )
        skipped = _Sent(split, where, ordered.cursor, None)
        try:
            prompt = await asyncio.to_thread(self._fuser.encode, window.passage)
            return await self._fuse(window, prompt, skipped)
        except UnfusableTextError as error:
            logger.warning("window %d of %s/%s is skipped: %s", ordered.index, self._corpus.name, split, error)
            return replace(skipped, lacking=error.refused_by, reason=str(error))
        except QuorumLostError as error:
            if self._service.below_quorum == "wait":
                raise
            return replace(skipped, lacking=error.missing, missing=error.missing, reason=str(error))

    async def _fuse(self, window: Window, prompt: Prompt, empty: _Sent) -> _Sent:
        """Return `empty`, which names the window, with the block of the window."""
        settings, where = self._settings, empty.where
        if self._tokens_only:
            block = self._fuser.text.without_distributions(prompt)
            return replace(empty, block=encode_block(block, settings.dtype, where))
        num_tokens = prompt.encoding.num_tokens
        num_bytes = most_block_bytes(
            len(prompt.text), num_tokens, settings.k, settings.dtype, num_context_tokens=prompt.context_ids.size
        )
        if num_bytes > MAX_BLOCK_BYTES:
            raise FailedPreconditionError(
                f"k: a window of {num_tokens} tokens with {settings.k} candidates each can take {num_bytes} "
                f"bytes, and {MAX_BLOCK_BYTES} fit a message; ask for fewer candidates, or prepare smaller windows"
            )
        fused = await self._fuser.fuse(
            window.passage,
            prompt,
            names=self._fuser.names_for(window, settings.names),
            k=settings.k,
            streamed=True,
            place=Place(self._corpus.fingerprint(empty.split), window.index),
        )
        lacking = tuple(share.name for share in fused.block.shares if not share.present)
        encoded = encode_block(fused.block, settings.dtype, where)
        return replace(empty, block=encoded, lacking=lacking, missing=fused.missing)

    async def _list_for_backfill(self, frame: list[_Sent]) -> None:
        """List a frame's windows that lack sources for back-filling, before the client takes them as done."""
        windows: dict[str, list[BackfillWindow]] = defaultdict(list)
        for sent in frame:
            if sent.missing:
                windows[sent.split].append(BackfillWindow(index=sent.where.index, missing=sent.missing))
        skipped = sum(sent.block is None for sent in frame)
        corpus = self._corpus
        try:
            for split, listed in windows.items():
                await self._fuser.list_for_backfill(corpus.name, split, corpus.fingerprint(split), listed)
        except UnavailableError as error:
            if skipped:
                raise
            logger.warning("%s", error)
        for _ in range(skipped):
            self._fuser.metrics.skipped()


def _parts(request: fusion_pb2.StreamFusedOpen) -> tuple[Part, ...]:
    """Return the parts of a request; the stream's own split has the name ""."""
    return tuple(
        Part(
            part.num_windows,
            tuple(("" if pool.split == request.split else pool.split, pool.weight) for pool in part.pools),
        )
        for part in request.parts
    )


def _pools(request: fusion_pb2.StreamFusedOpen, corpus: Corpus) -> dict[str, Pool]:
    """Return the splits that the parts of a request name; raises NotFoundError for one that is not there."""
    pools = {}
    for number, part in enumerate(request.parts):
        for split in (pool.split for pool in part.pools):
            if split not in corpus.splits:
                raise NotFoundError(
                    f"parts[{number}].pools.split: {split!r} is not known; {corpus.name} has "
                    f"{', '.join(sorted(corpus.splits))}"
                )
            if split != request.split:
                pools[split] = Pool(
                    corpus.fingerprint(split), corpus.num_windows(split), corpus.windows_per_group(split)
                )
    return pools


def _response(frame: list[_Sent]) -> fusion_pb2.StreamFusedResponse:
    """Return a frame as it goes out; one without windows is a heartbeat."""
    if not frame:
        return fusion_pb2.StreamFusedResponse()
    return fusion_pb2.StreamFusedResponse(
        blocks=[sent.block for sent in frame if sent.block is not None],
        cursor=frame[-1].cursor.to_proto(),
        skipped=[
            fusion_pb2.SkippedWindow(
                window=sent.where, position=position, missing=sent.lacking, reason=sent.reason[:_REASON_CHARACTERS]
            )
            for position, sent in enumerate(frame)
            if sent.block is None
        ],
        degraded=sum(sent.block is not None and bool(sent.lacking) for sent in frame),
    )
