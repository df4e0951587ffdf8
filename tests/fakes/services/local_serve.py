"""Ray Serve on a cluster of this process's own: no dashboard, which takes longer to start than everything else."""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import psutil

from services.deploy.local_ray import RAY_SETTINGS

_ATTEMPTS = 5
"""Ray gives a new cluster 30 seconds to come up, which is little on a machine with other work."""


@contextmanager
def local_serve(config: Mapping[str, Any]) -> Iterator[psutil.Process]:
    """Runs the applications of a Serve config; gives the process whose children all of Ray's processes are.

    They are gone in the end, those that are stopped included. Call `enable_ray_authentication` before.
    """
    for name, value in RAY_SETTINGS.items():
        os.environ.setdefault(name, value)
    import ray
    from ray import serve

    own = psutil.Process()
    before = own.children(recursive=True)
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    try:
        _start_ray(ray.init, ray.shutdown)
        serve.start(proxy_location="HeadOnly", http_options=config["http_options"], grpc_options=config["grpc_options"])
        apply(config)
        yield own
    finally:
        started = [process for process in own.children(recursive=True) if process not in before]
        ray.shutdown()
        kill(started)


def apply(config: Mapping[str, Any]) -> None:
    """Runs the applications of a Serve config, or changes those that run, and waits until they are there."""
    from ray.serve.api import RunTarget, run_many

    targets = []
    for entry in config["applications"]:
        module, _, builder = entry["import_path"].partition(":")
        application = getattr(importlib.import_module(module), builder)(entry["args"])
        targets.append(RunTarget(application, name=entry["name"], route_prefix=entry["route_prefix"]))
    run_many(targets)


def _start_ray(init: Callable[..., object], shutdown: Callable[[], object]) -> None:
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            init(
                address="local", num_cpus=32, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR
            )
            return
        except Exception:  # Ray has none of its own for this
            shutdown()
            if attempt == _ATTEMPTS:
                raise


def kill(processes: Sequence[psutil.Process]) -> None:
    """Ends processes that have nothing left to say, frozen ones as well."""
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(list(processes), timeout=20)
