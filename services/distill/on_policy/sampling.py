"""Sampling of answers from the target while it is trained, each by a seed of its own.

Shape legend: B answers that are sampled at once, L positions of the longest prompt, N new tokens, V ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList


class _Draws(LogitsProcessor):
    """Leaves one id of each row, drawn by inverse transform sampling from a number that is the answer's own.

    So an answer depends on its seed alone, not on those beside it; torch's generator is not used.
    """

    def __init__(self, draws_BN: Tensor, allowed_V: Tensor, temperature: float) -> None:
        self._draws_BN, self._allowed_V, self._temperature = draws_BN, allowed_V, temperature
        self._step = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        logits_BV = scores.float().masked_fill(~self._allowed_V, -torch.inf) / self._temperature
        sums_BV = torch.softmax(logits_BV, dim=-1, dtype=torch.float64).cumsum(dim=-1)
        drawn_B1 = self._draws_BN[:, self._step, None] * sums_BV[:, -1:]
        self._step += 1
        # The first id whose sum is above the number drawn: it has some probability, whatever is rounded.
        ids_B1 = torch.searchsorted(sums_BV, drawn_B1, right=True).clamp_max(sums_BV.shape[1] - 1)
        return torch.full_like(scores, -torch.inf).scatter_(1, ids_B1, 0.0)


def sample_ids(
    model: Any,
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[int],
    *,
    allowed_V: Tensor,
    stop_id: int,
    temperature: float,
    max_new_tokens: int,
    at_once: int,
    dtype: torch.dtype | None = None,
) -> list[list[int]]:
    """Return the sampled ids of an answer to each prompt, up to the one that ends it.

    The model is left as it was, its own settings of generation included.

    Args:
        model: the causal language model.
        prompts: the ids that the model reads first, BOS included.
        seeds: one for each answer.
        allowed_V: bool, the ids that an answer may have, over the rows of the lm_head.
        stop_id: the id that ends an answer.
        temperature: above 0.
        max_new_tokens: most ids of an answer.
        at_once: answers in one pass, of prompts of similar length.
        dtype: of the computation under autocast; None for that of the weights.
    """
    settings = GenerationConfig(  # type: ignore[no-untyped-call]
        do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=stop_id, pad_token_id=stop_id, use_cache=True
    )
    order = sorted(range(len(prompts)), key=lambda place: len(prompts[place]))
    answers: list[list[int]] = [[] for _ in prompts]
    own, training = model.generation_config, model.training
    model.generation_config = GenerationConfig()  # type: ignore[no-untyped-call]  # it fills what is not set
    model.eval()
    try:
        with torch.no_grad(), torch.autocast(model.device.type, dtype=dtype, enabled=dtype is not None):
            for start in range(0, len(order), at_once):
                places = order[start : start + at_once]
                draws_BN = torch.stack([_draws(seeds[place], max_new_tokens) for place in places])
                inputs_BL, mask_BL = _padded([prompts[place] for place in places], stop_id)
                sampled = model.generate(
                    input_ids=inputs_BL.to(model.device),
                    attention_mask=mask_BL.to(model.device),
                    generation_config=settings,
                    logits_processor=LogitsProcessorList(
                        [_Draws(draws_BN.to(model.device), allowed_V.to(model.device), temperature)]
                    ),
                )
                for place, ids in zip(places, sampled[:, inputs_BL.shape[1] :].tolist(), strict=True):
                    answers[place] = ids[: ids.index(stop_id) + 1] if stop_id in ids else ids
    finally:
        model.generation_config = own
        model.train(training)
    return answers


def _draws(seed: int, count: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, generator=generator, dtype=torch.float64)


def _padded(prompts: Sequence[Sequence[int]], padding: int) -> tuple[Tensor, Tensor]:
    """Return ids and attention mask, [B, L], padded on the left."""
    length = max(map(len, prompts))
    inputs_BL = torch.full((len(prompts), length), padding, dtype=torch.int64)
    mask_BL = torch.zeros_like(inputs_BL)
    for row, ids in enumerate(prompts):
        inputs_BL[row, length - len(ids) :] = torch.tensor(ids)
        mask_BL[row, length - len(ids) :] = 1
    return inputs_BL, mask_BL
