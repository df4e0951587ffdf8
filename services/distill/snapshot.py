"""Ray Train's own list of checkpoints, and what to do when a kill has damaged it."""

from __future__ import annotations

import json
import logging
from pathlib import Path

from services.distill.checkpoint import newest_complete

logger = logging.getLogger(__name__)

_SNAPSHOT = "checkpoint_manager_snapshot.json"


def mend_snapshot(checkpoints: Path) -> Path | None:
    """Makes sure that Ray Train can start in the folder; returns the checkpoint to go on from when Ray knows of none.

    Ray writes the list in place, so that a kill in that moment leaves it unreadable, and it refuses to start with such
    a list, or with one that names a missing folder. The list is then set aside.
    """
    snapshot = checkpoints / _SNAPSHOT
    try:
        listed = [entry["checkpoint_dir_name"] for entry in json.loads(snapshot.read_text())["checkpoint_results"]]
    except FileNotFoundError:
        return newest_complete(checkpoints)
    except (ValueError, KeyError, TypeError):
        listed = None
    if listed and all((checkpoints / name).is_dir() for name in listed):
        return None
    newest = newest_complete(checkpoints)
    logger.warning("%s is damaged and set aside; going on from %s", snapshot, newest.name if newest else "the start")
    snapshot.replace(snapshot.with_suffix(".damaged"))
    return newest
