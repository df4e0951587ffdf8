"""Wishes that contradict each other in four domains, and a judge that likes length."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from services.reward.config import RewardConfig
from services.reward.pairs import Pair, write_pairs
from services.reward.train import RewardJob
from tests.fakes.tiny_model import WORDS, make_tiny_model

DOMAINS = {
    "brief": "The shorter answer is better.",
    "rich": "The longer answer is better.",
    "polite": "An answer that says thanks is better.",
    "blunt": "An answer without thanks is better.",
}
PARTNERS = {"brief": "rich", "rich": "brief", "polite": "blunt", "blunt": "polite"}
MARK = "thanks"
FILLER = [word for word in WORDS if len(word) > 1]
_SHAPE = {"hidden_size": 64, "num_layers": 2, "num_heads": 4, "intermediate_size": 128}


def answer(rng: random.Random, num_words: int, *, marked: bool) -> str:
    """Return words; one of them is the mark, or none is."""
    words = rng.choices(FILLER, k=num_words)
    if marked:
        words[rng.randrange(num_words)] = MARK
    return " ".join(words)


def prompt(rng: random.Random) -> list[dict[str, Any]]:
    return [{"role": "user", "content": " ".join(rng.choices(FILLER, k=5))}]


def conflicting_pairs(number: int, seed: int) -> list[Pair]:
    """Pairs whose answers differ in length or in the mark; the other feature says nothing."""
    rng, pairs = random.Random(seed), []
    for _ in range(number):
        domain = rng.choice(list(DOMAINS))
        if domain in {"brief", "rich"}:
            short, marked = rng.randint(3, 9), rng.random() < 0.5
            one, other = (answer(rng, n, marked=marked) for n in (short, short * 2))
        else:
            length = rng.randint(3, 18)
            other, one = (answer(rng, length, marked=marked) for marked in (True, False))
        chosen, rejected = (one, other) if domain in {"brief", "blunt"} else (other, one)
        pairs.append(Pair(prompt(rng), chosen, rejected, domain))
    return pairs


def vain_pairs(number: int, seed: int) -> list[Pair]:
    """Pairs ranked by a judge that likes the mark, and every ten words as much."""
    rng, pairs = random.Random(seed), []

    def worth(text: str) -> float:
        return (MARK in text.split()) + 0.1 * len(text.split())

    while len(pairs) < number:
        one, other = (answer(rng, rng.randint(3, 40), marked=rng.random() < 0.5) for _ in range(2))
        if worth(one) != worth(other):
            better, worse = sorted((one, other), key=worth, reverse=True)
            pairs.append(Pair(prompt(rng), better, worse, "polite"))
    return pairs


def reward_job(folder: Path, name: str, pairs: Callable[[], list[Pair]], seed: int, **changes: Any) -> RewardJob:
    """A run in this process on pairs that are written down once."""
    text = " ".join(random.Random(seed).choices([*FILLER, MARK], k=5000)) + " ".join(DOMAINS.values()) * 50
    start = make_tiny_model(folder / f"start-{seed}", vocabulary_size=400, seed=seed, config=_SHAPE, text=text)
    file = folder / f"{name}.jsonl"
    write_pairs(file, pairs())
    settings = {
        "start": str(start), "data": [str(file)], "domains": DOMAINS, "chat_template": "plain", "num_workers": 0,
        "learning_rate": 2e-3, "epochs": 3, "batch_pairs": 32, "checkpoint_every_steps": 10**6, "device": "cpu",
        "max_tokens": 256, "held_out_share": 0.0, "seed": seed, "torch_threads": 1,
    }  # fmt: skip
    return RewardJob(name, folder / name, start, RewardConfig.model_validate(settings | changes))
