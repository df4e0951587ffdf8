"""A random model of some thousand parameters, and generated text."""

from __future__ import annotations

import random
from pathlib import Path

from services.distill.target.config import TargetConfig
from services.distill.target.prepare import prepare_target

WORDS = [
    "the",
    "of",
    "and",
    "to",
    "in",
    "a",
    "is",
    "that",
    "for",
    "it",
    "as",
    "was",
    "with",
    "be",
    "by",
    "on",
    "not",
    "he",
    "his",
    "but",
    "at",
    "are",
    "this",
    "have",
    "from",
    "or",
    "had",
    "an",
    "they",
    "which",
    "one",
    "you",
    "were",
    "all",
    "her",
    "she",
    "there",
    "would",
    "their",
    "we",
    "him",
    "been",
    "has",
    "when",
    "who",
    "will",
    "no",
    "more",
    "if",
    "out",
    "so",
    "up",
    "said",
    "what",
    "its",
    "about",
    "than",
    "into",
    "them",
    "can",
    "only",
    "other",
    "time",
    "new",
    "some",
    "could",
    "these",
    "two",
    "may",
    "first",
    "then",
    "do",
    "any",
    "like",
    "my",
    "now",
    "over",
    "such",
    "our",
    "man",
]


def sentences(num_bytes: int, seed: int) -> str:
    """Plain text in sentences and paragraphs; a few characters take more than one byte."""
    rng, text = random.Random(seed), ""
    while len(text.encode()) < num_bytes:
        words = [rng.choice(WORDS) for _ in range(rng.randint(4, 14))]
        text += " ".join(words).capitalize() + rng.choice([". ", "! ", "? — ", ".\n", ' "ça va" 👍 '])
    return text


def make_tiny_model(
    folder: Path, *, vocabulary_size: int, seed: int, config: dict[str, int] | None = None, text: str | None = None
) -> Path:
    """A random decoder of some thousand parameters with a tokenizer trained on generated text, or on `text`."""
    shape = {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "intermediate_size": 64} | (config or {})
    target = TargetConfig.model_validate(
        {"config": shape, "tokenizer": {"train": {"vocabulary_size": vocabulary_size}}}
    )
    return prepare_target(target, [text or sentences(20_000, seed)], folder, seed)
