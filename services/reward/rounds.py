"""Rounds of patching: what detectors found becomes pairs, the model is tuned on them, and a ledger keeps the account.

The pairs of a patch are mixed with pairs of the original data, so that the model does not forget what it knew.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from services.base.atomic import write_whole
from services.reward.evaluate import evaluate
from services.reward.hacks import Incident
from services.reward.model import RewardModel
from services.reward.pairs import Pair, fingerprint, write_pairs
from services.reward.train import RewardJob, run

LEDGER = "rounds.jsonl"


def patch_pairs(incidents: Sequence[Incident], *, least: int, most: int) -> list[Pair]:
    """Return the pairs of the incidents with at least `least` of them, at most `most` of each.

    Which ones, of too many, is a function of the pairs alone.
    """
    pairs: list[Pair] = []
    for incident in incidents:
        if len(incident.pairs) >= least:
            pairs += sorted(incident.pairs, key=_order)[:most]
    return list({_order(pair): pair for pair in pairs}.values())


def patch(
    job: RewardJob, incidents: Sequence[Incident], data: Sequence[Pair], held_out: Sequence[Pair], ledger: Path
) -> dict[str, Any]:
    """Tune the model that the job starts from on what was found; return the round's line of the ledger.

    Without an incident of enough pairs nothing is trained, and the line says so (`model` is the one that was there).

    Args:
        job: a run whose `start` is the reward model so far; `config.patch` says how many pairs and epochs.
        incidents: what the detectors found.
        data: pairs of the original data, of which some are trained on again.
        held_out: pairs for the model's accuracy before and after.
        ledger: file of JSON lines, one a round.
    """
    settings = job.config.patch
    pairs = patch_pairs(incidents, least=settings.least_pairs, most=settings.most_pairs)
    replayed = sorted(data, key=_order)[: round(settings.replay * len(pairs))]
    line: dict[str, Any] = {
        "run": job.run_name,
        "start": str(job.start),
        "found": {i.detector: {"answers": i.answers, "prompts": i.prompts} for i in incidents},
        "pairs": len(pairs),
        "replayed": len(replayed),
        "model": str(job.start),
    }
    if pairs:
        # Named by their content: another patch under this run's name, which is refused, overwrites nothing.
        files = []
        for kind, given in (("patch", pairs), ("replayed", replayed)):
            if given:
                files.append(job.run_folder / f"{kind}-{fingerprint(given)[:8]}.jsonl")
                write_pairs(files[-1], given)
        line["patch"] = files[0].name
        changes = {"data": tuple(map(str, files)), "held_out_share": 0.0, "epochs": settings.epochs}
        run(replace(job, config=job.config.model_copy(update=changes)))
        line["model"] = str(job.files.model)
    for name, folder in (("before", job.start), ("after", line["model"])):
        if held_out:
            line[f"right_{name}"] = evaluate(RewardModel.open(folder, device=job.config.device), held_out).right().value
    append_line(ledger, line)
    return line


def append_line(ledger: Path, line: dict[str, Any]) -> None:
    """Append a round to the ledger; a round of the same run stands there once."""
    rows = read_ledger(ledger)
    rows = [row for row in rows if row["run"] != line["run"]] + [line]
    write_whole(ledger, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read_ledger(ledger: Path) -> list[dict[str, Any]]:
    """Return the rounds of a ledger; none where there is no such file."""
    if not ledger.exists():
        return []
    with ledger.open(encoding="utf-8") as rows:
        return [json.loads(row) for row in rows]


def _order(pair: Pair) -> str:
    text = json.dumps([pair.messages, pair.chosen, pair.rejected, pair.domain], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
