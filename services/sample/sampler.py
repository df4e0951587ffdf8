"""Ask one source for the answers that are not in the store yet, many prompts at once."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from services.base.errors import (
    DeadlineExceededError,
    InvalidArgumentError,
    ResourceExhaustedError,
    UnavailableError,
)
from services.base.retry import Backoff
from services.sample.answers import AnswerStore
from services.source.client import AnswerStream, SourceClient
from services.wire.answer import Answer, AnswerPrompt, Sampling

_RETRIED = (UnavailableError, DeadlineExceededError, ResourceExhaustedError)


@dataclass(slots=True)
class Tally:
    """Numbers of answers that were sampled or were there, and of prompts that were refused, with the first reason."""

    sampled: int = 0
    kept: int = 0
    refused: int = 0
    reason: str = ""


class Sampler:
    """Fills the store of one source. Lives on one event loop.

    Args:
        address, application: where the source is served.
        store: of its answers.
        expected_vocabulary: fingerprint that the source must have.
        in_flight: prompts asked at once.
        attempts: for one prompt before the run fails.
        timeout_seconds: for the answers to one prompt.
    """

    def __init__(
        self,
        address: str,
        application: str,
        store: AnswerStore,
        *,
        expected_vocabulary: str,
        in_flight: int,
        attempts: int,
        timeout_seconds: float,
    ) -> None:
        self._address, self._application, self._store = address, application, store
        self._vocabulary, self._attempts, self._timeout_seconds = expected_vocabulary, attempts, timeout_seconds
        self._client = SourceClient(address, application, timeout_seconds=timeout_seconds)
        self._streams: dict[range, AnswerStream] = {}
        self._gate = asyncio.Semaphore(in_flight)
        self.tally = Tally()

    async def run(
        self, prompts: Iterable[AnswerPrompt], sampling: Sampling, progress: Callable[[int], None] = lambda done: None
    ) -> Tally:
        """Ask for what is missing of the answers to all prompts; `progress` receives how many prompts are done.

        What was answered is in the store whatever happens; raises ServiceError when a prompt found no answer in all
        attempts.
        """
        sampling = sampling.model_copy(update={"logprobs": True})
        running: set[asyncio.Task[None]] = set()
        asked: set[bytes] = set()
        done = reported = 0

        async def one(prompt: AnswerPrompt, missing: range) -> None:
            nonlocal done, reported
            try:
                await self._ask(prompt, sampling, missing)
            finally:
                asked.discard(prompt.identity)
                self._gate.release()
            done = reported = done + 1
            progress(done)

        try:
            for prompt in prompts:
                await self._gate.acquire()
                for task in [task for task in running if task.done()]:
                    running.discard(task)
                    task.result()
                missing = self._store.missing(prompt, sampling)
                self.tally.kept += sampling.num_answers - len(missing)
                if not missing or prompt.identity in asked:  # the same prompt twice, one right behind the other
                    self._gate.release()
                    done += 1
                    continue
                asked.add(prompt.identity)
                running.add(asyncio.create_task(one(prompt, missing)))
            await asyncio.gather(*running)
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)
            await asyncio.to_thread(self._store.flush)
        if done != reported:
            progress(done)
        return self.tally

    async def close(self) -> None:
        """End the streams and the connection."""
        await asyncio.gather(*(stream.close() for stream in self._streams.values()))
        await self._client.close()

    async def _ask(self, prompt: AnswerPrompt, sampling: Sampling, missing: range) -> None:
        """Store the missing answers to one prompt; a prompt that the source refuses is counted."""
        wanted = sampling.model_copy(update={"first_answer": missing.start, "num_answers": len(missing)})
        backoff = Backoff(0.5)
        for attempt in range(1, self._attempts + 1):
            # After a failure the prompt goes alone: what broke the stream may have been another prompt.
            try:
                answers = await (self._streamed(prompt, wanted) if attempt == 1 else self._alone(prompt, wanted))
            except InvalidArgumentError as error:
                if attempt > 1 or self._attempts == 1:
                    self.tally.refused += 1
                    self.tally.reason = self.tally.reason or str(error)
                    return
                continue
            except _RETRIED:
                if attempt == self._attempts:
                    raise
                await asyncio.sleep(backoff.next_pause())
                continue
            self._store.put(prompt, sampling, answers)
            self.tally.sampled += len(answers)
            return

    async def _streamed(self, prompt: AnswerPrompt, wanted: Sampling) -> list[Answer]:
        if wanted.numbers not in self._streams:
            self._streams[wanted.numbers] = AnswerStream(
                self._address,
                self._application,
                wanted,
                expected_vocabulary=self._vocabulary,
                timeout_seconds=self._timeout_seconds,
            )
        return await self._streams[wanted.numbers].answers(prompt)

    async def _alone(self, prompt: AnswerPrompt, wanted: Sampling) -> list[Answer]:
        [answers] = await self._client.generate([prompt], wanted, expected_vocabulary=self._vocabulary)
        return answers
