"""The target as training runs it: backbone, lm_head and loss in one module."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fusion_core.losses import FusionLoss, Losses, fused_losses
from services.distill.data.batch import Batch
from services.models.weights import last_hidden_states


class DistillModule(nn.Module):
    """Losses of a batch from token ids. The whole computation is one forward call, as DDP and FSDP need it."""

    def __init__(
        self,
        model: Any,
        *,
        vocabulary_size: int,
        loss: FusionLoss = "cross_entropy",
        temperature: float = 1.0,
        beta: float = 0.5,
        autocast: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.vocabulary_size = vocabulary_size
        self.loss: FusionLoss = loss
        self.temperature = temperature
        self.beta = beta
        self.autocast = autocast

    def forward(self, batch: Batch, clm_weights_N: Tensor, fusion_weights_N: Tensor | None) -> Losses:
        """Return the losses of a batch; see `fusion_core.losses.fused_losses` for the weights and the result."""
        return fused_losses(
            self._states(batch)[batch.valid_BL],
            self.model.get_output_embeddings().weight,
            batch.token_ids_N,
            batch.rows,
            clm_weights_N=clm_weights_N,
            fusion_weights_N=fusion_weights_N,
            loss=self.loss,
            temperature=self.temperature,
            beta=self.beta,
            vocabulary_size=self.vocabulary_size,
            compute_dtype=self.autocast,  # autocast ends before the loss, and norms give float32 under it
        )

    def _states(self, batch: Batch) -> Tensor:
        """Return the last hidden states, [B, L, D]."""
        with torch.autocast(batch.inputs_BL.device.type, dtype=self.autocast, enabled=self.autocast is not None):
            return last_hidden_states(self.model, batch.inputs_BL, batch.positions_BL)

    @torch.no_grad()
    def check_packing(self) -> None:
        """Raise ValueError when the model lets packed windows see each other, as recurrent layers do."""
        device = next(self.parameters()).device
        window = torch.arange(5, device=device) % self.vocabulary_size
        where = torch.arange(5, device=device)

        def states(*windows: Tensor) -> Tensor:
            return last_hidden_states(self.model, torch.cat(windows)[None], where.repeat(len(windows))[None])[0]

        training = self.training
        self.eval()
        behind, alone = states(window.flip(0), window)[5:], states(window)
        self.train(training)
        if not torch.allclose(behind, alone, rtol=0, atol=1e-4 * float(alone.abs().max())):
            raise ValueError(
                f"distill.pack_tokens: {self.model.config.model_type} lets packed windows see each other; leave it out"
            )
