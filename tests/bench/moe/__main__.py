"""A dense model as a mixture of experts: exactness, noise on routers, training with tied copies, vLLM, time and memory.

The model is SmolLM2-135M-Instruct, the text Python's own documentation. Mixtures have 24 experts of which 6 are active.
Training steps take the first six layers of the model. Times are CPU seconds over all threads, the sides in turn; memory
is the growth of a process of its own over two steps, weights included. `sources` compares vLLM with transformers on
tiny mixtures of every family; `experiment` is described in `experiment.py`.

A finished part is kept below runs/bench/moe-parts, so what broke off goes on; remove the folder to measure all anew.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from time import perf_counter

from services.base.atomic import write_whole
from services.models.fetch import fetch
from tests.bench.moe.exactness import measure_bfloat16, measure_noise, measure_shapes, measure_smollm2
from tests.bench.moe.experiment import measure_experiment
from tests.bench.moe.models import MODEL, text_ids
from tests.bench.moe.served import measure_vllm
from tests.bench.moe.sources import measure_source
from tests.bench.moe.training import measure_copies, measure_cost
from tests.bench.parts.report import Check, Report, arguments
from tests.fakes.files.tiny_mixtures import MIXTURES, REFUSED

STEPS = 40


def measured(file: Path, measure: Callable[[Report], None]) -> Report:
    """Return what a part has measured, now or earlier."""
    part = Report("moe")
    if file.is_file():
        found = json.loads(file.read_text())
        part.rows, part.checks = found["rows"], [Check(**check) for check in found["checks"]]
        return part
    started = perf_counter()
    measure(part)
    print(f"{file.stem}: {perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, json.dumps({"rows": part.rows, "checks": [asdict(check) for check in part.checks]}, indent=1))
    return part


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--only", nargs="+", metavar="PART", help="measure only these parts, such as noise or cost")
    options = parser.parse_args()
    fetch(MODEL)
    quick: bool = options.quick
    parts = parts_of(quick=quick)
    if unknown := set(options.only or ()) - parts.keys():
        parser.error(f"--only: no part is called {', '.join(sorted(unknown))}; there are {', '.join(parts)}")
    report = Report("moe")
    folder = Path("runs/bench") / f"moe-parts{'-quick' if quick else ''}"
    for name in options.only or parts:
        part = measured(folder / f"{name}.json", parts[name])
        report.rows += part.rows
        report.checks += part.checks
    report.finish(options.json)


def parts_of(*, quick: bool) -> dict[str, Callable[[Report], None]]:
    """Return what is measured, by name."""
    ids_BL = text_ids(2, 64) if quick else text_ids(2, 256)
    sources: dict[str, Callable[[Report], None]] = {
        f"source-{family}{'-refused' * refused}": partial(measure_source, family=family, refused=refused)
        for family in (["qwen2_moe"] if quick else MIXTURES)
        for refused in ([False, True] if family in REFUSED and not quick else [False])
    }
    return {
        "shapes": measure_shapes,
        "smollm2": partial(measure_smollm2, ids_BL=ids_BL),
        "bfloat16": partial(measure_bfloat16, ids_BL=ids_BL),
        "noise": partial(measure_noise, ids_BL=ids_BL),
        "copies": partial(measure_copies, ids_BL=ids_BL[:1], steps=5 if quick else STEPS),
        "cost": partial(measure_cost, ids_BL=ids_BL, repetitions=2 if quick else 7),
        "vllm": partial(measure_vllm, ids_BL=ids_BL),
        **sources,
        "experiment": partial(measure_experiment, quick=quick),
    }


if __name__ == "__main__":
    main()
