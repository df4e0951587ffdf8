"""One stage of a chain: its settings, and the places of its files."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from services.jobs.run_folder import RunFolder
from services.jobs.tracking import Tracking
from services.posttrain.config import DpoStage, GrpoStage, PosttrainConfig, SftStage
from services.posttrain.data.manifest import ROWS


@dataclass(frozen=True, slots=True)
class StageJob:
    """The settings of the workers. All of them must see the folders under the same path.

    Attributes:
        name: of the stage's folder, such as `1-sft`.
        folder: of the stage; see `RunFolder`. Its rows are there already.
        start: Hugging Face folder that the stage starts from, and its reference.
        stage: settings of the stage.
        config: settings of the chain.
        identity: hash of all that decides the result; every checkpoint carries it.
        tracking: where the stage's curves go.
    """

    name: str
    folder: Path
    start: Path
    stage: SftStage | DpoStage | GrpoStage
    config: PosttrainConfig
    identity: str
    tracking: Tracking = field(default_factory=Tracking)

    @property
    def files(self) -> RunFolder:
        """The files of the stage's folder."""
        return RunFolder(self.folder)

    def rows(self) -> list[dict[str, Any]]:
        """Return the rows that the stage learns from."""
        with (self.folder / ROWS).open(encoding="utf-8") as lines:
            return [json.loads(line) for line in lines]
