"""`python -m tests.jobs.tracked_process FOLDER AFTER_STEP LAST_STEP END`: an attempt at a run that tracks everywhere.

It goes on behind AFTER_STEP, and after LAST_STEP it ends, or is killed where END is `killed`.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from services.jobs.run_folder import RunFolder
from services.jobs.step_log import StepLog
from services.jobs.tracking import Trackers, Tracking


def main() -> None:
    folder, after_step, last_step, end = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    tracking = Tracking(("tensorboard", "wandb", "mlflow"), "story", folder / "tracking")
    files = RunFolder(folder / "run")
    log = StepLog(files.metrics, after_step=after_step)
    with Trackers(tracking, "first", files, after_step=after_step) as trackers:
        for step in range(after_step + 1, last_step + 1):
            row = {"step": step, "loss": 1 / step, "rate[0]": step * 0.1, "name": "words", "none": None}
            if step % 3 == 0:
                row["accuracy"] = step / 10
            log.write(row)
            trackers.write(row)
        log.sync()
        if end == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
    log.close()


if __name__ == "__main__":
    main()
