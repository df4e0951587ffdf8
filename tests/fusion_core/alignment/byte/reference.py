"""The exact distribution over the target's next token, by enumerating what the source would write next.

Every projection gives a source token's mass to target tokens at once. The truth needs the text that follows: the
target's first token for "the" can still become "there". Here the source is asked again and again until the bytes
decide, so this is the oracle for the mass off the realised path. Its cost is one model call per undecided
continuation: it is for small models, and for samples of positions of large ones with the undecided mass reported.

Two questions can be asked. With `behind`, what follows the last source boundary, for a next source token that starts
with some bytes: what a projection from the last row alone says. With `given`, what follows some target tokens,
whatever source tokens wrote them: what a target that has read those tokens should say (`ByteConfig.follow_tokens`).

Shape legend: N prefixes of one call, V ids of the source, U ids of the target, C continuations by one token.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from itertools import count
from typing import NamedTuple

import numpy as np

from fusion_core.arrays import Bool, Float64, Int32
from fusion_core.vocabulary import Vocabulary
from tests.fusion_core.alignment.byte.first_token import FirstTokenReference, Node, Tally

NextTokenProbs = Callable[[Sequence[tuple[int, ...]]], Float64]
"""Takes N prefixes of source ids, returns [N, V] probabilities of the next id after each of them."""

_SHORT = 30.0
"""How much sooner it is the turn of what has not reached the position: little of its mass goes on as given."""
_DISAGREES = -2
"""In place of a target id: the text does not start with the given target tokens."""


class _Children(NamedTuple):
    """All continuations of a node by one token that were looked at, and the mass of the others."""

    ids_C: Int32
    masses_C: Float64
    texts: list[bytes]
    next_C: Int32
    """Target id that follows the given ones, -1 for none, `_DISAGREES` where the given ones do not come."""
    decided_C: Bool
    ignored: float


class ReferenceEnumerator:
    """Enumerates source continuations for one pair of vocabularies."""

    def __init__(self, source: Vocabulary, target: Vocabulary) -> None:
        self.source, self.target = source, target
        self._joined_256_256 = _byte_pairs_within_tokens(target)

    def first_token(
        self,
        next_token: NextTokenProbs,
        prefix: Sequence[int],
        behind: bytes = b"",
        *,
        given: Sequence[int] = (),
        path: Sequence[int] = (),
        min_mass: float = 0.0,
        max_tokens: int = 8,
        max_calls: int = 10_000,
        batch_size: int = 64,
        ignore_share: float = 0.0,
    ) -> FirstTokenReference:
        """The distribution of the target token that starts `behind` bytes, or the `given` tokens, after `prefix`.

        Args:
            next_token: the source model.
            prefix: the source ids before the position (with BOS where the model needs it).
            behind: bytes of the next source token that lie before the position; the source is conditioned on a next
                token that starts with them.
            given: target ids that follow the prefix; the source is conditioned on texts whose target tokenisation
                starts with them, in whatever source tokens they are written.
            path: the realised source ids after the prefix, at least to the end of `given`.
            min_mass: continuations below this mass stay undecided.
            max_tokens: longest continuation in source tokens.
            max_calls: largest number of prefixes to ask the source for.
            batch_size: prefixes per call of `next_token`.
            ignore_share: continuations by one token below this share of all that are possible are not looked at, and
                stay undecided; the realised one always is.

        Raises:
            ValueError: `behind` and `given` are both set, or the source gives no mass to what they ask for.
        """
        if behind and given:
            raise ValueError("given: not allowed together with behind")
        before = b"".join(self.target.token_bytes(token) for token in given)
        tally = Tally(np.zeros(self.target.size), np.zeros(self.target.size), np.zeros(self.target.size))
        order = count()
        # Largest mass first, the realised tokens before all. The counter keeps the comparison away from the node.
        tally.heap = [(-np.inf, next(order), Node((), b"", 1.0, -1, True, False))]
        while tally.heap and tally.num_calls < max_calls:
            # A realised token goes alone: what follows it weighs more than what is waiting.
            size = 1 if tally.heap[0][2].on_path else min(batch_size, len(tally.heap), max_calls - tally.num_calls)
            batch = [heapq.heappop(tally.heap)[2] for _ in range(size)]
            tally.num_calls += len(batch)
            probs_NV = next_token([(*prefix, *node.tokens) for node in batch])
            for node, probs_V in zip(batch, probs_NV, strict=True):
                children = self._children(node, probs_V, behind, before, tuple(given), path, ignore_share, tally)
                for child in self._account(node, children, before, path, tally):
                    if child.mass < min_mass or len(child.tokens) >= max_tokens:
                        tally.leave(child)
                    else:
                        weight = np.inf if child.on_path else _SHORT if len(child.text) < len(before) else 1.0
                        heapq.heappush(tally.heap, (-child.mass * weight, next(order), child))
        for _, _, node in tally.heap:
            tally.leave(node)
        return tally.scaled("given" if given else "behind")

    def _children(
        self,
        node: Node,
        probs_V: Float64,
        behind: bytes,
        before: bytes,
        given: tuple[int, ...],
        path: Sequence[int],
        ignore_share: float,
        tally: Tally,
    ) -> _Children:
        """The continuations of a node by one token; outcomes that end the text go to the tally at once."""
        source = self.source
        must = before[len(node.text) :] if node.tokens or not behind else behind
        low, high = source.byte_table.prefix_range(must)
        ids = source.byte_table.sorted_ids_V[low:high]
        total = float(probs_V.sum())
        if behind and not node.tokens:
            total = float(probs_V[ids].sum())  # everything else is excluded by what is asked
            if total <= 0.0:
                raise ValueError(f"behind: the source gives no mass to tokens that start with {behind!r}")
        if not must:
            self._end(node, probs_V * (node.mass / total), given, tally)
        elif before:
            ids = np.concatenate([ids, self._tokens_within(must)])
        masses = node.mass * probs_V[ids] / total
        open_ = (source.byte_table.offsets_V1[ids + 1] > source.byte_table.offsets_V1[ids]) & (masses > 0.0)
        seen = open_ & (masses >= ignore_share * masses[open_].sum())
        if node.on_path and len(node.tokens) < len(path):
            seen |= open_ & (ids == path[len(node.tokens)])
        ignored = float(masses[open_ & ~seen].sum())
        ids, masses = ids[seen], masses[seen]
        skip = len(behind) if not node.tokens else 0
        texts = [node.text + source.token_bytes(int(token))[skip:] for token in ids]
        next_C, decided_C = self._decide(texts, given, len(before))
        return _Children(ids, masses, texts, next_C, decided_C, ignored)

    def _account(self, node: Node, children: _Children, before: bytes, path: Sequence[int], tally: Tally) -> list[Node]:
        """Books what is decided; returns the continuations that are not."""
        ids_C, masses_C, texts, next_C, decided_C, ignored = children
        tally.decide(next_C[decided_C], masses_C[decided_C])
        short_C = np.fromiter((len(text) <= len(before) for text in texts), dtype=np.bool_, count=len(texts))
        short_C &= bool(before)
        if node.beside:
            tally.beside += float(masses_C[decided_C & (next_C >= -1)].sum())
        if node.on_path:
            first_C = ~short_C & (next_C != _DISAGREES)
            tally.first_decided += float(masses_C[first_C & decided_C].sum())
            tally.first_undecided += float(masses_C[~short_C & ~decided_C].sum()) + ignored
            tally.first_mass += float(masses_C[first_C].sum()) + ignored
            np.add.at(tally.looked_at_U, next_C[first_C & (next_C >= 0)], masses_C[first_C & (next_C >= 0)])
            tally.undecided += ignored
        elif ignored:
            tally.leave(node, ignored)
        found = []
        for c in np.flatnonzero(~decided_C):
            tokens = (*node.tokens, int(ids_C[c]))
            on_path = bool(node.on_path and short_C[c] and tokens == tuple(path[: len(tokens)]))
            beside = bool(node.beside or (node.on_path and short_C[c] and not on_path))
            found.append(Node(tokens, texts[c], float(masses_C[c]), int(next_C[c]), on_path, beside))
        return found

    def _end(self, node: Node, masses_V: Float64, given: tuple[int, ...], tally: Tally) -> None:
        """Books the outcomes that end the text: control tokens, and ids beyond the table (a padded output layer)."""
        source = self.source
        without = np.flatnonzero(np.diff(source.byte_table.offsets_V1) == 0)
        masses = np.append(masses_V[without], masses_V[source.size :].sum())
        outcomes = np.full(len(masses), -1, dtype=np.int32)
        outcomes[:-1][without == source.eos_id] = self._at_end_of_text(node.text, given)
        tally.decide(outcomes, masses)
        booked = float(masses[outcomes != _DISAGREES].sum())
        if node.on_path:
            tally.first_decided += booked
            tally.first_mass += booked
            if (ended := outcomes >= 0).any():
                np.add.at(tally.looked_at_U, outcomes[ended], masses[ended])
        elif node.beside:
            tally.beside += booked

    def _tokens_within(self, text: bytes) -> Int32:
        """Source ids whose bytes are a proper, non-empty beginning of the text."""
        found: list[int] = []
        for length in range(1, len(text)):
            low, high = self.source.byte_table.prefix_range(text[:length])
            for rank in range(low, high):  # in byte order, tokens equal to the prefix come first
                token = int(self.source.byte_table.sorted_ids_V[rank])
                if self.source.byte_table.offsets_V1[token + 1] - self.source.byte_table.offsets_V1[token] != length:
                    break
                found.append(token)
        return np.array(found, dtype=np.int32)

    def _at_end_of_text(self, text: bytes, given: tuple[int, ...]) -> int:
        """The outcome when the source ends the text after these bytes; -1 for none."""
        row = self.target.leading_tokens([text], len(given) + 1)[0] if text else np.full(1, -1)
        if tuple(row[: len(given)]) != given:
            return _DISAGREES
        if len(text) == sum(len(self.target.token_bytes(token)) for token in given):
            return -1 if self.target.eos_id is None else self.target.eos_id
        return int(row[len(given)])

    def _decide(self, texts: list[bytes], given: tuple[int, ...], num_before: int) -> tuple[Int32, Bool]:
        """(target id after the given ones, whether no further text can change it) of every text."""
        decided = np.fromiter((self._is_decided(text, num_before) for text in texts), np.bool_, count=len(texts))
        rows = self.target.leading_tokens(texts, len(given) + 1)
        next_ = rows[:, len(given)].copy()
        if given:
            next_[(rows[:, : len(given)] != np.array(given)).any(axis=1)] = _DISAGREES
        return next_, decided

    def _is_decided(self, text: bytes, num_before: int) -> bool:
        """Whether a token boundary is certain: two bytes in a row that no target token holds, after them a character.

        Merges and paths of a Unigram model never cross such a place, so what stands before it is split the same
        whatever follows. The whole character after it is for pre-tokenizers that look one character ahead.
        """
        for at in range(num_before + 1, len(text)):
            if not self._joined_256_256[text[at - 1], text[at]]:
                after = text[at:]
                length = 1 if after[0] < 0x80 else 2 if after[0] < 0xE0 else 3 if after[0] < 0xF0 else 4
                return len(after) >= length
        return False


def _byte_pairs_within_tokens(vocabulary: Vocabulary) -> Bool:
    """[256, 256] table: whether any token holds the two bytes next to each other."""
    joined = np.zeros((256, 256), dtype=np.bool_)
    bytes_B = vocabulary.byte_table.bytes_B
    inside = np.ones(max(0, len(bytes_B) - 1), dtype=np.bool_)
    ends = vocabulary.byte_table.offsets_V1[1:-1]
    inside[ends[(ends > 0) & (ends < len(bytes_B))] - 1] = False
    joined[bytes_B[:-1][inside], bytes_B[1:][inside]] = True
    return joined
