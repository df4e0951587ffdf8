"""Fingerprint of a vocabulary."""

from __future__ import annotations

import hashlib
import json
from typing import Any


def vocabulary_fingerprint(
    description: dict[str, Any], token_bytes: list[bytes], roles: dict[str, int | None], special_ids: frozenset[int]
) -> str:
    """Return 16 hexadecimal digits: a hash of the id-to-bytes table, the pieces and merges, the preparation of a text
    and the special roles."""
    digest = hashlib.sha256()

    def add(name: str, value: Any) -> None:
        digest.update(f"\0{name}\0".encode() + json.dumps(value, sort_keys=True).encode())

    for token in token_bytes:
        digest.update(len(token).to_bytes(4, "little") + token)
    model = dict(description["model"])
    vocabulary, merges = model.pop("vocab"), model.pop("merges", ())
    # Merges are written as "a b" or ["a", "b"] depending on the version of the library.
    digest.update("\n".join(merge if isinstance(merge, str) else " ".join(merge) for merge in merges).encode())
    if isinstance(vocabulary, dict):
        digest.update("\n".join(sorted(f"{i} {piece}" for piece, i in vocabulary.items())).encode())
    else:
        add("scores", vocabulary)
    model.pop("dropout", None)
    add("model", model)
    for key in ("normalizer", "pre_tokenizer"):
        add(key, description.get(key))
    add("added", [a for a in description.get("added_tokens", ()) if a["id"] not in special_ids])
    add("roles", roles)
    add("special", sorted(special_ids))
    return digest.hexdigest()[:16]
