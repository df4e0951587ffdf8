"""The end row of a document moved into the target's vocabulary.

The source's row after its last token opens where the text ends, so no other source token is in progress: its EOS
becomes the target's EOS with its exact probability, and every other token gives its mass to the first token of its
target tokenisation, as in all rows.

Shape legend: K candidates of the source row, L = K + 1 ids whose probability is known, V source ids.
"""

from __future__ import annotations

import numpy as np

from fusion_core.alignment.byte.first_token_table import UNKNOWN, FirstTokenTable
from fusion_core.alignment.byte.source_row import add_row
from fusion_core.alignment.byte.target_row import write_row
from fusion_core.alignment.projected_rows import ProjectedRows
from fusion_core.alignment.realised import finite_logprobs
from fusion_core.blocks import Block
from fusion_core.sparse_row import num_slots


def end_row(table: FirstTokenTable, block: Block) -> ProjectedRows:
    """Return one row: the block's last one, for the target's EOS. It is masked when the block has no end row."""
    target_eos = table.target.eos_id
    if not (block.ends_document and block.mask_T[-1]) or target_eos is None:
        return ProjectedRows.masked()
    k, size, gold = block.k, table.source.size, finite_logprobs(block.gold_T[-1:])
    ids_L, masses_L = np.empty(k + 1, dtype=np.int32), np.empty(k + 1, dtype=np.float64)
    _, unlisted, _ = add_row(
        block.topk_ids_TK[-1:],
        np.exp(block.topk_logprobs_TK[-1:]),
        0,
        float(np.exp(np.float64(block.tail_T[-1]))),
        float(np.exp(gold[0])),
        int(block.token_ids_T[-1]),
        size,
        0,
        ids_L,
        masses_L,
    )
    inside_L = (ids_L >= 0) & (ids_L < size)
    keys = ids_L[inside_L].astype(np.int64)
    table.resolve(keys[table.values[keys] == UNKNOWN])
    nexts_L = np.full(k + 1, -1, dtype=np.int32)
    nexts_L[inside_L] = table.values[keys]
    nexts_L[nexts_L == target_eos] = -1  # EOS is the realised token alone, which add_row puts first
    nexts_L[0] = target_eos
    ids_TM = np.full((1, k + 2), -1, dtype=np.int32)
    probs_TM = np.zeros((1, k + 2), dtype=np.float32)
    keys_H = np.full(num_slots(k + 2), -1, dtype=np.int64)
    places_H, sums = np.empty(len(keys_H), dtype=np.int32), np.empty(k + 2, dtype=np.float64)
    _, tail, _ = write_row(0, nexts_L, masses_L, k + 1, unlisted, keys_H, places_H, sums, ids_TM, probs_TM)
    return ProjectedRows(
        ids_TM=ids_TM,
        probs_TM=probs_TM,
        tail_T=np.array([tail], dtype=np.float32),
        gold_T=gold.astype(np.float32),
        mask_T=np.ones(1, dtype=np.bool_),
        covered_T=np.array([1.0 - tail], dtype=np.float32),
    )
