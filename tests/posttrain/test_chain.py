"""Stages in a chain: trained, judged, skipped, resumed and refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from services.base.errors import FailedPreconditionError, RunFailedError, SettingError
from services.posttrain.chain import Chain
from services.posttrain.data.tokens import PromptTokens
from services.posttrain.generate import load_for_answers, sample_answers
from tests.posttrain.scene import HELD_OUT, TRAINED, Scene, question, write_rows


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    return Scene(tmp_path_factory.mktemp("posttrain"))


def notes(chain: Chain) -> list[str]:
    lines: list[str] = []
    chain.note = lines.append
    return lines


def test_a_better_stage_is_promoted_and_skipped_the_next_time(scene: Scene) -> None:
    config = scene.config(scene.sft(), gate={"texts": [str(scene.folder / "text.txt")], "guards": {"nats_per_byte": 9}})
    promoted = scene.chain(config, "skipped").run()
    assert promoted == scene.folder / "skipped" / "1-sft" / "model"
    written = (promoted / "model.safetensors").stat().st_mtime_ns
    decision = json.loads((promoted.parent / "gate.json").read_text())["decision"]
    lines = {line["name"]: line for line in decision["lines"]}
    assert decision["promoted"] and lines["mean score"]["before"] == 0 and lines["mean score"]["after"] == 1
    assert lines["nats per byte of texts"]["after"] > lines["nats per byte of texts"]["before"]
    assert {example["after"] for example in decision["examples"]} == {"yes"}
    report = (scene.folder / "skipped" / "posttrain.md").read_text()
    assert "promoted" in report and f"`{question(HELD_OUT[0]).strip()}`" in report
    again = scene.chain(config, "skipped")
    lines_again = notes(again)
    assert again.run() == promoted
    assert (promoted / "model.safetensors").stat().st_mtime_ns == written
    assert any("trained already" in line for line in lines_again)
    assert not any(line.startswith("answering") for line in lines_again), "the decision is there already"


def test_thirty_two_answers_are_learnt_by_heart(scene: Scene, tmp_path: Path) -> None:
    rows = [{"prompt": f"Say {word}: ", "completion": word} for word in TRAINED]
    config = scene.config(
        scene.sft(data=[write_rows(tmp_path / "rows.jsonl", rows)], num_train_epochs=100, save_steps=1000)
    )
    model = scene.chain(config, "by_heart", force=True).run()
    tokens = PromptTokens(model, None)
    prompts = [tokens.prompt_ids(row["prompt"]) for row in rows]
    settings = {"max_new_tokens": 8, "temperature": 0.0, "batch_size": 32, "seed": 0}
    sampled = sample_answers(load_for_answers(model, "cpu"), tokens, prompts, **settings)
    assert [tokens.text_of(ids) for ids in sampled] == [(word, True) for word in TRAINED]


def test_answers_are_the_model_s_likeliest_whatever_its_folder_says(scene: Scene, tmp_path: Path) -> None:
    folder = shutil.copytree(scene.start, tmp_path / "penalised")
    tokens = PromptTokens(folder, None)
    prompts = [tokens.prompt_ids(f"Say {word}: ") for word in TRAINED[:6]]
    found, of_folder = [], {"repetition_penalty": 5.0, "no_repeat_ngram_size": 1}
    for settings, batch_size in (({}, 6), (of_folder, 6), ({}, 1)):
        (folder / "generation_config.json").write_text(json.dumps(settings))
        model = load_for_answers(folder, "cpu")
        found.append(
            sample_answers(model, tokens, prompts, max_new_tokens=12, temperature=0, batch_size=batch_size, seed=0)
        )
    assert found[0] == found[1] == found[2]


def test_another_setting_is_refused_by_its_key(scene: Scene) -> None:
    scene.chain(scene.config(scene.sft(max_steps=1)), "other", force=True).run()
    with pytest.raises(FailedPreconditionError, match=r"posttrain\.stages\[0\]\.learning_rate"):
        scene.chain(scene.config(scene.sft(max_steps=1, learning_rate=1e-3)), "other", force=True).run()
    with pytest.raises(FailedPreconditionError, match=r"posttrain\.stages\[0\]\.data"):
        scene.chain(scene.config(scene.sft(max_steps=1, data=[scene.wrong])), "other", force=True).run()
    config = scene.config(scene.sft(max_steps=1, learning_rate=1e-3))
    assert scene.chain(config, "other", force=True).run(start_over=True).is_dir()


def test_a_stage_made_worse_is_held_back_and_ends_the_chain(scene: Scene) -> None:
    better = scene.sft()
    worse = scene.sft(name="worse", data=[scene.wrong])
    config = scene.config(better, worse)
    with pytest.raises(RunFailedError, match=r"2-worse: held back by the gate \(mean score"):
        scene.chain(config, "worse").run()
    assert not (scene.folder / "worse" / "chain.json").exists()
    report = (scene.folder / "worse" / "posttrain.md").read_text()
    assert "held back" in report
    forced = scene.chain(config, "worse", force=True).run()
    assert forced.parent.name == "2-worse"
    assert "promoted by force" in (scene.folder / "worse" / "posttrain.md").read_text()


def test_a_gain_inside_the_interval_is_held_back(scene: Scene) -> None:
    still = scene.sft(learning_rate=1e-9, max_steps=1)
    with pytest.raises(RunFailedError, match="held back"):
        scene.chain(scene.config(still), "still").run()
    decision = json.loads((scene.folder / "still" / "1-sft" / "gate.json").read_text())["decision"]
    [metric] = [line for line in decision["lines"] if line["is_metric"]]
    assert not metric["ok"] and metric["difference"]["low"] <= 0


def test_rows_that_hold_a_held_out_prompt_are_left_out(scene: Scene, tmp_path: Path) -> None:
    leaked = write_rows(tmp_path / "leaked.jsonl", [{"prompt": question(HELD_OUT[0]), "completion": "yes"}])
    config = scene.config(scene.sft(data=[scene.right, leaked], max_steps=1))
    scene.chain(config, "leaked", force=True).run()
    facts = json.loads((scene.folder / "leaked" / "1-sft" / "data.json").read_text())
    assert (facts["rows"], facts["held_out"]) == (32, 1)
    with pytest.raises(SettingError, match=r"stages\[0\]\.data: no row is left"):
        scene.chain(scene.config(scene.sft(data=[leaked])), "only_leaked").run()
