"""Does learning from its own answers bring a target nearer to the fused teacher where it goes by itself?

A small target with a vocabulary of its own is first trained on English news by CLM alone. From there it learns from
SmolLM2-135M-Instruct and Gemma-3-270M by reverse KL: in three rounds, half of every step's windows its own answers; or
off-policy, from windows of the corpus alone, with at least as many tokens. After each round (and third of the other
run) it answers prompts that no run has seen, and the sources score the answers: nats per token of reverse KL over the
candidates and the tail, with intervals over prompts, paired.

The run in rounds is then trained once more, and killed inside a round five times: its steps must take the windows of
the run that nothing disturbed, and every answer of its rounds once. The losses differ a little, and with them the
answers of later rounds: rows that come from the store are rounded, those that a source has just scored are not.
"""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

from services.distill.job import DistillJob
from services.distill.on_policy.ledger import RoundLedger
from services.jobs.step_log import read_rows
from tests.bench.on_policy.runs import ROUNDS, Runs, attempt, killed
from tests.bench.on_policy.scoring import Scored, difference, reverse_kl
from tests.bench.on_policy.services import FULL, QUICK, serving
from tests.bench.parts.report import Report, arguments

KILLS = 5


def add_learning(report: Report, on: list[Scored], off: list[Scored], tokens: tuple[list[int], list[int]]) -> None:
    """Add a row for the start and for each round; `on` and `off` begin with the target before both runs."""
    for number, (ours, theirs) in enumerate(zip(on, off, strict=True)):
        value, low, high = difference(ours, theirs)
        report.row(
            table="reverse KL on fresh answers, nats per token",
            after_round=number,
            on_policy=ours.nats_per_token,
            off_policy=theirs.nats_per_token,
            difference=value,
            low=low,
            high=high,
            on_policy_tokens=tokens[0][number],
            off_policy_tokens=tokens[1][number],
            on_policy_ended=ours.ended_share,
            off_policy_ended=theirs.ended_share,
        )
    steps = [after.nats_per_token - before.nats_per_token for before, after in pairwise(on)]
    report.check("largest change of reverse KL in a round, on-policy", max(steps), "nats/token", at_most=0.0)
    report.check(
        "on-policy minus off-policy after the last round", difference(on[-1], off[-1])[0], "nats/token", at_most=0.0
    )


def inexact(job: DistillJob) -> int:
    """Return the number of answers of all rounds that were taken not at all, or more than once."""
    taken: dict[str, Counter[int]] = {}
    for row in read_rows(job.files.ledger):
        taken.setdefault(row["round"], Counter()).update(row["answers"] + row["answers_skipped"])
    wrong = ROUNDS - len(taken)
    for name, places in taken.items():
        ledger = RoundLedger.open(job.files.rounds / name)
        assert ledger is not None
        wrong += sum((places - Counter(range(len(ledger.answers)))).values())
        wrong += sum((Counter(range(len(ledger.answers))) - places).values())
    return wrong


def main() -> None:
    options = arguments(__doc__.splitlines()[0]).parse_args()
    size, report = QUICK if options.quick else FULL, Report("on_policy")
    with serving(size) as (recipe, address):
        runs = Runs(size, recipe, address)
        start = runs.warm()
        on = runs.on_policy("on-policy", start)
        attempt(on)
        off = runs.off_policy("off-policy", start, on)
        attempt(off)
        prompts = runs.prompts["held_out"]
        before = reverse_kl(start, prompts, size, address)
        scored, tokens = [], []
        for job in (on, off):
            every = job.config.checkpoint_every_steps
            steps = [every * number for number in range(1, ROUNDS + 1)]
            models = [job.files.checkpoints / f"step-{step}" for step in steps]
            scored.append([before, *(reverse_kl(model, prompts, size, address) for model in models)])
            rows = {row["step"]: row["total_tokens"] for row in read_rows(job.files.metrics)}
            tokens.append([0, *(rows[step] for step in steps)])
        add_learning(report, scored[0], scored[1], (tokens[0], tokens[1]))
        again = runs.on_policy("killed", start, checkpoint_every_steps=2)
        done = killed(again, KILLS)
        wrong, lost = inexact(on), inexact(again)
        steps = zip(read_rows(on.files.ledger), read_rows(again.files.ledger), strict=True)
        moved = sum(a["windows"] != b["windows"] for a, b in steps)
        losses = zip(*([row["loss"] for row in read_rows(job.files.metrics)] for job in (on, again)), strict=True)
        report.row(
            table="killed",
            kills=len(done),
            after_steps=" ".join(map(str, done)),
            largest_difference_of_loss=max(abs(a - b) for a, b in losses),
        )
        report.check("kills inside a round", len(done), "kills", at_least=KILLS)
        report.check("answers lost or taken twice, undisturbed", wrong, "answers", at_most=0)
        report.check("answers lost or taken twice, killed", lost, "answers", at_most=0)
        report.check("steps with other windows than undisturbed", moved, "steps", at_most=0)
    report.finish(options.json)


if __name__ == "__main__":
    main()
