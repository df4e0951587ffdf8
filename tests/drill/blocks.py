"""What a fused block must be by itself; recomputation.py says what must stand in it.

Shape legend: T rows, K candidates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from fusion_core.blocks import Block
from fusion_core.vocabulary import Vocabulary
from services.fusion.client import FusedWindow

_MASS_TOLERANCE = 5e-3
"""float16 log-probabilities, candidates of a row added up."""


def wrong_with(
    window: FusedWindow,
    documents: Mapping[str, bytes],
    target: Vocabulary,
    sources: Sequence[str],
    min_sources: int,
    k: int,
) -> str:
    """What is wrong with a window as such, empty when nothing is."""
    wrong = _wrong_text(window, documents, target) or _wrong_rows(window.block, target, k)
    return wrong or _wrong_shares(window.block, sources, min_sources)


def _wrong_text(window: FusedWindow, documents: Mapping[str, bytes], target: Vocabulary) -> str:
    block = window.block
    # The corpus names documents by their path.
    document = documents.get(Path(window.document).name, b"")
    if block.text_bytes != document[window.start_byte : window.start_byte + len(block.text_bytes)]:
        return f"not the text of {window.document} from byte {window.start_byte} on"
    if block.vocabulary != target.fingerprint:
        return f"vocabulary {block.vocabulary}"
    token_ids = block.token_ids_T[: block.num_text_tokens]
    if b"".join(target.token_bytes(int(i)) for i in token_ids) != block.text_bytes:
        return "the realised tokens do not spell the text"
    ends = window.start_byte + len(block.text_bytes) == len(document)
    if block.ends_document != ends or (ends and block.token_ids_T[-1] != target.eos_id):
        return "the end row is missing, or in a wrong place"
    return ""


def _wrong_rows(block: Block, target: Vocabulary, k: int) -> str:
    if block.k != k or not block.mask_T.all():
        return f"k is {block.k}, and {int((~block.mask_T).sum())} rows are masked"
    for name, column in (("topk_logprobs", block.topk_logprobs_TK), ("tail", block.tail_T), ("gold", block.gold_T)):
        if np.isnan(column).any() or (column > 1e-3).any():
            return f"{name} has NaN or positive entries"
    mass_T = np.exp(block.topk_logprobs_TK.astype(np.float64)).sum(axis=1) + np.exp(block.tail_T.astype(np.float64))
    if np.abs(mass_T - 1).max() > _MASS_TOLERANCE:
        return f"a row sums to {mass_T[np.abs(mass_T - 1).argmax()]:.4f}"
    for row, token in zip(block.topk_ids_TK, block.token_ids_T, strict=True):
        ids = row[row >= 0]
        if len(set(ids.tolist())) != len(ids) or ids.max(initial=0) >= target.size or token not in ids:
            return "a row has an id twice, an id outside the vocabulary, or lacks the realised token"
    return ""


def _wrong_shares(block: Block, sources: Sequence[str], min_sources: int) -> str:
    present = [share for share in block.shares if share.present]
    if [share.name for share in block.shares] != list(sources) or len(present) < min_sources:
        return f"the shares are {block.shares}"
    if abs(sum(share.weight for share in present) - 1) > 1e-3:
        return f"the weights sum to {sum(share.weight for share in present):.4f}"
    return ""
