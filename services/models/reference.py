"""Models named by a URL: `hf://org/name@revision` on a hub, or a folder in an object store such as `s3://bucket/folder`."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from services.base.credentials import refuse_credentials
from services.base.home import fusion_home

_HUB = re.compile(r"hf://(?P<repository>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?/?")


@dataclass(frozen=True, slots=True)
class ModelReference:
    """A model that is fetched before it is used.

    Attributes:
        url: as the recipe names it.
        repository, revision: of a hub, where the URL is one of a hub: `org/name`, and a branch, tag or commit; else "".
    """

    url: str
    repository: str
    revision: str

    @property
    def folder(self) -> Path:
        """The folder into which the model is fetched."""
        name = re.sub(r"[^\w.-]", "-", self.url.partition("?")[0].rstrip("/").rpartition("/")[2])
        return fusion_home() / "models" / "remote" / f"{name}-{hashlib.sha256(self.url.encode()).hexdigest()[:12]}"


def is_reference(model: str) -> bool:
    """Return whether a recipe's `model` is a URL, not a name of the catalogue or a folder."""
    return "://" in model


def parse_reference(url: str) -> ModelReference:
    """Return what a URL names; ValueError when it is malformed or carries credentials."""
    refuse_credentials(url, "model")
    if not url.startswith("hf://"):
        if not re.fullmatch(r"[A-Za-z][\w+.-]*://.+", url):
            raise ValueError(f"{url} is no URL; give hf://ORG/NAME@REVISION, s3://BUCKET/FOLDER or a folder")
        return ModelReference(url, "", "")
    match = _HUB.fullmatch(url)
    if match is None:
        raise ValueError(f"{url} names no model of the hub; give hf://ORG/NAME, or hf://ORG/NAME@REVISION")
    return ModelReference(url, match["repository"], match["revision"] or "main")
