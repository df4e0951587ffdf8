"""CLM and fusion loss for transformers' Trainer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fusion_core.losses import FusionLoss, SparseRows, fused_losses
from services.distill.huggingface.example import IGNORED_LABEL
from services.models.weights import check_head, last_hidden_states


class FusedLossMixin:
    """The loss lambda * CLM + (1 - lambda) * fusion, for a class that is a Trainer too.

        class FusedTrainer(FusedLossMixin, Trainer):
            fusion_lambda = 0.5

    Batches come from `FusedCollator`. Both losses are means: CLM over the learned tokens, fusion over those with a
    fused row. The loss reads the model's hidden states and its lm_head, a chunk of tokens at a time, so that no logits
    are held. It takes one process; `fusion distill` trains with several.

    Attributes:
        fusion_lambda: share of CLM, 0 to 1.
        fusion_loss: divergence between fused row and model, see `fusion_core.losses.buckets`.
        fusion_temperature: for the fusion term.
        fusion_beta: of `jsd`, between 0 and 1.
    """

    fusion_lambda: float = 0.5
    fusion_loss: FusionLoss = "cross_entropy"
    fusion_temperature: float = 1.0
    fusion_beta: float = 0.5
    _head_is_checked: bool = False

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return the loss of a batch; with `return_outputs` also a mapping that holds it, and no logits.

        `num_items_in_batch` is the number of learned tokens of all batches whose gradients are summed.

        Raises ValueError where several processes train, or for a model that does more to its logits than the lm_head.
        """
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            raise ValueError("FusedLossMixin: takes one process; `fusion distill` trains with several")
        if not self._head_is_checked:
            try:
                check_head(model)
            except ValueError as error:
                raise ValueError(f"FusedLossMixin: {error}") from error
            self._head_is_checked = True
        input_ids_BL, labels_BL = inputs["input_ids"], inputs["labels"]
        learned_BL = labels_BL[:, 1:] != IGNORED_LABEL
        tokens_N = labels_BL[:, 1:][learned_BL]
        length = input_ids_BL.shape[1]
        positions_BL = torch.arange(length, device=input_ids_BL.device).expand_as(input_ids_BL)
        hidden_ND = last_hidden_states(model, input_ids_BL, positions_BL)[:, :-1][learned_BL]
        rows = SparseRows(*(inputs[name][:, 1:][learned_BL] for name in ("topk_ids", "topk_logprobs", "tail", "fused")))
        num_tokens = tokens_N.numel()
        scale = 1.0 if num_items_in_batch is None else num_tokens / max(1.0, float(num_items_in_batch))
        num_fused = int(rows.mask_N.sum())
        device = hidden_ND.device.type
        compute_dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        ones_N = torch.ones(num_tokens, dtype=torch.float32, device=hidden_ND.device)
        with torch.autocast(device, enabled=False):  # the loss chooses its own precision
            losses = fused_losses(
                hidden_ND,
                model.get_output_embeddings().weight,
                tokens_N,
                rows,
                clm_weights_N=ones_N * (scale * self.fusion_lambda / max(1, num_tokens)),
                fusion_weights_N=ones_N * (scale * (1 - self.fusion_lambda) / max(1, num_fused)),
                loss=self.fusion_loss,
                temperature=self.fusion_temperature,
                beta=self.fusion_beta,
                compute_dtype=compute_dtype,
            )
        return (losses.total, {"loss": losses.total}) if return_outputs else losses.total
