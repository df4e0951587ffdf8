"""Causal language models in Hugging Face folders: loaded, checked and saved."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from services.models.pretrained import load_causal_lm

_PROBE_TOKENS = 8
_LARGE_LOGIT = 100.0
_TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "*.model", "vocab*", "merges.txt", "chat_template*")


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' progress bars out of the logs."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def load_model(folder: Path | str, dtype: torch.dtype = torch.float32) -> Any:
    """Return the causal language model of a local Hugging Face folder; ValueError when it cannot be trained here."""
    with quiet():
        model = load_causal_lm(folder, dtype=dtype)
    check_head(model)
    return model


def save_model(model: Any, tokenizer_folder: Path, folder: Path, weights: dict[str, Any] | None = None) -> None:
    """Writes weights, configuration and the tokenizer's files as they are in `tokenizer_folder`.

    `weights`: the model's own when not set; where it is sharded, what was gathered from all workers.
    """
    with quiet():
        model.save_pretrained(folder, state_dict=weights)
    for pattern in _TOKENIZER_FILES:
        for file in tokenizer_folder.glob(pattern):
            if file.name != "target.json":
                shutil.copy2(file, folder / file.name)


def last_hidden_states(model: Any, inputs_BL: Tensor, positions_BL: Tensor) -> Tensor:
    """Return the states that the lm_head reads, [B, L, D], in the way that training computes them.

    There is no attention mask: padding stands behind the tokens of its row, where causal attention never looks from
    them. Without a mask attention takes its fastest path, unless the positions start anew within a row: then
    transformers makes the mask that keeps packed windows apart.
    """
    states_BLD: Tensor = model.base_model(
        input_ids=inputs_BL, position_ids=positions_BL, use_cache=False
    ).last_hidden_state
    return states_BLD


def check_head(model: Any) -> None:
    """Raise ValueError unless logits are a plain matrix product of the last hidden states, and these of the past only.

    The loss is computed from the lm_head's weight, without the model's own forward pass over it. So both ways are
    taken on a few tokens, and must agree: scales and caps of logits have another name in every architecture.
    """
    kind = model.config.model_type
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear) or head.bias is not None:
        raise ValueError(
            f"target.model: the lm_head of {kind} is no plain matrix (it has a bias or an adapter), which is not "
            "supported"
        )
    text_config = model.config.get_text_config()
    for name in ("final_logit_softcapping", "logit_scale", "logits_scaling"):
        if getattr(text_config, name, None) not in {None, 1}:
            raise ValueError(f"target.model: {name} = {getattr(text_config, name)} in config.json is not supported")
    training = model.training
    model.eval()
    try:
        difference, ahead = head_difference(model), _seen_ahead(model)
    except (TypeError, AttributeError) as error:
        raise ValueError(f"target.model: {kind} cannot be run as training does: {error}") from error
    finally:
        model.train(training)
    tolerance = 1e-3 if head.weight.dtype == torch.float32 else 3e-2
    if ahead > tolerance:
        raise ValueError(f"target.model: {kind} lets a token see those behind it, and so what it is to predict")
    if difference > tolerance:
        raise ValueError(
            f"target.model: the logits of {kind} are not its last hidden states times the lm_head (they differ by "
            f"{difference:.2g} of the largest one), which is not supported"
        )


@torch.no_grad()
def head_difference(model: Any) -> float:
    """Return the largest difference between the model's own logits and the product of states and lm_head, as a share
    of the largest logit.

    It is measured twice: on the states of a few tokens, and on states so long that the largest logit is
    `_LARGE_LOGIT`, where a cap shows that untrained weights would never reach.
    """
    head = model.get_output_embeddings()
    rows, width = head.weight.shape
    tokens_BL = (torch.arange(_PROBE_TOKENS, device=head.weight.device) % rows)[None]
    positions_BL = torch.arange(_PROBE_TOKENS, device=head.weight.device)[None]
    states_BLD = last_hidden_states(model, tokens_BL, positions_BL)
    differences = [_share(model(input_ids=tokens_BL, use_cache=False).logits, head(states_BLD))]

    generator = torch.Generator().manual_seed(0)
    large_BLD = torch.randn(1, _PROBE_TOKENS, width, generator=generator).to(head.weight)
    large_BLD *= _LARGE_LOGIT / head(large_BLD).abs().max().clamp_min(1e-9)
    product_BLV = head(large_BLD)
    replaced = head.register_forward_pre_hook(lambda _head, _args: (large_BLD,))
    try:
        differences.append(_share(model(input_ids=tokens_BL, use_cache=False).logits, product_BLV))
    finally:
        replaced.remove()
    return max(differences)


@torch.no_grad()
def _seen_ahead(model: Any) -> float:
    """Return the largest change of the states of some tokens, as a share of the largest, when more come behind them."""
    rows, device = model.get_output_embeddings().weight.shape[0], model.get_output_embeddings().weight.device
    tokens_BL = (3 + torch.arange(_PROBE_TOKENS, device=device)[None] * 7) % rows
    positions_BL = torch.arange(_PROBE_TOKENS, device=device)[None]
    half = _PROBE_TOKENS // 2
    alone_BLD = last_hidden_states(model, tokens_BL[:, :half], positions_BL[:, :half])
    return _share(last_hidden_states(model, tokens_BL, positions_BL)[:, :half], alone_BLD)


def _share(one: Tensor, other: Tensor) -> float:
    """Return the largest difference between two tensors as a share of the largest value; infinite for NaN.

    Of logits only the columns are compared that both have.
    """
    columns = min(one.shape[-1], other.shape[-1])
    one, other = one[..., :columns].double(), other[..., :columns].double()
    share = float((one - other).abs().max() / torch.maximum(one.abs().max(), other.abs().max()).clamp_min(1e-9))
    return share if math.isfinite(share) else math.inf
