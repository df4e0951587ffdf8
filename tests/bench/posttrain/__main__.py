"""Post-training: what verified rewards gain on addition, the gate's refusals, and the loss of LN-DPO.

Rewards: three seeds of a target of 0.1M parameters that SFT left half-taught; a GRPO stage then trains it on prompts
alone. Held-out sums are in no stage; the likeliest tokens are their answers, and intervals are bootstraps over the
sums. Gate: a stage that learns wrong sums, and one whose learning rate changes next to nothing, must be held back.
"""

from __future__ import annotations

import contextlib
import io
import json
import tempfile
from pathlib import Path
from time import perf_counter
from typing import Any

from tests.bench.parts.report import Report, arguments
from tests.bench.posttrain.addition import BASE, GRPO, STILL, Sums, chain_of, write_sums, wrong_sums
from tests.bench.posttrain.preference import loss_and_formula

_SEEDS = 3


def main() -> None:
    options = arguments(__doc__ or "").parse_args()
    report = Report("posttrain")
    with tempfile.TemporaryDirectory(prefix="bench-posttrain-") as folder:
        gains = [
            _seed(report, Path(folder) / f"seed{seed}", seed, options.quick)
            for seed in range(1 if options.quick else _SEEDS)
        ]
        if not options.quick:
            least = min(low for low, _ in gains)
            report.check("least gain of a seed by verified rewards", min(g for _, g in gains), "share", at_least=0.1)
            report.check("least lower end of the gains' intervals", least, "share", at_least=1e-9)
        _gate(report, Path(folder) / "gate")
        loss, formula = loss_and_formula(Path(folder), 8)
        report.check("LN-DPO's loss against its formula", abs(loss - formula), "nats", at_most=1e-6)
    report.finish(options.json)


def _run(sums: Sums, name: str, *stages: dict[str, Any], start: Path | None = None) -> tuple[Path, dict[str, Any]]:
    """Run a chain; return the model's folder, and the last stage's decision with its seconds."""
    begin = perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        model = chain_of(sums, *stages, start=start, name=name).run()
    decision = json.loads((model.parent / "gate.json").read_text())["decision"]
    return model, {**decision, "seconds": perf_counter() - begin}


def _row(report: Report, seed: int, stage: str, decision: dict[str, Any]) -> dict[str, Any]:
    lines = {line["name"]: line for line in decision["lines"]}
    score, length, ended = (lines[name] for name in ("mean score", "tokens per answer", "share of ended answers"))
    report.row(
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
    )
    return score


def _seed(report: Report, folder: Path, seed: int, quick: bool) -> tuple[float, float]:
    """Return the lower end of the interval around the gain of a seed, and the gain."""
    sums = write_sums(folder, seed)
    base, decision = _run(sums, "base", {**BASE, "data": [sums.train]})
    _row(report, seed, "sft", decision)
    settings = {**GRPO, "prompts": [sums.prompts], "seed": seed, **({"max_steps": 4} if quick else {})}
    _, decision = _run(sums, "rewards", settings, start=base)
    score = _row(report, seed, "grpo", decision)
    return score["difference"]["low"], score["difference"]["value"]


def _gate(report: Report, folder: Path) -> None:
    sums = write_sums(folder, 9)
    base, _ = _run(sums, "base", {**BASE, "data": [sums.train]})
    _, worse = _run(sums, "worse", {**BASE, "data": [wrong_sums(sums)], "num_train_epochs": 5}, start=base)
    _row(report, 9, "sft on wrong sums", worse)
    _, still = _run(sums, "still", {**STILL, "data": [sums.train]}, start=base)
    _row(report, 9, "sft that changes nothing", still)
    held_back = int(not worse["promoted"]) + int(not still["promoted"])
    report.check("stages that the gate holds back, of a worse and an unchanged one", held_back, "stages", at_least=2)


if __name__ == "__main__":
    main()
