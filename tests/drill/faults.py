"""What is done to the stream. A fault does its harm, undoes what it can, and says since when recovery counts."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable
from contextlib import suppress

import psutil

from tests.drill.scene import Scene
from tests.fakes.lies import LIES

Fault = Callable[[Scene, random.Random], float]
"""Returns when it began, in seconds of `time.time()`; a freeze or a silence returns when it ended."""


def kill_source(scene: Scene, rng: random.Random) -> float:
    name = rng.choice(["alpha", "beta", "gamma"])
    if name != "gamma":
        return _kill(scene.replicas(name), rng)
    since = time.time()
    _signal(scene.gamma, signal.SIGKILL)
    time.sleep(rng.uniform(1, 3))
    scene.start_gamma()
    return since


def kill_fusion(scene: Scene, rng: random.Random) -> float:
    return _kill([_busiest(scene.replicas("fusion"))], rng)


def kill_proxy(scene: Scene, rng: random.Random) -> float:
    return _kill(scene.proxies(), rng)


def kill_consumer(scene: Scene, rng: random.Random) -> float:
    since = time.time()
    _signal(scene.consumer, signal.SIGKILL)
    while scene.consumer_ended() is None:
        time.sleep(0.01)
    scene.start_consumer()
    return since


def freeze_source(scene: Scene, rng: random.Random) -> float:
    name = rng.choice(["alpha", "beta", "gamma"])
    return _freeze(scene, scene.gamma if name == "gamma" else _any(scene.replicas(name), rng), rng)


def freeze_fusion(scene: Scene, rng: random.Random) -> float:
    return _freeze(scene, _busiest(scene.replicas("fusion")), rng)


def freeze_proxy(scene: Scene, rng: random.Random) -> float:
    return _freeze(scene, _any(scene.proxies(), rng), rng)


def freeze_consumer(scene: Scene, rng: random.Random) -> float:
    return _freeze(scene, scene.consumer, rng)


def reset_client(scene: Scene, rng: random.Random) -> float:
    since = time.time()
    scene.to_fusion.reset()
    return since


def reset_sources(scene: Scene, rng: random.Random) -> float:
    since = time.time()
    scene.to_sources.reset()
    return since


def silence_client(scene: Scene, rng: random.Random) -> float:
    """The connection stays open and carries nothing."""
    scene.to_fusion.hold(True)
    time.sleep(_longer_than_the_deadline(scene, rng))
    scene.to_fusion.hold(False)
    return time.time()


def silence_sources(scene: Scene, rng: random.Random) -> float:
    scene.to_sources.hold(True)
    time.sleep(_longer_than_the_deadline(scene, rng))
    scene.to_sources.hold(False)
    return time.time()


def nan_blocks(scene: Scene, rng: random.Random) -> float:
    return _lie(scene, rng, "nan")


def false_blocks(scene: Scene, rng: random.Random) -> float:
    """One lie after the other: ids beyond the vocabulary, other numbers of candidates, rows that cannot be."""
    since = time.time()
    for name in rng.sample(sorted(LIES), len(LIES)):
        scene.tell_gamma(f"lie {name}")
        time.sleep(scene.deadline_seconds / len(LIES) * rng.uniform(0.75, 1.5))
    scene.tell_gamma("sound")
    return since


def mutated_blocks(scene: Scene, rng: random.Random) -> float:
    return _lie(scene, rng, "mutated")


def wrong_fingerprint(scene: Scene, rng: random.Random) -> float:
    return _lie(scene, rng, "fingerprint")


def other_text(scene: Scene, rng: random.Random) -> float:
    """The source answers with the block before, which is sound and belongs to another window."""
    return _lie(scene, rng, "other_text")


def late_answers(scene: Scene, rng: random.Random) -> float:
    return _lie(scene, rng, f"delay {_longer_than_the_deadline(scene, rng):.1f}")


FAULTS: dict[str, Fault] = {
    fault.__name__.replace("_", " "): fault
    for fault in (
        *(kill_source, kill_fusion, kill_proxy, kill_consumer),
        *(freeze_source, freeze_fusion, freeze_proxy, freeze_consumer),
        *(reset_client, reset_sources, silence_client, silence_sources),
        *(nan_blocks, wrong_fingerprint, other_text, late_answers, false_blocks, mutated_blocks),
    )
}


BRIEF = (
    "reset client",
    "nan blocks",
    "kill source",
    "other text",
    "reset sources",
    "kill consumer",
    "wrong fingerprint",
    "freeze source",
    "late answers",
    "false blocks",
    "mutated blocks",
    "kill fusion",
    "kill proxy",
)
"""One of each kind, those that take long left out."""


def _kill(processes: list[psutil.Process], rng: random.Random) -> float:
    since = time.time()
    _signal(_any(processes, rng), signal.SIGKILL)
    return since


def _freeze(scene: Scene, process: psutil.Process | None, rng: random.Random) -> float:
    _signal(process, signal.SIGSTOP)
    try:
        time.sleep(_longer_than_the_deadline(scene, rng))
    finally:
        _signal(process, signal.SIGCONT)
    return time.time()


def _lie(scene: Scene, rng: random.Random, command: str) -> float:
    since = time.time()
    scene.tell_gamma(command)
    time.sleep(scene.deadline_seconds * rng.uniform(0.75, 1.5))
    scene.tell_gamma("sound")
    return since


def _longer_than_the_deadline(scene: Scene, rng: random.Random) -> float:
    return scene.deadline_seconds * rng.uniform(1.25, 2.0)


def _any(processes: list[psutil.Process], rng: random.Random) -> psutil.Process | None:
    """None where the fault before has left nobody: then this one hits nothing."""
    return rng.choice(sorted(processes, key=lambda process: process.pid)) if processes else None


def _busiest(processes: list[psutil.Process]) -> psutil.Process | None:
    """The replica that serves the stream."""

    def seconds() -> list[float]:
        return [sum(process.cpu_times()[:2]) for process in processes]

    try:
        before = seconds()
        time.sleep(0.5)
        used = [after - first for after, first in zip(seconds(), before, strict=True)]
    except psutil.NoSuchProcess:
        return processes[0]
    return processes[used.index(max(used))] if used else None


def _signal(process: psutil.Process | None, number: int) -> None:
    if process is not None:
        with suppress(psutil.NoSuchProcess):
            process.send_signal(number)
