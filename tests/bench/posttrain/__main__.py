"""Post-training: what verified rewards gain on addition, implicit fusion of two real models, refusals of the gate.

`rewards-SEED`: a target of 0.1M parameters that SFT left half-taught; a GRPO stage then trains it on prompts alone.
Held-out sums are in no stage; the likeliest tokens are their answers, and intervals are bootstraps over the sums.
`gate`: a stage that learns wrong sums, and one whose learning rate changes next to nothing, must be held back.
`preference`: the loss of LN-DPO against its formula. `implicit`, described in `implicit.py`, runs only when it is named
with --only.

A finished part is kept below runs/bench/posttrain-parts, so what broke off goes on; remove the folder to measure all
anew.
"""

from __future__ import annotations

import contextlib
import io
import json
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

from services.models.fetch import fetch
from tests.bench.parts.report import Report, arguments, kept
from tests.bench.posttrain.addition import BASE, GRPO, STILL, Sums, chain_of, write_sums, wrong_sums
from tests.bench.posttrain.implicit import SKILLS, Fusion
from tests.bench.posttrain.preference import loss_and_formula

_SEEDS = (20, 21, 22)
"""Seeds that no setting was chosen by; on seeds 2 and 10 the reward still rose after 200 and after 400 steps."""
_MODEL = "smollm2-135m-instruct"


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--only", nargs="+", metavar="PART", help="measure only these parts, such as gate or implicit")
    options = parser.parse_args()
    quick: bool = options.quick
    parts: dict[str, Callable[[Report, Path], None]] = {
        **{f"rewards-{seed}": partial(_rewards, seed=seed, quick=quick) for seed in (_SEEDS[:1] if quick else _SEEDS)},
        "implicit": partial(_implicit, quick=quick),
        "gate": _gate,
        "preference": _preference,
    }
    if unknown := set(options.only or ()) - parts.keys():
        parser.error(f"--only: no part is called {', '.join(sorted(unknown))}; there are {', '.join(parts)}")
    report = Report("posttrain")
    files = Path("runs/bench") / f"posttrain-parts{'-quick' if quick else ''}"
    for name in options.only or [name for name in parts if name != "implicit"]:
        with tempfile.TemporaryDirectory(prefix="bench-posttrain-") as folder:
            measure = partial(parts[name], folder=Path(folder) / name)
            part = kept("posttrain", files / f"{name}.json", measure)
        report.rows += part.rows
        report.checks += part.checks
    gained = [row for row in report.rows if row.get("stage") == "grpo"]
    if len(gained) == len(_SEEDS):
        report.check("least gain of a seed by verified rewards", _least(gained, "gain"), "share", at_least=0.1)
        report.check("least lower end of the gains' intervals", _least(gained, "low"), "share", at_least=1e-9)
    report.finish(options.json)


def _least(rows: list[dict[str, Any]], key: str) -> float:
    return min(float(row[key]) for row in rows)


def _run(sums: Sums, name: str, *stages: dict[str, Any], start: Path | None = None) -> tuple[Path, dict[str, Any]]:
    """Run a chain; return the model's folder, and the last stage's decision with its seconds."""
    begin, begin_cpu = perf_counter(), process_time()
    with contextlib.redirect_stdout(io.StringIO()):
        model = chain_of(sums, *stages, start=start, name=name).run()
    decision = json.loads((model.parent / "gate.json").read_text())["decision"]
    return model, {**decision, "seconds": perf_counter() - begin, "cpu_seconds": process_time() - begin_cpu}


def _row(report: Report, seed: int, stage: str, decision: dict[str, Any]) -> None:
    lines = {line["name"]: line for line in decision["lines"]}
    score, length, ended = (lines[name] for name in ("mean score", "tokens per answer", "share of ended answers"))
    report.row(
        table="addition",
        seed=seed,
        stage=stage,
        before=score["before"],
        after=score["after"],
        gain=score["difference"]["value"],
        low=score["difference"]["low"],
        high=score["difference"]["high"],
        ended=ended["after"],
        tokens=length["after"],
        promoted=decision["promoted"],
        seconds=decision["seconds"],
        cpu_seconds=decision["cpu_seconds"],
    )


def _rewards(report: Report, folder: Path, *, seed: int, quick: bool) -> None:
    sums = write_sums(folder, seed)
    base, decision = _run(sums, "base", {**BASE, "data": [sums.train]})
    _row(report, seed, "sft", decision)
    settings = {**GRPO, "prompts": [sums.prompts], "seed": seed, **({"max_steps": 4} if quick else {})}
    _, decision = _run(sums, "rewards", settings, start=base)
    _row(report, seed, "grpo", decision)


def _implicit(report: Report, folder: Path, *, quick: bool) -> None:
    begin, begin_cpu = perf_counter(), process_time()
    fusion = Fusion(folder, fetch(_MODEL), quick=quick)
    fusion.run()
    for name in fusion.models:
        shares = {skill: fusion.score(name, skill) for skill in SKILLS}
        report.row(table="implicit fusion", model=name, both=fusion.score(name), **shares)
    sources = [name for name in fusion.models if name.startswith("source")]
    better = max(sources, key=fusion.score)
    for name in fusion.models:
        if name not in sources:
            found = fusion.difference(name, better)
            ends = {"gain": found.value, "low": found.low, "high": found.high}
            report.row(table="next to the better source", model=name, source=better, **ends)
    report.row(
        table="cost of implicit fusion", seconds=perf_counter() - begin, cpu_seconds=process_time() - begin_cpu,
        **fusion.counts,
    )  # fmt: skip
    least = fusion.difference("target after LN-DPO", better).low
    assert least is not None
    report.check("target above the better source, lower end of the interval", least, "share", at_least=1e-9)


def _gate(report: Report, folder: Path) -> None:
    sums = write_sums(folder, 9)
    base, _ = _run(sums, "base", {**BASE, "data": [sums.train]})
    _, worse = _run(sums, "worse", {**BASE, "data": [wrong_sums(sums)], "num_train_epochs": 5}, start=base)
    _row(report, 9, "sft on wrong sums", worse)
    _, still = _run(sums, "still", {**STILL, "data": [sums.train]}, start=base)
    _row(report, 9, "sft that changes nothing", still)
    held_back = int(not worse["promoted"]) + int(not still["promoted"])
    report.check("stages that the gate holds back, of a worse and an unchanged one", held_back, "stages", at_least=2)


def _preference(report: Report, folder: Path) -> None:
    folder.mkdir()
    loss, formula = loss_and_formula(folder, 8)
    report.check("LN-DPO's loss against its formula", abs(loss - formula), "nats", at_most=1e-6)


if __name__ == "__main__":
    main()
