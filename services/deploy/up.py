"""The start of a recipe's services: the Serve config, and `fusion up` on this machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import psutil
from rich.console import Console

from services.base.errors import ServiceError, UnavailableError
from services.base.home import exclusive, fusion_home
from services.base.progress_bars import deployment_progress
from services.deploy.local_ray import Deployment, deployments, port_in_use, start_ray
from services.deploy.serve_config import serve_config
from services.recipes.recipe import Recipe
from services.source.config import AnySource

Answer = TypeVar("Answer")
_PORTS = ("grpc_port", "http_port", "dashboard_port")
"""Keys of the section `service` with the ports that a deployment listens on."""

ReportStates = Callable[[Mapping[str, str]], None]
"""A function of the state of every application, by name."""


def check_free(recipe: Recipe) -> None:
    """Raise ServiceError when this recipe runs already or a port that it needs is taken."""
    service = recipe.service
    wanted = {f"service.{key}": getattr(service, key) for key in _PORTS}
    for other in deployments():
        if other.name == recipe.name:
            raise ServiceError(f"{recipe.name} is up already; `fusion down {recipe.name}` ends it")
        for key, port in wanted.items():
            if port in other.ports:  # it may not listen there yet
                raise ServiceError(f"{key}: port {port} is that of {other.name}, which is up; choose another")
    for key, port in wanted.items():
        if port_in_use(service.host, port):
            raise ServiceError(f"{key}: port {port} is in use; stop what listens there or choose another")


def up(
    recipe: Recipe,
    recipe_file: Path,
    report: ReportStates,
    *,
    only: Collection[str] | None = None,
    timeout_seconds: float = 900,
) -> Deployment:
    """Start Ray and the services on this machine and return when all serve; raises ServiceError when one cannot.

    Args:
        recipe: the run.
        recipe_file: file that keeps the recipe as it is served.
        report: receives the state of every application while they start.
        only: names of the applications to start, all by default.
        timeout_seconds: longest time for the applications to start.
    """
    # One process at a time from the check of the ports to the record that names them: two that start in the same moment
    # would both find them free.
    with exclusive(fusion_home() / "deployments" / "starting"):
        check_free(recipe)
        recipe.save(recipe_file)
        deployment = _start(recipe, recipe_file)
    try:
        deploy(
            serve_config(recipe, only),
            deployment.dashboard,
            report,
            timeout_seconds=timeout_seconds,
            check_head=deployment.check_running,
        )
    except BaseException:
        deployment.stop()
        raise
    return deployment


def _start(recipe: Recipe, recipe_file: Path) -> Deployment:
    """Start Ray with the logical CPUs that the recipe's replicas, workers and job count; record where it is."""
    service = recipe.service
    log = recipe.run_folder / "ray.log"
    wanted = sum(source.num_cpus * source.most_replicas for source in recipe.deployed)
    wanted += service.num_cpus * service.num_replicas + 2
    wanted += sum(served.num_cpus * served.num_replicas for served in recipe.beside.values())
    wanted += recipe.distill.worker_range[1] * recipe.distill.cpus_per_worker
    pid, gcs_address = start_ray(
        host=service.host, dashboard_port=service.dashboard_port, num_cpus=int(wanted + 0.999), log=log
    )
    process = psutil.Process(pid)
    deployment = Deployment(
        name=recipe.name,
        recipe=str(recipe_file.absolute()),
        pid=pid,
        pid_created=process.create_time(),
        gcs_address=gcs_address,
        dashboard=f"http://{service.host}:{service.dashboard_port}",
        grpc_address=recipe.fusion_address,
        application=service.application,
        log=str(log),
        ports=tuple(getattr(service, key) for key in _PORTS),
    )
    try:
        deployment.save()
    except BaseException:
        deployment.stop()
        raise
    return deployment


@contextmanager
def temporarily_up(
    recipe: Recipe, recipe_file: Path, console: Console, *, only: Collection[str] | None = None
) -> Iterator[Deployment]:
    """Start the services as `up` does, and end them when the block ends."""
    with deployment_progress(console) as progress:
        deployment = up(recipe, recipe_file, progress, only=only)
    try:
        yield deployment
    finally:
        deployment.stop()


@contextmanager
def sources_up(recipe: Recipe, sources: Sequence[AnySource], console: Console) -> Iterator[None]:
    """Deploy sources that do not answer for as long as the block takes; those that run already stay.

    Raises UnavailableError when the recipe is up, so that its sources should have answered.
    """
    if not sources:
        yield
        return
    if any(deployment.name == recipe.name for deployment in deployments()):
        raise UnavailableError(f"source {sources[0].name} does not answer, though {recipe.name} is up; see its log")
    recipe_file = recipe.run_folder / "recipe.yaml"
    with temporarily_up(recipe, recipe_file, console, only=[source.name for source in sources]):
        yield


def deploy(
    config: Mapping[str, Any],
    dashboard: str,
    report: ReportStates,
    *,
    timeout_seconds: float,
    check_head: Callable[[], None] = lambda: None,
) -> None:
    """Hand a Serve config to a Ray cluster and wait until every application runs.

    Raises ServiceError when Serve refuses the config or an application fails, UnavailableError when the time is over;
    and whatever `check_head` raises, which is asked all the time whether Ray's head still runs.
    """
    from ray.dashboard.modules.serve.sdk import ServeSubmissionClient

    ray = _Dashboard(dashboard, time.monotonic() + timeout_seconds, check_head)
    try:
        client = ray.ask(lambda: ServeSubmissionClient(dashboard))
    except RuntimeError as error:  # it answers, and refuses: a missing or wrong token
        raise ServiceError(f"Ray's dashboard at {dashboard} refuses: {error}") from error
    try:
        ray.ask(lambda: client.deploy_applications(dict(config)))
    except RuntimeError as error:
        raise ServiceError(f"Ray Serve refuses the configuration: {error}") from error
    names = [application["name"] for application in config["applications"]]
    while True:
        found = ray.ask(client.get_serve_details).get("applications", {})
        states = {name: found.get(name, {}).get("status", "NOT_STARTED") for name in names}
        report(states)
        for name, state in states.items():
            if state in {"DEPLOY_FAILED", "UNHEALTHY"}:
                raise ServiceError(f"application {name} failed to start:\n{_reason(found[name])}")
        if all(state == "RUNNING" for state in states.values()):
            return
        if time.monotonic() > ray.deadline:
            waiting = ", ".join(name for name, state in states.items() if state != "RUNNING")
            raise UnavailableError(f"not running after {timeout_seconds:.0f} s: {waiting}")
        time.sleep(1.0)


@dataclass(frozen=True, slots=True)
class _Dashboard:
    """The dashboard of a Ray cluster, asked until `deadline` (of `time.monotonic`)."""

    url: str
    deadline: float
    check_head: Callable[[], None]

    def ask(self, call: Callable[[], Answer]) -> Answer:
        """Call until the dashboard answers: its modules come up after its port, and a busy one drops connections."""
        while True:
            self.check_head()
            try:
                return call()
            except OSError as error:  # those of requests as well
                if time.monotonic() > self.deadline:
                    raise UnavailableError(f"Ray's dashboard at {self.url} does not answer: {error}") from error
                time.sleep(0.5)


def _reason(application: Mapping[str, Any]) -> str:
    """Return the end of Serve's messages, where the exception is."""
    messages = [application.get("message", "")]
    messages += [deployment.get("message", "") for deployment in application.get("deployments", {}).values()]
    return "\n".join(message.strip()[-1500:] for message in messages if message)
