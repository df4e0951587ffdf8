"""The figures of a page that shows per target token what each source said.

Labels are kept once, in a table; everything else names them by number. Shape legend: S sources, T target tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fusion_core.alignment.projected_rows import ProjectedRows
from fusion_core.arrays import Float32, Float64, Int32
from fusion_core.blocks import Block
from fusion_core.fusion.attribution import Attribution
from fusion_core.vocabulary import Encoding, Vocabulary
from services.web.shown import label_of_bytes, shown_label, shown_tokens

_MAPPED_TOKENS = 3
"""Target tokens that are shown for what a source's candidate adds to the text."""


@dataclass(frozen=True, slots=True)
class Strategy:
    """The mixture of one strategy: its name, its rows, and the sources' parts in them."""

    name: str
    fused: Block
    attribution: Attribution


@dataclass(frozen=True, slots=True)
class ScoredText:
    """A text as sources scored it, in their own vocabularies and in the target's."""

    encoding: Encoding
    blocks: Mapping[str, Block]
    rows: Mapping[str, ProjectedRows]
    vocabularies: Mapping[str, Vocabulary]
    target: Vocabulary


class _Labels:
    """A table of labels, each once."""

    def __init__(self) -> None:
        self.all: list[str] = []
        self._numbers: dict[str, int] = {}

    def number(self, label: str) -> int:
        if label not in self._numbers:
            self._numbers[label] = len(self.all)
            self.all.append(label)
        return self._numbers[label]


def token_view(scored: ScoredText, strategies: Sequence[Strategy], top: int) -> dict[str, Any]:
    """Return what the page shows, as plain values for JSON.

    Args:
        scored: the text.
        strategies: at least one; the first one colours the text.
        top: candidates shown per row.

    Returns:
        `labels`; `tokens` as shown; `sources`; by source `own` (per token where its row opens, in bytes, its candidates
        with their probabilities and what they become in the target's tokens, its tail), `rows` (the same in the
        target's tokens), `reasons` and `realised`; by strategy its `name`, `fused` rows, `weights`, `winner`,
        `entropy`, `disagreement`, `loss`, and `nats_per_byte` of its rows.
    """
    labels, target = _Labels(), _Names(scored.target)
    first = strategies[0].attribution
    ends = scored.encoding.byte_ends_T.tolist()
    text = next(iter(scored.blocks.values())).text_bytes
    starts = [0, *ends[:-1]]
    token_bytes = [text[start:end] for start, end in zip(starts, ends, strict=True)]
    tokens = shown_tokens(token_bytes)
    realised = [target.label(int(token)) for token in scored.encoding.token_ids_T]
    sources = []
    for place, name in enumerate(first.names):
        rows = scored.rows[name]
        sources.append(
            {
                "name": name,
                "nats_per_byte": _number(scored.blocks[name].nats_per_byte),
                "own": _own(scored, name, first.own_row_ST[place].tolist(), starts, top, labels),
                "rows": _top_rows(rows.ids_TM, rows.probs_TM, rows.tail_T, target, top, labels),
                "realised": _numbers(first.realised_ST[place]),
                "reasons": [labels.number(reason) if reason else -1 for reason in first.reasons_ST[place]],
            }
        )
    return {
        "tokens": [token or f"⟨{label}⟩" for token, label in zip(tokens, realised, strict=True)],
        "realised": [labels.number(label) for label in realised],
        "sources": sources,
        "strategies": [_strategy(strategy, target, top, labels) for strategy in strategies],
        "labels": labels.all,
    }


class _Names:
    """The labels of a vocabulary's ids."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._control = {token_id: name for name, token_id in vocabulary.special_tokens.items()}

    def label(self, token_id: int) -> str:
        if token_id in self._control:
            return shown_label(self._control[token_id])
        return label_of_bytes(self._vocabulary.token_bytes(token_id)) or f"#{token_id}"


def _strategy(strategy: Strategy, target: _Names, top: int, labels: _Labels) -> dict[str, Any]:
    fused, found = strategy.fused, strategy.attribution
    probs_TK = np.exp(fused.topk_logprobs_TK)
    return {
        "name": strategy.name,
        "nats_per_byte": _number(fused.nats_per_byte),
        "fused": _top_rows(fused.topk_ids_TK, probs_TK, np.exp(fused.tail_T), target, top, labels),
        "weights": [_numbers(weight_T) for weight_T in found.weight_ST],
        "winner": found.winner_T.tolist(),
        "entropy": _numbers(found.entropy_T),
        "disagreement": _numbers(found.disagreement_T),
        "loss": _numbers(found.loss_T),
    }


def _top_rows(
    ids_TM: Int32, probs_TM: Float32, tail_T: Float32, target: _Names, top: int, labels: _Labels
) -> list[list[Any]]:
    """Return per token the largest entries, label and probability in turn, and the mass outside all entries."""
    order_TK = np.argsort(-probs_TM, axis=1, kind="stable")[:, :top]
    best_TK = np.take_along_axis(ids_TM, order_TK, axis=1).tolist()
    probs_TK = np.take_along_axis(probs_TM, order_TK, axis=1).astype(np.float64).tolist()
    names = {token: labels.number(target.label(token)) for token in {i for row in best_TK for i in row if i >= 0}}
    return [
        [[value for i, p in zip(ids, probs, strict=True) if i >= 0 for value in (names[i], _number(p))], _number(tail)]
        for ids, probs, tail in zip(best_TK, probs_TK, tail_T.tolist(), strict=True)
    ]


def _own(
    scored: ScoredText, name: str, own_T: Sequence[int], starts: Sequence[int], top: int, labels: _Labels
) -> list[list[Any]]:
    """Return per target token what the source's own row says: the byte at which it opens; label, probability and what
    follows in the target's tokens of each candidate; the tail."""
    block, source = scored.blocks[name], scored.vocabularies[name]
    names, mapped = _Names(source), _Mapped(scored.target, source, block)
    opens = [0, *block.byte_ends_T[:-1].tolist()]
    ids_TK, probs_TK = block.topk_ids_TK.tolist(), np.exp(block.topk_logprobs_TK).tolist()
    tail_T = np.exp(block.tail_T).tolist()
    places = list(zip(own_T, starts, strict=True))
    # Behind the middle of a token, candidates that the text before it rules out come last.
    kept = [
        sorted(
            (place for place, token in enumerate(ids_TK[row]) if token >= 0),
            key=lambda place, row=row, start=start: not mapped.fits(ids_TK[row][place], opens[row], start),  # type: ignore[misc]
        )[:top]
        for row, start in places
    ]
    mapped.look_up(
        (ids_TK[row][k], opens[row], start) for (row, start), ks in zip(places, kept, strict=True) for k in ks
    )
    return [
        [
            opens[row],
            [
                value
                for k in ks
                for value in (
                    labels.number(names.label(ids_TK[row][k])),
                    _number(probs_TK[row][k]),
                    labels.number(mapped.of(ids_TK[row][k], opens[row], start)),
                )
            ],
            _number(tail_T[row]),
        ]
        for (row, start), ks in zip(places, kept, strict=True)
    ]


class _Mapped:
    """What a source's candidates add to the text behind a place, in the target's tokens."""

    def __init__(self, target: Vocabulary, source: Vocabulary, block: Block) -> None:
        self._target, self._source, self._text = target, source, block.text_bytes
        self._names = _Names(target)
        self._prefixed = source.num_virtual_bytes(block.token_ids_T, block.byte_ends_T) > 0
        self._tokens: dict[bytes, str] = {}

    def fits(self, token: int, opens: int, start: int) -> bool:
        """Return whether a candidate says what the text says from where its row opens to where the target's token
        starts."""
        return opens == start or self._remainder(token, opens, start) is not None

    def look_up(self, places: Iterable[tuple[int, int, int]]) -> None:
        """Split all remainders at once; a place is a candidate, where its row opens, and where the target's token
        starts."""
        found = {self._remainder(*place) for place in places}
        remainders = sorted(remainder for remainder in found if remainder)
        leading = self._target.leading_tokens(remainders, _MAPPED_TOKENS + 1).tolist() if remainders else []
        for remainder, tokens in zip(remainders, leading, strict=True):
            ids = [token for token in tokens if token >= 0]
            shown = " · ".join(self._names.label(token) for token in ids[:_MAPPED_TOKENS])
            self._tokens[remainder] = shown + (" · …" if len(ids) > _MAPPED_TOKENS else "")

    def of(self, token: int, opens: int, start: int) -> str:
        """Return the target's tokens of what the candidate adds, or in words why there are none."""
        remainder = self._remainder(token, opens, start)
        if remainder is None:
            control = token in self._source.special_ids
            if control and token == self._source.eos_id and self._target.eos_id is not None and opens == start:
                return self._names.label(self._target.eos_id)
            return "to the tail: stands for no text" if control else "not what the text before says"
        return self._tokens.get(remainder, "") or ("ends here" if not remainder else "to the tail")

    def _remainder(self, token: int, opens: int, start: int) -> bytes | None:
        data = self._source.token_bytes(token)
        if not data:
            return None
        if self._prefixed and opens == 0 and data.startswith(b" "):
            data = data[1:]
        before = self._text[opens:start]
        return data[len(before) :] if data.startswith(before) else None


def _numbers(values_T: Float64) -> list[float | None]:
    return [_number(value) for value in values_T.tolist()]


def _number(value: float) -> float | None:
    """Return a value with four digits; None for NaN and infinity, which JSON does not have."""
    return float(f"{value:.4g}") if math.isfinite(value) else None
