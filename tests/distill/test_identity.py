"""The identity of a run: whatever decides its result, or nothing is resumed."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from services.base.errors import FailedPreconditionError, UnavailableError
from services.distill.plan import claim_run, make_plan
from services.evaluation.controls import Training, training_of
from services.jobs.step_log import read_rows
from tests.fakes.fusion_stream import FakeFusion, corpus
from tests.fakes.training import job_in, train

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def begun(tmp_path_factory, target):
    """A run that broke behind its first checkpoint."""
    torch.set_num_threads(1)
    job = job_in(tmp_path_factory.mktemp("begun"), target)
    fusion = FakeFusion(target, corpus(18), break_after=15)
    claim_run(job, make_plan(job, fusion))
    with pytest.raises(FailedPreconditionError, match="the stream broke"):
        train(job, fusion)
    return job


@pytest.fixture
def resumed(tmp_path, target, begun):
    shutil.copytree(begun.run_folder, tmp_path / "run")
    return job_in(tmp_path / "run", target)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("fusion.tau", 0.5),
        ("fusion.k_out", 9),
        ("fusion.weights.left", 0.5),
        ("fusion.scope", "span"),
        ("fusion.span_tokens", 16),
        ("fusion.min_sources", 2),
        ("fusion.alignment.follow_tokens", False),
        ("service.below_quorum", "wait"),
        ("corpus.target_context", False),
        ("sources.left.model", "another model"),
        ("sources.left.revision", "another revision"),
        ("sources.left.engine", "another engine"),
        ("sources.right.top_k", 32),
    ],
)
def test_a_run_is_not_resumed_under_another_setting_of_the_service(resumed, target, key, value):
    fusion = FakeFusion(target, corpus(18))
    fusion.settings[key] = value
    plan = make_plan(resumed, fusion)
    with pytest.raises(FailedPreconditionError, match=rf"^{key}: run run "):
        claim_run(resumed, plan)
    with pytest.raises(FailedPreconditionError, match="belongs to another target, data set or training settings"):
        train(resumed, fusion)


def test_a_run_is_resumed_under_the_same_settings(resumed, target):
    fusion = FakeFusion(target, corpus(18))
    claim_run(resumed, make_plan(resumed, fusion))
    train(resumed, fusion)
    assert len(read_rows(resumed.files.metrics)) == 10
    assert training_of(resumed.run_folder) == Training("fused", ("left", "right"))


def test_sources_that_are_not_asked_decide_nothing(tmp_path, target):
    job = job_in(tmp_path, target, sources=["right"])
    fusion = FakeFusion(target, corpus(18))
    before = make_plan(job, fusion)
    for key in ("sources.left.revision", "fusion.weights.left", "fusion.prior.left"):
        fusion.settings[key] = "another"
    assert make_plan(job, fusion).identity == before.identity
    fusion.settings["sources.right.revision"] = "another"
    assert make_plan(job, fusion).identity != before.identity
    clm_only = job_in(tmp_path, target, **{"lambda": 1.0})
    plain = make_plan(clm_only, fusion)
    assert not [key for key in plain.settings if key.startswith(("sources.", "fusion.tau"))]
    fusion.settings["corpus.target_context"] = False
    assert make_plan(clm_only, fusion).identity != plain.identity, "what the target reads decides without sources too"


def test_a_record_from_before_a_setting_was_recorded_is_refused_in_words(resumed, target):
    fusion = FakeFusion(target, corpus(18))
    record = json.loads(resumed.files.record.read_text())
    del record["settings"]["fusion.tau"]
    resumed.files.record.write_text(json.dumps(record))
    with pytest.raises(FailedPreconditionError, match=r"fusion\.tau: run run did not record it .* start over"):
        claim_run(resumed, make_plan(resumed, fusion))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("service.below_quorum", "wait", r'service\.below_quorum: the recipe says "wait", .* runs with "skip"'),
        ("fusion.tau", 0.5, r"fusion\.tau: the recipe says 0\.5, .* runs with 0\.05"),
        ("sources.left.top_k", 8, r"sources\.left\.top_k: the recipe says 8, .* runs with 16"),
        ("sources.middle.top_k", 8, r"sources\.middle\.top_k: .* runs with no such setting"),
    ],
)
def test_a_recipe_that_says_otherwise_than_the_service_runs_is_refused(tmp_path, target, key, value, message):
    fusion = FakeFusion(target, corpus(18))
    as_it_runs = {name: json.dumps(setting) for name, setting in fusion.settings.items()}
    make_plan(job_in(tmp_path, target, expected=as_it_runs), fusion)
    with pytest.raises(FailedPreconditionError, match=message):
        make_plan(job_in(tmp_path, target, expected=as_it_runs | {key: json.dumps(value)}), fusion)


def test_a_service_that_fuses_by_a_key_which_the_recipe_leaves_out_is_refused(tmp_path, target):
    fusion = FakeFusion(target, corpus(18))
    as_it_runs = {name: json.dumps(setting) for name, setting in fusion.settings.items()}
    fusion.settings["fusion.soften"] = 0.8
    with pytest.raises(FailedPreconditionError, match=r"fusion\.soften: the recipe leaves it out, .* runs with 0\.8"):
        make_plan(job_in(tmp_path, target, expected=as_it_runs), fusion)


def test_a_service_that_does_not_name_its_settings_streams_tokens_only(tmp_path, target):
    fusion = FakeFusion(target, corpus(18))
    fusion.settings = {}
    with pytest.raises(FailedPreconditionError, match="older than this trainer, update it"):
        make_plan(job_in(tmp_path, target), fusion)
    make_plan(job_in(tmp_path, target, **{"lambda": 1.0}), fusion)


def test_a_source_of_which_nothing_is_known_is_waited_for(tmp_path, target):
    fusion = FakeFusion(target, corpus(18))
    revision = fusion.settings.pop("sources.left.revision")
    with pytest.raises(UnavailableError, match=r"sources\.left: has not answered yet"):
        make_plan(job_in(tmp_path, target), fusion, patience_seconds=0.0)

    class Late(FakeFusion):
        asked = 0

        def info(self):
            self.asked += 1
            if self.asked == 2:
                self.settings["sources.left.revision"] = revision
            return super().info()

    late = Late(target, corpus(18))
    del late.settings["sources.left.revision"]
    assert make_plan(job_in(tmp_path, target), late).settings["sources.left.revision"] == revision
    assert late.asked == 2
