"""`fusion export`: a data set that `datasets` loads, whose tokens are the windows and whose rows are distributions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
from typer.testing import CliRunner

from fusion_core.vocabulary import Vocabulary
from services.cli.app import app
from services.corpus.ledger import Corpus
from services.distill.huggingface import FusedCollator, FusedLossMixin
from services.recipes.load import load_recipe
from tests.commands.analysis.conftest import write_recipe


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["export", *arguments], terminal_width=200)


class FusedTrainer(FusedLossMixin, Trainer):
    """A Trainer as a user writes it."""


def test_a_split_becomes_a_data_set_that_a_trainer_learns_from(
    models: dict[str, Path], addresses: dict[str, str], tmp_path: Path
) -> None:
    import datasets

    recipe, folder = write_recipe(tmp_path, models, addresses), tmp_path / "exported"
    done = run(recipe, str(folder), "--split", "held_out")
    assert done.exit_code == 0, done.output
    corpus = Corpus.open(load_recipe(recipe).corpus_folder)
    assert f"{corpus.num_windows('held_out')} windows" in done.output.splitlines()[-1]
    rows = datasets.load_dataset(str(folder), split="held_out", cache_dir=str(tmp_path / "cache"))
    vocabulary = Vocabulary.from_pretrained(load_recipe(recipe).target_folder)
    for index, row in enumerate(rows):
        window = corpus.window("held_out", index)
        learned = [token for token in row["labels"] if token != -100]
        text = b"".join(vocabulary.token_bytes(token) for token in learned)
        assert text.removeprefix(b" " * (len(text) - len(window.text))) == window.text
        assert (row["document"], row["domain"], row["start_byte"]) == (
            window.document,
            window.domain,
            window.start_byte,
        )
        mass = np.exp(np.array(row["topk_logprobs"])).sum(axis=1) + np.exp(row["tail"])
        np.testing.assert_allclose(mass, 1.0, atol=1e-3)
        assert all(token in ids for token, ids in zip(learned, row["topk_ids"], strict=True))
        assert sum(share["weight"] for share in row["weights"]) == pytest.approx(1.0, abs=1e-5)

    model = AutoModelForCausalLM.from_pretrained(load_recipe(recipe).target_folder)
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "out"), max_steps=1, use_cpu=True, report_to=[], save_strategy="no",
        remove_unused_columns=False, disable_tqdm=True,
    )  # fmt: skip
    trainer = FusedTrainer(model=model, args=arguments, train_dataset=rows, data_collator=FusedCollator())
    assert 0 < trainer.train().training_loss < 20

    again = run(recipe, str(folder))
    assert again.exit_code == 2 and "is not empty" in again.output


def test_distillkit_s_rows_predict_the_next_position_and_count_where_it_has_a_label(
    models: dict[str, Path], addresses: dict[str, str], tmp_path: Path
) -> None:
    import datasets

    recipe, plain, kit = write_recipe(tmp_path, models, addresses), tmp_path / "plain", tmp_path / "kit"
    as_distillkit = ("--format", "distillkit", "--length", "300")
    # The first one asks the sources, and the store rounds what they say.
    for folder, options in ((tmp_path / "first", ()), (plain, ()), (kit, as_distillkit)):
        done = run(recipe, str(folder), "--split", "held_out", *options)
        assert done.exit_code == 0, done.output
    read = {
        folder: datasets.load_dataset(str(folder), split="held_out", cache_dir=str(tmp_path / "cache"))
        for folder in (plain, kit)
    }
    for row, expected in zip(read[kit], read[plain], strict=True):
        num_tokens = len(expected["topk_ids"])
        assert row["input_ids"][: num_tokens + 1] == expected["input_ids"] and len(row["labels"]) == 300
        counting = [place for place, label in enumerate(row["labels"]) if label >= 0]
        assert counting == [t for t in range(num_tokens) if expected["fused"][t]]
        for place in counting:
            assert row["labels"][place] == row["input_ids"][place]
            assert row["token_ids"][place] == expected["topk_ids"][place]
            np.testing.assert_allclose(row["top_values"][place], expected["topk_logprobs"][place], atol=1e-5)
            assert row["input_ids"][place + 1] in row["token_ids"][place]
        assert np.isfinite(row["top_values"]).all()
    for options, message in (
        (("--format", "distillkit"), "--length: needed with --format distillkit"),
        (("--length", "300"), "--length: needed with --format distillkit"),
        (("--format", "distillkit", "--length", "8"), "--length: a window has"),
    ):
        done = run(recipe, str(tmp_path / "refused"), *options, "--split", "held_out")
        assert done.exit_code == 2 and message in done.output, done.output
