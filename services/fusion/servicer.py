"""The alignment-fusion service as a Ray Serve deployment."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Sequence
from contextlib import aclosing
from typing import Any

from fusion.v1 import fusion_pb2
from services.base.concurrency import gather_or_cancel
from services.base.errors import FailedPreconditionError, InvalidArgumentError, NotFoundError
from services.corpus.ledger import Corpus
from services.fusion.config import FusionServiceConfig
from services.fusion.fuser import Fuser
from services.fusion.result_settings import result_settings
from services.fusion.stream import AnswerSettings, FusedStream, block_windows
from services.models.prompt import Prompt
from services.rpc.auth import accepted_tokens
from services.rpc.client_limits import ClientLimits
from services.rpc.draining import Draining
from services.rpc.health import health_response
from services.rpc.methods import bidirectional, public_unary, unary
from services.wire.block import check_dtype, encode_block, most_block_bytes
from services.wire.passage import passages_of
from services.wire.protocol import MAX_BLOCK_BYTES, PROTOCOL_VERSION

logger = logging.getLogger("ray.serve")


class FusionServicer:
    """Methods of fusion.v1.FusionService and grpc.health.v1.Health."""

    async def __init__(self, config: FusionServiceConfig) -> None:  # type: ignore[misc]  # Serve awaits constructors
        accepted_tokens()  # refuses a malformed token now, not at every call
        self._config = config
        self.client_limits = ClientLimits(config.service.per_client, "service.per_client")
        self._corpora = {corpus.name: corpus for corpus in map(Corpus.open, config.corpora)}
        splits = {
            f"{corpus.name}/{split}": corpus.fingerprint(split)
            for corpus in self._corpora.values()
            for split in corpus.splits
        }
        self._fuser = Fuser(config, splits)
        await asyncio.to_thread(self._fuser.compile_loops)  # before health says SERVING
        self._draining = Draining(self._flush)
        logger.info("fusing %s into %s", ", ".join(s.name for s in config.sources), config.tokenizer)

    @unary
    async def GetFusionInfo(self, request: fusion_pb2.GetFusionInfoRequest) -> fusion_pb2.GetFusionInfoResponse:
        config = self._config
        self._report_streams()
        statuses = await self._fuser.statuses()
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
                    block_windows=block_windows(corpus, split),
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
        settings = self._settings(request)
        prompts = await asyncio.to_thread(lambda: [self._fuser.encode(passage) for passage in passages])
        _check_size(prompts, settings)
        fused = await gather_or_cancel(
            *(
                self._fuser.fuse(passage, prompt, names=settings.names, k=settings.k)
                for passage, prompt in zip(passages, prompts, strict=True)
            )
        )
        return fusion_pb2.FuseResponse(blocks=[encode_block(block, settings.dtype) for block, _ in fused])

    @bidirectional
    async def StreamFused(
        self, requests: AsyncIterator[fusion_pb2.StreamFusedRequest]
    ) -> AsyncGenerator[fusion_pb2.StreamFusedResponse, None]:
        stream = self._open_stream(await anext(requests, None))
        async with aclosing(stream.responses(requests, self._draining)) as responses:
            async for response in responses:
                self._report_streams()
                yield response
        self._report_streams()

    @public_unary
    async def Check(self, request: Any) -> Any:
        return await health_response(request, "fusion.v1.FusionService", self._fuser.problem)

    async def close(self) -> None:
        """End streams and connections, and write windows that are only in memory to the store."""
        await self._draining.close()
        await self._fuser.close()

    async def _flush(self) -> None:
        await asyncio.to_thread(self._fuser.flush)

    def _open_stream(self, first: fusion_pb2.StreamFusedRequest | None) -> FusedStream:
        if first is None or first.WhichOneof("message") != "open":
            raise InvalidArgumentError("message: a stream starts with `open`")
        request = first.open
        if request.protocol_version not in {0, PROTOCOL_VERSION}:
            raise FailedPreconditionError(
                f"protocol_version: the client speaks {request.protocol_version}, this service {PROTOCOL_VERSION}"
            )
        if request.dataset not in self._corpora:
            raise NotFoundError(f"dataset: {request.dataset!r} is not known; this service has {_listed(self._corpora)}")
        corpus = self._corpora[request.dataset]
        if request.split not in corpus.splits:
            raise NotFoundError(f"split: {request.split!r} is not known; {corpus.name} has {_listed(corpus.splits)}")
        return FusedStream(request, corpus, self._settings(request), self._fuser, self._config.service)

    def _settings(self, request: fusion_pb2.FuseRequest | fusion_pb2.StreamFusedOpen) -> AnswerSettings:
        """Return the settings of a request; raises FailedPreconditionError when it expects another vocabulary."""
        target, max_k = self._fuser.target, self._config.fusion.k_out
        if request.expected_vocabulary not in {"", target.fingerprint}:
            raise FailedPreconditionError(
                f"expected_vocabulary: {request.expected_vocabulary} was asked for, but this service fuses into "
                f"{target.fingerprint}"
            )
        k = request.k if request.HasField("k") else max_k
        if not 1 <= k <= max_k:
            raise InvalidArgumentError(f"k: must be 1 to {max_k}, got {k}")
        return AnswerSettings(k, check_dtype(request.dtype), self._fuser.check_names(request.sources))

    def _report_streams(self) -> None:
        self._fuser.metrics.under_way(self._draining.streams, self._draining.in_flight)


def _check_size(prompts: Sequence[Prompt], settings: AnswerSettings) -> None:
    """Raise InvalidArgumentError, before any source has worked, when the answer might not fit a message."""
    num_bytes = sum(
        most_block_bytes(
            len(prompt.text),
            prompt.encoding.num_tokens,
            settings.k,
            settings.dtype,
            num_context_tokens=prompt.context_ids.size,
        )
        for prompt in prompts
    )
    if num_bytes > MAX_BLOCK_BYTES:
        raise InvalidArgumentError(
            f"texts: with {settings.k} candidates a token the answer can take {num_bytes} bytes, and {MAX_BLOCK_BYTES} "
            f"fit a message; send fewer texts at once, or ask for a smaller k"
        )


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)) or "none"
