"""Which weights a folder holds."""

from __future__ import annotations

import hashlib
from pathlib import Path


def weights_revision(folder: Path) -> str:
    """Hash over configuration and weight files; sizes and names are part of it."""
    digest = hashlib.sha256()
    files = sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin"), *folder.glob("config.json")])
    for file in files:
        with file.open("rb") as stream:
            digest.update(f"{file.name}:{file.stat().st_size}:".encode())
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()[:32]
