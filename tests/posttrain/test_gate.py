"""The gate's figures: pass@k of several answers, and tasks of lm-evaluation-harness in local files."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path

import pytest

from services.base.errors import RunFailedError, SettingError
from services.posttrain.data.tokens import PromptTokens
from services.posttrain.gate import measure
from services.posttrain.generate import load_for_answers, sample_answers
from services.posttrain.held_out import read_held_out
from tests.posttrain.scene import HELD_OUT, RIGHT, Scene, question, write_rows

_SAMPLES, _K = 6, 3


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    return Scene(tmp_path_factory.mktemp("gate"))


@pytest.fixture(scope="module")
def half_taught(scene: Scene) -> Path:
    """A model whose likeliest answer is right; others come now and then."""
    return scene.chain(scene.config(scene.sft(num_train_epochs=12)), "half", force=True).run()


@pytest.fixture
def tasks(scene: Scene, tmp_path: Path) -> str:
    """A folder with a task of the harness, whose answers are sampled."""
    data = write_rows(tmp_path / "documents.jsonl", ({"question": question(w), "answer": RIGHT} for w in HELD_OUT))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "say_yes.yaml").write_text(
        f"task: asked\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}}}}}\ntest_split: test\n"
        "output_type: generate_until\ndoc_to_text: '{{question}}'\ndoc_to_target: '{{answer}}'\n"
        "generation_kwargs: {until: ['.'], max_gen_toks: 8}\n"
        "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]\n"
    )
    return str(tmp_path / "tasks")


@pytest.mark.parametrize("pass_at", [None, _K])
def test_several_answers_give_their_mean_or_pass_at_k(scene: Scene, half_taught: Path, pass_at: int | None) -> None:
    gate = {"samples": _SAMPLES, "temperature": 1.0, "pass_at": pass_at, "seed": 3}
    config = scene.config(scene.sft(), gate=gate)
    measured = measure(half_taught, config, read_held_out(config.gate))
    tokens = PromptTokens(half_taught, None)
    asked = [word for word in HELD_OUT for _ in range(_SAMPLES)]
    sampled = sample_answers(
        load_for_answers(half_taught, "cpu"),
        tokens,
        [tokens.prompt_ids(question(word)) for word in asked],
        max_new_tokens=8,
        temperature=1.0,
        batch_size=config.gate.batch_size,
        seed=3,
    )
    answers = [tokens.text_of(ids)[0] for ids in sampled]
    groups = [answers[at : at + _SAMPLES] for at in range(0, len(answers), _SAMPLES)]
    drawn = 1 if pass_at is None else pass_at
    expected = [
        sum(RIGHT in draw for draw in combinations(group, drawn)) / len(list(combinations(group, drawn)))
        for group in groups
    ]
    assert measured.scores_P.tolist() == pytest.approx(expected, abs=1e-12)
    assert len(set(expected)) > 1, "prompts differ"
    assert measured.answers == [group[0] for group in groups]


def test_a_task_of_the_harness_promotes_and_guards(scene: Scene, tasks: str) -> None:
    good = scene.sft(task="asked")
    bad = scene.sft(name="bad", data=[scene.wrong], skill="say_yes")
    config = scene.config(good, bad, gate={"tasks": tasks, "guards": {"length_ratio": 9}})
    with pytest.raises(RunFailedError, match=r"2-bad: held back by the gate \(.*score of task asked"):
        scene.chain(config, "tasks").run()
    found = {}
    for name in ("1-sft", "2-bad"):
        decision = json.loads((scene.folder / "tasks" / name / "gate.json").read_text())["decision"]
        found[name] = {line["name"]: line for line in decision["lines"]}
    first, second = (found[name]["score of task asked"] for name in ("1-sft", "2-bad"))
    assert first["is_metric"] and first["before"] == 0 and first["after"] > 0.8 and first["ok"]
    assert not second["is_metric"] and second["after"] < 0.2 and not second["ok"]
    assert not found["1-sft"]["mean score of say_yes"]["is_metric"]


def test_mistakes_in_tasks_are_named(scene: Scene, tasks: str, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=r"gate\.tasks: no \*\.yaml"):
        scene.chain(scene.config(scene.sft(), gate={"tasks": str(tmp_path / "nowhere")}), "none").run()
    with pytest.raises(SettingError, match=r"stages\[0\]\.task: gate\.tasks has no 'other'; known: asked"):
        scene.chain(scene.config(scene.sft(task="other"), gate={"tasks": tasks}), "other").run()
    with pytest.raises(ValueError, match="samples: several answers"):
        scene.config(scene.sft(), gate={"samples": 4})
    with pytest.raises(ValueError, match="pass_at: pass@3 needs"):
        scene.config(scene.sft(), gate={"samples": 2, "temperature": 1, "pass_at": 3})
    with pytest.raises(ValueError, match="either skill or task"):
        scene.config(scene.sft(skill="say_yes", task="asked"))
