"""Causal language models in Hugging Face folders: loaded, checked and saved."""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from services.models.pretrained import load_causal_lm

CHAT_TEMPLATES = "additional_chat_templates"
"""Folder of the chat templates beside the first one, in a Hugging Face folder."""
_PROBE_TOKENS = 8
_LARGE_LOGIT = 100.0
_KEPT_FILES = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "*.model", "*.tiktoken", "vocab*", "merges.txt",
    "chat_template*", f"{CHAT_TEMPLATES}/*", "generation_config.json",
)  # fmt: skip
"""Files of a target that its trained model takes over as they are."""


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


def empty_model(folder: Path | str) -> Any:
    """Return the model of a Hugging Face folder without its weights, which take no memory (device `meta`)."""
    from transformers import AutoConfig

    return model_of(AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False))


def model_of(config: Any) -> Any:
    """Return the model of a configuration without weights (device `meta`)."""
    from transformers import AutoModelForCausalLM

    from_config: Any = AutoModelForCausalLM.from_config
    with torch.device("meta"):
        return from_config(config, dtype=torch.float32)


def save_model(model: Any, target_folder: Path, folder: Path, weights: dict[str, Any] | None = None) -> None:
    """Write weights and configuration, and the other files (tokenizer, templates) as they are in `target_folder`.

    `weights`: the model's own when not set; where it is sharded, those gathered from all workers.
    """
    with quiet(), _default_generation(model), write_errors_named(folder):
        model.save_pretrained(folder, state_dict=weights)
    for pattern in _KEPT_FILES:
        for file in target_folder.glob(pattern):
            kept = folder / file.relative_to(target_folder)
            kept.parent.mkdir(exist_ok=True)
            shutil.copy2(file, kept)


def check_savable(model: Any, target_folder: Path) -> None:
    """Raise ValueError unless transformers would save the model; all but the weights is saved once.

    transformers loads settings that it refuses to save, which would come to light at the first checkpoint.
    """
    with tempfile.TemporaryDirectory(prefix="fusion-savable-") as folder:
        try:
            save_model(model, target_folder, Path(folder), weights={})
        except (ValueError, TypeError, NotImplementedError) as error:
            raise ValueError(f"target.model: {target_folder} is loaded but could not be saved: {error}") from error


@contextmanager
def write_errors_named(folder: Path) -> Iterator[None]:
    """Raise OSError where a file cannot be written, such as on a full disk.

    For that, tokenizers raises a bare Exception and safetensors an error of its own.
    """
    from safetensors import SafetensorError

    try:
        yield
    except Exception as error:
        if type(error) is Exception or isinstance(error, SafetensorError):
            raise OSError(f"cannot write to {folder}: {error}") from error
        raise


@contextmanager
def _default_generation(model: Any) -> Iterator[None]:
    """Give the model default settings of generation: transformers loads any, and refuses to save some.

    The file of the target, where it has one, is kept as it is.
    """
    from transformers import GenerationConfig

    settings = getattr(model, "generation_config", None)
    if settings is None:
        yield
        return
    roles = {name: getattr(settings, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model.generation_config = GenerationConfig(**roles)  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        model.generation_config = settings


def last_hidden_states(model: Any, inputs_BL: Tensor, positions_BL: Tensor) -> Tensor:
    """Return the states that the lm_head reads, [B, L, D], in the way that training computes them.

    There is no attention mask: padding stands behind the tokens of its row, where their causal attention never looks.
    Without a mask attention takes its fastest path, unless the positions start anew within a row: then transformers
    makes the mask that keeps packed windows apart.
    """
    states_BLD: Tensor = model.base_model(
        input_ids=inputs_BL, position_ids=positions_BL, use_cache=False
    ).last_hidden_state
    return states_BLD


def check_head(model: Any) -> None:
    """Raise ValueError unless logits are a plain matrix product of the last hidden states, and these see the past only.

    The loss is computed from the lm_head's weight, without the model's own forward pass over it. So both ways are
    compared on a few tokens: scales and caps of logits have another name in every architecture.
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
    `_LARGE_LOGIT`, where a cap shows that the logits of untrained weights never reach.
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
