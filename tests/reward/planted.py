"""Pairs in two domains whose wishes contradict each other: one likes the short answer, the other one the long one."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from services.reward.config import RewardConfig
from services.reward.pairs import Pair, write_pairs
from services.reward.train import RewardJob
from tests.fakes.tiny_model import WORDS, make_tiny_model

DOMAINS = {"brief": "Be brief.", "rich": "Tell it all."}


def planted_pairs(number: int, seed: int) -> list[Pair]:
    rng, pairs = random.Random(seed), []
    for _ in range(number):
        prompt, short, long = (" ".join(rng.choices(WORDS, k=size)) for size in (4, 3, 9))
        domain = rng.choice(list(DOMAINS))
        chosen, rejected = (short, long) if domain == "brief" else (long, short)
        pairs.append(Pair([{"role": "user", "content": prompt}], chosen, rejected, domain))
    return pairs


def planted_job(folder: Path, **changes: Any) -> RewardJob:
    """A run on planted pairs, with a random model of some thousand parameters."""
    start = make_tiny_model(folder / "tiny", vocabulary_size=300, seed=0)
    write_pairs(folder / "pairs.jsonl", planted_pairs(240, seed=1))
    settings = {
        "start": str(start), "data": [str(folder / "pairs.jsonl")], "domains": DOMAINS, "chat_template": "plain",
        "num_workers": 0, "learning_rate": 5e-3, "epochs": 3, "batch_pairs": 16, "checkpoint_every_steps": 20,
        "device": "cpu", "max_tokens": 96, "held_out_share": 0.2,
    }  # fmt: skip
    config = RewardConfig.model_validate(settings | changes)
    return RewardJob("trained", folder / "runs" / "judged" / "reward" / "trained", start, config)
