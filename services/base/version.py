"""Which code this is."""

from __future__ import annotations

import subprocess
from importlib import metadata
from pathlib import Path


def git_revision() -> str:
    """Commit of the checkout that this package is run from, with a mark when it was changed; else its version."""
    folder = Path(__file__).resolve().parent
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return f"llm-fusion {metadata.version('llm-fusion')}"
