"""All checks on one overlay."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from tests.k8s.check import network, schemas
from tests.k8s.check.manifests import Document
from tests.k8s.check.rules import RULES

PARTS = {
    "cpu-dev": ("base",),
    "gpu": ("base",),
    "external-sources": ("base", "external-sources"),
    "production": ("base", "gcs-redis", "gateway", "tracing"),
}
"""What of the README's table each overlay brings."""


def check_overlay(name: str, documents: Sequence[Document]) -> Iterator[str]:
    """A sentence per problem."""
    yield from schemas.problems(documents)
    for rule in RULES:
        yield from rule(documents)
    yield from network.problems(documents, PARTS[name])
