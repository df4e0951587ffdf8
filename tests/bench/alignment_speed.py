"""Speeds of alignment and projection, each beside its slow oracle in the same run.

Vocabularies are the real ones of Gemma 3 and SmolLM2, fetched once; the text is Python's own documentation. All
times are CPU seconds of one thread.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np

from fusion_core.alignment.published.min_edit import MinEditConfig, MinEditProjection
from fusion_core.alignment.published.transport import TransportConfig, TransportProjection
from fusion_core.alignment.published.vocabulary_map import VocabularyMap, VocabularyMapConfig
from fusion_core.blocks import Block
from fusion_core.vocabulary import Encoding, Vocabulary
from services.models.catalogue import MODELS, resolve_model
from services.models.fetch import fetch
from tests.bench.parts.byte_speed import measure_byte
from tests.bench.parts.report import Report, arguments, in_turn
from tests.fusion_core.alignment.published.papers import (
    candidates_of,
    nearest,
    pieces_without_spaces,
    spelled,
    transported_row,
    warp,
)

WINDOW = 2048


@dataclass(frozen=True)
class Case:
    """The pair that is measured: Gemma's rows brought to SmolLM2's vocabulary, unless a measurement says otherwise."""

    source: Vocabulary
    target: Vocabulary
    text: bytes
    quick: bool
    rng: np.random.Generator

    def window(self) -> tuple[bytes, Encoding, Encoding]:
        """A text of about `WINDOW` target tokens, in both tokenisations."""
        end = int(self.target.encode(self.text).byte_ends_T[WINDOW - 1])
        text = self.text[:end].decode(errors="ignore").encode()
        return text, self.source.encode(text), self.target.encode(text)


def measure_map(report: Report, case: Case) -> None:
    """`min_edit` vocabulary map of all pieces; the oracle compares a sample of them with every candidate."""
    config = VocabularyMapConfig(strategy="min_edit", cache_dir=None)
    VocabularyMap.build(case.target, case.source, config)  # compiles; this direction is short
    built: list[VocabularyMap] = []
    [seconds] = in_turn(
        1 if case.quick else 3, lambda: built.append(VocabularyMap.build(case.source, case.target, config))
    )
    mapped = built[0].target_ids_V
    peak_gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20

    candidates = candidates_of(case.target)
    pieces, ids = list(candidates), list(candidates.values())
    missing = [i for i in range(case.source.size) if (p := case.source.token_bytes(i)) and spelled(p) not in candidates]
    sample = case.rng.choice(missing, 10 if case.quick else 200, replace=False)
    expected: list[int] = []
    [sample_seconds] = in_turn(
        1, lambda: expected.extend(ids[nearest(spelled(case.source.token_bytes(i)), pieces)[0]] for i in sample)
    )
    oracle_seconds = sample_seconds / len(sample) * len(missing)
    same = bool((mapped[sample] == expected).all())
    with tempfile.TemporaryDirectory() as folder:
        cached = VocabularyMapConfig(strategy="min_edit", cache_dir=Path(folder))
        VocabularyMap.load_or_build(case.source, case.target, cached)
        [load_seconds] = in_turn(5, lambda: VocabularyMap.load_or_build(case.source, case.target, cached))
    report.row(
        operation="map",
        size=f"{case.source.size:,} onto {case.target.size:,} ids, {len(missing):,} without an exact match",
        ours=seconds,
        oracle=oracle_seconds,
        unit="s",
        times_faster=oracle_seconds / seconds,
        same_results=same,
        note=f"oracle extrapolated from {len(sample)} pieces; from the cache {load_seconds * 1000:.1f} ms",
    )
    report.check("map: Gemma onto SmolLM2", seconds, "s", at_most=25)
    report.check("map: peak memory of the process", peak_gib, "GiB", at_most=2)
    report.check("map: sampled pieces equal brute force", float(same), "", at_least=1)


def measure_path(report: Report, case: Case) -> None:
    """The warping path of one window; the oracle is the reference implementation's loop."""
    _, source, target = case.window()
    exact = VocabularyMap.build(case.source, case.target, VocabularyMapConfig(strategy="exact", cache_dir=None))
    pairs = MinEditProjection(case.source, case.target, MinEditConfig(match="hard"), exact).pairs
    whole = source.token_ids_T, target.token_ids_T
    left, right = (ids[: 512 if case.quick else WINDOW] for ids in whole)
    path = pairs.path(left, right)
    oracle: list[list[tuple[int, int]]] = []

    def reference() -> None:
        pieces = pieces_without_spaces(case.source, left.tolist()), pieces_without_spaces(case.target, right.tolist())
        oracle.append(warp(*pieces))

    seconds, oracle_seconds = in_turn(1, lambda: pairs.path(left, right), reference)
    same = [tuple(step) for step in path.tolist()] == oracle[0]
    report.row(
        operation="path",
        size=f"{len(left):,} x {len(right):,} tokens of text",
        ours=seconds * 1000,
        oracle=oracle_seconds * 1000,
        unit="ms",
        times_faster=oracle_seconds / seconds,
        same_results=same,
    )
    distinct = [case.rng.permutation(v.size)[:WINDOW].astype(np.int32) for v in (case.source, case.target)]
    whole_seconds, distinct_seconds = in_turn(9, lambda: pairs.path(*whole), lambda: pairs.path(*distinct))
    for size, some_seconds in (
        (f"{len(whole[0]):,} x {len(whole[1]):,} tokens of text", whole_seconds),
        (f"{WINDOW:,} x {WINDOW:,} ids, no two alike", distinct_seconds),
    ):
        report.row(operation="path", size=size, ours=some_seconds * 1000, unit="ms", note="median of 9")
    report.check("path: 2,048 x 2,048 tokens of text", whole_seconds * 1000, "ms", at_most=50)
    report.check("path: equals the reference's", float(same), "", at_least=1)


def measure_transport(report: Report, case: Case) -> None:
    """Projection of one window at 10 x 10; the oracle is Sinkhorn on logarithms in NumPy, to the same threshold."""
    text, source, target = case.window()
    exact = VocabularyMap.build(case.source, case.target, VocabularyMapConfig(strategy="exact", cache_dir=None))
    config = TransportConfig(match="hard", top_k=10, carry_realised=False)
    projection = TransportProjection(case.source, case.target, config, exact)
    block, own = _blocks_with_shared_candidates(case, text, source, target, exact)
    rows = projection.project(block, target, own)
    num_pairs = int(rows.mask_T.sum())
    path_seconds, seconds = in_turn(
        5, lambda: projection.pairs.source_of(block, target), lambda: projection.project(block, target, own)
    )
    speed = num_pairs / (seconds - path_seconds)

    source_of_T = projection.pairs.source_of(block, target)
    sample = np.flatnonzero(rows.mask_T)[:: 100 if case.quick else 20].tolist()
    expected: list[dict[int, float] | None] = []
    limits = {"weight": config.entropy_weight, "threshold": config.threshold, "max_iterations": 20_000}
    [sample_seconds] = in_turn(
        1,
        lambda: expected.extend(
            transported_row(case.source, block, int(source_of_T[t]), case.target, own, t, top_k=10, **limits)
            for t in sample
        ),
    )
    # Where Sinkhorn does not reach the threshold, or two entries of a row are equal, there is nothing to compare with.
    decided = [(t, row) for t, row in zip(sample, expected, strict=True) if row is not None]
    same = all(_same_row(rows.ids_TM[t], rows.probs_TM[t], row) for t, row in decided)
    report.row(
        operation="transport",
        size=f"10 x 10, {num_pairs:,} pairs in a window of {target.num_tokens:,}",
        ours=speed,
        oracle=len(sample) / sample_seconds,
        unit="positions/s",
        times_faster=speed / (len(sample) / sample_seconds),
        same_results=same,
        note=f"without the path; {len(decided)} of {len(sample)} sampled positions decided by the oracle",
    )
    report.check("transport: 10 x 10", speed, "positions/s", at_least=20_000)
    report.check("transport: sampled rows equal Sinkhorn's", float(same), "", at_least=1)


def _same_row(ids: np.ndarray, probs: np.ndarray, expected: dict[int, float]) -> bool:
    row = {int(i): float(p) for i, p in zip(ids, probs, strict=True) if p > 0}
    return row.keys() == expected.keys() and all(abs(row[i] - p) < 1e-4 for i, p in expected.items())


def _blocks_with_shared_candidates(
    case: Case, text: bytes, source: Encoding, target: Encoding, exact: VocabularyMap
) -> tuple[Block, Block]:
    """Two models that mostly consider the same pieces: tokens of the text, at random, after the realised one."""
    mapped_V = exact.target_ids_V
    pool = np.array([i for i in source.token_ids_T if mapped_V[i] >= 0])
    following_S = np.stack([case.rng.permutation(np.unique(pool))[:14] for _ in range(source.num_tokens)])
    source_ids_SK = np.concatenate([source.token_ids_T[:, None], following_S[:, :10]], axis=1)
    # The target considers the pieces of the source token nearest to it in the text, and three of its own.
    at_T = np.minimum(np.searchsorted(source.byte_ends_T, target.byte_ends_T), source.num_tokens - 1)
    shared_TK = mapped_V[following_S[at_T, 3:]]
    target_ids_TK = np.concatenate([target.token_ids_T[:, None], shared_TK], axis=1)
    return (
        _block(case, text, case.source, source, source_ids_SK),
        _block(case, text, case.target, target, target_ids_TK),
    )


def _block(case: Case, text: bytes, vocabulary: Vocabulary, encoding: Encoding, ids_TN: np.ndarray) -> Block:
    """Ten distinct candidates a row, probabilities falling as those of language models do, 5 % in the tail."""
    first_T10 = np.stack([np.array(list(dict.fromkeys(row.tolist()))[:10]) for row in ids_TN]).astype(np.int32)
    falling_T10 = np.exp(case.rng.normal(0, 1.5, first_T10.shape)) / np.arange(1, 11) ** 1.5
    falling_T10 = -np.sort(-0.95 * falling_T10 / falling_T10.sum(axis=1, keepdims=True), axis=1)
    order_T10 = np.argsort(case.rng.random(first_T10.shape) + np.arange(10) / 5, axis=1)
    first_T10 = np.take_along_axis(first_T10, order_T10, axis=1)
    realised_T10 = first_T10 == encoding.token_ids_T[:, None]
    gold_T = np.log(np.where(realised_T10, falling_T10, 0).sum(axis=1)).astype(np.float32)
    tail_T = np.full(len(gold_T), np.log(0.05), np.float32)
    logprobs_T10 = np.log(falling_T10).astype(np.float32)
    block = Block(
        text,
        encoding.token_ids_T,
        encoding.byte_ends_T,
        first_T10,
        logprobs_T10,
        tail_T,
        gold_T,
        vocabulary.fingerprint,
        encoding.lossless_T,
    )
    block.validate()
    return block


# Each takes (report, case) and adds its rows and checks; the models of the last one would count as memory of the map.
MEASUREMENTS = (measure_map, measure_path, measure_transport, measure_byte)


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    for side, model in (("source", "gemma-3-270m"), ("target", "smollm2-135m-instruct")):
        parser.add_argument(f"--{side}", default=model, metavar="MODEL", help=f"name or folder (default: {model})")
    options: argparse.Namespace = parser.parse_args()
    source, target = (
        Vocabulary.from_pretrained(fetch(name) if name in MODELS else resolve_model(name))
        for name in (options.source, options.target)
    )
    text = "\n\n".join(topics[name] for name in sorted(topics)).encode()
    report = Report("alignment_speed")
    for measure in MEASUREMENTS:
        measure(report, Case(source, target, text, options.quick, np.random.default_rng(0)))
    report.finish(options.json)


if __name__ == "__main__":
    main()
