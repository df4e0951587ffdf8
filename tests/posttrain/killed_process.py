"""A process that runs a chain and kills itself once the stage has written a number of checkpoints."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

from services.posttrain.chain import Chain
from services.posttrain.config import PosttrainConfig
from services.posttrain.stages import parts

parts.load_trl()


def run_until_killed(folder: Path, config: Path, name: str, num_checkpoints: int) -> None:
    """Run the chain in `folder` whose settings are in the file `config`."""
    whole = parts.write_whole
    written = 0

    def write_and_die(path: Path, content: Any) -> None:
        nonlocal written
        whole(path, content)
        written += path.name == "checkpoint.json"
        if written == num_checkpoints:
            os.kill(os.getpid(), signal.SIGKILL)

    parts.write_whole = write_and_die
    Chain(PosttrainConfig.model_validate_json(config.read_text()), folder / "start", folder / name, force=True).run()
