"""Tasks in processes of their own, with their results in order."""

from __future__ import annotations

import logging
import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from logging.handlers import QueueHandler
from queue import SimpleQueue
from typing import Any, Self, TypeVar

Result = TypeVar("Result")
_TASKS_AHEAD = 2
"""Number of tasks of each process that are under way or wait for their turn."""

_first: tuple[Any, ...] = ()


class Workers:
    """Processes that work through tasks, to be used in a `with` block; a single one is this process itself.

    Args:
        number: of processes.
        first: first arguments of every task, which are sent to each process once.
    """

    def __init__(self, number: int, *first: Any) -> None:
        self._number, self._first = number, first
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def in_order(
        self, function: Callable[..., Result], tasks: Iterable[tuple[Any, ...]]
    ) -> Generator[Result, None, None]:
        """Yield `function(*first, *task)` of every task, in order; raises the first exception in that order.

        A few tasks are ahead of the results; those that have not begun are dropped when the iterator is closed. What
        the function logs in another process is logged here, each message once.
        """
        if self._number == 1:
            yield from (function(*self._first, *task) for task in tasks)
            return
        if self._pool is None:
            # Not by forking: a process with threads of its own, such as gRPC's, may not be copied.
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(self._number, context, initializer=_initialise, initargs=(self._first,))
        under_way = deque[Future[tuple[Result, list[logging.LogRecord]]]]()
        told = set[str]()
        try:
            for task in tasks:
                under_way.append(self._pool.submit(_run, function, task))
                if len(under_way) >= self._number * _TASKS_AHEAD:
                    yield _logged(under_way.popleft(), told)
            while under_way:
                yield _logged(under_way.popleft(), told)
        finally:
            for future in under_way:
                future.cancel()


def available_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _initialise(first: tuple[Any, ...]) -> None:
    global _first  # noqa: PLW0603  # the place of a process's first arguments
    _first = first
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # every core has a process already
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End this process when its parent is killed: the queue of tasks would stay open, and be waited for, for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "it was started by one"
    parent.join()
    os._exit(1)


def _run(function: Callable[..., Result], task: tuple[Any, ...]) -> tuple[Result, list[logging.LogRecord]]:
    queue = SimpleQueue[logging.LogRecord]()
    handler, root = QueueHandler(queue), logging.getLogger()
    root.addHandler(handler)
    try:
        result = function(*_first, *task)
    finally:
        root.removeHandler(handler)
    return result, [queue.get() for _ in range(queue.qsize())]


def _logged(future: Future[tuple[Result, list[logging.LogRecord]]], told: set[str]) -> Result:
    result, records = future.result()
    for record in records:
        if record.getMessage() not in told:
            told.add(record.getMessage())
            logging.getLogger(record.name).handle(record)
    return result
