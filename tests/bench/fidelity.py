"""The faithfulness of each mapping: rows of two real models in each other's vocabulary, against the truth.

SmolLM2-135M and Gemma-3-270M read the same documents; each one's rows are mapped into the other's vocabulary. What is
measured, per method, direction and domain:

nats per byte   loss of the realised target tokens under the mapped rows, next to the source's own on the same bytes;
                the mapped probability p counts as (1 - eps) p + eps / V with eps = 1e-3, as a row without the realised
                token would lose infinitely much. "carried" methods put the realised token's exact probability in, so
                their ratio says that nothing was lost or leaked, and nothing about the other entries.
covered         mass that the mapping moved onto target tokens, as a share of the source's mass in its top k.
in support      share of the rows in which the realised token has a probability.
masked          share of the target tokens without a row; they count in nothing else.
top-1, TV, KL   at sampled positions, against what the source says about the next target token given the target tokens
                before it, by enumeration of its continuations to a stated number of model calls per position;
                what is still undecided then stays where the projection from full vocabularies puts it. KL is
                KL(truth | row) with the same eps.

Intervals are 95 % bootstrap intervals over documents.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from fusion_core.alignment.byte.projection import ByteConfig, ByteProjection
from fusion_core.alignment.projected_rows import ProjectedRows
from fusion_core.alignment.published.min_edit import MinEditConfig, MinEditProjection
from fusion_core.alignment.published.transport import TransportConfig, TransportProjection
from fusion_core.alignment.published.vocabulary_map import VocabularyMap, VocabularyMapConfig
from services.models.fetch import fetch
from tests.bench.parts.fidelity_models import Model, Reading
from tests.bench.parts.fidelity_tallies import Place, Tally, dense, interval, mean_of, ratio, share, tally
from tests.bench.parts.fidelity_texts import documents
from tests.bench.parts.report import Report, arguments
from tests.fusion_core.alignment.byte.reference import ReferenceEnumerator

IGNORED_SHARE = 3e-4
_FULL_ENTRIES = 4096
_CHUNK = 32
_DEPTH = 4
"""Source tokens behind the position, at most, that are enumerated."""

Method = Callable[[Reading, Reading], ProjectedRows]


class Direction:
    """Source, target and all methods between them."""

    def __init__(self, source: Model, target: Model, corpus: Path) -> None:
        self.source, self.target = source, target
        pair = source.vocabulary, target.vocabulary
        self.name = f"{source.name} to {target.name}"
        self._byte = ByteProjection(*pair)
        self._byte.warm()
        self.enumerator = ReferenceEnumerator(*pair)
        self.methods = dict(self._methods(corpus))

    def _methods(self, corpus: Path) -> Iterator[tuple[str, tuple[Method, int | None]]]:
        """Name, function and number of candidates (None for full rows)."""
        pair = self.source.vocabulary, self.target.vocabulary
        exact, nearest, company = (
            VocabularyMap.load_or_build(*pair, VocabularyMapConfig(strategy=strategy, corpus=text))
            for strategy, text in (("exact", None), ("min_edit", None), ("co_occurrence", corpus))
        )
        last_row = ByteProjection(*pair, ByteConfig(follow_tokens=False))
        bare = ByteProjection(*pair, ByteConfig(follow_tokens=False, carry_realised=False))
        hard = MinEditProjection(*pair, MinEditConfig(match="hard"), exact)
        soft = MinEditProjection(*pair, MinEditConfig(match="soft"), nearest)
        similar = MinEditProjection(*pair, MinEditConfig(match="soft"), company)
        uncarried = MinEditProjection(*pair, MinEditConfig(match="soft", carry_realised=False), nearest)
        published = MinEditConfig(match="soft", carry_realised=False, published_fallback=True)
        fuse_llm = MinEditProjection(*pair, published, nearest)
        moved = TransportProjection(*pair, TransportConfig(match="soft"), nearest)
        moved_bare = TransportProjection(*pair, TransportConfig(match="soft", carry_realised=False), nearest)

        def from_blocks(subject: ByteProjection | MinEditProjection, k: int) -> tuple[Method, int]:
            return lambda source, target: subject.project(source.block(k), target.encoding), k

        def between_blocks(subject: TransportProjection, k: int) -> tuple[Method, int]:
            return lambda source, target: subject.project(source.block(k), target.encoding, target.block(k)), k

        yield "byte, full rows, carried", (self.full_rows, None)
        yield "byte, top 64, carried", from_blocks(self._byte, 64)
        yield "byte, top 10, carried", from_blocks(self._byte, 10)
        yield "byte from the last row, top 64, carried", from_blocks(last_row, 64)
        yield "byte from the last row, top 64", from_blocks(bare, 64)
        yield "min_edit hard, exact map, top 64, carried", from_blocks(hard, 64)
        yield "min_edit soft, min_edit map, top 64, carried", from_blocks(soft, 64)
        yield "min_edit soft, co_occurrence map, top 64, carried", from_blocks(similar, 64)
        yield "min_edit soft, min_edit map, top 10", from_blocks(uncarried, 10)
        yield "min_edit as published, top 10", from_blocks(fuse_llm, 10)
        yield "transport, top 10, carried", between_blocks(moved, 10)
        yield "transport, top 10", between_blocks(moved_bare, 10)

    def full_rows(self, source: Reading, target: Reading) -> ProjectedRows:
        """`byte` from the source's full vocabulary."""
        rows = source.logprobs_TV
        chunks = (rows[first : first + _CHUNK] for first in range(0, len(rows), _CHUNK))
        return self._byte.project_full(source.text, source.encoding, chunks, target.encoding, _FULL_ENTRIES)


def places(
    direction: Direction, source: Reading, target: Reading, full: ProjectedRows, sample: np.ndarray, max_calls: int
) -> list[Place]:
    """The truth about sampled target tokens."""
    found = []
    source_ends = [0, *source.encoding.byte_ends_T.tolist()]
    target_ends = [0, *target.encoding.byte_ends_T.tolist()]
    ids = source.encoding.token_ids_T.tolist()
    for t in sample.tolist():
        # From the last place before the token where both begin a token: what is older has no say.
        row = max(i for i, end in enumerate(source_ends) if (end < target_ends[t] or end == 0) and end in target_ends)
        first = target_ends.index(source_ends[row])
        last = max(i for i, end in enumerate(source_ends) if end <= target_ends[t])
        reference = direction.enumerator.first_token(
            lambda continuations, row=row: source.next_token(row, continuations),
            (),
            given=target.encoding.token_ids_T[first:t].tolist(),
            path=ids[row:],
            max_calls=max_calls,
            batch_size=16,
            max_tokens=last - row + _DEPTH,
            ignore_share=IGNORED_SHARE,
        )
        found.append(Place(t, reference.completed(dense(full, t, direction.target.vocabulary.size)), reference))
    return found


def report_method(report: Report, direction: str, domain: str, method: str, tallies: list[Tally]) -> None:
    low, high = interval(tallies, ratio)
    tv_low, tv_high = interval(tallies, mean_of("total_variation"))
    covered = share(tallies, "covered", "in_top_k")
    masked = 1.0 - share(tallies, "num_rows", "num_tokens")
    report.row(
        table=f"{direction}, {domain}",
        method=method,
        own=share(tallies, "source_nats", "num_bytes"),
        mapped=share(tallies, "mapped_nats", "num_bytes"),
        ratio=ratio(tallies),
        ratio_95=f"{low:.3f}-{high:.3f}",
        covered=covered,
        in_support=share(tallies, "num_supported", "num_rows"),
        masked=masked,
        top_1=mean_of("top_1")(tallies),
        tv=mean_of("total_variation")(tallies),
        tv_95=f"{tv_low:.3f}-{tv_high:.3f}",
        kl=mean_of("divergence")(tallies),
    )
    if method == "byte, top 64, carried":
        case = f"{direction}, {domain}"
        report.check(f"{case}: nats per byte to the source's own", ratio(tallies), "", at_least=0.99, at_most=1.03)
        report.check(f"{case}: covered share of the top-64 mass", covered, "", at_least=0.95)
        report.check(f"{case}: masked share", masked, "", at_most=0.01)


def report_truth(report: Report, direction: str, domain: str, found: Findings) -> None:
    """Report the undecided mass, the model calls that it costs to settle it, and the mass beyond k candidates."""
    references = [place.reference for place in found.places]
    report.row(
        table="undecided mass, per sampled position",
        direction=direction,
        domain=domain,
        positions=len(references),
        undecided_by_one_token=float(np.mean([r.undecided_after_one for r in references])),
        model_calls=float(np.mean([r.num_calls for r in references])),
        undecided_then=float(np.mean([r.undecided for r in references])),
        beyond_top_10=float(np.mean(np.concatenate(found.beyond_10))),
        beyond_top_64=float(np.mean(np.concatenate(found.beyond_64))),
    )


@dataclass
class Findings:
    """All about one direction and domain, document by document."""

    tallies: dict[str, list[Tally]] = field(default_factory=dict)
    places: list[Place] = field(default_factory=list)
    beyond_10: list[np.ndarray] = field(default_factory=list)
    beyond_64: list[np.ndarray] = field(default_factory=list)

    def add(self, direction: Direction, source: Reading, target: Reading, num_positions: int, max_calls: int) -> None:
        full = direction.full_rows(source, target)
        candidates = np.flatnonzero(full.mask_T)[1:-1]
        sample = np.random.default_rng(len(source.text)).choice(
            candidates, min(num_positions, len(candidates)), replace=False
        )
        truths = places(direction, source, target, full, np.sort(sample), max_calls)
        self.places += truths
        for name, (method, k) in direction.methods.items():
            rows = full if k is None else method(source, target)
            self.tallies.setdefault(name, []).append(tally(rows, full, source, target, k, truths))
        for k, beyond in ((10, self.beyond_10), (64, self.beyond_64)):
            beyond.append(np.exp(source.block(k).tail_T))


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--documents", type=int, metavar="N", help="documents per domain (default: 8, at most 12)")
    parser.add_argument("--positions", type=int, metavar="N", help="sampled positions per document (default: 4)")
    parser.add_argument("--calls", type=int, metavar="N", help="model calls per sampled position (default: 48)")
    options = parser.parse_args()
    options.documents = options.documents or (2 if options.quick else 8)
    options.positions = options.positions or (2 if options.quick else 4)
    options.calls = options.calls or (16 if options.quick else 48)
    texts = documents(12)
    smollm2 = Model("SmolLM2", fetch("smollm2-135m-instruct"), "<|endoftext|>")
    gemma3 = Model("Gemma 3", fetch("gemma-3-270m"), "<bos>")
    report = Report("fidelity")
    with tempfile.NamedTemporaryFile("wb", suffix=".txt") as corpus:
        for of_domain in texts.values():  # for co_occurrence; those that are measured are left out where there are more
            corpus.write(b"\n".join(of_domain[options.documents :] or of_domain) + b"\n")
        corpus.flush()
        directions = [Direction(*pair, Path(corpus.name)) for pair in ((smollm2, gemma3), (gemma3, smollm2))]
    for domain, of_domain in texts.items():
        found = [Findings() for _ in directions]
        for text in of_domain[: options.documents]:
            read = smollm2.read(text), gemma3.read(text)
            for direction, of_direction, pair in zip(directions, found, (read, read[::-1]), strict=True):
                of_direction.add(direction, *pair, options.positions, options.calls)
        for direction, of_direction in zip(directions, found, strict=True):
            for name, tallies in of_direction.tallies.items():
                report_method(report, direction.name, domain, name, tallies)
            report_truth(report, direction.name, domain, of_direction)
    report.finish(options.json)


if __name__ == "__main__":
    main()
