"""Train with transformers' Trainer on the fused stream of a service that runs.

    fusion up quickstart
    python examples/own_trainer.py --target runs/quickstart/target --steps 3

The loss is lambda * CLM + (1 - lambda) * fusion, as `fusion distill` has it; everything else is the Trainer's. Windows
that are in the store cost the sources nothing. `fusion export` writes the same examples to files.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from services.distill.huggingface import FusedCollator, FusedDataset, FusedLossMixin
from services.fusion.client import FusionClient, StreamRequest


class FusedTrainer(FusedLossMixin, Trainer):
    """A Trainer whose loss reads fused rows."""

    fusion_lambda = 0.5


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a target on the fused stream with transformers' Trainer.")
    parser.add_argument("--address", default="127.0.0.1:9000", help="host:port of the fusion service")
    parser.add_argument("--dataset", default="lee-news", help="corpus.name of the recipe")
    parser.add_argument("--target", type=Path, default=Path("runs/quickstart/target"), help="model and tokenizer")
    parser.add_argument("--steps", type=int, default=3, help="steps to train")
    parser.add_argument("--output", type=Path, default=Path("own_trainer"), help="folder of the trained model")
    options = parser.parse_args()

    request = StreamRequest(dataset=options.dataset, split="train", seed=0)
    windows = FusedDataset(FusionClient(options.address), request, tokenizer=options.target)
    arguments = TrainingArguments(
        output_dir=str(options.output),
        max_steps=options.steps,
        per_device_train_batch_size=4,
        learning_rate=1e-3,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        remove_unused_columns=False,  # the fused rows are columns that the model itself does not take
    )
    trainer = FusedTrainer(
        model=AutoModelForCausalLM.from_pretrained(options.target),
        args=arguments,
        train_dataset=windows,
        data_collator=FusedCollator(),
    )
    trainer.train()
    trainer.save_model(str(options.output))
    print(f"{options.output}: trained for {options.steps} steps")


if __name__ == "__main__":
    main()
