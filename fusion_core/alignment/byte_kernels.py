"""Compiled loops of the byte projection.

Shape legend: R rows of the source that the caller holds, S tokens of the source, K candidates of a source row, T target
tokens, M entries of a target row, V source ids, B bytes of all source ids together, P pending look-ups.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from fusion_core.alignment.first_token_table import UNKNOWN
from fusion_core.compiled import compiled
from fusion_core.sparse_row import num_slots, place_of

Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]
UInt8 = npt.NDArray[np.uint8]
Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
Bool = npt.NDArray[np.bool_]


@compiled
def tokens_match(
    blob_B: UInt8, offsets_V1: Int64, token_ids_S: Int32, byte_ends_S: Int32, text_N: UInt8, num_virtual: int
) -> Bool:
    """Whether every token's bytes are the bytes of the text that it is said to cover."""
    match_S = np.zeros(token_ids_S.shape[0], dtype=np.bool_)
    begin = -num_virtual
    for s in range(token_ids_S.shape[0]):
        token, end = token_ids_S[s], byte_ends_S[s]
        if 0 <= token < offsets_V1.shape[0] - 1:
            first = offsets_V1[token]
            same = offsets_V1[token + 1] - first == end - begin and end > begin
            at = max(begin, 0)
            while same and at < end:
                same = blob_B[first + at - begin] == text_N[at]
                at += 1
            match_S[s] = same
        begin = end
    return match_S


@compiled
def known_ids(
    ids_K: Int32, probs_K: Float32, realised: int, gold: float, ids: Int32, masses: Float64
) -> tuple[int, bool]:
    """Writes the ids whose probability is known into `ids` and `masses`.

    The realised token comes first, with its exact probability, whether it is a candidate or not.
    Returns the number of ids and whether the realised token is a candidate.
    """
    ids[0], masses[0] = realised, gold
    num_ids, seen = 1, False
    for j in range(ids_K.shape[0]):
        if ids_K[j] == realised:
            seen = True
        elif ids_K[j] >= 0:
            ids[num_ids], masses[num_ids] = ids_K[j], probs_K[j]
            num_ids += 1
    return num_ids, seen


@compiled
def keep_range(ids: Int32, masses: Float64, num_ids: int, rank_V: Int32, low: int, high: int) -> tuple[int, int]:
    """Keeps the ids whose rank is in low..high-1, in place.

    Returns how many are kept, and how many of all were ids of the vocabulary (an output layer can be wider).
    """
    num_kept = num_inside = 0
    for n in range(num_ids):
        if ids[n] < rank_V.shape[0]:
            num_inside += 1
            if low <= rank_V[ids[n]] < high:
                ids[num_kept], masses[num_kept] = ids[n], masses[n]
                num_kept += 1
    return num_kept, num_inside


@compiled
def project_rows(
    topk_ids_RK: Int32,
    topk_probs_RK: Float32,
    tail_R: Float64,
    gold_R: Float64,
    first_row: int,
    source_ids_S: Int32,
    source_starts_S: Int64,
    offsets_V1: Int64,
    rank_V: Int32,
    prefix_low_B: Int32,
    prefix_high_B: Int32,
    first_table: Int32,
    row_of_T: Int64,
    target_starts_T: Int64,
    at_start_T: Bool,
    wanted_T: Bool,
    ids_TM: Int32,
    probs_TM: Float32,
    tail_T: Float64,
    log_prefix_mass_T: Float64,
    pending_P: Int64,
) -> int:
    """Maps the source rows first_row..first_row+R-1 onto the T target tokens that start in them.

    Writes the conditional distribution "first target token, given that the source's token starts with the bytes that
    are already behind" into ids_TM, probs_TM and tail_T, and the log of the mass of that condition into
    log_prefix_mass_T. Keys of `first_table` (see `FirstTokenTable`) that are not known yet are collected in pending_P;
    the return value is their number, which can exceed P. Results are meaningful only when it is 0.

    Rows that are not wanted are skipped. A wanted row to which the source gives no mass at all stops being wanted.
    """
    k, size = topk_ids_RK.shape[1], rank_V.shape[0]
    keys = np.full(num_slots(k + 1), -1, dtype=np.int64)
    places = np.empty(len(keys), dtype=np.int32)
    ids, masses, sums = np.empty(k + 1, np.int32), np.empty(k + 1, np.float64), np.empty(k + 1, np.float64)
    num_pending = 0

    for t in range(row_of_T.shape[0]):
        if not wanted_T[t]:
            continue
        row = row_of_T[t] - first_row
        realised = source_ids_S[row + first_row]
        behind = target_starts_T[t] - source_starts_S[row + first_row]
        num_ids, seen = known_ids(topk_ids_RK[row], topk_probs_RK[row], realised, gold_R[row], ids, masses)
        unseen = tail_R[row] if seen else max(0.0, tail_R[row] - gold_R[row])
        mass = total = masses[:num_ids].sum() + unseen
        if behind > 0:
            # The bytes behind start the realised source token, so their range of ids is stored with it.
            at = offsets_V1[realised] + behind - 1
            low, high = prefix_low_B[at], prefix_high_B[at]
            num_ids, num_inside = keep_range(ids, masses, num_ids, rank_V, low, high)
            unseen *= (high - low - num_ids) / max(1, size - num_inside)
            mass = masses[:num_ids].sum() + unseen
        if mass <= 0.0:
            wanted_T[t] = False
            log_prefix_mass_T[t] = -np.inf
            continue

        num_entries, rest = 0, unseen
        for n in range(num_ids):
            x, key = ids[n], -1
            if behind > 0 and offsets_V1[x + 1] - offsets_V1[x] > behind:
                key = 2 * size + offsets_V1[x] + behind
            elif behind == 0 and x < size:
                key = size + x if at_start_T[t] else x
            first = first_table[key] if key >= 0 else -1
            if first == UNKNOWN:
                if num_pending < pending_P.shape[0]:
                    pending_P[num_pending] = key
                num_pending += 1
            if first < 0:
                rest += masses[n]
                continue
            place = place_of(keys, places, t, first, num_entries)
            if place == num_entries:
                ids_TM[t, place] = first
                sums[place] = 0.0
                num_entries += 1
            sums[place] += masses[n]
        for m in range(num_entries):
            probs_TM[t, m] = sums[m] / mass
        tail_T[t] = rest / mass
        log_prefix_mass_T[t] = math.log(mass / total)
    return num_pending


@compiled
def carry_realised(
    target_ids_T: Int32, gold_T: Float64, mask_T: Bool, ids_TM: Int32, probs_TM: Float32, tail_T: Float64
) -> None:
    """Gives every realised target token its exact probability and rescales the rest of its row to the remainder.

    Masked rows are emptied: no entries, all mass in the tail. Rows need one free place at the end.
    """
    num_tokens, width = ids_TM.shape
    for t in range(num_tokens):
        if not mask_T[t]:
            for m in range(width):
                ids_TM[t, m] = -1
                probs_TM[t, m] = 0.0
            tail_T[t] = 1.0
            continue
        place = 0
        while ids_TM[t, place] != target_ids_T[t] and ids_TM[t, place] >= 0:
            place += 1
        ids_TM[t, place] = target_ids_T[t]
        probs_TM[t, place] = 0.0
        others = tail_T[t]
        for m in range(width):
            if ids_TM[t, m] < 0:
                break
            others += probs_TM[t, m]
        realised = math.exp(gold_T[t])
        if others > 0.0:
            scale = (1.0 - realised) / others
            for m in range(width):
                if ids_TM[t, m] < 0:
                    break
                probs_TM[t, m] *= scale
            tail_T[t] *= scale
        else:
            tail_T[t] = 1.0 - realised
        probs_TM[t, place] = realised
