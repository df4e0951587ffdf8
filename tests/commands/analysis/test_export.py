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
    datasets = pytest.importorskip("datasets")
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
