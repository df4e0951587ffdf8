"""The exact distribution over the target's first token, by enumerating what the source would write next.

Every projection gives a source token's mass to one target token at once. The truth needs the text that follows: the
target's first token for "the" can still become "there". Here the source is asked again and again until the bytes
decide, so this is the oracle for the mass off the realised path. Its cost is one model call per undecided
continuation: it is for small models, and for samples of positions of large ones with the undecided mass reported.

It is the truth given the source tokens up to a boundary. Source tokens of earlier rows that reach beyond the position
(`ByteConfig.follow_tokens`) are not part of it.

Shape legend: N prefixes of one call, V ids of the source, U ids of the target.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count

import numpy as np
import numpy.typing as npt

from fusion_core.vocabulary import Vocabulary

Float64 = npt.NDArray[np.float64]
Int32 = npt.NDArray[np.int32]
Bool = npt.NDArray[np.bool_]

NextTokenProbs = Callable[[Sequence[tuple[int, ...]]], Float64]
"""Takes N prefixes of source ids, returns [N, V] probabilities of the next id after each of them."""

_Candidates = tuple[Int32, Float64, list[bytes]]


@dataclass(frozen=True, slots=True, eq=False)
class FirstTokenReference:
    """The target's first token at one position, as the source's own continuations decide it.

    Attributes:
        probs_U: float64 probability of every target id, as far as it is decided.
        outside: mass of continuations that no target token can start (control tokens, text the target rewrites).
        undecided: mass that was left open by `min_mass`, `max_tokens` or `max_calls`.
        undecided_after_one: mass of first source tokens whose bytes alone do not decide. No projection that looks at
            one source token can be surer than that: its total variation from the truth is at most this mass.
        num_calls: prefixes that the source was asked for.

    probs_U, `outside` and `undecided` sum to one.
    """

    probs_U: Float64
    outside: float
    undecided: float
    undecided_after_one: float
    num_calls: int

    def total_variation(self, probs_U: Float64) -> float:
        """Distance of a distribution over target ids (its tail is what is missing to one) to this one.

        Undecided mass counts as a deviation unless it meets tail.
        """
        tail = max(0.0, 1.0 - float(probs_U.sum()))
        off = np.abs(probs_U - self.probs_U).sum() + abs(tail - self.outside - self.undecided)
        return float(off) / 2.0


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
        min_mass: float = 0.0,
        max_tokens: int = 8,
        max_calls: int = 10_000,
        batch_size: int = 64,
    ) -> FirstTokenReference:
        """The distribution of the target token that starts `behind` bytes after the end of `prefix`.

        Args:
            next_token: the source model.
            prefix: the source ids before the position (with BOS where the model needs it).
            behind: bytes of the next source token that lie before the position; the source is conditioned on a next
                token that starts with them, as in the byte projection.
            min_mass: continuations below this mass stay undecided.
            max_tokens: longest continuation in source tokens.
            max_calls: largest number of prefixes to ask the source for.
            batch_size: prefixes per call of `next_token`.

        Raises:
            ValueError: the source gives no mass to tokens that start with `behind`.
        """
        probs_U = np.zeros(self.target.size)
        outside = undecided = undecided_after_one = 0.0
        num_calls, order = 0, count()
        # Largest mass first; the counter keeps the comparison away from the rest of the entry.
        heap: list[tuple[float, int, tuple[int, ...], bytes]] = [(-1.0, next(order), (), b"")]
        while heap and num_calls < max_calls:
            batch = [heapq.heappop(heap) for _ in range(min(batch_size, len(heap), max_calls - num_calls))]
            num_calls += len(batch)
            probs_NV = next_token([(*prefix, *tokens) for _, _, tokens, _ in batch])
            for (negative_mass, _, tokens, text), probs_V in zip(batch, probs_NV, strict=True):
                children, closed = self._children(probs_V, -negative_mass, text, b"" if tokens else behind)
                for target_id, mass in closed:
                    if target_id < 0:
                        outside += mass
                    else:
                        probs_U[target_id] += mass
                ids, masses, texts = children
                first_U, decided = self._decide(texts)
                np.add.at(probs_U, first_U[decided & (first_U >= 0)], masses[decided & (first_U >= 0)])
                outside += float(masses[decided & (first_U < 0)].sum())
                if not tokens:
                    undecided_after_one = float(masses[~decided].sum())
                for child in np.flatnonzero(~decided):
                    if masses[child] < min_mass or len(tokens) + 1 >= max_tokens:
                        undecided += float(masses[child])
                    elif masses[child] > 0.0:
                        entry = (-float(masses[child]), next(order), (*tokens, int(ids[child])), texts[child])
                        heapq.heappush(heap, entry)
        undecided += sum(-entry[0] for entry in heap)
        return FirstTokenReference(probs_U, outside, undecided, undecided_after_one, num_calls)

    def _children(
        self, probs_V: Float64, mass: float, text: bytes, behind: bytes
    ) -> tuple[_Candidates, list[tuple[int, float]]]:
        """(continuations with bytes, outcomes that end the text) of one node, with the node's mass spread over them."""
        source = self.source
        low, high = source.prefix_range(behind)
        ids = source.sorted_ids_V[low:high]
        total = float(probs_V[ids].sum()) if behind else float(probs_V.sum())
        if total <= 0.0:
            raise ValueError(f"behind: the source gives no mass to tokens that start with {behind!r}")
        masses = mass * probs_V[ids] / total
        lengths = source.offsets_V1[ids + 1] - source.offsets_V1[ids]
        closed: list[tuple[int, float]] = []
        if not behind:
            closed.append((-1, mass * (1.0 - float(probs_V[ids].sum()) / total)))  # a padded output layer
            for index in np.flatnonzero(lengths == 0):
                is_end = ids[index] == source.eos_id
                closed.append((self._at_end_of_text(text) if is_end else -1, float(masses[index])))
        open_ = (lengths > 0) & (masses > 0.0)
        ids, masses = ids[open_], masses[open_]
        texts = [text + source.token_bytes(int(token))[len(behind) :] for token in ids]
        return (ids, masses, texts), closed

    def _at_end_of_text(self, text: bytes) -> int:
        """The outcome when the source ends the text after these bytes; -1 for none."""
        if not text:
            return -1 if self.target.eos_id is None else self.target.eos_id
        return int(self.target.first_tokens([text])[0])

    def _decide(self, texts: list[bytes]) -> tuple[Int32, Bool]:
        """(first target id, whether no further text can change it) of every text."""
        decided = np.fromiter((self._is_decided(text) for text in texts), dtype=np.bool_, count=len(texts))
        first = np.full(len(texts), -1, dtype=np.int32)
        which = np.flatnonzero(decided)
        first[which] = self.target.first_tokens([texts[index] for index in which])
        return first, decided

    def _is_decided(self, text: bytes) -> bool:
        """Whether a token boundary is certain: two bytes in a row that no target token holds, after them a character.

        Merges and paths of a Unigram model never cross such a place, so what stands before it is split the same
        whatever follows. The whole character after it is for pre-tokenizers that look one character ahead.
        """
        for at in range(1, len(text)):
            if not self._joined_256_256[text[at - 1], text[at]]:
                after = text[at:]
                length = 1 if after[0] < 0x80 else 2 if after[0] < 0xE0 else 3 if after[0] < 0xF0 else 4
                return len(after) >= length
        return False


def _byte_pairs_within_tokens(vocabulary: Vocabulary) -> Bool:
    """[256, 256] table: whether any token holds the two bytes next to each other."""
    joined = np.zeros((256, 256), dtype=np.bool_)
    blob_B = vocabulary.blob_B
    inside = np.ones(max(0, len(blob_B) - 1), dtype=np.bool_)
    ends = vocabulary.offsets_V1[1:-1]
    inside[ends[(ends > 0) & (ends < len(blob_B))] - 1] = False
    joined[blob_B[:-1][inside], blob_B[1:][inside]] = True
    return joined
