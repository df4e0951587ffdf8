"""The exit code of a Ray job says whether the recipe was wrong or training failed."""

from __future__ import annotations

import pytest
from ray.train import TrainingFailedError

from services.base.errors import FailedPreconditionError, SettingError
from services.jobs.ray_workers import exit_codes


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (SettingError("distill.epochs", "must be at least 1"), 2, "error: distill.epochs: must be at least 1"),
        (FailedPreconditionError("checkpoint: belongs to another run"), 2, "error: checkpoint: belongs to another run"),
        (OSError("no room"), 2, "error: no room"),
        (ArithmeticError("step 3: loss nan"), 1, "error: training failed: step 3: loss nan"),
        (TrainingFailedError("worker died"), 1, "error: training failed: worker died"),
    ],
)
def test_errors_become_exit_codes(
    error: Exception, code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended, exit_codes():
        raise error
    assert ended.value.code == code
    assert capsys.readouterr().err == f"{message}\n"


def test_other_errors_keep_their_traceback() -> None:
    with pytest.raises(KeyError), exit_codes():
        raise KeyError("a defect")
