"""One drill: faults in random order until the time is up, then a quiet end, then the judgement."""

from __future__ import annotations

import base64
import itertools
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from fusion.v1 import block_pb2
from services.wire.block import decode_block
from tests.bench.parts.report import Report
from tests.drill.faults import FAULTS
from tests.drill.ledger import Entry, Verdict, judge
from tests.drill.scene import PREFETCH_WINDOWS, Scene

_RECOVERY_SECONDS = 180.0
"""A stream that stands still for longer has stopped for good."""
_MOST_PROBLEMS = 5
"""With so many there is nothing more to learn."""
_POLL_SECONDS = 0.05
_SAY_SECONDS = 15.0


@dataclass(slots=True)
class Strike:
    """A fault that was done, and how the stream took it.

    Attributes:
        recovery_seconds: from the fault, or the end of a freeze, to the first window that had not been asked for by
            then: what was on its way already is no sign of life. None when it never came.
        silence_seconds: the longest time without a window, from the fault to its recovery.
    """

    fault: str
    recovery_seconds: float | None = None
    silence_seconds: float = 0.0


@dataclass(slots=True)
class Outcome:
    """What a drill found."""

    verdict: Verdict
    strikes: list[Strike]
    problems: list[str] = field(default_factory=list)
    num_recomputed: int = 0
    seconds: float = 0.0
    num_epochs: int = 0

    @property
    def sound(self) -> bool:
        return self.verdict.sound and not self.problems

    def report(self) -> Report:
        report = Report("drill")
        for fault in FAULTS:
            mine = [strike for strike in self.strikes if strike.fault == fault]
            if not mine:
                continue
            seconds = [strike.recovery_seconds for strike in mine if strike.recovery_seconds is not None]
            report.row(
                table="recovery in seconds",
                fault=fault,
                number=len(mine),
                recovered=len(seconds),
                median=statistics.median(seconds) if seconds else None,
                worst=max(seconds, default=None),
                longest_silence=max(strike.silence_seconds for strike in mine),
            )
        verdict = self.verdict
        due = verdict.delivered - sum(1 for _ in verdict.twice) + len(verdict.lost)
        once = due - len(verdict.lost) - len(verdict.twice)
        report.row(table="ledger", figure="windows due", value=due)
        report.row(table="ledger", figure="epochs", value=self.num_epochs)
        report.row(table="ledger", figure="blocks computed again", value=self.num_recomputed)
        report.row(table="ledger", figure="seconds", value=round(self.seconds))
        report.check("windows delivered exactly once", 100 * once / max(1, due), "%", at_least=100)
        report.check("windows lost", len(verdict.lost), "windows", at_most=0)
        report.check("windows delivered twice", len(verdict.twice), "windows", at_most=0)
        report.check("wrong blocks delivered", len(verdict.wrong), "blocks", at_most=0)
        report.check("other problems", len(self.problems), "", at_most=0)
        return report


def drill(
    scene: Scene,
    seconds: float,
    rng: random.Random,
    say: Callable[[str], None],
    *,
    faults: Sequence[str] | None = None,
    num_recomputed: int = 100,
) -> Outcome:
    """Runs a drill on a scene that is up.

    Args:
        seconds: how long faults are done, from the first windows on; the end of the last epoch and the judgement come
            on top.
        rng: draws everything that is drawn.
        say: gets a line now and then.
        faults: these, once each and in this order, instead of random ones; the time is then a limit.
        num_recomputed: so many blocks of the sample are computed again.
    """
    watch = _Watch(scene)
    begins = watch.wait_for(PREFETCH_WINDOWS, time.time()) is not None
    begin, said, strikes = time.monotonic(), 0.0, list[Strike]()
    deck: list[str] = list(faults or ())
    while begins and time.monotonic() - begin < seconds:
        if not deck:
            if faults is not None:
                break
            deck = rng.sample(list(FAULTS), len(FAULTS))
        strikes.append(_strike(scene, watch, deck.pop(0), rng))
        if time.monotonic() - said > _SAY_SECONDS:
            said = time.monotonic()
            last = strikes[-1]
            took = "no recovery" if last.recovery_seconds is None else f"{last.recovery_seconds:.1f} s"
            say(
                f"{said - begin:4.0f} s: {len(scene.ledger.entries):,} windows, {len(strikes)} faults; "
                f"last: {last.fault}, {took}"
            )
        if strikes[-1].recovery_seconds is None:
            watch.problems.append(f"{strikes[-1].fault}: no window for {_RECOVERY_SECONDS:.0f} s")
            break
        watch.idle(rng.uniform(1, 4))
    scene.ask_for_end()
    watch.wait_for_end()
    ended = time.monotonic()
    entries = scene.ledger.entries
    sample = [entry for entry in entries if entry.block]
    sample = rng.sample(sample, min(num_recomputed, len(sample)))
    say(f"{ended - begin:4.0f} s: the stream has ended; computing {len(sample)} blocks again")
    verdict = judge(entries, scene.expected(), _recompute(scene, sample))
    num_epochs = entries[-1].epoch + 1 if entries else 0
    return Outcome(verdict, strikes, watch.problems, len(sample), ended - begin, num_epochs)


def _strike(scene: Scene, watch: _Watch, name: str, rng: random.Random) -> Strike:
    began = time.time()
    since = FAULTS[name](scene, rng)
    recovered = watch.wait_for(PREFETCH_WINDOWS + 1, since)
    strike = Strike(name)
    if recovered is not None:
        strike.recovery_seconds = recovered - since
        times = [began, *(entry.at for entry in scene.ledger.entries if began <= entry.at <= recovered)]
        strike.silence_seconds = max(after - before for before, after in itertools.pairwise(times))
    return strike


class _Watch:
    """Waits for windows, and restarts a consumer that ended by itself: that is a problem to report."""

    def __init__(self, scene: Scene) -> None:
        self._scene = scene
        self.problems: list[str] = []

    def wait_for(self, num_windows: int, since: float) -> float | None:
        """When the `num_windows`-th window after `since` was delivered; None when it was not in time."""
        deadline = time.monotonic() + _RECOVERY_SECONDS
        while time.monotonic() < deadline and len(self.problems) < _MOST_PROBLEMS:
            self._look()
            after = [entry.at for entry in self._scene.ledger.entries[-10_000:] if entry.at > since]
            if len(after) >= num_windows:
                return after[num_windows - 1]
            time.sleep(_POLL_SECONDS)
        return None

    def idle(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            self._look()
            time.sleep(_POLL_SECONDS)

    def wait_for_end(self) -> None:
        deadline = time.monotonic() + _RECOVERY_SECONDS
        while (code := self._scene.consumer_ended()) is None and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)
        if code != 0:
            self.problems.append("the stream did not come to the end of its epoch")
        self._scene.ledger.update()

    def _look(self) -> None:
        self._scene.ledger.update()
        if (code := self._scene.consumer_ended()) is not None:
            log = (self._scene.folder / "consumer.log").read_text().strip().splitlines()
            self.problems.append(f"the consumer ended by itself with code {code}: {log[-1] if log else ''}")
            self._scene.start_consumer()


def _recompute(scene: Scene, sample: Sequence[Entry]) -> list[str]:
    if not sample:
        return []
    recomputation, wrong = scene.recomputation(), []
    for entry in sample:
        block = decode_block(block_pb2.TokenBlock.FromString(base64.b64decode(entry.block)))
        if found := recomputation.wrong_with(block):
            wrong.append(f"epoch {entry.epoch}, window {entry.index}: {found}")
    return wrong
