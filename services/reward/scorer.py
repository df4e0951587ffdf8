"""Answers of many callers, scored together: those that wait go through the model in one batch."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from fusion_core.arrays import Float64, Int32
from services.base.errors import UnavailableError
from services.models.revision import weights_revision
from services.reward.config import RewardServiceConfig
from services.reward.model import CARD, RewardModel


class BatchScorer:
    """A function from batches to scores, shared by callers on one event loop; batches run on a thread of its own.

    Args:
        score: from conversations in tokens to their scores.
        batch_tokens: tokens of a batch, padding included; a longer conversation is a batch of its own.
    """

    def __init__(self, score: Callable[[Sequence[Int32]], Float64], batch_tokens: int) -> None:
        self._score, self._batch_tokens = score, batch_tokens
        self._waiting: deque[tuple[Int32, asyncio.Future[float]]] = deque()
        self._arrived = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="reward-model")
        self._running = asyncio.create_task(self._run())

    async def score(self, ids: Int32) -> float:
        """Return the score of a conversation; one whose caller waits no longer is not scored."""
        found: asyncio.Future[float] = asyncio.get_running_loop().create_future()
        self._waiting.append((ids, found))
        self._arrived.set()
        return await found

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._arrived.wait()
            self._arrived.clear()
            while batch := self._next_batch():
                try:
                    scores = await loop.run_in_executor(self._thread, self._score, [ids for ids, _ in batch])
                except Exception as error:  # of this batch alone: the callers get it, and the next batch is tried
                    for _, found in batch:
                        if not found.done():
                            found.set_exception(error)
                    continue
                for (_, found), score in zip(batch, scores, strict=True):
                    if not found.done():
                        found.set_result(float(score))

    def _next_batch(self) -> list[tuple[Int32, asyncio.Future[float]]]:
        batch: list[tuple[Int32, asyncio.Future[float]]] = []
        longest = 0
        while self._waiting:
            ids, found = self._waiting[0]
            longest = max(longest, len(ids))
            if batch and longest * (len(batch) + 1) > self._batch_tokens:
                break
            self._waiting.popleft()
            if not found.done():
                batch.append((ids, found))
        return batch

    async def close(self) -> None:
        """End the thread; who still waits is cancelled."""
        self._running.cancel()
        await asyncio.gather(self._running, return_exceptions=True)
        for _, found in self._waiting:
            found.cancel()
        await asyncio.to_thread(self._thread.shutdown)


class ServedModel:
    """The model of a replica, loaded as soon as its folder is there. Lives on one event loop."""

    def __init__(self, config: RewardServiceConfig) -> None:
        assert config.model is not None
        self._config, self.folder = config, Path(config.model)
        self.revision = ""
        self._loading = asyncio.Lock()
        self._model: RewardModel | None = None
        self._batches: BatchScorer | None = None

    async def opened(self) -> tuple[RewardModel, BatchScorer]:
        """Return the model; raises UnavailableError as long as there is none."""
        async with self._loading:
            if self._model is None or self._batches is None:
                if not (self.folder / CARD).is_file():
                    raise UnavailableError(f"model: there is none in {self.folder} yet; `fusion reward train` makes it")
                try:
                    self._model = await asyncio.to_thread(self._load)
                except ValueError as error:
                    raise UnavailableError(str(error)) from error
                model, most = self._model, self._config.batch_tokens
                self._batches = BatchScorer(lambda ids: model.score(ids, batch_tokens=most), most)
            return self._model, self._batches

    def _load(self) -> RewardModel:
        import torch

        torch.set_num_threads(self._config.threads)
        self.revision = weights_revision(self.folder)
        return RewardModel.open(self.folder, device="auto" if self._config.num_gpus else "cpu")

    async def close(self) -> None:
        if self._batches is not None:
            await self._batches.close()
