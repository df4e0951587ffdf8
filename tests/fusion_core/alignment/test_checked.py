"""Blocks and encodings that do not fit are refused by every method, and nothing that is taken crashes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest

from fusion_core.alignment.byte.projection import ByteConfig, ByteProjection
from fusion_core.alignment.method import Alignment
from fusion_core.alignment.projected_rows import ProjectedRows
from fusion_core.alignment.published.min_edit import MinEditConfig, MinEditProjection
from fusion_core.alignment.published.transport import TransportConfig, TransportProjection
from fusion_core.alignment.published.vocabulary_map import VocabularyMapConfig
from fusion_core.blocks import Block
from fusion_core.vocabulary import Encoding
from tests.fakes.strategies import random_block
from tests.fakes.tokenizers import vocabulary

TEXT = "The other thing: Die Würde 日本語 12 * 12 = 144\n\tdef add(a, b):\r\n".encode()
MAP = VocabularyMapConfig(cache_dir=None)
METHODS = ("byte", "last_row", "min_edit", "transport")
SOURCE, TARGET = "gemma", "byte_level"
NUM_MUTATIONS = 2000


@cache
def project(method: str) -> Callable[[Block, Encoding, Block], ProjectedRows]:
    pair = vocabulary(SOURCE), vocabulary(TARGET)
    if method == "transport":
        transport = TransportProjection(*pair, TransportConfig(vocabulary_map=MAP))
        return transport.project
    other = (
        MinEditProjection(*pair, MinEditConfig(vocabulary_map=MAP))
        if method == "min_edit"
        else ByteProjection(*pair, ByteConfig(follow_tokens=method == "byte"))
    )
    return lambda block, target, own: other.project(block, target)


def sound(ends: bool = True) -> tuple[Block, Encoding, Block]:
    """A source's block, the target's encoding, the target's own block."""
    source, target = vocabulary(SOURCE), vocabulary(TARGET)
    encoding = target.encode(TEXT)
    assert target.eos_id is not None
    block, own = random_block(source, TEXT, 1, 8, ends=ends), random_block(target, TEXT, 2, 8, ends=ends)
    return block, encoding.with_end(target.eos_id) if ends else encoding, own


BEYOND, PADDED = vocabulary(SOURCE).size, vocabulary(SOURCE).size + 3
REFUSED: tuple[tuple[str, Any, str], ...] = (
    ("token_ids_T", 16_000_000, rf"token_ids: expected ids from 0 to {BEYOND - 1}, got \d+ to 16000000"),
    ("token_ids_T", BEYOND, "token_ids: expected ids"),
    ("token_ids_T", -1, "token_ids: expected ids"),
    ("topk_ids_TK", 16_000_000, "topk_ids: expected ids from -1"),
    ("topk_ids_TK", -2, "topk_ids: expected ids from -1"),
    ("byte_ends_T", 1 << 30, "byte_ends: must rise from 0 to the text's"),
    ("byte_ends_T", -5, "byte_ends: must rise from 0 to the text's"),
    ("topk_logprobs_TK", np.nan, "topk_logprobs: expected log-probabilities up to 0, got nan"),
    ("topk_logprobs_TK", 2.0, "topk_logprobs: expected log-probabilities up to 0, got 2"),
    ("tail_T", np.inf, "tail: expected log-probabilities up to 0, got inf"),
    ("gold_T", np.nan, "gold: expected log-probabilities up to 0, got nan"),
)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("column", "value", "message"), REFUSED)
def test_a_value_that_does_not_fit_is_refused_by_the_name_of_its_column(
    method: str, column: str, value: Any, message: str
) -> None:
    block, encoding, own = sound()
    changed = getattr(block, column).copy()
    changed.flat[changed.size // 2] = value
    with pytest.raises(ValueError, match=f"^{message}"):
        project(method)(replace(block, **{column: changed}), encoding, own)


@pytest.mark.parametrize("method", METHODS)
def test_columns_of_another_shape_or_dtype_are_refused(method: str) -> None:
    block, encoding, own = sound()
    none = {"topk_ids_TK": block.topk_ids_TK[:, :0], "topk_logprobs_TK": block.topk_logprobs_TK[:, :0]}
    with pytest.raises(ValueError, match=r"^topk_ids: expected at least one candidate a row, got the shape \(\d+, 0\)"):
        project(method)(replace(block, **none), encoding, own)
    for name in ("token_ids_T", "byte_ends_T", "topk_ids_TK", "topk_logprobs_TK", "tail_T", "gold_T", "mask_T"):
        column = getattr(block, name)
        for other in (column[:-1], np.append(column, column[-1:], axis=0), column[None], column.astype(np.float16)):
            with pytest.raises(ValueError, match=r"^[a-z_]+: (expected|must)"):
                project(method)(replace(block, **{name: other}), encoding, own)


@pytest.mark.parametrize("method", METHODS)
def test_the_targets_encoding_is_checked_too(method: str) -> None:
    block, encoding, own = sound(ends=False)
    for token_id in (-1, vocabulary(TARGET).size):
        ids = encoding.token_ids_T.copy()
        ids[3] = token_id
        with pytest.raises(ValueError, match=r"^target: token_ids: expected ids from 0"):
            project(method)(block, replace(encoding, token_ids_T=ids), own)
    with pytest.raises(ValueError, match=r"^target: byte_ends must rise"):
        project(method)(block, replace(encoding, byte_ends_T=encoding.byte_ends_T[::-1]), own)
    with pytest.raises(ValueError, match=r"^target: .*one shape"):
        project(method)(block, replace(encoding, lossless_T=encoding.lossless_T[1:]), own)


def test_the_door_of_all_methods_refuses_as_well() -> None:
    block, encoding, _ = sound()
    alignment = Alignment({"only": vocabulary(SOURCE)}, vocabulary(TARGET), MinEditConfig(vocabulary_map=MAP))
    ids = block.token_ids_T.copy()
    ids[0] = BEYOND
    with pytest.raises(ValueError, match=r"^token_ids: expected ids"):
        alignment.project({"only": replace(block, token_ids_T=ids)}, encoding)


@pytest.mark.parametrize("method", METHODS)
def test_candidates_of_a_padded_output_layer_go_to_the_tail(method: str) -> None:
    block, encoding, own = sound()
    ids_TK = block.topk_ids_TK.copy()
    ids_TK[ids_TK == ids_TK[0, 0]] = PADDED
    assert_distributions(project(method)(replace(block, topk_ids_TK=ids_TK), encoding, own))


def assert_distributions(rows: ProjectedRows) -> None:
    total_T = rows.probs_TM.sum(axis=1, dtype=np.float64) + rows.tail_T
    assert np.abs(total_T - 1.0).max(initial=0.0) <= 1e-4
    assert rows.probs_TM.min(initial=0.0) >= 0.0 and np.isfinite(rows.gold_T).all()


def mutated(block: Block, rng: np.random.Generator) -> Block:
    """The block with one to three columns changed: single values, whole columns, shapes, the text, the end row."""
    values = {
        "token_ids_T": [-1, 0, BEYOND - 1, BEYOND, PADDED, 16_000_000, -(2**31), 2**31 - 1],
        "byte_ends_T": [-1, 0, 1, len(TEXT), len(TEXT) + 1, 2**31 - 1, -(2**31)],
        "topk_ids_TK": [-2, -1, 0, BEYOND - 1, BEYOND, PADDED, 16_000_000, 2**31 - 1],
        "topk_logprobs_TK": [np.nan, np.inf, -np.inf, 0.0, 1e-3, 5.0, -1e30, -745.0, -1e-45],
        "tail_T": [np.nan, np.inf, -np.inf, 0.0, 3.0, -1e30],
        "gold_T": [np.nan, np.inf, -np.inf, 0.0, 1e-3, 3.0, -1e30, -355.0],
        "mask_T": [False, True],
    }
    for _ in range(rng.integers(1, 4)):
        name = str(rng.choice([*values, "text_bytes", "ends_document", "rows", "candidates"]))
        if name == "text_bytes":
            block = replace(block, text_bytes=[b"", TEXT[:-1], TEXT + b"x", TEXT[::-1]][rng.integers(4)])
        elif name == "ends_document":
            block = replace(block, ends_document=not block.ends_document)
        elif name == "rows":
            number = rng.integers(0, block.num_tokens + 1)
            block = replace(block, **{column: getattr(block, column)[:number] for column in values})
        elif name == "candidates":
            number = rng.integers(0, block.topk_ids_TK.shape[-1] + 1)
            block = replace(
                block,
                topk_ids_TK=block.topk_ids_TK[:, :number],
                topk_logprobs_TK=block.topk_logprobs_TK[:, : number + rng.integers(0, 2)],
            )
        else:
            column = getattr(block, name).copy()
            chosen = rng.random(column.shape) < rng.choice([0.02, 0.3, 1.0])
            column[chosen] = rng.choice(np.array(values[name], dtype=column.dtype), chosen.sum())
            block = replace(block, **{name: column})
    return block


@pytest.mark.parametrize("method", METHODS)
def test_a_mutated_block_is_refused_or_gives_distributions(method: str) -> None:
    block, encoding, own = sound()
    rng, num_refused = np.random.default_rng(0), 0
    for _ in range(NUM_MUTATIONS):
        lie, of_target = mutated(block, rng), rng.random() < 0.2
        try:
            rows = project(method)(block, encoding, lie) if of_target else project(method)(lie, encoding, own)
        except ValueError:
            num_refused += 1
        else:
            assert_distributions(rows)
    assert NUM_MUTATIONS / 4 < num_refused < NUM_MUTATIONS
