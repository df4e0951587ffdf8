"""Jobs through Ray's job API: submitted, followed to their end, stopped."""

from __future__ import annotations

import asyncio
import re
import shlex
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from services.base.errors import ServiceError, UnavailableError
from services.base.progress_bars import plain_console
from services.jobs.progress_line import parse_progress

_ANSI = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
_POLL_SECONDS = 1.0
_LOST_SECONDS = 60.0


def job_name(*parts: str) -> str:
    """Return one name from several parts, such as those of recipe and run: other parts give another name.

    Parts are joined by a hyphen, and hyphens within them are doubled. Each part must begin with a letter or digit.
    """
    assert all(part[:1].isalnum() for part in parts), parts
    return "-".join(part.replace("-", "--") for part in parts)


def submit(
    entrypoint: Sequence[str],
    *,
    name: str,
    dashboard: str,
    env: Mapping[str, str] | None = None,
    follow: bool = True,
    detach_on_interrupt: bool = True,
    console: Console | None = None,
) -> int:
    """Start a job, or join the one of the same name that still runs; return its exit code, 0 when not followed.

    Args:
        entrypoint: command of the driver, run on the cluster's head node.
        name: see `job_name`; the submission id is the name and the number of the attempt, such as `a-fused-2`.
        dashboard: address of Ray's dashboard, `http://host:8265`.
        env: environment variables of the job, shown on the dashboard: no secrets.
        follow: print logs and progress until the end.
        detach_on_interrupt: Ctrl-C leaves the job running; else KeyboardInterrupt goes to the caller.
        console: output; a terminal gets a progress bar, anything else plain lines.

    Raises UnavailableError when the dashboard does not answer, ServiceError when the job is refused.
    """
    console = console or plain_console()
    client = _connect(dashboard)
    submission_id, running = _submission_id(client, name)
    if running:
        console.print(f"{submission_id} is running already", highlight=False)
    else:
        try:
            client.submit_job(
                entrypoint=shlex.join(entrypoint),
                submission_id=submission_id,
                runtime_env={"env_vars": dict(env or {})},
            )
        except RuntimeError as error:
            raise ServiceError(f"job {submission_id} was refused: {error}") from error
        console.print(f"submitted {submission_id} to {dashboard}", highlight=False)
    if not follow:
        console.print(_commands_for(submission_id, dashboard), highlight=False, soft_wrap=True)
        return 0
    try:
        asyncio.run(_print_log(client, submission_id, console))
    except KeyboardInterrupt:
        if not detach_on_interrupt:
            raise
        console.print(f"\ndetached; {submission_id} goes on", highlight=False)
        console.print(_commands_for(submission_id, dashboard), highlight=False, soft_wrap=True)
        return 0
    return _exit_code(client, submission_id, console)


def stop(name: str, *, dashboard: str) -> str | None:
    """Stop the running job of that name; return its submission id, None when none runs."""
    client = _connect(dashboard)
    submission_id, running = _submission_id(client, name)
    if not running:
        return None
    client.stop_job(submission_id)
    return submission_id


def _connect(dashboard: str) -> Any:
    from ray.job_submission import JobSubmissionClient

    try:
        return JobSubmissionClient(dashboard)
    except (ConnectionError, RuntimeError) as error:
        raise UnavailableError(f"Ray's job API at {dashboard} does not answer: {error}") from error


def _submission_id(client: Any, name: str) -> tuple[str, bool]:
    """Return (id, True) of the running job of that name, or (id, False) of the next attempt."""
    attempts: dict[int, Any] = {}
    for job in client.list_jobs():
        prefix, _, number = (job.submission_id or "").rpartition("-")
        if prefix == name and number.isdigit():
            attempts[int(number)] = job
    for job in attempts.values():
        if not job.status.is_terminal():
            return job.submission_id, True
    return f"{name}-{max(attempts, default=0) + 1}", False


def _commands_for(submission_id: str, dashboard: str) -> str:
    return (
        f"follow: ray job logs -f {submission_id} --address {dashboard}\n"
        f"stop:   ray job stop {submission_id} --address {dashboard}"
    )


async def _print_log(client: Any, submission_id: str, console: Console) -> None:
    """Print the job's log until the job has ended."""
    columns = (
        TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(),
        TextColumn("{task.fields[state]}", markup=False),
    )  # fmt: skip
    bar = Progress(*columns, console=console, transient=True) if console.is_terminal else None
    with bar or nullcontext():
        task = bar.add_task("starting", total=None, state="") if bar else None
        async for line in _lines(client, submission_id):
            now = parse_progress(line)
            if now is None or bar is None or task is None:
                console.print(line if now is None else now.line(), highlight=False, markup=False, soft_wrap=True)
                continue
            state = f"loss {now.loss:.4f}  {now.tokens_per_second:.0f} tokens/s  ETA {now.eta_seconds:.0f} s"
            bar.update(task, description=now.run_name, completed=now.step, total=now.total_steps, state=state)


async def _lines(client: Any, submission_id: str) -> AsyncIterator[str]:
    """Yield complete lines of the job's log, each once. A connection that drops is taken up again."""
    seen = 0
    lost_since: float | None = None
    clock = asyncio.get_running_loop().time
    while True:
        rest, number = "", 0
        try:
            async for chunk in client.tail_job_logs(submission_id):
                lost_since = None
                *lines, rest = (rest + chunk).split("\n")
                for line in lines:
                    number += 1
                    if number > seen:
                        yield _ANSI.sub("", line).rstrip("\r")
            seen = max(seen, number)
            if (await asyncio.to_thread(client.get_job_status, submission_id)).is_terminal():
                if rest:
                    yield _ANSI.sub("", rest)
                return
        except (OSError, RuntimeError) as error:
            seen = max(seen, number)
            lost_since = lost_since or clock()
            if clock() - lost_since > _LOST_SECONDS:
                raise UnavailableError(f"lost the log of {submission_id}: {error}") from error
        await asyncio.sleep(_POLL_SECONDS)


def _exit_code(client: Any, submission_id: str, console: Console) -> int:
    info = client.get_job_info(submission_id)
    status = str(info.status.value)
    console.print(f"{submission_id}: {status.lower()}", highlight=False)
    if status == "SUCCEEDED":
        return 0
    return int(getattr(info, "driver_exit_code", None) or 1)
