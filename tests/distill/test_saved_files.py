"""The other files of a pretrained target are kept; what cannot be saved is known before the first step."""

from __future__ import annotations

import json
import shutil

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from services.distill.plan import make_plan
from services.distill.target.config import TargetConfig
from services.distill.target.prepare import prepare_target
from services.distill.workers.worker import DistillWorker
from services.distill.workers.world import World
from services.models.weights import write_errors_named
from tests.fakes.files.small_disk import small_disk
from tests.fakes.fusion_stream import FakeFusion, corpus
from tests.fakes.training import job_in, train

pytestmark = pytest.mark.usefixtures("one_thread")

SAMPLING = {"temperature": 0.6, "top_p": 0.9, "bos_token_id": 0, "eos_token_id": [1, 2], "transformers_version": "4.1"}


@pytest.fixture
def pretrained(tmp_path, target):
    """A folder with settings of generation that transformers loads and refuses to save, and with many templates."""
    folder = tmp_path / "pretrained"
    shutil.copytree(target, folder)
    (folder / "target.json").unlink()
    (folder / "generation_config.json").write_text(json.dumps(SAMPLING))
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_text("{{ documents }}")
    (folder / "added_tokens.json").write_text("{}")
    return folder


@pytest.mark.parametrize("lora", [None, {"rank": 4}])
def test_generation_settings_and_chat_templates_come_out_as_they_went_in(tmp_path, pretrained, lora):
    target = prepare_target(TargetConfig(model=str(pretrained)), (), tmp_path / "target", seed=0)
    job = job_in(tmp_path / "run", target, epochs=1, lora=lora)
    fusion = FakeFusion(target, corpus(18), break_after=15)
    with pytest.raises(Exception, match="the stream broke"):
        train(job, fusion)
    train(job, fusion)
    folders = [target, job.files.model]
    if lora is None:
        folders.append(job.files.checkpoints / "step-3")
    for folder in folders:
        for name in (
            "generation_config.json", "chat_template.jinja", "additional_chat_templates/rag.jinja", "added_tokens.json",
        ):  # fmt: skip
            assert (folder / name).read_bytes() == (pretrained / name).read_bytes(), (folder, name)
    assert AutoModelForCausalLM.from_pretrained(job.files.model).generation_config.temperature == 0.6
    assert set(AutoTokenizer.from_pretrained(job.files.model).chat_template) == {"default", "rag"}


def test_a_model_that_could_not_be_saved_is_refused_before_the_first_step(tmp_path, pretrained, monkeypatch):
    def refuse(self, *_args, **_settings):
        raise ValueError("this configuration cannot be written")

    target = prepare_target(TargetConfig(model=str(pretrained)), (), tmp_path / "target", seed=0)
    monkeypatch.setattr(type(AutoModelForCausalLM.from_pretrained(target)), "save_pretrained", refuse)
    fusion = FakeFusion(target, corpus(18))
    job = job_in(tmp_path / "run", target)
    with pytest.raises(ValueError, match=r"target\.model: .* is loaded but could not be saved: this configuration"):
        DistillWorker(job, make_plan(job, fusion), fusion, World())
    assert fusion.requests == []


def test_a_full_disk_is_an_error_of_the_system_whoever_writes(tmp_path, target):
    tokenizer, model = AutoTokenizer.from_pretrained(target), AutoModelForCausalLM.from_pretrained(target)
    with small_disk(tmp_path / "disk") as disk:
        (disk / "filler").write_bytes(b"x" * 60 * 1024)
        for write in (tokenizer.save_pretrained, model.save_pretrained):
            with pytest.raises(OSError), write_errors_named(disk):
                write(disk / "saved")
    with pytest.raises(ValueError, match="another"), write_errors_named(tmp_path):
        raise ValueError("another")
