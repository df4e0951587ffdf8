"""`fusion reward patch`: find reward hacks in scored samples, and tune the reward model against them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from services.commands.answers.rows import answer_of, asked_of, json_rows
from services.commands.reward.train import reward_job, run_folder
from services.recipes.recipe import Recipe, RecipeError
from services.reward.hacks import DETECTORS, Incident, Judged, find_hacks
from services.reward.model import read_card
from services.reward.pairs import read_pairs, split_pairs
from services.reward.rounds import LEDGER, patch


def read_samples(path: Path) -> list[Judged]:
    """Return the answers of a file that `fusion reward score --to` wrote; raises ValueError naming the line.

    A row that `fusion verify --to` has judged as well carries its verdict.
    """
    samples = []
    for where, row in json_rows(path):
        messages = asked_of(row, where)
        score, domain, verdict = row.get("reward"), row.get("domain"), row.get("verdict")
        if isinstance(score, bool) or not isinstance(score, int | float) or not isinstance(domain, str):
            raise ValueError(f"{where}: needs `reward` and `domain`, as `fusion reward score --to` writes them")
        right = bool(verdict["right"]) if isinstance(verdict, dict) and "right" in verdict else None
        samples.append(Judged(messages, answer_of(row, where), domain, float(score), right))
    return samples


def patch_run(
    recipe: Recipe,
    samples: Path,
    *,
    run_name: str,
    start: str,
    detectors: Sequence[str] = (),
    usual_words: float | None = None,
) -> tuple[list[Incident], dict[str, Any]]:
    """Find hacks, and train run `run_name` from the model of run `start`; return what was found, and the ledger's line.

    Training takes place in this process. Raises ValueError naming the option or key that is wrong.
    """
    model = run_folder(recipe, start) / "model"
    if not model.is_dir():
        raise RecipeError(f"--start: there is no model in {model.parent} yet; `fusion reward train` makes it")
    job = reward_job(recipe, run_name)
    config = job.config.model_copy(update={"num_workers": 0, "chat_template": "model"})
    job = replace(job, start=model, config=config)
    if (trained := read_card(model).domains) != job.config.domains:
        raise RecipeError(f"reward.domains: the model of run {start} has {', '.join(trained)} with other prompts")
    if unknown := sorted(set(detectors) - set(DETECTORS)):
        raise RecipeError(f"--detector: {unknown[0]!r} is none of {', '.join(DETECTORS)}")
    try:
        train, held_out = split_pairs(read_pairs(config.data, config.domains), config.held_out_share)
    except ValueError as error:
        raise RecipeError(f"reward.{error}") from error
    try:
        found = find_hacks(read_samples(samples), detectors or tuple(DETECTORS), usual_words=usual_words)
    except ValueError as error:
        raise RecipeError(str(error)) from error
    return found, patch(job, found, train, held_out, recipe.reward_folder / LEDGER)
