"""The byte projection written down with dictionaries, one row at a time: slow, and obvious."""

from __future__ import annotations

import math
from decimal import Decimal
from typing import Any

import numpy as np

from fusion_core.blocks import Block
from fusion_core.vocabulary import Encoding, Vocabulary


class Oracle:
    """The projection from the last source boundary alone, written down with dictionaries, one row at a time."""

    number: Any = float
    """What masses are computed in."""

    def exp(self, logprob: float) -> Any:
        return math.exp(logprob)

    def log(self, mass: Any) -> float:
        return math.log(mass)

    def __init__(self, source: Vocabulary, target: Vocabulary, block: Block, encoding: Encoding) -> None:
        self.source, self.target, self.block, self.encoding = source, target, block, encoding
        self.same = source.fingerprint == target.fingerprint
        tokens = [source.token_bytes(int(i)) for i in block.token_ids_T]
        targets = [target.token_bytes(int(i)) for i in encoding.token_ids_T]
        source_prefix = self.dummy(tokens, block.byte_ends_T)
        target_prefix = self.dummy(targets, encoding.byte_ends_T)
        self.text = b" " * source_prefix + block.text_bytes
        ends = [int(end) + source_prefix for end in block.byte_ends_T]
        self.starts = [0, *ends[:-1]]
        self.good = [
            self.text[a:b] == token and b > a and bool(ok)
            for a, b, token, ok in zip(self.starts, ends, tokens, block.mask_T, strict=True)
        ]
        target_ends = [int(end) + source_prefix for end in encoding.byte_ends_T]
        self.spans = list(zip([max(0, source_prefix - target_prefix), *target_ends[:-1]], target_ends, strict=True))
        self.prepend = target_prefix > source_prefix

    @staticmethod
    def dummy(tokens: list[bytes], ends: np.ndarray) -> int:
        return int(bool(tokens) and tokens[0][:1] == b" " and len(tokens[0]) == ends[0] + 1)

    def row_at(self, position: int) -> int:
        return max(i for i, start in enumerate(self.starts) if start <= position)

    def known(self, i: int) -> tuple[dict[int, float], float]:
        """(probability of every known id, mass of the unknown ones), scaled to sum to one."""
        ids, logprobs = self.block.topk_ids_TK[i].tolist(), self.block.topk_logprobs_TK[i].tolist()
        known = {x: self.exp(p) for x, p in zip(ids, logprobs, strict=True) if x >= 0}
        unseen = self.exp(self.block.tail_T[i])
        realised, gold = int(self.block.token_ids_T[i]), self.exp(self.block.gold_T[i])
        if realised not in known:
            unseen = max(self.number(0), unseen - gold)
        known[realised] = gold
        total = sum(known.values()) + unseen
        return {x: p / total for x, p in known.items()}, unseen / total

    def prefix_mass(self, i: int, prefix: bytes) -> tuple[float, float]:
        """(mass of all ids that start with the prefix, the part of it that belongs to unknown ids)."""
        if not prefix:
            return self.number(1), self.known(i)[1]
        known, unseen = self.known(i)
        others = [x for x in range(self.source.size) if x not in known]
        starting = sum(self.source.token_bytes(x).startswith(prefix) for x in others)
        share = unseen * starting / len(others) if others else self.number(0)
        return sum(p for x, p in known.items() if self.source.token_bytes(x).startswith(prefix)) + share, share

    def first_token(self, x: int, behind: bytes, prepend: bool) -> int:
        if not behind and self.same:
            return x if x < self.source.size else -1
        if not behind and x == self.source.eos_id:
            return -1 if self.target.eos_id is None else self.target.eos_id
        rest = self.source.token_bytes(x)[len(behind) :]
        return int(self.target.first_tokens([b" " * prepend + rest])[0]) if rest else -1

    def logprob_until(self, position: int) -> float:
        """Log-probability of the text before `position` on the realised path."""
        golds = [float(g) for g in self.block.gold_T]
        if position >= len(self.text):
            return sum(golds)
        i = self.row_at(position)
        inside = self.text[self.starts[i] : position]
        if not inside:
            return sum(golds[:i])
        return sum(golds[:i]) + (self.log(self.prefix_mass(i, inside)[0]) if self.good[i] else golds[i])

    def row(self, t: int) -> tuple[dict[int, float], float, float] | None:
        """(entries, tail, log-probability of the realised token); None where the row is masked."""
        start, end = self.spans[t]
        i = self.row_at(start)
        covering = [self.good[j] for j in range(i, len(self.starts)) if j == i or self.starts[j] < end]
        if not self.encoding.lossless_T[t] or start == end or not all(covering):
            return None
        behind = self.text[self.starts[i] : start]
        mass, tail = self.prefix_mass(i, behind)
        out: dict[int, float] = {}
        tail /= mass
        for x, p in self.known(i)[0].items():
            if self.source.token_bytes(x).startswith(behind):
                first = self.first_token(x, behind, self.prepend and t == 0)
                if first < 0:
                    tail += p / mass
                else:
                    out[first] = out.get(first, 0.0) + p / mass
        gold = min(0.0, self.logprob_until(end) - self.logprob_until(start))
        realised = int(self.encoding.token_ids_T[t])
        rest = 1.0 - out.pop(realised, 0.0)
        scale = (1.0 - math.exp(gold)) / rest if rest > 1e-12 else 0.0
        out = {x: p * scale for x, p in out.items()}
        out[realised] = math.exp(gold)
        return out, (tail * scale if rest > 1e-12 else 1.0 - math.exp(gold)), gold


class FollowOracle(Oracle):
    """The projection that follows source tokens: the same, with all hypotheses (id, row) in a dictionary of masses.

    Masses are of the whole text so far; an id is unknown when it is neither a candidate nor realised.
    """

    def rows(self, firsts_of_all: list[int]) -> list[tuple[dict[int, float], float, float] | None]:
        return list(self._rows(firsts_of_all, len(self.spans) - 1))

    def _rows(self, firsts_of_all: list[int], last: int) -> Any:
        state: tuple[dict[tuple[int, int], float], int, float] | None = None
        for t, (start, end) in enumerate(self.spans):
            i = self.row_at(start)
            covering = [self.good[j] for j in range(i, len(self.starts)) if j == i or self.starts[j] < end]
            if not self.encoding.lossless_T[t] or start == end or not all(covering):
                state = None
                yield None
                continue
            masses, unknown = self.at(start, state)
            total = sum(masses.values()) + unknown[0] * unknown[1]
            firsts = {
                (x, r): self.first_token(x, self.text[self.starts[r] : start], self.prepend and t == 0)
                for x, r in masses
            }
            out: dict[int, float] = {}
            for hypothesis, mass in masses.items():
                out[firsts[hypothesis]] = out.get(firsts[hypothesis], 0) + mass / total
            tail = out.pop(-1, 0) + unknown[0] * unknown[1] / total
            realised_id = int(self.encoding.token_ids_T[t])
            state, kept, moved = self.advance(t, i, masses, firsts, unknown, firsts_of_all)
            if t == last:
                kept = self.exp(sum(float(g) for g in self.block.gold_T))
            realised = kept / total
            needed = realised - out.get(realised_id, 0)
            moved_from = firsts.get((int(self.block.token_ids_T[i]), i), -1)
            if needed > 0 and moved_from >= 0 and moved_from != realised_id:
                taken = min(needed, moved / total, out[moved_from])
                out[moved_from] -= taken
                needed -= taken
            tail -= min(needed, tail)
            out[realised_id] = realised
            yield out, tail, self.log(realised)

    def path(self, row: int) -> float:
        return self.exp(sum(float(g) for g in self.block.gold_T[:row]))

    def reaching(self, row: int, position: int) -> tuple[dict[tuple[int, int], float], int, float]:
        """Known ids of a row that go on with the text up to the position; number and mass of the unknown ones."""
        known, unseen = self.known(row)
        done = self.text[self.starts[row] : position]
        path = self.path(row)
        found = {
            (x, row): path * p
            for x, p in known.items()
            if not done or (x < self.source.size and self.source.token_bytes(x).startswith(done))
        }
        others = [x for x in range(self.source.size) if x not in known]
        each = path * unseen / len(others) if others else self.number(0)
        return found, sum(self.source.token_bytes(x).startswith(done) for x in others), each

    def at(self, position: int, state: Any) -> tuple[dict[tuple[int, int], float], tuple[int, float]]:
        row = self.row_at(position)
        if state is None:
            masses, number, each = self.reaching(row, position)
            return masses, (number, each)
        masses, number, each = state
        if self.starts[row] == position:
            opened, number, each = self.reaching(row, position)
            masses = {**masses, **opened}
        return masses, (number, each)

    def advance(
        self, t: int, i: int, masses: Any, firsts: Any, unknown: tuple[int, float], firsts_of_all: list[int]
    ) -> Any:
        start, end = self.spans[t]
        realised_id = int(self.encoding.token_ids_T[t])
        row = max(j for j, begin in enumerate(self.starts) if begin < end)
        ends = [*self.starts[1:], len(self.text)]
        real = (int(self.block.token_ids_T[i]), i)
        kept = {h: m for h, m in masses.items() if firsts[h] == realised_id and h != real}
        moved = self.number(0)
        if row == i:
            kept[real] = masses[real]
            moved = masses[real] if firsts[real] != realised_id else self.number(0)
        for j in range(i + 1, row + 1):
            found, number, each = self.reaching(j, end)
            kept |= found
            moved += sum(found.values())
        number, each = 0, self.number(0)
        if end < ends[row]:
            _, number, each = self.reaching(row, end)
            if row == i:
                number = min(number, unknown[0])
                if self.starts[i] == start and not (self.prepend and t == 0):
                    known = self.known(i)[0]
                    number = min(number, sum(f == realised_id for x, f in enumerate(firsts_of_all) if x not in known))
            else:
                moved += number * each
        mass = sum(kept.values()) + number * each
        if end == ends[row]:
            kept.pop((int(self.block.token_ids_T[row]), row), None)  # it goes on as the row that opens there
        return (kept, number, each), mass, moved


class ExactOracle(FollowOracle):
    """The same in decimal numbers, whose exponents know no end: for rows of next to impossible tokens."""

    number = Decimal

    def exp(self, logprob: float) -> Decimal:
        return Decimal(float(logprob)).exp()

    def log(self, mass: Decimal) -> float:
        return float(mass.ln())
