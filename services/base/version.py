"""The version of the code that runs."""

from __future__ import annotations

import subprocess
from importlib import metadata
from pathlib import Path


def git_revision() -> str:
    """Return the commit of the checkout that runs, with a mark when it was changed; else the package's version."""
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
