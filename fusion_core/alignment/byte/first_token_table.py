"""The first target token of every remainder of every source token, looked up once.

Shape legend: V source ids, B bytes of all source ids together.
"""

from __future__ import annotations

import threading

import numpy as np

from fusion_core.arrays import Int32, Int64
from fusion_core.vocabulary import Vocabulary

UNKNOWN = -2
"""Entry of a key that is not looked up yet; -1 is the entry of a key without a target token."""


class FirstTokenTable:
    """One array of target ids by key, filled as keys are met; safe to use from several threads.

    Keys: 0..V-1 a whole source token; V..2V-1 the same after the target's dummy prefix, for the start of a text;
    2V + p the remainder of a source token from position p of the source's blob on.

    The end-of-text token goes to the target's by role, other control tokens have none. With the same vocabulary on both
    sides every whole token goes to itself, also where the tokenizer would never produce it.
    """

    def __init__(self, source: Vocabulary, target: Vocabulary) -> None:
        self.source, self.target = source, target
        values = np.full(2 * source.size + len(source.byte_table.bytes_B), UNKNOWN, dtype=np.int32)
        without_bytes_V = source.byte_table.offsets_V1[1:] == source.byte_table.offsets_V1[:-1]
        values[: source.size][without_bytes_V] = -1
        values[source.size : 2 * source.size][without_bytes_V] = -1
        if source.fingerprint == target.fingerprint:
            values[: source.size] = np.arange(source.size)
        elif source.eos_id is not None and target.eos_id is not None:
            values[source.eos_id] = values[source.size + source.eos_id] = target.eos_id
        self.values: Int32 = values
        self.num_first_U: Int32 | None = None
        self._lock = threading.Lock()

    def resolve(self, keys: Int64) -> None:
        """Look up the keys that are not known yet, and the remainders of their tokens behind the first target token."""
        with self._lock:
            keys = np.unique(keys)
            while len(keys := keys[self.values[keys] == UNKNOWN]):
                self._look_up(keys)
                keys = np.unique(self._behind(keys))

    def resolve_whole_tokens(self) -> None:
        """Look up every whole source token, and count how many begin with each target token."""
        if self.num_first_U is not None:
            return
        with self._lock:
            if self.num_first_U is None:
                self._look_up(np.flatnonzero(self.values[: self.source.size] == UNKNOWN))
                firsts_V = self.values[: self.source.size]
                self.num_first_U = np.bincount(firsts_V[firsts_V >= 0], minlength=self.target.size).astype(np.int32)

    def resolve_ahead(self) -> None:
        """Look up whole tokens and their remainders behind their first and their second target token.

        Later remainders are met only where a text agrees with more than two target tokens of a candidate.
        """
        self.resolve_whole_tokens()
        with self._lock:
            keys = np.arange(self.source.size)
            for _ in range(2):
                keys = np.unique(self._behind(keys))
                keys = keys[self.values[keys] == UNKNOWN]
                self._look_up(keys)

    def _look_up(self, keys: Int64) -> None:
        remainders = [self._remainder(key) for key in keys.tolist()]
        distinct = list(dict.fromkeys(remainders))
        first_of = dict(zip(distinct, self.target.first_tokens(distinct).tolist(), strict=True))
        self.values[keys] = [first_of[remainder] for remainder in remainders]

    def _behind(self, keys: Int64) -> Int64:
        """Return the keys of the tokens' remainders behind their first target token, without empty remainders."""
        size, source, target = self.source.size, self.source, self.target
        first = self.values[keys]
        keys, first = keys[first >= 0], first[first >= 0]
        whole = keys < 2 * size
        position = np.where(whole, source.byte_table.offsets_V1[keys % size], keys - 2 * size)
        token = np.where(whole, keys % size, np.searchsorted(source.byte_table.offsets_V1, position, side="right") - 1)
        length = target.byte_table.offsets_V1[first + 1] - target.byte_table.offsets_V1[first]
        position = position + length - (whole & (keys >= size))  # the dummy prefix is not the token's own
        left: Int64 = 2 * size + position[position < source.byte_table.offsets_V1[token + 1]]
        return left

    def _remainder(self, key: int) -> bytes:
        size = self.source.size
        if key < size:
            return self.source.token_bytes(key)
        if key < 2 * size:
            return b" " + self.source.token_bytes(key - size)
        position = key - 2 * size
        token = int(np.searchsorted(self.source.byte_table.offsets_V1, position, side="right")) - 1
        return self.source.byte_table.bytes_B[position : self.source.byte_table.offsets_V1[token + 1]].tobytes()
