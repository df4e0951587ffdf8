"""One small reward model for all tests that score."""

from __future__ import annotations

import pytest

from services.reward.train import RewardJob, run
from tests.reward.planted import planted_job


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> RewardJob:
    """A finished run."""
    job = planted_job(tmp_path_factory.mktemp("reward"))
    assert run(job)
    return job
