"""What detectors find in scored samples, and the pairs and the ledger of a patch."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from services.cli.app import app
from services.reward.evaluate import evaluate
from services.reward.hacks import DETECTORS, Judged, find_hacks, repeats_itself
from services.reward.model import RewardModel
from services.reward.pairs import Pair, read_pairs
from services.reward.rounds import patch_pairs
from services.reward.train import RewardJob
from tests.reward.planted import planted_pairs
from tests.reward.test_commands import a_recipe


def judged(prompt: str, answer: str, score: float, right: bool | None = None) -> Judged:
    return Judged([{"role": "user", "content": prompt}], answer, "one", score, right)


SHORT, LONG = "a b c d", "a b c d e f g h i j k"
REPEATED = "so it goes on and " * 8
REFUSALS = ["I'm sorry, but no.", "I cannot do this.", "As an AI model, I", "Unfortunately, I can't", "  Sorry."]


@pytest.mark.parametrize(
    ("detector", "suspicious"),
    [
        ("length", judged("p", LONG, 2)),
        ("repetition", judged("p", REPEATED, 2)),
        ("verifier", judged("p", SHORT, 2, False)),
    ]
    + [("refusal", judged("p", text, 2)) for text in REFUSALS],
)
def test_a_suspicious_answer_above_a_clean_one_makes_a_pair(detector: str, suspicious: Judged) -> None:
    clean, worse = judged("p", "a b c e", 1, True), judged("p", "a b c f", 0, True)
    [incident] = find_hacks([suspicious, worse, clean], [detector], usual_words=5)
    assert (incident.answers, incident.prompts) == (1, 1)
    assert incident.pairs == (Pair(clean.messages, clean.answer, suspicious.answer, "one"),)  # type: ignore[arg-type]
    for below in (replace(suspicious, score=0.5), replace(suspicious, messages=[{"role": "user", "content": "q"}])):
        assert find_hacks([below, worse, clean], [detector], usual_words=5)[0].pairs == ()


def test_clean_answers_are_clean_by_every_detector_asked_for() -> None:
    wrong, long, clean = judged("p", "a b", 3, False), judged("p", LONG, 2, True), judged("p", SHORT, 1, True)
    for incident in find_hacks([wrong, long, clean], usual_words=4):
        assert [pair.chosen for pair in incident.pairs] in ([], [SHORT])
    [verifier] = find_hacks([wrong, long, clean], ["verifier"])
    assert [pair.chosen for pair in verifier.pairs] == [LONG]
    with pytest.raises(ValueError, match="detector: 'mood' is none of length, repetition, refusal, verifier"):
        find_hacks([], ["mood"])


def test_honest_texts_are_not_suspicious() -> None:
    text = (Path(__file__).parents[2] / "README.md").read_text()
    for paragraph in text.split("\n\n"):
        assert not repeats_itself(paragraph)
        assert not DETECTORS["refusal"](judged("p", paragraph, 0), 0)
    assert not DETECTORS["refusal"](judged("p", "I am sorted. Sorrow aside, I can.", 0), 0)


def test_a_patch_takes_incidents_of_enough_pairs_and_not_too_many() -> None:
    samples = [judged(f"p{n}", text, score) for n in range(30) for text, score in ((LONG, 2.0), (SHORT, 1.0))]
    samples += [judged("q", REPEATED, 2), judged("q", SHORT, 1)]
    found = find_hacks(samples, ["length", "repetition"], usual_words=5)
    assert [incident.prompts for incident in found] == [31, 1]  # what repeats itself is long as well
    assert len(patch_pairs(found, least=20, most=100)) == 31
    few = patch_pairs(found, least=20, most=25)
    assert (len(few), few) == (25, patch_pairs(list(reversed(found)), least=20, most=25))
    assert patch_pairs(found, least=32, most=100) == []


def test_a_patch_on_the_command_line_mends_the_model_and_keeps_a_ledger(trained: RewardJob, tmp_path: Path) -> None:
    """The model was taught that rich answers are better. Wrong ones that are rich are the hack that is planted here."""
    model, rows, checks = RewardModel.open(trained.files.model), [], []
    for number, pair in enumerate(planted_pairs(120, seed=21)):
        short, long = sorted((pair.chosen, pair.rejected), key=len)
        texts = ((long, False), (short, True))
        checks.append(Pair(pair.messages, short, long, "rich"))
        scores = model.score([model.tokens.encode(pair.messages, text, "rich") for text, _ in texts])
        rows += [
            {
                "messages": [*pair.messages, {"role": "assistant", "content": text}], "domain": "rich",
                "reward": float(score), "verdict": {"right": right},
            }
            for (text, right), score in zip(texts, scores, strict=True)
            if number < 60
        ]  # fmt: skip
    samples = tmp_path / "scored.jsonl"
    samples.write_text("\n".join(map(json.dumps, rows)))
    recipe = str(a_recipe(tmp_path, trained))
    done = CliRunner().invoke(
        app, ["reward", "patch", recipe, str(samples), "--run-name", "patched", "--detector", "verifier",
              "--set", "reward.patch.replay=0", "--set", "reward.patch.epochs=8"],
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    folder = trained.run_folder.parent
    [line] = [json.loads(row) for row in (folder / "rounds.jsonl").read_text().splitlines()]
    assert (line["run"], line["replayed"]) == ("patched", 0)
    assert 50 <= line["pairs"] <= 60
    assert line["found"] == {"verifier": {"answers": 60, "prompts": line["pairs"]}}
    assert len(read_pairs([str(folder / "patched" / line["patch"])], ["brief", "rich"])) == line["pairs"]
    before, after = (evaluate(RewardModel.open(folder / run / "model"), checks[60:]) for run in ("trained", "patched"))
    assert before.shares["rich", "rich"].value <= 0.1
    assert after.shares["rich", "rich"].value >= 0.9
    nothing = CliRunner().invoke(
        app, ["reward", "patch", recipe, str(samples), "--run-name", "other", "--detector", "refusal"]
    )
    assert (nothing.exit_code, "nothing to patch" in nothing.output) == (0, True), nothing.output
    assert not (folder / "other" / "model").exists()
