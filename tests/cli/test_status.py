"""`fusion status` without the rest of a deployment: the rows of verifier and recall service."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from services.cli.status import show_status
from services.deploy.local_ray import Deployment
from services.recall.config import RecallConfig
from services.verify.config import VerifyConfig
from tests.fakes.services.plain_recall import ScriptedJudge, plain_recall
from tests.fakes.services.plain_verifier import plain_verifier


def test_a_recall_service_that_was_started_has_a_row(tmp_path: Path) -> None:
    with plain_recall(RecallConfig(), ScriptedJudge()) as address:
        [row] = rows_of("finds key blocks", {"recall": {"judge": "judge"}}, address, tmp_path)
        assert "recall" in row
        assert "SERVING" in row
        assert rows_of("finds key blocks", {"recall": {"address": "10.0.0.7:9000"}}, address, tmp_path) == []


@pytest.mark.parametrize(("section", "shown"), [({}, True), ({"address": "10.0.0.7:9000"}, False), (None, False)])
def test_a_verifier_that_was_started_has_a_row(section: dict[str, str] | None, shown: bool, tmp_path: Path) -> None:
    with plain_verifier(VerifyConfig(bwrap="/nowhere/bwrap")) as address:
        rows = rows_of("judges answers", {"verify": section}, address, tmp_path)
    assert len(rows) == shown
    assert all("verify" in row and "SERVING" in row for row in rows)


def rows_of(task: str, sections: dict[str, Any], address: str, folder: Path) -> list[str]:
    """The rows with this task of a deployment at an address, whose recipe has these sections."""
    recipe = {
        "name": "beside",
        "corpus": {"files": ["*.txt"]},
        "sources": [{"name": "one", "model": "smollm2-135m-instruct", "address": "127.0.0.1:1"}],
        "target": {"model": "smollm2-135m-instruct"},
        **sections,
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    console = Console(width=300, file=io.StringIO(), record=True)
    deployment = Deployment(
        name="beside",
        recipe=str(path),
        pid=1,
        pid_created=0.0,
        gcs_address="",
        dashboard="",
        grpc_address=address,
        application="fusion",
        log="",
        ports=(),
    )
    show_status(deployment, console)
    return [line for line in console.export_text().splitlines() if task in line]
