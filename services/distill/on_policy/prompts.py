"""The prompts of a run's rounds: drawn from files in an order that only the seed decides."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from fusion_core.arrays import Int64
from services.base.errors import FailedPreconditionError, SettingError
from services.sample.prompts import read_prompts
from services.wire.answer import AnswerPrompt

KEY = "distill.on_policy.prompts"


@dataclass(frozen=True, slots=True)
class PromptFiles:
    """Files of prompts, which are read anew for every round: only the prompts of one round are in memory.

    Attributes:
        patterns: globs of the files.
        num_prompts: prompts in them.
        fingerprint: hash over all prompts in order.
        has_messages: whether one of them is messages, which need a chat template.
    """

    patterns: tuple[str, ...]
    num_prompts: int
    fingerprint: str
    has_messages: bool

    @classmethod
    def read(cls, patterns: Sequence[str]) -> PromptFiles:
        """Read all prompts once; SettingError names the file and row that is wrong, or says that there are none."""
        digest, num_prompts, has_messages = hashlib.sha256(), 0, False
        try:
            for prompt in read_prompts(patterns):
                digest.update(prompt.identity)
                num_prompts += 1
                has_messages |= prompt.is_messages
        except SettingError as error:
            raise SettingError(KEY, error.problem) from error
        if not num_prompts:
            raise SettingError(KEY, "the files hold no prompt")
        return cls(tuple(patterns), num_prompts, digest.hexdigest()[:32], has_messages)

    def check_template(self, chat_template: str | None) -> None:
        """Raise SettingError when a prompt is messages, and the target has no chat template to read them by."""
        if self.has_messages and chat_template is None:
            raise SettingError(KEY, "a row holds messages, and the target reads none; set target.chat_template")

    def check_same(self, fingerprint: str) -> None:
        """Raise FailedPreconditionError when the files hold others than the prompts with this fingerprint."""
        if fingerprint != self.fingerprint:
            raise FailedPreconditionError(f"{KEY}: the files have changed since the run began")

    def drawn(self, first: int, count: int, seed: int) -> list[AnswerPrompt]:
        """Return the prompts of draws `first` to `first + count - 1`; no prompt comes again before all have come.

        Raises FailedPreconditionError when the files are no longer those that were read first.
        """
        places = [self._place(draw, seed) for draw in range(first, first + count)]
        wanted, digest = dict.fromkeys(places), hashlib.sha256()
        found: dict[int, AnswerPrompt] = {}
        for place, prompt in enumerate(read_prompts(self.patterns)):
            digest.update(prompt.identity)
            if place in wanted:
                found[place] = prompt
        self.check_same(digest.hexdigest()[:32])
        return [found[place] for place in places]

    def _place(self, draw: int, seed: int) -> int:
        number, within = divmod(draw, self.num_prompts)
        return int(_order(seed, number, self.num_prompts)[within])


@lru_cache(maxsize=2)
def _order(seed: int, number: int, num_prompts: int) -> Int64:
    """Return the order of a pass over the prompts."""
    return np.random.default_rng([seed, number]).permutation(num_prompts)
