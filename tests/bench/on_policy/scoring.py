"""Reverse KL to the fused teacher, where a target goes by itself: on its own answers to prompts that no run saw."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from fusion_core.vocabulary import Vocabulary
from services.distill.config import DistillConfig
from services.distill.data.batch import collate, pack
from services.distill.on_policy.feed import AnswerFeed
from services.distill.on_policy.whole_target import WholeTarget
from services.distill.on_policy.writer import AnswerWriter
from services.distill.target.module import DistillModule
from services.distill.workers.world import World
from services.fusion.client import FusionClient
from services.models.weights import load_model
from tests.bench.on_policy.services import Size

_DRAWS = 4000


@dataclass(frozen=True)
class Scored:
    """Answers of a target to the held-out prompts.

    Attributes:
        nats_P: sum of the reverse KL divergence over the rows of each prompt's answer; 0 for one without text.
        rows_P: number of these rows.
        ended_share: share of the answers that the target ended itself.
    """

    nats_P: np.ndarray
    rows_P: np.ndarray
    ended_share: float

    @property
    def nats_per_token(self) -> float:
        return float(self.nats_P.sum() / self.rows_P.sum())


def reverse_kl(model_folder: Path, prompts: Path, size: Size, address: str) -> Scored:
    """Let a target answer, with the same seeds for every target, and score its answers."""
    torch.set_num_threads(1)
    settings = {
        "prompts": [str(prompts)], "rounds": 1, "round_steps": 1, "share": 1,
        "max_new_tokens": size.max_new_tokens,
    }  # fmt: skip
    config = DistillConfig.model_validate(
        {"loss": "reverse_kl", "batch_windows": size.num_prompts, "seed": 77, "on_policy": settings}
    )
    vocabulary = Vocabulary.from_pretrained(model_folder)
    bos = vocabulary.bos_id if vocabulary.bos_id is not None else vocabulary.eos_id
    assert bos is not None
    model = load_model(model_folder).eval()
    module = DistillModule(model, vocabulary_size=vocabulary.size, loss="reverse_kl")
    target = WholeTarget(module, World(), adapters=False, make_copy=lambda: model)
    answers, _ = AnswerWriter(target, model_folder, None, config, World(), bos=bos).write(0)
    client = FusionClient(address, timeout_seconds=3600)
    feed = AnswerFeed(client, k=None, sources=(), vocabulary=vocabulary.fingerprint, in_flight=4)
    feed.put([answer.passage for answer in answers])
    nats_P, rows_P = np.zeros(size.num_prompts), np.zeros(size.num_prompts)
    for answer, block in zip(answers, feed.take(len(answers)), strict=True):
        if block is None:
            continue
        batch = collate(pack([block], None), bos, vocabulary_size=vocabulary.size)
        weights_N = torch.zeros(batch.num_tokens)
        with torch.no_grad():
            losses = module(batch, weights_N, weights_N)
        nats_P[answer.draw], rows_P[answer.draw] = float(losses.fusion_N.sum()), int(block.mask_T.sum())
    feed.close()
    return Scored(nats_P, rows_P, sum(answer.ends for answer in answers) / len(answers))


def difference(ours: Scored, theirs: Scored) -> tuple[float, float, float]:
    """Return our nats per token minus theirs with the ends of a 95 % bootstrap interval over prompts, paired."""
    num_prompts = len(ours.nats_P)
    drawn_RP = np.random.default_rng(0).multinomial(num_prompts, np.full(num_prompts, 1 / num_prompts), size=_DRAWS)
    with np.errstate(invalid="ignore"):
        ours_R, theirs_R = ((drawn_RP @ s.nats_P) / (drawn_RP @ s.rows_P) for s in (ours, theirs))
    low, high = np.nanpercentile(ours_R - theirs_R, (2.5, 97.5))
    return ours.nats_per_token - theirs.nats_per_token, float(low), float(high)
