"""Training a reward model: it follows the domain's prompt, resumes after a kill, and transformers opens its folder."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from services.base.errors import FailedPreconditionError, SettingError
from services.jobs.step_log import read_rows
from services.reward.evaluate import Share, evaluate
from services.reward.model import RewardModel
from services.reward.pairs import Pair, read_pairs, split_pairs
from services.reward.train import RewardJob, run
from tests.fakes.files.curves import tensorboard_curves
from tests.reward.planted import DOMAINS, planted_job, planted_pairs

REPOSITORY = Path(__file__).parents[2]


def test_it_is_right_under_the_right_prompt_and_wrong_under_the_other(trained: RewardJob) -> None:
    found = evaluate(RewardModel.open(trained.files.model), planted_pairs(100, seed=7))
    assert found.right().value >= 0.95
    assert found.swapped({"brief": "rich", "rich": "brief"}).value <= 0.05
    assert -5 < found.least_score < found.largest_score < 5
    assert found.left_out == 0
    rows = read_rows(trained.files.metrics)
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    assert rows[0]["accuracy"] < rows[-1]["accuracy"] == 1


def test_the_folder_is_one_of_transformers(trained: RewardJob) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder = trained.files.model
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    mine = RewardModel.open(folder)
    pairs = planted_pairs(6, seed=3)
    conversations = [mine.tokens.encode(pair.messages, pair.chosen, pair.domain) for pair in pairs]
    together = mine.score(conversations, batch_tokens=200)
    for pair, ids, score in zip(pairs, conversations, together, strict=True):
        system = {"role": "system", "content": DOMAINS[pair.domain]}
        answer = {"role": "assistant", "content": pair.chosen}
        theirs = tokenizer.apply_chat_template([system, *pair.messages, answer], return_tensors="pt", return_dict=True)
        assert theirs["input_ids"][0].tolist() == ids.tolist()
        with torch.inference_mode():
            assert float(model(**theirs).logits) == pytest.approx(score, abs=1e-4)


def test_a_system_message_follows_the_prompt_and_words_stay_words(trained: RewardJob) -> None:
    tokens = RewardModel.open(trained.files.model).tokens
    messages = [{"role": "system", "content": "of the"}, {"role": "user", "content": "and <|endoftext|> to"}]
    ids = tokens.encode(messages, "in a", "brief")
    assert tokens.tokenizer.decode(ids) == "Be brief.\n\nof the\n\nUser:\nand <|endoftext|> to\n\nAssistant:\nin a\n\n"
    assert not set(ids.tolist()) & set(tokens.tokenizer.all_special_ids)
    with pytest.raises(ValueError, match="domain: 'loud' is none of brief, rich"):
        tokens.encode(messages, "in a", "loud")


def test_a_killed_run_ends_with_the_weights_of_one_that_was_not(trained: RewardJob, tmp_path: Path) -> None:
    job = planted_job(tmp_path)
    command = [sys.executable, "-m", "tests.reward.killed_run", str(tmp_path), "31"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert (Path(job.checkpoints) / "checkpoint-20" / "checkpoint.json").is_file()
    assert not job.files.model.exists()
    assert run(job)
    weights, wanted = (load_file(one.files.model / "model.safetensors") for one in (job, trained))
    assert weights.keys() == wanted.keys()
    assert all(torch.equal(weights[name], wanted[name]) for name in wanted)
    steps = [row["step"] for row in read_rows(job.files.metrics)]
    assert steps == [row["step"] for row in read_rows(trained.files.metrics)]
    curves = {
        key: {row["step"]: row[key] for row in read_rows(job.files.metrics)}
        for key in ("epoch", "loss", "learning_rate", "gradient_norm", "accuracy", "margin")
    }
    written = tensorboard_curves(job.files.events)
    assert {key: written[key] for key in curves} == {key: pytest.approx(curves[key], rel=1e-6) for key in curves}


def test_a_run_that_has_ended_is_skipped_and_another_one_refused(trained: RewardJob) -> None:
    written = (trained.files.model / "model.safetensors").stat().st_mtime_ns
    assert run(trained) is False
    assert (trained.files.model / "model.safetensors").stat().st_mtime_ns == written
    other = replace(trained, config=trained.config.model_copy(update={"gamma": 1.0}))
    with pytest.raises(FailedPreconditionError, match=r"^reward\.gamma: .*started with 2\.0, now 1\.0"):
        run(other)


def test_pairs_that_are_too_long_are_an_error_when_none_is_left(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=r"^reward\.data: .*none has at most 8 tokens"):
        run(planted_job(tmp_path, max_tokens=8))


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        (
            {"prompt": "a", "chosen": "b", "rejected": "c", "domain": "x"},
            "domain: 'x' is none of reward.domains: one, two",
        ),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "domain: None is none"),
        ({"prompt": "a", "chosen": "b", "rejected": "b", "domain": "one"}, "chosen and rejected are the same answer"),
        ({"chosen": "b", "rejected": "c", "domain": "one"}, "needs one of the keys prompt and messages"),
        ({"messages": [], "chosen": "b", "rejected": "c", "domain": "one"}, "messages: must hold"),
        ({"prompt": "a", "chosen": ["b"], "rejected": "c", "domain": "one"}, "chosen: must be a string"),
        ([1], "expected an object"),
    ],
)
def test_a_wrong_row_is_named(tmp_path: Path, row: object, problem: str) -> None:
    (tmp_path / "pairs.jsonl").write_text("\n" + json.dumps(row))
    with pytest.raises(SettingError, match=rf"^data: .*pairs\.jsonl, line 2: {problem}"):
        read_pairs([str(tmp_path / "pairs.jsonl")], ["one", "two"])


def test_rows_of_trl_are_read(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "a"}]
    rows = [
        {"prompt": messages, "chosen": [{"role": "assistant", "content": "b"}], "rejected": "c"},
        {"messages": messages, "chosen": "b", "rejected": "c", "domain": "one"},
        {"prompt": "a", "chosen": "b", "rejected": "c"},
    ]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert read_pairs([str(tmp_path / "pairs.jsonl")], ["one"]) == [Pair(messages, "b", "c", "one")] * 3


def test_all_pairs_of_a_prompt_are_on_one_side() -> None:
    pairs = planted_pairs(300, seed=2)
    train, held_out = split_pairs(pairs, 0.2)
    assert 30 < len(held_out) < 90
    assert not {str(pair.messages) for pair in train} & {str(pair.messages) for pair in held_out}
    assert split_pairs(pairs[:100], 0.2)[1] == held_out[: len(split_pairs(pairs[:100], 0.2)[1])]


def test_the_interval_is_wilson_s() -> None:
    # Values of statsmodels' proportion_confint(method="wilson").
    assert Share(8, 10).interval == pytest.approx((0.490162, 0.943318), abs=1e-5)
    assert Share(0, 20).interval == pytest.approx((0.0, 0.161125), abs=1e-5)
