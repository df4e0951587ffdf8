"""`python -m tests.reward.killed_run FOLDER STEP`: a run that is killed when it has logged that step."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

from services.jobs.step_log import StepLog
from services.reward.train import run
from tests.reward.planted import planted_job


def main() -> None:
    folder, last = Path(sys.argv[1]), int(sys.argv[2])
    write = StepLog.write

    def write_and_die(self: StepLog, row: dict[str, Any]) -> None:
        write(self, row)
        if row["step"] == last:
            os.kill(os.getpid(), signal.SIGKILL)

    StepLog.write = write_and_die  # type: ignore[method-assign]
    run(planted_job(folder))


if __name__ == "__main__":
    main()
