"""The published methods written down from their papers, slow and obvious: oracles for tests and benchmarks.

Nothing here shares code with `fusion_core.alignment`; edit distances come from the library `editdistance`, which the
reference implementations use.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

import editdistance
import numpy as np

from fusion_core.blocks import Block
from fusion_core.vocabulary import Encoding, Vocabulary


def spelled(piece: bytes) -> str:
    return piece.decode("utf-8", "surrogateescape")


def nearest(piece: str, candidates: Sequence[str]) -> tuple[int, int]:
    """The place of the first candidate at minimum edit distance, and that distance."""
    distances = [editdistance.eval(piece, candidate) for candidate in candidates]
    return distances.index(min(distances)), min(distances)


def candidates_of(target: Vocabulary) -> dict[str, int]:
    """Target pieces in order of their ids; of several ids with the same bytes, the one that its tokenizer produces."""
    ids_of: dict[bytes, list[int]] = {}
    for token_id in range(target.size):
        if target.token_bytes(token_id):
            ids_of.setdefault(target.token_bytes(token_id), []).append(token_id)
    chosen = {}
    for piece, ids in ids_of.items():
        produced = int(target.first_tokens([piece])[0])
        chosen[spelled(piece)] = produced if produced in ids else ids[0]
    return dict(sorted(chosen.items(), key=lambda item: item[1]))


def co_occurrences(documents: list[list[int]], window: int) -> dict[int, Counter[int]]:
    counts: dict[int, Counter[int]] = {}
    for ids in documents:
        for i, token in enumerate(ids):
            for j in range(max(0, i - window), min(i + window + 1, len(ids))):
                if i != j:
                    counts.setdefault(token, Counter())[ids[j]] += 1
    return counts


def cosine(left: Counter[int], right: Counter[int]) -> float:
    square = sum(n * n for n in left.values()) * sum(n * n for n in right.values())
    return sum(n * right[context] for context, n in left.items()) / math.sqrt(square) if square else 0.0


def build_map(
    source: Vocabulary, target: Vocabulary, strategy: str, corpus: list[bytes] | None = None, window: int = 5
) -> list[int]:
    """FuseLLM's vocabulary map, source id to target id, by comparing every piece with every piece."""
    candidates = candidates_of(target)
    pieces = [spelled(source.token_bytes(i)) for i in range(source.size)]
    result = [candidates.get(piece, -1) for piece in pieces]
    missing = [i for i, piece in enumerate(pieces) if piece and result[i] == -1]
    if strategy == "co_occurrence":
        of_target = co_occurrences([target.encode(text).token_ids_T.tolist() for text in corpus or []], window)
        of_source = co_occurrences([source.encode(text).token_ids_T.tolist() for text in corpus or []], window)
        shared = set(result)
        in_target = {i: Counter({c: n for c, n in near.items() if c in shared}) for i, near in of_target.items()}
        in_source: dict[int, Counter[int]] = {}
        for i, near in of_source.items():
            in_source[i] = Counter()
            for context, n in near.items():
                if result[context] != -1:
                    in_source[i][result[context]] += n
    chosen = {}
    for i in missing if strategy != "exact" else ():
        distances = {target_id: editdistance.eval(pieces[i], piece) for piece, target_id in candidates.items()}
        tied = [target_id for target_id, distance in distances.items() if distance == min(distances.values())]
        best = tied[0]
        if strategy == "co_occurrence":
            similarities = [round(cosine(in_source.get(i, Counter()), in_target.get(j, Counter())), 9) for j in tied]
            best = tied[similarities.index(max(similarities))]
        chosen[i] = best
    for i, best in chosen.items():
        result[i] = best
    for role in ("pad_id", "bos_id", "eos_id"):
        if getattr(source, role) is not None:
            result[getattr(source, role)] = getattr(target, role)
    return result


def warp(left: Sequence[str], right: Sequence[str]) -> list[tuple[int, int]]:
    """Dynamic time warping as in the reference implementation (`dtw` in its `others.py`)."""
    total = np.full((len(left) + 1, len(right) + 1), np.inf)
    total[0, 0] = 0
    for i, a in enumerate(left):
        for j, b in enumerate(right):
            cost = editdistance.eval(a, b)
            total[i + 1, j + 1] = cost + min(total[i, j + 1], total[i + 1, j], total[i, j])
    i, j = len(left) - 1, len(right) - 1
    path = [(i, j)]
    while i > 0 or j > 0:
        moves = [(i - 1, j - 1), (i - 1, j), (i, j - 1)]
        # Outside the table there is no way: its border is infinite, but for the corner where the path starts.
        options = [total[a + 1, b + 1] if a >= 0 and b >= 0 else np.inf for a, b in moves]
        i, j = moves[int(np.argmin(options))]
        path.append((i, j))
    return path[::-1]


def pieces_without_spaces(vocabulary: Vocabulary, ids: Sequence[int]) -> list[str]:
    return [spelled(vocabulary.token_bytes(int(i))).replace(" ", "") for i in ids]


def spans(ends: Sequence[int]) -> list[tuple[int, int]]:
    return list(zip([0, *ends[:-1]], ends, strict=True))


def windows(source_ends: list[int], target_ends: list[int], size: int | None) -> list[tuple[range, range]]:
    """Cuts behind the first common boundary after at least `size` target tokens, tokens without bytes included."""
    cuts = [(0, 0)]
    for t, end in enumerate(target_ends[:-1]):
        last = target_ends[t + 1] != end
        if size is not None and last and t + 1 - cuts[-1][1] >= size and end in source_ends:
            s = max(i for i, other in enumerate(source_ends) if other == end)
            cuts.append((s + 1, t + 1))
    cuts.append((len(source_ends), len(target_ends)))
    return [(range(a[0], b[0]), range(a[1], b[1])) for a, b in pairwise(cuts)]


def pair_tokens(
    source: Vocabulary,
    target: Vocabulary,
    block: Block,
    encoding: Encoding,
    mapped: Sequence[int],
    match: str,
    window: int | None = None,
    shared: bool = False,
) -> list[int | None]:
    """The source token of every target token, where the two stand alone in the path and agree."""
    source_ids, target_ids = block.token_ids_T.tolist(), encoding.token_ids_T.tolist()
    source_ends, target_ends = block.byte_ends_T.tolist(), encoding.byte_ends_T.tolist()
    result: list[int | None] = [None] * len(target_ids)
    for sources, targets in windows(source_ends, target_ends, window):
        if not len(sources) or not len(targets):
            continue
        path = warp(
            pieces_without_spaces(source, [source_ids[s] for s in sources]),
            pieces_without_spaces(target, [target_ids[t] for t in targets]),
        )
        for t in targets:
            partners = [sources[a] for a, b in path if targets[b] == t]
            if len(partners) != 1:
                continue
            (s,) = partners
            if not shared and len([b for a, b in path if sources[a] == s]) != 1:
                continue
            a, b = spans(source_ends)[s], spans(target_ends)[t]
            equal = block.text_bytes[slice(*a)] == block.text_bytes[slice(*b)]
            if equal or (match == "soft" and mapped[source_ids[s]] == target_ids[t]):
                result[t] = s
    return result


def mapped_row(block: Block, s: int, mapped: Sequence[int]) -> tuple[dict[int, float], float]:
    """The candidates of a source row by target id, and the tail."""
    row: Counter[int] = Counter()
    tail = math.exp(float(block.tail_T[s]))
    for token, logprob in zip(block.topk_ids_TK[s].tolist(), block.topk_logprobs_TK[s].tolist(), strict=True):
        if token >= 0 and token < len(mapped) and mapped[token] >= 0:
            row[mapped[token]] += math.exp(logprob)
        elif token >= 0:
            tail += math.exp(logprob)
    mass = sum(row.values()) + tail
    return {token: p / mass for token, p in row.items()}, tail / mass


def carried(row: dict[int, float], tail: float, realised: int, gold: float) -> tuple[dict[int, float], float]:
    """The row with the realised token's exact probability, the rest scaled to what is left."""
    others = {token: p for token, p in row.items() if token != realised}
    rest = sum(others.values()) + tail
    scale = (1 - math.exp(gold)) / rest if rest > 0 else 0.0
    tail = tail * scale if rest > 0 else 1 - math.exp(gold)
    return {realised: math.exp(gold)} | {token: p * scale for token, p in others.items()}, tail


def sinkhorn(
    costs: np.ndarray, source: np.ndarray, target: np.ndarray, weight: float, threshold: float, max_iterations: int
) -> tuple[np.ndarray, bool]:
    """The transport plan by Sinkhorn's iterations on logarithms, and whether its rows are within the threshold."""
    kernel, g = -costs / weight, np.zeros(len(target))
    for _ in range(max_iterations):
        f = np.log(source) - np.logaddexp.reduce(kernel + g, axis=1)
        g = np.log(target) - np.logaddexp.reduce(kernel + f[:, None], axis=0)
        plan = np.exp(kernel + f[:, None] + g)
        if np.abs(plan.sum(axis=1) - source).max() <= threshold:
            return plan, True
    return plan, False


def comparable(block: Block, row: int, top_k: int, own: Vocabulary, other: Vocabulary) -> tuple[list[int], np.ndarray]:
    """The first `top_k` candidates of a row, less those without bytes (but EOS where both sides have one)."""
    ids = block.topk_ids_TK[row, :top_k].tolist()
    probs = np.exp(block.topk_logprobs_TK[row, :top_k].astype(float)).tolist()
    kept = [
        (i, p)
        for i, p in zip(ids, probs, strict=True)
        if own.token_bytes(i) or (i == own.eos_id and other.eos_id is not None)
    ]
    return [i for i, _ in kept], np.array([p for _, p in kept])


def transport_costs(source: Vocabulary, source_ids: list[int], target: Vocabulary, target_ids: list[int]) -> np.ndarray:
    """Edit distances of the decoded candidates; EOS, which has no bytes, is 16 from everything but EOS."""

    def cost(i: int, j: int) -> int:
        if i == source.eos_id or j == target.eos_id:
            return 0 if i == source.eos_id and j == target.eos_id else 16
        return editdistance.eval(spelled(source.token_bytes(i)), spelled(target.token_bytes(j)))

    return np.array([[cost(i, j) for j in target_ids] for i in source_ids], float)


def transported_row(
    source: Vocabulary,
    block: Block,
    s: int,
    target: Vocabulary,
    own: Block,
    t: int,
    *,
    top_k: int,
    weight: float,
    threshold: float,
    max_iterations: int,
) -> dict[int, float] | None:
    """PTA-LLM's fused values of one pair; None where the iterations do not suffice or two entries are too close."""
    source_ids, source_probs = comparable(block, s, top_k, source, target)
    target_ids, target_probs = comparable(own, t, top_k, target, source)
    if not source_ids or not target_ids:
        return {}
    costs = transport_costs(source, source_ids, target, target_ids)
    marginals = source_probs / source_probs.sum(), target_probs / target_probs.sum()
    plan, converged = sinkhorn(costs, *marginals, weight, threshold, max_iterations)
    if not converged or (len(target_ids) > 1 and np.any(np.sort(plan, axis=1)[:, -2] > 0.999 * plan.max(axis=1))):
        return None
    row: Counter[int] = Counter()
    for line in plan:
        row[target_ids[int(line.argmax())]] += float(line.max() * source_probs.sum())
    return dict(row)
