"""`python -m tests.fuzz [--cases N] [--seed S]`: N malformed blocks for the decoder and N inputs for a live service.

Prints counts by outcome; ends with 1 when anything happened that must not.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from services.deploy.local_ray import enable_ray_authentication

enable_ray_authentication()  # before anything below imports Ray

from tests.fuzz.decoder import fuzz_decoder  # noqa: E402
from tests.fuzz.live import Report, fuzz_live  # noqa: E402
from tests.security.deployment import SECOND_TOKEN, TOKEN, guarded_deployment  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--cases", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    decoded, violations = fuzz_decoder(arguments.cases, arguments.seed)
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder, guarded_deployment(Path(folder)) as up:
        started = time.monotonic()
        report = fuzz_live(
            arguments.cases,
            arguments.seed,
            address=up.address,
            token=TOKEN,
            good=up.client(SECOND_TOKEN),
            resident_bytes=up.resident_bytes,
        )
        seconds = time.monotonic() - started
    violations += report.violations
    console = Console(width=120)
    table = Table("input", "outcome", "count")
    for outcome, count in sorted(decoded.items()):
        table.add_row("decoder", outcome, f"{count:,}")
    for (kind, outcome), count in sorted(report.counts.items()):
        table.add_row(kind, outcome, f"{count:,}")
    console.print(table)
    _print_rest(console, report, seconds)
    for violation in violations[:50]:
        console.print(f"VIOLATION {violation}", highlight=False, markup=False)
    console.print(f"{len(violations)} violations in {sum(decoded.values()) + sum(report.counts.values()):,} cases")
    return 1 if violations else 0


def _print_rest(console: Console, report: Report, seconds: float) -> None:
    console.print(f"good client beside it: {report.good_calls:,} calls in {seconds:.0f} s")
    for name, growth in sorted(report.growth_bytes.items()):
        console.print(f"{name}: memory {growth / 2**20:+.1f} MiB", highlight=False)


if __name__ == "__main__":
    sys.exit(main())
