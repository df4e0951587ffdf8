"""The configured alignment method gives the rows of that method's own projection, and the target's own rows as is."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
from pydantic import ValidationError

from fusion_core.alignment.byte.projection import ByteConfig, ByteProjection
from fusion_core.alignment.method import Alignment
from fusion_core.alignment.projected_rows import ProjectedRows
from fusion_core.alignment.published.min_edit import MinEditConfig, MinEditProjection
from fusion_core.alignment.published.transport import TransportProjection
from fusion_core.blocks import Block
from fusion_core.fusion import FusionConfig, fuse
from fusion_core.vocabulary import Encoding
from tests.fakes.strategies import random_block
from tests.fakes.tokenizers import vocabulary

TEXT = "The other thing is there. Die Würde 日本語 12 * 12 = 144\n\tdef add(a, b):".encode()
SOURCE, TARGET = vocabulary("gemma"), vocabulary("byte_level")
VOCABULARIES = {"own": TARGET, "other": SOURCE}
BLOCKS: dict[str, Block | None] = {name: random_block(v, TEXT, 7, 16) for name, v in VOCABULARIES.items()}
UNCACHED = {"vocabulary_map": {"cache_dir": None}}


def config(**alignment: object) -> FusionConfig:
    return FusionConfig.model_validate({"alignment": alignment})


def assert_same(rows: ProjectedRows | None, expected: ProjectedRows) -> None:
    assert rows is not None
    for field in dataclasses.fields(expected):
        np.testing.assert_array_equal(getattr(rows, field.name), getattr(expected, field.name))


def by_byte(block: Block, own: Block, target: Encoding) -> ProjectedRows:
    return ByteProjection(SOURCE, TARGET).project(block, target)


def by_min_edit(block: Block, own: Block, target: Encoding) -> ProjectedRows:
    return MinEditProjection(SOURCE, TARGET, MinEditConfig.model_validate(UNCACHED)).project(block, target)


def by_transport(block: Block, own: Block, target: Encoding) -> ProjectedRows:
    return TransportProjection(SOURCE, TARGET).project(block, target, own)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"method": "byte"}, by_byte),
        ({"method": "min_edit", **UNCACHED}, by_min_edit),
        ({"method": "transport", **UNCACHED}, by_transport),
    ],
)
def test_rows_are_those_of_the_method(
    settings: dict[str, object], expected: Callable[[Block, Block, Encoding], ProjectedRows]
) -> None:
    own, other = BLOCKS["own"], BLOCKS["other"]
    assert own is not None and other is not None
    target, configured = TARGET.encode(TEXT), config(**settings)
    rows = Alignment(VOCABULARIES, TARGET, configured.alignment).project(BLOCKS, target)
    assert_same(rows["other"], expected(other, own, target))
    assert_same(rows["own"], ByteProjection(TARGET, TARGET).project(own, target))
    fused = fuse(TEXT, target, rows, configured, TARGET.fingerprint)
    fused.validate()
    assert [share.present for share in fused.shares] == [True, True]


def test_an_absent_source_has_no_rows_and_transport_needs_the_target_s_own() -> None:
    target = TARGET.encode(TEXT)
    aligned = Alignment(VOCABULARIES, TARGET, config(method="byte").alignment)
    assert aligned.project(BLOCKS | {"own": None}, target)["other"] is not None
    transported = Alignment(VOCABULARIES, TARGET, config(method="transport", **UNCACHED).alignment)
    assert transported.project(BLOCKS | {"own": None}, target) == {"own": None, "other": None}
    with pytest.raises(ValueError, match=r"fusion\.alignment: transport .* add the target model to the sources"):
        Alignment({"other": SOURCE}, TARGET, config(method="transport", **UNCACHED).alignment)


def test_a_name_is_enough_and_another_s_settings_are_refused() -> None:
    assert FusionConfig().alignment == FusionConfig.model_validate({"alignment": "byte"}).alignment == ByteConfig()
    assert FusionConfig.model_validate({"alignment": "min_edit"}).alignment == MinEditConfig()
    with pytest.raises(ValidationError, match=r"alignment\.byte\.match"):
        config(method="byte", match="hard")
    with pytest.raises(ValidationError, match="'byte', 'min_edit', 'transport'"):
        FusionConfig.model_validate({"alignment": "bytes"})
