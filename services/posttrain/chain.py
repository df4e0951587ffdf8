"""The chain: every stage starts from the folder that the one before promoted, and ends with a folder and a decision.

FOLDER/1-sft/  data.jsonl  run.json  metrics.jsonl  checkpoints/  model/  gate.json
FOLDER/chain.json           the promoted folder, written when the chain has come to its end
FOLDER/posttrain.md, .html  what each stage gained and cost
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from services.base.atomic import sweep_partial, write_whole
from services.base.errors import FailedPreconditionError, RunFailedError, SettingError
from services.jobs.lease import held_leases
from services.jobs.tracking import Tracking
from services.posttrain.config import GrpoStage, PosttrainConfig
from services.posttrain.data.judge import Judge
from services.posttrain.data.manifest import StageData, stage_data
from services.posttrain.data.tokens import PromptTokens
from services.posttrain.driver import run_apart, run_stage
from services.posttrain.gate import Decision, Measured, decide, measure
from services.posttrain.held_out import HeldOut, check_aim, gate_identity, read_held_out
from services.posttrain.identity import claim_stage, identity_of, stage_settings
from services.posttrain.job import StageJob
from services.posttrain.pilot import mixed_share
from services.posttrain.report import StageResult, write_report
from services.posttrain.stages.grpo import verified_rows
from services.posttrain.stages.parts import require_extra

GATE = "gate.json"
SUMMARY = "chain.json"


@dataclass(slots=True)
class Chain:
    """One run of a chain.

    Attributes:
        config: section `posttrain`.
        start: Hugging Face folder that the first stage starts from.
        folder: of the chain.
        force: whether stages that the gate holds back are promoted all the same.
        recipe: the resolved recipe, YAML, kept beside every stage.
        tracking: where the curves of the stages go.
        note: called with a line about what happens.
        measured: figures of models by their folder, with the same gate; the run's own are added.
    """

    config: PosttrainConfig
    start: Path
    folder: Path
    force: bool = False
    recipe: str = ""
    tracking: Tracking = field(default_factory=Tracking)
    note: Callable[[str], None] = lambda line: None
    measured: dict[Path, Measured] = field(default_factory=dict)
    _results: list[StageResult] = field(default_factory=list)

    def run(self, *, start_over: bool = False) -> Path:
        """Run all stages that are not done, and return the folder that the last one promoted.

        Raises SettingError (a key below `posttrain`) for a mistake in settings or data, FailedPreconditionError when a
        stage's folder belongs to other settings, RunFailedError when the gate holds a stage back.
        """
        self.tracking.check()
        held_out, data = read_data(self.config)
        self.folder.mkdir(parents=True, exist_ok=True)
        with held_leases((str(self.folder.absolute()),), self.folder.name):
            sweep_partial(self.folder)
            if start_over:
                for name in self.config.stage_names():
                    shutil.rmtree(self.folder / name, ignore_errors=True)
            (self.folder / SUMMARY).unlink(missing_ok=True)
            current = self.start
            for number in range(len(self.config.stages)):
                current = self._stage(number, current, held_out, data[number])
            summary = {"promoted": str(current), "stages": {r.name: r.decision.to_json() for r in self._results}}
            write_whole(self.folder / SUMMARY, json.dumps(summary, indent=2, ensure_ascii=False) + "\n")
        return current

    def _stage(self, number: int, start: Path, held_out: HeldOut, data: StageData) -> Path:
        stage, name = self.config.stages[number], self.config.stage_names()[number]
        tokens = PromptTokens(start, self.config.chat_template)
        settings = stage_settings(number, stage, self.config, start, tokens, data)
        job = StageJob(name, self.folder / name, start, stage, self.config, identity_of(settings), self.tracking)
        job.folder.mkdir(exist_ok=True)
        details = {"start": str(start), "rows": len(data.rows), "held_out": data.held_out}
        if claim_stage(job, settings, details, self.recipe):
            self.note(f"{name}: trained already")
        else:
            data.write(job.folder)
            if isinstance(stage, GrpoStage) and not any(job.files.checkpoints.glob("*/checkpoint.json")):
                self._pilot(number, job, stage, data)
            self.note(f"{name}: training on {len(data.rows)} rows, from {start}")
            try:
                run_stage(job)
            except SettingError as error:
                raise SettingError(f"stages[{number}].{error.setting}", error.problem) from error
        decision = self._decide(job, held_out)
        self._results.append(StageResult(name, stage.kind, job.folder, start, data, decision))
        write_report(self.folder, self._results)
        if not decision.promoted and not decision.forced:
            raise RunFailedError(
                f"{name}: held back by the gate ({', '.join(decision.failed)}); see {self.folder / 'posttrain.md'}; "
                "--force promotes it all the same"
            )
        return job.files.model

    def _pilot(self, number: int, job: StageJob, stage: GrpoStage, data: StageData) -> None:
        if not stage.pilot_prompts:
            return
        prompts = verified_rows(data.rows[: stage.pilot_prompts])
        share = run_apart(self.config, mixed_share, job.start, self.config, stage, prompts)
        self.note(f"{job.name}: the pilot's groups have different rewards in {share:.0%} of {len(prompts)} prompts")
        if share < stage.least_mixed_share:
            raise FailedPreconditionError(
                f"posttrain.stages[{number}].prompts: only {share:.1%} of the pilot's {len(prompts)} groups have "
                f"different rewards, at least {stage.least_mixed_share:.1%} are needed (least_mixed_share): such "
                "rewards cannot teach; choose prompts that the model solves now and then, or tune it with SFT first"
            )

    def _decide(self, job: StageJob, held_out: HeldOut) -> Decision:
        """Return the decision on a trained stage: the one that is there, where the gate's settings are the same."""
        identity = f"{job.identity} {gate_identity(self.config.gate, held_out, job.stage)}"
        try:
            found: dict[str, Any] = json.loads((job.folder / GATE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            found = {}
        if found.get("identity") == identity:
            decision = Decision.from_json(found["decision"])
        else:
            before, after = (self._measure(folder, held_out) for folder in (job.start, job.files.model))
            decision = decide(before, after, held_out, self.config.gate, job.stage)
        decision = replace(decision, forced=self.force and not decision.promoted)
        content = {"identity": identity, "decision": decision.to_json()}
        write_whole(job.folder / GATE, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
        verb = "promoted" if decision.promoted else "promoted by force" if decision.forced else "held back"
        metric = decision.lines[0]
        self.note(f"{job.name}: {verb}; {metric.name} {metric.before:.3f} to {metric.after:.3f}")
        return decision

    def _measure(self, folder: Path, held_out: HeldOut) -> Measured:
        """Return a model's figures; they are taken once in a run, because every folder but the ends counts twice."""
        if folder not in self.measured:
            self.note(f"answering {len(held_out.prompts)} held-out prompts with {folder}")
            self.measured[folder] = run_apart(self.config, measure, folder, self.config, held_out)
        return self.measured[folder]


def read_data(config: PosttrainConfig) -> tuple[HeldOut, list[StageData]]:
    """Return what the gate holds out, and the rows of every stage.

    Raises SettingError (a key below `posttrain`) for files that are missing, rows that are wrong, or too few of them.
    """
    require_extra()
    held_out = read_held_out(config.gate)
    Judge(config.verifier).check(held_out.prompts)
    return held_out, [_stage_data(number, config, held_out) for number in range(len(config.stages))]


def _stage_data(number: int, config: PosttrainConfig, held_out: HeldOut) -> StageData:
    stage = config.stages[number]
    try:
        check_aim(stage, held_out)
        share, judge = config.gate.overlap_share, Judge(config.verifier)
        data = stage_data(stage, held_out.prompts, overlap_share=share, judge=judge)
        if isinstance(stage, GrpoStage):
            needed = stage.prompts_per_step(config.num_workers)
            if len(data.rows) < needed:
                raise SettingError("prompts", f"{len(data.rows)} are fewer than a step's {needed}; give more of them")
        return data
    except SettingError as error:
        raise SettingError(f"stages[{number}].{error.setting}", error.problem) from error
