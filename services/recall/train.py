"""Training of a judge: windows as MemRecall makes them, a label per token, binary cross-entropy (CogLTX, section 3.2).

Where passages are marked, their tokens are relevant, and the rest of their block is not; else all tokens of a relevant
block are. With few tokens in a hundred relevant, those count `_RELEVANT_WEIGHT` times.

A window holds what memory could hold, some relevant blocks and some others, and behind it what competes: the rest of
the relevant blocks, those that BM25 takes for them, and any others, in the order of the text. What a step draws depends
on seed and step alone, so that a resumed run goes on as if it had never stopped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fusion_core.recall.labels import bm25
from services.recall.examples import Example, gold_blocks
from services.recall.judge import Document, Judge
from services.recall.training_config import JudgeTrainingConfig

_MEMORY_BLOCKS = 3
"""Blocks that a training window's memory holds at most: the stride of a first hop."""
_RELEVANT_WEIGHT = 3.0
_STATE = "judge_trainer.pt"


@dataclass(frozen=True, slots=True)
class Labelled:
    """A document with its question.

    Attributes:
        start: tokens of the question as every window begins with them.
        relevant, likely: the relevant blocks, and all others, both the best by BM25 first.
        marked: by relevant block, which of its tokens are relevant; all of a block that is not in it.
    """

    document: Document
    start: list[int]
    relevant: list[int]
    likely: list[int]
    marked: dict[int, NDArray[np.bool_]] = field(default_factory=dict)


def label(judge: Judge, example: Example, block_tokens: int) -> Labelled:
    """Return an example in the judge's blocks; relevant are those of its spans, and their tokens."""
    document = judge.read(example.text, block_tokens)
    gold = set(gold_blocks(example, document.spans))
    order = np.argsort(-bm25(example.question, document.blocks), kind="stable").tolist()
    relevant = [block for block in order if block in gold]
    within = judge.marked(document, example.spans) if gold else []
    marked = {block: within[block] for block in relevant if within[block].any()}
    return Labelled(document, judge.question(example.question), relevant, [b for b in order if b not in gold], marked)


@dataclass(frozen=True, slots=True)
class Step:
    """The figures of one step.

    `loss`: nats per token, relevant ones weighted. `gradient_norm`: before clipping. `tokens`: padding included.
    """

    number: int
    loss: float
    gradient_norm: float
    learning_rate: float
    tokens: int


class JudgeTrainer:
    """The training of one judge on one device."""

    def __init__(self, judge: Judge, examples: Sequence[Labelled], config: JudgeTrainingConfig) -> None:
        """Take examples; see `use`. A resumed run must give the same ones in the same order.

        Raises ValueError for windows that are longer than the encoder reads.
        """
        if config.window_tokens > judge.window_tokens:
            raise ValueError(f"recall.train.window_tokens: must be at most {judge.window_tokens} with this encoder")
        self.judge, self._config = judge, config
        self.steps = 0
        self.use(examples)
        for module in judge.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = config.dropout
        self._optimizer = torch.optim.AdamW(
            judge.model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay
        )

    def use(self, examples: Sequence[Labelled]) -> None:
        """Learn from these examples from now on, those without a relevant block apart.

        Raises ValueError naming `recall.train.window_tokens` when none is left, or none fits behind its question.
        """
        self._examples = [
            example
            for example in examples
            if example.relevant
            and self._config.window_tokens - len(example.start) >= max(example.document.tokens_in_window)
        ]
        if not any(example.relevant for example in examples):
            raise ValueError("recall.train.files: no block is relevant, by `spans` or by recall.train.labels")
        if not self._examples:
            raise ValueError(
                "recall.train.window_tokens: no example has a relevant block that fits behind its question"
            )

    def step(self) -> Step:
        """Take the next step; return its figures. Raises ArithmeticError when the loss is not finite."""
        draw = np.random.default_rng((self._config.seed, self.steps))
        torch.manual_seed(self._config.seed * 1_000_003 + self.steps)  # dropout
        chosen = [self._examples[draw.integers(len(self._examples))] for _ in range(self._config.batch_windows)]
        windows = [draw_window(example, self._config.window_tokens, draw) for example in chosen]
        packed = [
            (example.start, [example.document.token_ids_B[block] for block in window])
            for example, window in zip(chosen, windows, strict=True)
        ]
        batch = self.judge.batch(packed)
        with self.judge.training():
            logits_N = self.judge.logits(batch)[batch.block_WT >= 0]
        labels = [_token_labels(example, window) for example, window in zip(chosen, windows, strict=True)]
        labels_N = torch.from_numpy(np.concatenate(labels)).to(logits_N)
        loss = torch.nn.functional.binary_cross_entropy_with_logits(
            logits_N, labels_N, pos_weight=logits_N.new_tensor(_RELEVANT_WEIGHT)
        )
        if not torch.isfinite(loss):
            raise ArithmeticError(
                f"the judge's loss is {float(loss)} in step {self.steps + 1}; lower recall.train.learning_rate"
            )
        rate = self._config.learning_rate * _share(self.steps, self._config)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        norm = float(torch.nn.utils.clip_grad_norm_(self.judge.model.parameters(), self._config.clip_norm))
        self._optimizer.step()
        self.steps += 1
        return Step(self.steps, float(loss.detach()), norm, rate, batch.input_ids_WT.numel())

    def save(self, folder: Path) -> None:
        """Write the judge's folder, with the state that `restore` reads beside it."""
        self.judge.save(folder)
        torch.save({"steps": self.steps, "optimizer": self._optimizer.state_dict()}, folder / _STATE)

    def restore(self, folder: Path) -> None:
        """Go on where the trainer that wrote the folder stopped."""
        state: dict[str, Any] = torch.load(folder / _STATE, map_location="cpu", weights_only=True)
        weights = Judge.load(folder).model.state_dict()
        self.judge.model.load_state_dict(weights)
        self._optimizer.load_state_dict(state["optimizer"])
        self.steps = int(state["steps"])


def draw_window(example: Labelled, window_tokens: int, draw: np.random.Generator) -> list[int]:
    """Return the blocks of one training window: memory's first, then those that compete, each in the text's order.

    Relevant blocks are taken in the order of BM25, as a chain: the question leads to the first, and what memory holds
    to the next. A block that only others lead to never competes without them: nothing would tell it from a rival.
    """
    sizes = example.document.tokens_in_window
    left = window_tokens - len(example.start)
    held: list[int] = []
    known = int(draw.integers(0, len(example.relevant) + 1))
    strangers = _strangers(example, draw)
    for block in [*example.relevant[:known], *strangers[: int(draw.integers(0, _MEMORY_BLOCKS))]][:_MEMORY_BLOCKS]:
        if sizes[block] <= left - max(sizes):  # one block at least must compete
            held.append(block)
            left -= sizes[block]
    led_to = [block for block in example.relevant[:known] if block not in held]
    led_to += example.relevant[known : known + int(draw.integers(0, len(example.relevant) - known + 1))]
    competing = []
    for block in [*led_to, *(block for block in strangers if block not in held)]:
        if sizes[block] <= left:
            competing.append(block)
            left -= sizes[block]
    return [*sorted(held), *sorted(competing)]


def _token_labels(example: Labelled, window: Sequence[int]) -> NDArray[np.bool_]:
    """Return which tokens of a window's blocks are relevant, block after block, without the separators."""
    labels = []
    for block in window:
        tokens = len(example.document.token_ids_B[block])
        marked = example.marked.get(block) if block in example.relevant else np.zeros(tokens, dtype=np.bool_)
        labels.append(np.ones(tokens, dtype=np.bool_) if marked is None else marked)
    return np.concatenate([np.zeros(0, dtype=np.bool_), *labels])


def _strangers(example: Labelled, draw: np.random.Generator) -> list[int]:
    """Return blocks that are not relevant, in random order: half of them likely ones, half any."""
    likely = draw.permutation(example.likely[:8]).tolist()
    others: list[int] = draw.permutation(example.likely[8:]).tolist() if len(example.likely) > 8 else []
    mixed = [block for pair in zip(likely, others, strict=False) for block in pair]
    return [*mixed, *likely[len(others) :], *others[len(likely) :]]


def _share(step: int, config: JudgeTrainingConfig) -> float:
    """Return the share of the highest learning rate at a step: a line up, and a line down to 0."""
    warmup = max(1, round(config.warmup_share * config.steps))
    return min((step + 1) / warmup, (config.steps - step) / max(1, config.steps - warmup))
