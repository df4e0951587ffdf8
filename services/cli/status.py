"""`fusion status`: health, model and vocabulary of all running services."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table

from fusion.v1 import fusion_pb2
from services.base.errors import ServiceError
from services.deploy.local_ray import Deployment
from services.fusion.client import FusionClient
from services.recipes.load import load_recipe
from services.rpc.health_check import health_of

_TIMEOUT_SECONDS = 15.0
_TASKS_BESIDE = {"recall": "finds key blocks", "verify": "judges answers", "reward.serve": "scores answers"}
"""The task of each service beside sources and fusion service, by section of the recipe."""


def show_status(deployment: Deployment, console: Console) -> bool:
    """Print a table for one deployment; return whether the fusion service answers SERVING."""
    health = health_of(deployment.grpc_address, deployment.application)
    table = Table(title=f"{deployment.name} at {deployment.grpc_address}", title_justify="left")
    for column in ("application", "health", "model", "vocabulary", "missing, retries, timeouts"):
        table.add_column(column, overflow="fold", no_wrap=column in {"health", "vocabulary"})
    problems: list[str] = []
    address, name = deployment.grpc_address, deployment.application
    client = FusionClient(address, application=name, timeout_seconds=_TIMEOUT_SECONDS, patience_seconds=0)
    try:
        info = client.info()
    except ServiceError as error:
        table.add_row(deployment.application, health)
        problems.append(f"{deployment.application}: {error}")
    else:
        table.add_row(deployment.application, health, f"fuses by {info.alignment}, {info.strategy}", info.vocabulary)
        for source in info.sources:
            counts = f"{source.missing}, {source.retries}, {source.timeouts}"
            table.add_row(source.name, _state(source), source.model, source.vocabulary, counts)
            if source.problem:
                problems.append(f"{source.name}: {source.problem}")
        for dataset in info.datasets:
            size = f"{dataset.num_windows} windows, {dataset.num_bytes:,} bytes"
            table.add_row(f"data set {dataset.name}/{dataset.split}", "", size, dataset.fingerprint[:16])
        done = info.counts
        table.caption_justify = "left"
        table.caption = (
            f"{done.windows} windows fused, {done.tokens} tokens; {done.degraded} without all sources, {done.skipped} "
            f"skipped; {done.streams} streams open, {done.windows_in_flight} windows under way "
            "(by the replica that answered, since its start)"
        )
    for section, served in _beside(deployment):
        table.add_row(served, health_of(address, served), _TASKS_BESIDE[section])
    console.print(table)
    for problem in problems:
        console.print(problem, soft_wrap=True, markup=False, highlight=False)
    console.print(f"Ray dashboard {deployment.dashboard}, log {deployment.log}", soft_wrap=True)
    return health == "SERVING"


def _beside(deployment: Deployment) -> list[tuple[str, str]]:
    """Return section and application of each service that was started beside sources and fusion service."""
    if not Path(deployment.recipe).is_file():
        return []
    return [(section, served.application) for section, served in load_recipe(deployment.recipe).beside.items()]


def _state(source: fusion_pb2.SourceStatus) -> str:
    """Return a source's health, and whether the breaker keeps it out of the windows."""
    left_out = {fusion_pb2.BREAKER_STATE_OPEN: ", left out", fusion_pb2.BREAKER_STATE_HALF_OPEN: ", on trial"}
    return ("SERVING" if source.serving else "NOT_SERVING") + left_out.get(source.breaker, "")
