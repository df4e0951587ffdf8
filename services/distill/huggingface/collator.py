"""Examples of fused windows padded to a batch.

Shape legend: B examples, L positions, K candidates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fusion_core.blocks import PADDING_ID
from services.distill.huggingface.example import IGNORED_LABEL, LOWEST

_ROWS = ("topk_ids", "topk_logprobs", "tail", "fused")


class FusedCollator:
    """Collator for examples of `FusedDataset` or of an exported data set.

    A batch has input_ids, labels and attention_mask [B, L], padded on the right, and the rows where the labels are that
    they predict: topk_ids and topk_logprobs [B, L, K], tail and fused [B, L]. All are cut along B as any batch is.
    """

    def __init__(self, pad_id: int = 0) -> None:
        """Take the id that stands where an example is shorter than the batch; any will do."""
        self.pad_id = pad_id

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Return the batch; raises ValueError naming a column that the examples lack."""
        if missing := [name for name in ("input_ids", "labels", *_ROWS) if name not in examples[0]]:
            raise ValueError(
                f"{missing[0]}: the examples have no such column; transformers' Trainer keeps the columns of fused "
                "windows with TrainingArguments(remove_unused_columns=False)"
            )
        length = max(len(example["input_ids"]) for example in examples)
        width = max(np.asarray(example["topk_ids"]).shape[-1] for example in examples)
        shape = len(examples), length
        batch = {
            "input_ids": np.full(shape, self.pad_id, dtype=np.int64),
            "labels": np.full(shape, IGNORED_LABEL, dtype=np.int64),
            "attention_mask": np.zeros(shape, dtype=np.int64),
            "topk_ids": np.full((*shape, width), PADDING_ID, dtype=np.int64),
            "topk_logprobs": np.full((*shape, width), -np.inf, dtype=np.float32),
            "tail": np.zeros(shape, dtype=np.float32),
            "fused": np.zeros(shape, dtype=np.bool_),
        }
        for number, example in enumerate(examples):
            size = len(example["input_ids"])
            batch["input_ids"][number, :size] = example["input_ids"]
            batch["labels"][number, :size] = example["labels"]
            batch["attention_mask"][number, :size] = 1
            learned = np.flatnonzero(batch["labels"][number] != IGNORED_LABEL)
            candidates = np.asarray(example["topk_ids"]).shape[-1]
            batch["topk_ids"][number, learned, :candidates] = example["topk_ids"]
            batch["topk_logprobs"][number, learned, :candidates] = _logprobs(example["topk_logprobs"])
            batch["tail"][number, learned] = _logprobs(example["tail"])
            batch["fused"][number, learned] = example["fused"]
        return {name: torch.from_numpy(column) for name, column in batch.items()}


def _logprobs(values: npt.ArrayLike) -> npt.NDArray[np.float32]:
    """Return log-probabilities, those of nothing as -inf."""
    logprobs = np.asarray(values, dtype=np.float32)
    return np.where(logprobs <= LOWEST, np.float32(-np.inf), logprobs)
