"""The same cleaning as a job on a Ray cluster."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from services.base.errors import SettingError
from services.cli.app import app
from services.corpus.cleaning.pipeline import clean
from services.corpus.cleaning.tasks import run_on_ray
from tests.corpus.cleaning.conftest import bytes_of, run_clean, settings
from tests.fakes.heap.planted import Heap


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """The dashboard of a cluster of this process's own."""
    from services.deploy.local_ray import enable_ray_authentication

    enable_ray_authentication()
    import ray

    repository = str(Path(__file__).parents[3])
    paths = os.pathsep.join([repository, os.environ.get("PYTHONPATH", "")])
    env = {"env_vars": {"PYTHONPATH": paths}}
    with closing(socket.create_server(("127.0.0.1", 0))) as free:
        port = free.getsockname()[1]
    with pytest.MonkeyPatch.context() as patch:  # the jobs' `python` is the one that runs the tests
        patch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)
        started = ray.init(
            address="local",
            num_cpus=2,
            include_dashboard=True,
            dashboard_port=port,
            log_to_driver=False,
            runtime_env=env,
        )
    try:
        yield f"http://{started.dashboard_url}"
    finally:
        ray.shutdown()


def test_the_job_makes_the_same_bytes_as_this_machine(heap: tuple[Heap, Path], cluster: str, tmp_path: Path) -> None:
    curate = settings(heap[1])
    here = run_clean(curate, tmp_path / "here")
    model = "smollm2-135m-instruct"
    recipe: dict[str, Any] = {
        "name": "mine",
        "output_dir": str(tmp_path),
        "curate": curate.model_dump(mode="json"),
        "sources": [{"name": "a", "model": model}],
        "target": {"model": model},
    }
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(recipe))
    done = CliRunner().invoke(app, ["corpus", str(tmp_path / "mine.yaml"), "--ray-address", cluster])
    assert done.exit_code == 0, done.output
    assert f"{here['kept']:,} kept" in done.output
    made = bytes_of(tmp_path / "mine" / "curate")
    assert made.pop("corpus.html")
    assert made.pop("submitted.yaml")
    assert made == bytes_of(tmp_path / "here")


def test_a_task_that_fails_names_the_setting(heap: tuple[Heap, Path], cluster: str, tmp_path: Path) -> None:
    config = settings(heap[1], files=[str(heap[1] / "raw/web/*.parquet")], text_field="body")
    with pytest.raises(SettingError, match=r"text_field: .* has no column 'body'"):
        clean(config, tmp_path / "out", run_on_ray)
