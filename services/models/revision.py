"""The revision of a model's folder: a hash of all files that decide its numbers, the tokenizer's apart."""

from __future__ import annotations

import hashlib
from pathlib import Path

_DECIDING_FILES = (
    *("config.json", "params.json", "*.safetensors", "*.bin"),
    "*.safetensors.index.json",  # which shard a tensor is read from
    "*quant*.json",
    "**/*.py",  # run when the recipe trusts them
)


def weights_revision(folder: Path) -> str:
    """Return a hash over configuration, weights and code of a model's folder; names and sizes are part of it."""
    digest = hashlib.sha256()
    for file in sorted({file for pattern in _DECIDING_FILES for file in folder.glob(pattern)}):
        with file.open("rb") as stream:
            digest.update(f"{file.relative_to(folder).as_posix()}:{file.stat().st_size}:".encode())
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()[:32]
