"""Tasks of a step side by side, in processes of this machine or on a Ray cluster, each with a record of its own.

A task is done when its `record.json` names files that are all there: on a disk its folder appears whole, in an object
store, where the files are uploaded from a temporary folder, the record is the last one. So a run
may be killed anywhere and started again, and what a killed worker still writes harms nobody. datatrove's executors are
not used: they write shards in place, mark a task as done with an empty file that outlives its shard, leave their
workers behind when they are killed, and the one for Ray returns as if all was well when tasks failed three times.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from services.base.atomic import PARTIAL_SUFFIX, whole_folder
from services.base.errors import RunFailedError
from services.base.files import Files
from services.corpus.cleaning.shards import StepFiles
from services.corpus.cleaning.tally import Tally

RECORD = "record.json"

RunAll = Callable[[Callable[[int], None], Sequence[int]], Iterator[int]]
"""Runs a function for each task; yields a task when it is done. Raises what a task raised."""


@dataclass(frozen=True, slots=True)
class Step:
    """A step of the pipeline.

    Attributes:
        name: of its folder, and in the ledger.
        identity: everything besides the step before it that decides the result; JSON.
        run: makes a task's files in a folder, and returns its tally; None where it makes no documents.
        num_tasks: tasks that may run side by side.
    """

    name: str
    identity: Any
    run: Callable[[int, Path], Tally | None]
    num_tasks: int


def run_step(step: Step, files: Files, run_all: RunAll, report: Callable[[int], None]) -> None:
    """Run the tasks of a step that are not done yet; `report` is called with the number of those that are."""
    if (root := files.local_folder) is not None:
        for left in (root / step.name).glob(f".*{PARTIAL_SUFFIX}"):
            shutil.rmtree(left, ignore_errors=True)
    missing = [task for task in range(step.num_tasks) if read_record(files, step.name, task) is None]
    done = step.num_tasks - len(missing)
    report(done)
    for _ in run_all(partial(_run_task, step, files), missing) if missing else ():
        done += 1
        report(done)


def read_record(files: Files, step: str, task: int) -> dict[str, Any] | None:
    """Return the record of a task that is done: its tally, and name, size and hash of its files; None for others."""
    folder = StepFiles(files, step).folder(task)
    try:
        record: dict[str, Any] = json.loads(files.read(f"{folder}/{RECORD}") or b"")
        sizes = files.sizes(folder)
        intact = all(sizes.get(name) == size for name, (size, _) in record["files"].items())
    except (OSError, ValueError):
        return None
    return record if intact else None


def _run_task(step: Step, files: Files, task: int) -> None:
    folder = StepFiles(files, step.name).folder(task)
    if (root := files.local_folder) is not None:
        if (root / folder).exists():  # a file in it is missing or short
            shutil.rmtree(root / folder)
        with whole_folder(root / folder) as partial_folder:
            _fill(step, task, partial_folder)
        return
    with tempfile.TemporaryDirectory(prefix="fusion-") as temporary:
        _fill(step, task, Path(temporary))
        files.delete(f"{folder}/{RECORD}")
        for path in sorted(Path(temporary).iterdir(), key=lambda path: path.name == RECORD):
            if path.is_file():
                files.upload(f"{folder}/{path.name}", path)


def _fill(step: Step, task: int, folder: Path) -> None:
    """Write the files of a task and their record."""
    tally = step.run(task, folder)
    written = {}
    for path in sorted(folder.iterdir()):
        if path.is_file():
            with path.open("rb") as data:
                digest = hashlib.file_digest(data, "sha256").hexdigest()
            written[path.name] = [path.stat().st_size, digest]
    record = {"files": written, "tally": None if tally is None else tally.as_json()}
    (folder / RECORD).write_text(json.dumps(record, indent=1) + "\n")


@contextmanager
def local_workers(num_workers: int) -> Iterator[RunAll]:
    """Yield what runs tasks in so many processes of this machine; with one, in this process."""
    if num_workers == 1:
        yield _run_here
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_workers, context, initializer=_end_with_parent) as pool:

        def run_all(function: Callable[[int], None], tasks: Sequence[int]) -> Iterator[int]:
            futures = {pool.submit(function, task): task for task in tasks}
            try:
                for future in as_completed(futures):
                    future.result()
                    yield futures[future]
            except BrokenProcessPool as error:
                raise RunFailedError("a worker was killed, perhaps for its memory; try fewer `workers`") from error
            finally:
                for future in futures:
                    future.cancel()

        yield run_all


def run_on_ray(function: Callable[[int], None], tasks: Sequence[int]) -> Iterator[int]:
    """Run each task on a core of the Ray cluster that this process is connected to; see `RunAll`."""
    import ray

    remote = ray.remote(num_cpus=1)(_call)
    pending = {remote.remote(function, task): task for task in tasks}
    while pending:
        [done], _ = ray.wait(list(pending), num_returns=1)
        try:
            ray.get(done)
        except ray.exceptions.RayTaskError as error:
            raise error.cause from error
        except ray.exceptions.RayError as error:
            raise RunFailedError(f"task {pending[done]} was lost: {error}") from error
        yield pending.pop(done)


def _call(function: Callable[[int], None], task: int) -> None:
    function(task)


def _run_here(function: Callable[[int], None], tasks: Sequence[int]) -> Iterator[int]:
    for task in tasks:
        function(task)
        yield task


def _end_with_parent() -> None:
    """End this worker when the process that started it is gone; a pool's workers would wait for it for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
