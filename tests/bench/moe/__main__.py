"""A dense model as a mixture of experts: exactness, noise on routers, training with tied copies, vLLM, time and memory.

The model is SmolLM2-135M-Instruct, the text Python's own documentation. Mixtures have 24 experts of which 6 are active.
Training steps take two layers of its widths with random weights and ids. Times are CPU seconds of one thread, the
sides in turn; memory is the growth of a process of its own over two steps, weights included. `source-FAMILY` compares
vLLM with transformers on a tiny mixture; `experiment` is described in `experiment.py`. These take longer than all
others together and run only when they are named with --only.

A finished part is kept below runs/bench/moe-parts, so what broke off goes on; remove the folder to measure all anew.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from services.models.fetch import fetch
from tests.bench.moe.exactness import measure_bfloat16, measure_noise, measure_shapes, measure_smollm2
from tests.bench.moe.experiment import measure_experiment
from tests.bench.moe.models import MODEL, text_ids
from tests.bench.moe.served import measure_vllm
from tests.bench.moe.sources import measure_source
from tests.bench.moe.training import ids_of, measure_copies, measure_cost
from tests.bench.parts.report import Report, arguments, kept
from tests.fakes.files.tiny_mixtures import LATENT, MIXTURES, REFUSED

STEPS = 40


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--only", nargs="+", metavar="PART", help="measure only these parts, such as noise or cost")
    options = parser.parse_args()
    torch.set_num_threads(1)  # threads that wait for one another would count as work
    fetch(MODEL)
    quick: bool = options.quick
    parts = parts_of(quick=quick)
    if unknown := set(options.only or ()) - parts.keys():
        parser.error(f"--only: no part is called {', '.join(sorted(unknown))}; there are {', '.join(parts)}")
    report = Report("moe")
    folder = Path("runs/bench") / f"moe-parts{'-quick' if quick else ''}"
    for name in options.only or [name for name, (_, always) in parts.items() if always]:
        part = kept("moe", folder / f"{name}.json", parts[name][0])
        report.rows += part.rows
        report.checks += part.checks
    report.finish(options.json)


def parts_of(*, quick: bool) -> dict[str, tuple[Callable[[Report], None], bool]]:
    """Return what is measured, by name, and whether it is measured when no part is named."""
    ids_BL = text_ids(2, 32) if quick else text_ids(2, 128)
    sources: dict[str, Callable[[Report], None]] = {
        f"source-{family}{'-refused' * refused}{'-plain' * (not latent)}": partial(
            measure_source, family=family, refused=refused, latent=latent
        )
        for family in (["qwen2_moe"] if quick else MIXTURES)
        for refused in ([False, True] if family in REFUSED and not quick else [False])
        for latent in ([True, False] if family in LATENT and not refused else [True])
    }
    experiment = partial(measure_experiment, quick=quick)
    always: dict[str, Callable[[Report], None]] = {
        "shapes": measure_shapes,
        "smollm2": partial(measure_smollm2, ids_BL=ids_BL),
        "bfloat16": partial(measure_bfloat16, ids_BL=ids_BL),
        "noise": partial(measure_noise, ids_BL=ids_BL),
        "copies": partial(measure_copies, ids_BL=ids_of(1, 64), steps=5 if quick else STEPS),
        "cost": partial(measure_cost, ids_BL=ids_of(1, 256), repetitions=2 if quick else 5),
        "vllm": partial(measure_vllm, ids_BL=ids_BL),
    }
    return {name: (measure, True) for name, measure in always.items()} | {
        name: (measure, False) for name, measure in (sources | {"experiment": experiment}).items()
    }


if __name__ == "__main__":
    main()
