"""`fusion status` without the rest of a deployment: the row of the verifier."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from services.cli.status import show_status
from services.deploy.local_ray import Deployment
from services.verify.config import VerifyConfig
from tests.fakes.services.plain_verifier import plain_verifier


@pytest.mark.parametrize(("section", "shown"), [({}, True), ({"address": "10.0.0.7:9000"}, False), (None, False)])
def test_a_verifier_that_was_started_has_a_row(section: dict[str, str] | None, shown: bool, tmp_path: Path) -> None:
    recipe = {
        "name": "judged",
        "corpus": {"files": ["*.txt"]},
        "sources": [{"name": "one", "model": "smollm2-135m-instruct", "address": "127.0.0.1:1"}],
        "target": {"model": "smollm2-135m-instruct"},
        "verify": section,
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    console = Console(width=300, file=io.StringIO(), record=True)
    with plain_verifier(VerifyConfig(bwrap="/nowhere/bwrap")) as address:
        deployment = Deployment(
            name="judged",
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
    rows = [line for line in console.export_text().splitlines() if "judges answers" in line]
    assert len(rows) == shown
    assert all("verify" in row and "SERVING" in row for row in rows)
