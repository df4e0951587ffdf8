"""One guarded deployment for all tests here."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.security.deployment import Guarded, guarded_deployment


@pytest.fixture(scope="package")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    with guarded_deployment(tmp_path_factory.mktemp("guarded")) as up:
        yield up
