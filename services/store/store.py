"""A store: the scored windows of any number of sources below one folder or URL."""

from __future__ import annotations

import logging
import threading

from pydantic import ValidationError

from services.base.files import Files
from services.store.identity import SourceIdentity
from services.store.source_store import SourceStore

logger = logging.getLogger("ray.serve")


class BlockStore:
    """The store in a folder or URL. Raises ValueError when it cannot be written."""

    def __init__(self, root: str) -> None:
        self.files = Files(root)
        self._sources: dict[str, SourceStore] = {}
        self._lock = threading.Lock()

    def identities(self) -> list[SourceIdentity]:
        """Return the sources whose windows are in the store."""
        found = []
        for folder in self.files.folders(""):
            data = self.files.read(f"{folder}/source.json")
            try:
                found += [SourceIdentity.model_validate_json(data)] if data is not None else []
            except ValidationError as error:
                logger.warning("service.store: %s is damaged: %s", self.files.location(f"{folder}/source.json"), error)
        return found

    def source(self, identity: SourceIdentity) -> SourceStore:
        """Return the windows of one source."""
        with self._lock:
            if identity.digest not in self._sources:
                self._sources[identity.digest] = SourceStore(self.files, identity)
            return self._sources[identity.digest]

    def flush(self) -> None:
        """Write the windows that are only in memory."""
        for source in list(self._sources.values()):
            source.flush()
