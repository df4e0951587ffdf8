"""Reward models: wishes that contradict each other in four domains, and a planted hack that rounds find and patch.

Models of some hundred thousand parameters are trained here, from random weights. The policy of the second part is no
language model but two numbers, the share of answers with the mark and their usual length: each step samples eight
answers to each prompt, and moves halfway to what the best ones have (the cross-entropy method).
"""

from __future__ import annotations

import contextlib
import math
import random
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from time import process_time
from typing import Any

from services.reward.evaluate import Share, evaluate
from services.reward.hacks import Judged, find_hacks, num_words
from services.reward.model import RewardModel
from services.reward.pairs import Pair
from services.reward.rounds import LEDGER, patch, read_ledger
from services.reward.train import RewardJob, run
from tests.bench.parts.report import Report, arguments
from tests.bench.reward.planted import MARK, PARTNERS, answer, conflicting_pairs, prompt, reward_job, vain_pairs

_ROUNDS, _STEPS, _SAMPLES = 3, 3, 8
START_WORDS, _MOST_WORDS = 8.0, 120
_LOSSES: dict[str, dict[str, float]] = {"focal, barrier": {}, "plain ranking": {"gamma": 0.0, "barrier": 0.0}}


def main() -> None:
    options = arguments(__doc__ or "").parse_args()
    report = Report("reward")
    seeds = range(1 if options.quick else 3)
    size = 0.5 if options.quick else 1.0
    with tempfile.TemporaryDirectory(prefix="reward-bench-") as name:
        _wishes(report, Path(name), seeds, size)
        _hack(report, Path(name), seeds, size)
    report.finish(options.json)


def _wishes(report: Report, folder: Path, seeds: range, size: float) -> None:
    """Train with InternLM2's loss and with the plain one; score held-out pairs under right and swapped prompts."""
    held_out = conflicting_pairs(600, seed=10**6)
    total = {loss: {"right": Share(0, 0), "swapped": Share(0, 0)} for loss in _LOSSES}
    extremes: list[float] = []
    by_seed: dict[str, list[float]] = {"right": [], "swapped": []}
    for seed in seeds:
        for loss, settings in _LOSSES.items():
            name = f"wishes-{seed}-{loss.split(',')[0].split()[0]}"
            job = reward_job(
                folder, name, lambda s=seed: conflicting_pairs(round(3000 * size), s), seed, epochs=5, **settings
            )
            start = process_time()
            model = _trained(job)
            seconds = process_time() - start
            found = evaluate(model, held_out)
            right, swapped = found.right(), found.swapped(PARTNERS)
            for key, share in (("right", right), ("swapped", swapped)):
                so_far = total[loss][key]
                total[loss][key] = Share(so_far.right + share.right, so_far.number + share.number)
            if settings == {}:
                extremes += [abs(found.least_score), abs(found.largest_score)]
                by_seed["right"].append(right.value)
                by_seed["swapped"].append(swapped.value)
            report.row(
                table="contradicting wishes", loss=loss, seed=seed, **_cells(right=right, swapped=swapped),
                least_score=found.least_score, largest_score=found.largest_score, cpu_seconds=seconds,
            )  # fmt: skip
    for loss, shares in total.items():
        report.row(table="all seeds", loss=loss, **_cells(**shares))
    report.check("right under the right prompt, least seed", min(by_seed["right"]), "share", at_least=0.95)
    report.check("right under the swapped prompt, largest seed", max(by_seed["swapped"]), "share", at_most=0.05)
    report.check("largest score without its sign", max(extremes), "", at_most=5)


def _cells(**shares: Share) -> dict[str, float]:
    ends = ((name, share, *share.interval) for name, share in shares.items())
    return {
        key: value
        for name, share, low, high in ends
        for key, value in ((name, share.value), (f"{name}_low", low), (f"{name}_high", high))
    }


def _hack(report: Report, folder: Path, seeds: range, size: float) -> None:
    """Train on a judge that likes length, and tune a policy on the model for some rounds, with patches and without."""
    replay = {"patch": {"replay": 0.5}}  # the data itself teaches the hack
    last: dict[str, list[_Policy]] = {"without patches": [], "patched": []}
    pairs_of_patches = []
    for seed in seeds:
        judge = reward_job(folder, f"vain-{seed}", lambda s=seed: vain_pairs(round(1500 * size), s), seed, **replay)
        _trained(judge)
        for arm, policies in last.items():
            policy, model = _Policy(0.3, START_WORDS), judge.files.model
            ledger = folder / f"{seed}-{arm}" / LEDGER
            for number in range(1, _ROUNDS + 1):
                rng = random.Random(f"{seed} {number}")
                policy, samples = _tuned(policy, RewardModel.open(model, device="cpu"), rng, round(60 * size))
                row: dict[str, Any] = {"patch_pairs": None, "equal_length_right": None}
                if arm == "patched":
                    job = replace(
                        judge, run_name=f"{arm}-{seed}-{number}", run_folder=folder / f"{arm}-{seed}-{number}"
                    )
                    line = _patched(replace(job, start=model), samples, seed, ledger)
                    model = Path(line["model"])
                    row = {"patch_pairs": line["pairs"], "equal_length_right": line["right_after"]}
                    pairs_of_patches += [line["pairs"]] if line["pairs"] else []
                words = fmean(num_words(judged.answer) for judged in samples[-_SAMPLES * round(60 * size) :])
                report.row(
                    table="planted hack", arm=arm, seed=seed, round=number, words=words, marked=policy.marked, **row
                )
            policies.append(policy)
            if arm == "patched":
                assert len(read_ledger(ledger)) == _ROUNDS
    growth = {arm: [policy.words / START_WORDS for policy in policies] for arm, policies in last.items()}
    report.check(
        "length without patches next to the start, least seed", min(growth["without patches"]), "times", at_least=3
    )
    report.check("length with patches next to the start, largest seed", max(growth["patched"]), "times", at_most=2)
    marked = {arm: min(policy.marked for policy in policies) for arm, policies in last.items()}
    report.check("right answers with patches, least seed", marked["patched"], "share", at_least=0.9)
    report.check("pairs of a patch, fewest", min(pairs_of_patches, default=0), "pairs", at_least=20, at_most=200)


@dataclass(frozen=True, slots=True)
class _Policy:
    """The share of answers with the mark, and the usual number of words, around which lengths are spread."""

    marked: float
    words: float

    def sample(self, rng: random.Random) -> str:
        length = round(self.words * math.exp(rng.gauss(0, 0.5)))
        return answer(rng, max(2, min(_MOST_WORDS, length)), marked=rng.random() < self.marked)

    def moved(self, best: list[Judged]) -> _Policy:
        marked = fmean(bool(judged.right) for judged in best)
        words = math.exp(fmean(math.log(num_words(judged.answer)) for judged in best))
        return _Policy(min(0.98, (self.marked + marked) / 2), math.sqrt(self.words * words))


def _tuned(policy: _Policy, model: RewardModel, rng: random.Random, num_prompts: int) -> tuple[_Policy, list[Judged]]:
    """Return the policy after the steps of a round, and all samples of the round with their scores and verdicts."""
    prompts = [prompt(rng) for _ in range(num_prompts)]
    samples: list[Judged] = []
    for _ in range(_STEPS):
        answers = [(messages, policy.sample(rng)) for messages in prompts for _ in range(_SAMPLES)]
        ids = [model.tokens.encode(messages, text, "polite") for messages, text in answers]
        scores = model.score(ids)
        step = [
            Judged(messages, text, "polite", float(score), MARK in text.split())
            for (messages, text), score in zip(answers, scores, strict=True)
        ]
        groups = [step[at : at + _SAMPLES] for at in range(0, len(step), _SAMPLES)]
        policy = policy.moved([max(group, key=lambda judged: judged.score) for group in groups])
        samples += step
    return policy, samples


def _patched(job: RewardJob, samples: list[Judged], seed: int, ledger: Path) -> dict[str, Any]:
    found = find_hacks(samples, ["length", "repetition", "refusal", "verifier"], usual_words=START_WORDS)
    with contextlib.redirect_stdout(None):
        return patch(job, found, vain_pairs(200, seed), _equal_length_pairs(200), ledger)


def _equal_length_pairs(number: int) -> list[Pair]:
    """Pairs of which only the mark decides: what a patch must not break."""
    rng, pairs = random.Random(7), []
    for _ in range(number):
        length = rng.randint(4, 12)
        pairs.append(Pair(prompt(rng), *(answer(rng, length, marked=marked) for marked in (True, False)), "polite"))
    return pairs


def _trained(job: RewardJob) -> RewardModel:
    with contextlib.redirect_stdout(None):
        run(job)
    return RewardModel.open(job.files.model, device="cpu")


if __name__ == "__main__":
    main()
