"""`python -m tests.drill --seconds 600 [--seed N] [--json FILE]`: 1 on any loss, duplicate or wrong block."""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console

from services.deploy.local_ray import enable_ray_authentication


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.drill", description="The fault drill, see tests/drill.")
    parser.add_argument("--seconds", type=_positive, default=600.0, help="how long faults are done")
    parser.add_argument("--seed", type=int, help="repeats a drill's faults, in so far as their timing allows")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results there")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="work in this new folder, and leave it there")
    parser.add_argument("--faults", nargs="+", metavar="NAME", help="these, once each, instead of random ones")
    parser.add_argument("--brief", action="store_true", help="one of each fault that is soon over, short deadlines")
    options = parser.parse_args()
    if options.keep is not None and options.keep.exists():
        parser.error(f"--keep: {options.keep} exists")
    seed = options.seed if options.seed is not None else random.SystemRandom().randrange(10**6)
    if seed < 0:
        parser.error("--seed: must not be negative")
    _end_on_sigterm()
    console = Console(highlight=False)
    with tempfile.TemporaryDirectory(prefix="drill-") as temporary:
        folder = (options.keep or Path(temporary)).absolute()
        os.environ["FUSION_HOME"] = str(folder / "home")
        enable_ray_authentication()
        from tests.drill.faults import BRIEF, FAULTS
        from tests.drill.run import drill
        from tests.drill.scene import Scene

        if options.brief:
            options.faults = options.faults or BRIEF
        if unknown := sorted(set(options.faults or ()) - set(FAULTS)):
            parser.error(f"--faults: {unknown[0]!r} is not known; there are {', '.join(FAULTS)}")
        console.print(f"seed {seed}; starting the services in {folder}")
        size: dict[str, Any] = {"deadline_seconds": 1.5, "fusion_replicas": 1} if options.brief else {}
        with Scene(folder, seed, **size) as scene:
            _end_on_sigterm()  # Ray has put its own handler in place
            rng, num_recomputed = random.Random(seed), 20 if options.brief else 100
            outcome = drill(
                scene, options.seconds, rng, console.print, faults=options.faults, num_recomputed=num_recomputed
            )
    outcome.report().finish(options.json)
    for line in [*outcome.problems, *outcome.verdict.wrong[:20]]:
        console.print(f"[red]{line}")
    console.print(f"seed {seed}: " + ("sound" if outcome.sound else "[bold red]NOT SOUND"))
    return 0 if outcome.sound else 1


def _end_on_sigterm() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))


def _positive(text: str) -> float:
    if not (value := float(text)) > 0:
        raise argparse.ArgumentTypeError("must be positive")
    return value


if __name__ == "__main__":
    sys.exit(main())
