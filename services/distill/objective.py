"""The gradient of a step, lambda * CLM + (1 - lambda) * fusion over the blocks that all workers hold together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fusion_core.blocks import Block
from fusion_core.losses import Losses, source_reward
from services.distill.config import DistillConfig
from services.distill.data.batch import Batch, blocks_of, collate, pack
from services.distill.data.join import Reading
from services.distill.step_meter import StepLosses, StepTotals
from services.distill.target.module import DistillModule
from services.distill.target.routing import FIGURES, TargetRouting
from services.distill.workers.parallel import gradients_kept_back
from services.distill.workers.world import World


class FusionObjective:
    """CLM and fusion loss of a step's blocks, in one forward and backward pass per micro-batch.

    With a balance loss and several micro-batches, a pass without gradient over all of them comes first.

    Attributes:
        routing: figures of the last step's experts and their load; None for a dense target.
    """

    def __init__(
        self, module: DistillModule, parallel: nn.Module, config: DistillConfig, world: World, *, bos: int, steps: int
    ) -> None:
        """Take the bare module and the one that the workers run together; `steps` is the length of the run."""
        self._module, self._parallel, self._config, self._world = module, parallel, config, world
        self._bos, self._steps = bos, steps
        self.routing: dict[str, Any] | None = None
        self._routing = TargetRouting(module.model, None if config.moe is None else config.moe.balance, world)

    def backward(
        self, windows: Sequence[Block], step: int, totals: StepTotals, answers: Sequence[Block] = ()
    ) -> StepLosses:
        """Add the gradient of the global batch to the weights'; all workers take the same number of passes.

        Args:
            windows: this worker's share of the step's windows of the stream.
            step: counted from 0.
            totals: size of the global batch, at least one token.
            answers: its share of the target's own answers, for which lambda is 0: they are no text to be imitated.
        """
        config, device = self._config, self._world.device
        blocks, own = [*windows, *answers], {id(block) for block in answers}
        lambda_ = config.lambda_at(step, self._steps)
        losses = StepLosses(coefficients={"lambda": lambda_})
        # Gradients are averaged over the workers. The short batch at the end of an epoch counts by its windows.
        scale = self._world.size * totals.windows / config.batch_windows
        size = config.micro_batch_windows or totals.most_windows
        starts = range(0, totals.most_windows, size)
        routing = self._routing.step(totals.tokens)
        if self._routing.counts_first and len(starts) > 1:
            batches = (replace(self._batch(blocks[start : start + size])[1], rows=None) for start in starts)
            routing.count(
                lambda batch: self._parallel(
                    batch, batch.token_ids_N.new_zeros(batch.num_tokens, dtype=torch.float32), None
                ),
                batches,
            )
        for start in starts:
            rows, batch = self._batch(blocks[start : start + size])
            in_order = blocks_of(rows)
            own_N = _repeated([id(block) in own for block in in_order], in_order)
            lambda_N = _lambdas(in_order, lambda_, reward_weighting=config.reward_weighting)
            lambda_N = lambda_N.masked_fill(own_N, 0.0).to(device)
            clm_N = lambda_N * (scale / totals.tokens)
            fusion_N = None if config.tokens_only else (1 - lambda_N) * (scale / max(1.0, totals.fused))
            with gradients_kept_back(self._parallel, enabled=start != starts[-1]):
                passed: Losses
                passed, balance = routing.watch(
                    partial(self._parallel, clm_weights_N=clm_N, fusion_weights_N=fusion_N), batch
                )
                total = passed.total if balance is None else passed.total + scale * balance
                total.backward()  # type: ignore[no-untyped-call]
            losses.input_tokens += sum(reading.num_inputs for row in rows for reading in row)
            losses.loss += float(total.detach()) / scale
            losses.clm += float(passed.clm_N[~own_N.to(device)].sum(dtype=torch.float64))
            if passed.fusion_N is not None:
                losses.fusion += float(passed.fusion_N.sum(dtype=torch.float64))
            if own:
                _add_reverse_kl(losses, passed.clm_N.cpu(), [b for b in in_order if id(b) in own], own_N)
        self.routing = routing.figures()
        if self.routing is not None:
            self._routing.move_biases(self.routing["load"])
            self.routing |= {"step": step + 1, "tokens": int(totals.tokens)}
            losses.routing = {key: self.routing[key] for key in FIGURES}
        return losses

    def _batch(self, blocks: Sequence[Block]) -> tuple[list[list[Reading]], Batch]:
        """Return the rows of a pass, and its batch on this worker's device."""
        rows = pack(blocks, self._config.pack_tokens)
        vocabulary_size, tokens_only = self._module.vocabulary_size, self._config.tokens_only
        batch = collate(rows, self._bos, vocabulary_size=vocabulary_size, tokens_only=tokens_only)
        return rows, batch.to(self._world.device)


def _add_reverse_kl(losses: StepLosses, clm_N: Tensor, answers: Sequence[Block], own_N: Tensor) -> None:
    """Add the answers of a pass to `losses`; `clm_N` is minus the target's log-probability of every token."""
    if not answers:
        return
    fused_N = torch.from_numpy(np.concatenate([block.gold_T for block in answers]))
    counted_N = torch.from_numpy(np.concatenate([block.mask_T for block in answers])) & fused_N.isfinite()
    losses.reverse_kl += float((-clm_N[own_N] - fused_N)[counted_N].sum(dtype=torch.float64))
    losses.answer_rows += int(counted_N.sum())


def _repeated(values: Sequence[bool], blocks: Sequence[Block]) -> Tensor:
    """Return a block's value for every token of it, bool [N]."""
    return torch.from_numpy(np.repeat(np.array(values, dtype=np.bool_), [block.num_tokens for block in blocks]))


def _lambdas(blocks: Sequence[Block], lambda_: float, *, reward_weighting: bool) -> Tensor:
    """Return lambda of every token, [N]: the schedule's, or raised towards 1 where the window's best source is poor."""
    parts = [torch.empty(0)]
    for block in blocks:
        reward = 1.0
        if reward_weighting:
            losses = [share.nats_per_byte for share in block.shares if share.present]
            reward = source_reward(losses, len(block.text_bytes), block.num_text_tokens)
        parts.append(torch.full((block.num_tokens,), 1 - (1 - lambda_) * reward))
    return torch.cat(parts)
