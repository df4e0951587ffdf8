"""`fusion upcycle`: a dense model's folder as a mixture of experts, checked against the dense one."""

from __future__ import annotations

from pathlib import Path

import torch

from fusion_core.moe.upcycle import Upcycling
from services.base.atomic import whole_folder
from services.base.errors import RunFailedError
from services.distill.target.moe import upcycle
from services.models.catalogue import resolve_model
from services.models.weights import load_model, save_model

TEXT = """The largest part of a decoder's weights is in its feed-forward blocks. A block is a sum over hidden units,
and a sum may be cut into parts: 12 + 30 = (5 + 7) + (10 + 20). Experts are such parts, chosen for each token."""
"""Text on which `check` compares logits."""


def upcycle_folder(
    model: str, folder: Path, upcycling: Upcycling, *, seed: int, bound: float | None = None
) -> float | None:
    """Write the mixture of a dense model, in float32, with its tokenizer and templates.

    Args:
        model: of the catalogue, a URL, or a folder.
        folder: appears complete or not at all.
        upcycling: the shape.
        seed: of the routers' rows.
        bound: largest difference of a logit that is accepted; None compares nothing.

    Returns the largest difference, on `TEXT`, between the dense model and the folder as it was written. Raises
    RunFailedError when it is above the bound, ValueError when the model cannot become a mixture, OSError when `folder`
    is there.
    """
    source = resolve_model(model)
    if folder.exists():
        raise FileExistsError(f"{folder} exists; give a new folder")
    dense = load_model(source).eval()
    with whole_folder(folder) as made:
        save_model(upcycle(dense, upcycling, seed=seed), source, made)
        difference = None if bound is None else _largest_difference(dense, source, made)
        if difference is not None and bound is not None and not difference <= bound:
            raise RunFailedError(
                f"upcycle: a logit differs by {difference:.3g} from the dense model's, more than {bound:g}; "
                f"{folder} was not written"
            )
    return difference


@torch.no_grad()
def _largest_difference(dense: torch.nn.Module, source: Path, folder: Path) -> float:
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(source, trust_remote_code=False)(TEXT, return_tensors="pt").input_ids
    written = load_model(folder).eval()
    return float((dense(ids).logits - written(ids).logits).abs().max())
