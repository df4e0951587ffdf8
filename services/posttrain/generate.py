"""Answers of a model in a folder, in batches, with transformers.

Shape legend: B prompts of a batch, L positions, prompts are padded on the left.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from services.posttrain.data.tokens import PromptTokens


def load_for_answers(folder: Any, device: Literal["auto", "cpu", "cuda"]) -> Any:
    """Return the model of a folder, ready to answer."""
    import torch
    from transformers import GenerationConfig

    from services.models.pretrained import load_causal_lm
    from services.models.weights import quiet

    where = "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"
    with quiet():
        model = load_causal_lm(folder, dtype=torch.float32).to(where).eval()
    model.generation_config = GenerationConfig()  # type: ignore[no-untyped-call]  # the folder's fills what is not set
    return model


def sample_answers(
    model: Any,
    tokens: PromptTokens,
    prompts_ids: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float,
    batch_size: int,
    seed: int,
) -> list[list[int]]:
    """Return the sampled ids of one answer to each prompt, up to the first that ends it.

    Batches are of prompts of similar length, so that little is padded; the same arguments give the same answers.
    """
    import torch
    from transformers import GenerationConfig

    stop = tokens.stop_ids[0]
    random = {"temperature": temperature, "top_p": 1.0, "top_k": 0} if temperature else {}
    settings = GenerationConfig(  # type: ignore[no-untyped-call]
        do_sample=temperature > 0,
        max_new_tokens=max_new_tokens,
        eos_token_id=tokens.stop_ids,
        pad_token_id=stop,
        **random,
    )
    order = sorted(range(len(prompts_ids)), key=lambda place: len(prompts_ids[place]))
    answers: list[list[int]] = [[]] * len(prompts_ids)
    device = model.device
    with torch.inference_mode(), torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        for start in range(0, len(order), batch_size):
            places = order[start : start + batch_size]
            length = max(len(prompts_ids[place]) for place in places)
            ids_BL = torch.full((len(places), length), stop, dtype=torch.int64)
            mask_BL = torch.zeros((len(places), length), dtype=torch.int64)
            for row, place in enumerate(places):
                ids = torch.tensor(prompts_ids[place])
                ids_BL[row, length - len(ids) :], mask_BL[row, length - len(ids) :] = ids, 1
            sampled_BL = model.generate(
                ids_BL.to(device), attention_mask=mask_BL.to(device), generation_config=settings
            )[:, length:].tolist()
            for place, ids in zip(places, sampled_BL, strict=True):
                answers[place] = _until_stop(ids, set(tokens.stop_ids))
    return answers


def _until_stop(ids: list[int], stops: set[int]) -> list[int]:
    end = next((place for place, token in enumerate(ids) if token in stops), None)
    return ids if end is None else ids[: end + 1]
