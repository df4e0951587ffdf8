"""Submitting and following, against a stand-in for Ray's job client; the live job API is tested with the services."""

from __future__ import annotations

import io
from types import SimpleNamespace

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from ray.job_submission import JobStatus
from rich.console import Console

from services.base.errors import ServiceError, UnavailableError
from services.jobs import ray_job as module
from services.jobs.progress_line import RunProgress, parse_progress
from services.jobs.ray_job import job_name, stop, submit

NOW = RunProgress(
    "fused", step=3, total_steps=40, epoch=1, loss=2.5, tokens_per_second=1234, wait_share=0.25, eta_seconds=61
)


class FakeJobs:
    """Jobs with a log in chunks; a chunk that is an exception breaks the connection once."""

    def __init__(self, chunks=(), status=JobStatus.SUCCEEDED, exit_code=None, jobs=()):
        self.chunks, self.status, self.exit_code, self.jobs = list(chunks), status, exit_code, list(jobs)
        self.submitted: dict[str, object] = {}
        self.stopped: list[str] = []

    def list_jobs(self):
        return [SimpleNamespace(submission_id=name, status=status) for name, status in self.jobs]

    def submit_job(self, **arguments):
        if arguments["entrypoint"] == "refuse":
            raise RuntimeError("no")
        self.submitted = arguments

    def stop_job(self, submission_id):
        self.stopped.append(submission_id)

    async def tail_job_logs(self, _submission_id):
        for number, chunk in enumerate(self.chunks):
            if isinstance(chunk, Exception):
                self.chunks.pop(number)
                raise chunk
            yield chunk

    def get_job_status(self, _submission_id):
        return self.status

    def get_job_info(self, _submission_id):
        return SimpleNamespace(status=self.status, driver_exit_code=self.exit_code)


@pytest.fixture
def run(monkeypatch):
    monkeypatch.setattr(module, "_POLL_SECONDS", 0.01)

    def start(jobs: FakeJobs, entrypoint=("python", "-m", "services.distill"), **settings):
        monkeypatch.setattr(module, "_connect", lambda _dashboard: jobs)
        text = io.StringIO()
        console = Console(file=text, width=200, force_terminal=settings.pop("terminal", False))
        code = submit(entrypoint, name="toy-fused", dashboard="http://ray:8265", console=console, **settings)
        return code, text.getvalue()

    return start


def test_progress_survives_rays_log():
    line = f"\x1b[36m(RayTrainWorker pid=7)\x1b[0m {NOW.line()}"
    assert parse_progress(line) == NOW
    assert parse_progress("(RayTrainWorker pid=7) Setting up process group") is None


def test_lines_come_once_and_plain_when_the_connection_breaks(run):
    jobs = FakeJobs(
        [
            "\x1b[36m(driver)\x1b[0m start\nhalf ",
            "a line\n",
            ConnectionResetError("gone"),
            f"(worker) {NOW.line()}\n",
            "the end",
        ]
    )
    code, text = run(jobs)
    assert code == 0
    assert text.splitlines() == [
        "submitted toy-fused-1 to http://ray:8265", "(driver) start", "half a line", NOW.line(), "the end",
        "toy-fused-1: succeeded",
    ]  # fmt: skip
    assert jobs.submitted["entrypoint"] == "python -m services.distill"


def test_a_terminal_gets_a_bar(run):
    code, text = run(FakeJobs([f"{NOW.line()}\n", "something else\n"]), terminal=True)
    assert code == 0
    assert "something else" in text and "1234 tokens/s" in text and "3/40" in text


@pytest.mark.parametrize(("exit_code", "expected"), [(2, 2), (None, 1)])
def test_a_failed_job_gives_its_exit_code(run, exit_code, expected):
    code, text = run(FakeJobs(status=JobStatus.FAILED, exit_code=exit_code))
    assert (code, text.splitlines()[-1]) == (expected, "toy-fused-1: failed")


def test_attempts_are_counted_and_a_running_one_is_joined(run):
    others = [("toy-fused-1", JobStatus.FAILED), ("toy-fused-x-7", JobStatus.RUNNING), (None, JobStatus.RUNNING)]
    jobs = FakeJobs(jobs=[*others, ("toy-fused-2", JobStatus.SUCCEEDED)])
    run(jobs, follow=False)
    assert jobs.submitted["submission_id"] == "toy-fused-3"
    jobs = FakeJobs(jobs=[*others, ("toy-fused-2", JobStatus.RUNNING)])
    code, text = run(jobs, follow=False)
    assert code == 0 and jobs.submitted == {}
    assert "toy-fused-2 is running already" in text
    assert "ray job stop toy-fused-2 --address http://ray:8265" in text
    assert stop("toy-fused", dashboard="http://ray:8265") == "toy-fused-2" and jobs.stopped == ["toy-fused-2"]


NAMES = st.from_regex(r"[a-c][a-c_.-]{0,5}", fullmatch=True)


@given(one=st.tuples(NAMES, NAMES), other=st.tuples(NAMES, NAMES))
@example(one=("a", "b-c"), other=("a-b", "c"))
@example(one=("a-", "b"), other=("a", "-b"[1:]))
def test_other_recipes_and_runs_have_other_jobs(one, other):
    assert (job_name(*one) == job_name(*other)) == (one == other)


def test_the_job_of_another_run_is_not_joined(run):
    jobs = FakeJobs(jobs=[("toy--fused-1", JobStatus.RUNNING), ("toy-fused--2-1", JobStatus.RUNNING)])
    run(jobs, follow=False)
    assert jobs.submitted["submission_id"] == "toy-fused-1"


def test_control_c_detaches(run):
    jobs = FakeJobs(["first\n"])

    async def interrupted(_submission_id):
        yield "first\n"
        raise KeyboardInterrupt

    jobs.tail_job_logs = interrupted  # type: ignore[method-assign]
    code, text = run(jobs)
    assert code == 0
    assert "detached; toy-fused-1 goes on" in text and "ray job logs -f toy-fused-1" in text


def test_refusal_and_silence_are_service_errors(run, monkeypatch):
    with pytest.raises(ServiceError, match="job toy-fused-1 was refused: no"):
        run(FakeJobs(), entrypoint=["refuse"])
    monkeypatch.undo()
    with pytest.raises(UnavailableError, match="does not answer"):
        submit(["python"], name="x", dashboard="http://127.0.0.1:9")
