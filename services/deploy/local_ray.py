"""A Ray cluster on this machine, started by `fusion up` and outliving it; and the file that says where it is."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from services.base.atomic import write_whole
from services.base.errors import ServiceError, UnavailableError
from services.base.home import expand_user, fusion_home
from services.wire.protocol import MAX_MESSAGE_BYTES

_START_SECONDS = 120
_STOP_SECONDS = 10
_SHOWN_BYTES = 2000

RAY_SETTINGS = {
    # Ray gives its workers niceness 15, so that anything else on the machine would go before the services.
    "RAY_worker_niceness": "0",
    # Serve asks its proxy for health every ten seconds; every call goes through it.
    "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "2",
    # Serve's own limit is two gigabytes, read into memory before the token is checked.
    "RAY_SERVE_GRPC_MAX_MESSAGE_SIZE": str(MAX_MESSAGE_BYTES),
}
"""Environment variables of a cluster on this machine; the user's own values come first."""


@dataclass(frozen=True, slots=True)
class Deployment:
    """Services that `fusion up` left running. `ports` are those that they listen on."""

    name: str
    recipe: str
    pid: int
    pid_created: float
    gcs_address: str
    dashboard: str
    grpc_address: str
    application: str
    log: str
    ports: tuple[int, ...] = ()

    @property
    def running(self) -> bool:
        return self._process() is not None

    def _process(self) -> psutil.Process | None:
        try:
            process = psutil.Process(self.pid)
            # A child of this process that has ended stays in the list of processes until somebody asks how it ended.
            ended = process.status() == psutil.STATUS_ZOMBIE
            return process if not ended and abs(process.create_time() - self.pid_created) < 1.0 else None
        except psutil.NoSuchProcess:
            return None

    def check_running(self) -> None:
        """Raise UnavailableError with the end of the log when Ray's head has ended."""
        if not self.running:
            raise UnavailableError(f"Ray's head, process {self.pid}, has ended; {_end_of_log(Path(self.log))}")

    def save(self) -> None:
        write_whole(_state_file(self.name), json.dumps(asdict(self), indent=2))

    def stop(self) -> None:
        """End the cluster and every process that it started, the engines' included; also those of a head that died."""
        if (process := self._process()) is not None:
            _end(process)
        else:
            _kill(self._left_behind())
        _state_file(self.name).unlink(missing_ok=True)

    def _left_behind(self) -> list[psutil.Process]:
        """Return the processes of the head's session that outlived it."""
        with _ignore_ended():
            if abs(psutil.Process(self.pid).create_time() - self.pid_created) >= 1.0:
                return []  # the number was given out again, which happens only when nobody is left of its session
        return [process for process in psutil.process_iter() if _session(process) == self.pid != process.pid]


def deployments() -> list[Deployment]:
    """Return all deployments that run now; records of those that died are removed."""
    found = []
    for path in sorted(_state_file("x").parent.glob("*.json")):
        try:
            values = json.loads(path.read_text())
            deployment = Deployment(**{**values, "ports": tuple(values.get("ports", ()))})
        except (ValueError, TypeError, AttributeError):
            continue
        if deployment.running:
            found.append(deployment)
        else:
            path.unlink(missing_ok=True)
    return found


def start_ray(*, host: str, dashboard_port: int, num_cpus: int, log: Path) -> tuple[int, str]:
    """Start a Ray head that outlives this process; return its pid and GCS address.

    Ray uses the machine's own address where `host` is a loopback one, so its ports can be reached from outside; its
    token keeps strangers out, see `enable_ray_authentication`. Raises UnavailableError with the end of the log when
    it does not come up.
    """
    gcs_port = free_port(host)
    command = [
        _ray(), "start", "--head", "--block",
        f"--node-ip-address={host}", f"--port={gcs_port}",
        f"--dashboard-host={host}", f"--dashboard-port={dashboard_port}",
        f"--ray-client-server-port={free_port(host)}", f"--dashboard-agent-listen-port={free_port(host)}",
        f"--num-cpus={num_cpus}", "--disable-usage-stats", "--include-dashboard=true",
    ]  # fmt: skip
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as stream:
        process = subprocess.Popen(
            command, stdout=stream, stderr=stream, stdin=subprocess.DEVNULL, start_new_session=True, env=_environment()
        )
    deadline = time.monotonic() + _START_SECONDS
    try:
        while not (_listens(host, dashboard_port) and _has_listener(process.pid, dashboard_port)):
            if process.poll() is not None or time.monotonic() > deadline:
                raise UnavailableError(f"Ray did not start; {_end_of_log(log)}")
            time.sleep(0.2)
    except BaseException:  # Ctrl-C does not reach a session of its own
        with _ignore_ended():
            _end(psutil.Process(process.pid))
        raise
    return process.pid, f"{host}:{gcs_port}"


def enable_ray_authentication() -> None:
    """Turn Ray's token authentication on for this process and those it starts, unless RAY_AUTH_MODE says otherwise.

    Call it before Ray is imported: Ray reads the mode once. The token is Ray's own, in the place where Ray keeps it, so
    that stock `ray` commands of the same user find it.
    """
    assert "ray" not in sys.modules or "RAY_AUTH_MODE" in os.environ, "Ray was imported before its mode was set"
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    if os.environ["RAY_AUTH_MODE"] != "token" or {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys():
        return
    if not expand_user("~/.ray/auth_token", "RAY_AUTH_TOKEN_PATH").is_file():
        try:
            subprocess.run([_ray(), "get-auth-token", "--generate"], check=True, capture_output=True, text=True)
        except (OSError, subprocess.CalledProcessError) as error:
            reason = getattr(error, "stderr", None) or str(error)
            raise ServiceError(f"RAY_AUTH_MODE: cannot make a token: {reason.strip()[-500:]}") from error


def _ray() -> str:
    return str(Path(sys.executable).parent / "ray")


def _environment() -> dict[str, str]:
    """Return the environment of Ray's processes: `python` there is the interpreter that runs the services."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    return {**RAY_SETTINGS, **os.environ, "PATH": path}


_returned_ports: set[int] = set()


def free_port(host: str = "127.0.0.1") -> int:
    """Return a TCP port that nothing listens on, and that no outgoing connection gets by chance before it is used.

    It lies between the ports of Ray's workers and those that Linux gives to outgoing connections. No port is returned
    twice: the caller may not listen there yet.
    """
    while True:
        port = random.SystemRandom().randrange(20_000, 32_768)
        if port not in _returned_ports and not port_in_use(host, port):
            _returned_ports.add(port)
            return port


def port_in_use(host: str, port: int) -> bool:
    """Return whether binding the port would fail."""
    with closing(socket.socket(socket.AF_INET, socket.SOCK_STREAM)) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                return True
            raise ServiceError(f"service.host: cannot listen on {host}:{port}: {error.strerror}") from error
    return False


def _end(process: psutil.Process) -> None:
    """End a process with SIGTERM, then those that it started and that still run with SIGKILL."""
    with _ignore_ended():
        family = [process, *process.children(recursive=True)]
        process.send_signal(signal.SIGTERM)
        _, alive = psutil.wait_procs(family, timeout=_STOP_SECONDS)
        _kill(alive)


def _kill(processes: list[psutil.Process]) -> None:
    for process in processes:
        with _ignore_ended():
            process.kill()
    psutil.wait_procs(processes, timeout=_STOP_SECONDS)


def _session(process: psutil.Process) -> int | None:
    """Return the number of the session that a process belongs to, None when it has ended."""
    try:
        return os.getsid(process.pid)
    except OSError:
        return None


def _end_of_log(log: Path) -> str:
    """Return the last lines of a log as the end of a message; no more of them than fit a screen."""
    if not log.is_file():
        return f"there is no log {log}"
    with log.open("rb") as stream:
        stream.seek(max(0, log.stat().st_size - _SHOWN_BYTES))
        return f"the end of {log} reads:\n{stream.read().decode(errors='replace')}"


def _listens(host: str, port: int) -> bool:
    with closing(socket.socket(socket.AF_INET, socket.SOCK_STREAM)) as probe:
        probe.settimeout(1.0)
        return probe.connect_ex((host, port)) == 0


def _has_listener(pid: int, port: int) -> bool:
    """Return whether the process, or one that it started, listens on the port: it may be another cluster's."""
    with _ignore_ended():
        process = psutil.Process(pid)
        for member in (process, *process.children(recursive=True)):
            for connection in member.net_connections(kind="tcp"):
                if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port:
                    return True
    return False


def _state_file(name: str) -> Path:
    return fusion_home() / "deployments" / f"{name}.json"


@contextmanager
def _ignore_ended() -> Iterator[None]:
    try:
        yield
    except psutil.NoSuchProcess:
        return
