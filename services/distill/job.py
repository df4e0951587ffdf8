"""One training run: its settings, and the places of its files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from services.base.files import join_location
from services.distill.config import DistillConfig
from services.jobs.run_folder import RunFolder
from services.jobs.storage import clear, split_location
from services.jobs.tracking import Tracking


@dataclass(frozen=True, slots=True)
class DistillJob:
    """The settings of driver and workers. All workers must see the folders under the same path.

    Attributes:
        run_name: name of the run, unique among the runs of a target.
        run_folder: folder of checkpoints, logs and the final model; see `RunFolder`.
        target_folder: Hugging Face folder of the target before training.
        dataset: name of the data set at the fusion service.
        split: split to train on.
        fusion_address: host:port of the fusion service.
        config: settings of training.
        application: name of the fusion service's Serve application.
        token: bearer token; default the one in the workers' environment.
        eval_split: split that `eval_every_steps` scores.
        recipe: the resolved recipe, YAML, to be kept in the run's folder.
        expected: settings of the fusion service that the recipe names, dotted key and JSON value as in GetFusionInfo; a
            service that runs otherwise is refused.
        tracking: where the run's curves go.
    """

    run_name: str
    run_folder: Path
    target_folder: Path
    dataset: str
    split: str
    fusion_address: str
    config: DistillConfig
    application: str = "fusion"
    token: str | None = field(default=None, repr=False)
    eval_split: str = "held_out"
    recipe: str = field(default="", repr=False)
    expected: Mapping[str, str] = field(default_factory=dict, repr=False)
    tracking: Tracking = field(default_factory=Tracking)

    @property
    def files(self) -> RunFolder:
        """The files of the run folder."""
        return RunFolder(self.run_folder)

    @property
    def checkpoints(self) -> str:
        """Folder or URL of the checkpoints and of Ray Train's list of them."""
        if self.config.storage is None:
            return str(self.files.checkpoints.absolute())
        return join_location(self.config.storage, self.run_folder.parent.name, self.run_name, "checkpoints")

    @property
    def lease_locations(self) -> tuple[str, ...]:
        """Folders or URLs where only one process may write at a time: that of the run, and that of its checkpoints."""
        beside_checkpoints, _ = split_location(self.checkpoints)
        return (str(self.run_folder.absolute()), beside_checkpoints)

    def start_over(self) -> None:
        """Delete the files and checkpoints of the run."""
        clear(self.checkpoints)
        self.files.clear()
