"""SmolLM2-135M-Instruct, mixtures made of it, and its loss on Python's own documentation.

Shape legend: B windows, L tokens of a window, V vocabulary.
"""

from __future__ import annotations

from pydoc_data.topics import topics
from typing import Any

import torch
from torch import Tensor

from fusion_core.moe.upcycle import Upcycling
from services.distill.target.moe import upcycle
from services.models.catalogue import resolve_model
from services.models.weights import load_model

MODEL = "smollm2-135m-instruct"
ROUTERS = {"residual": 0.02, "split": 0.02, "split, larger rows": 0.2}
"""Standard deviation of the router's rows by the name of a mixture."""


def text_ids(num_windows: int, length: int) -> Tensor:
    """Return token ids of consecutive windows, [B, L]."""
    from transformers import AutoTokenizer

    text = "\n".join(topics[name] for name in sorted(topics))[: 20 * num_windows * length]
    ids = AutoTokenizer.from_pretrained(resolve_model(MODEL))(text).input_ids
    return torch.tensor(ids[: num_windows * length]).view(num_windows, length)


def dense_model(dtype: torch.dtype = torch.float32) -> Any:
    return load_model(resolve_model(MODEL), dtype).eval()


def mixture(dense: Any, name: str, **changes: Any) -> Any:
    """Return the mixture of a name in `ROUTERS`; `changes` to its shape."""
    init: Any = name.partition(",")[0]
    return upcycle(dense, Upcycling(**{"init": init, "router_std": ROUTERS[name]} | changes), seed=0)


def nats_per_token(model: Any, ids_BL: Tensor) -> float:
    with torch.no_grad():
        return float(torch.stack([model(ids[None], labels=ids[None]).loss for ids in ids_BL]).mean())


def logits(model: Any, ids_BL: Tensor) -> Tensor:
    """Return float64 logits, [B, L, V]."""
    with torch.no_grad():
        return torch.cat([model(ids[None]).logits.double() for ids in ids_BL])
