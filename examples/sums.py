"""Write the data of examples/sums.yaml: sums of two numbers below 20, with specs and with answers.

    python examples/sums.py sums

120 of the 400 sums are held out; the gate judges by them.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

BELOW, HELD_OUT = 20, 120


def row(a: int, b: int) -> dict[str, Any]:
    """Return a prompt with the spec that its answers are held against."""
    return {"prompt": f"{a}+{b}=", "verify": {"kind": "answer", "expected": a + b}}


def write(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write rows as JSON lines."""
    lines = [json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{path}: {len(lines)} rows")


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    sums = [(a, b) for a in range(BELOW) for b in range(BELOW)]
    random.Random(0).shuffle(sums)
    held_out, train = sums[:HELD_OUT], sums[HELD_OUT:]
    write(folder / "answered.jsonl", ({**row(a, b), "completion": str(a + b)} for a, b in train))
    write(folder / "prompts.jsonl", (row(a, b) for a, b in train))
    write(folder / "held_out.jsonl", (row(a, b) for a, b in held_out))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python examples/sums.py FOLDER")
    main(Path(sys.argv[1]))
