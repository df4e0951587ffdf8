"""The alignment method that a run is configured with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from fusion_core.alignment.byte.projection import ByteConfig, ByteProjection
from fusion_core.alignment.projected_rows import ProjectedRows
from fusion_core.alignment.published.min_edit import MinEditConfig, MinEditProjection
from fusion_core.alignment.published.transport import TransportConfig, TransportProjection
from fusion_core.blocks import Block
from fusion_core.vocabulary import Encoding, Vocabulary


def _name_as_section(value: Any) -> Any:
    return {"method": value} if isinstance(value, str) else value


AlignmentConfig = Annotated[
    ByteConfig | MinEditConfig | TransportConfig,
    Field(discriminator="method"),
    BeforeValidator(_name_as_section),
]
"""`byte`, `min_edit` or `transport`; a mapping with the key `method` may hold that method's settings too."""


class Alignment:
    """The projection of several sources' blocks into one target vocabulary. Keep one object per service.

    A source that has the target's own vocabulary is taken as it is, whatever the method.
    """

    def __init__(self, sources: Mapping[str, Vocabulary], target: Vocabulary, config: AlignmentConfig) -> None:
        """Look up or build the tables of every pair (seconds for a large vocabulary).

        Raises:
            ValueError: `transport`, and no source has the target's vocabulary.
        """
        self.target, self.method = target, config.method
        self._native = tuple(name for name, source in sources.items() if source.fingerprint == target.fingerprint)
        if config.method == "transport" and not self._native:
            raise ValueError(
                "fusion.alignment: transport matches candidates with the target model's own: add the target model to "
                "the sources, or choose byte or min_edit"
            )
        self._projections = {
            name: _projection(source, target, ByteConfig() if name in self._native else config)
            for name, source in sources.items()
        }

    def project(self, blocks: Mapping[str, Block | None], target: Encoding) -> dict[str, ProjectedRows | None]:
        """Return every source's rows in the target's vocabulary, one per token of `target`; None where it has no block.

        With `transport`, a window for which the target's own block is missing cannot be aligned: all are None.

        Raises:
            ValueError: a block belongs to another vocabulary or to another text.
        """
        own = next((block for name in self._native if (block := blocks.get(name)) is not None), None)
        rows: dict[str, ProjectedRows | None] = {}
        for name, block in blocks.items():
            projection = self._projections[name]
            if block is None or (isinstance(projection, TransportProjection) and own is None):
                rows[name] = None
            elif isinstance(projection, TransportProjection):
                rows[name] = projection.project(block, target, own)
            else:
                rows[name] = projection.project(block, target)
        return rows


def _projection(
    source: Vocabulary, target: Vocabulary, config: ByteConfig | MinEditConfig | TransportConfig
) -> ByteProjection | MinEditProjection | TransportProjection:
    match config:
        case ByteConfig():
            projection = ByteProjection(source, target, config)
            projection.warm()
            return projection
        case MinEditConfig():
            return MinEditProjection(source, target, config)
        case TransportConfig():
            return TransportProjection(source, target, config)
