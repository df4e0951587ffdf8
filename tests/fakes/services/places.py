"""Places to keep things in: a folder, or a bucket of an S3 server of which one prefix may be touched."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.fakes.services.s3_server import rights_on_prefix, s3_server, s3_url

Place = Callable[[str], str]
"""Returns the folder or URL of a name."""
PLACES = ("folder", "s3")


@contextmanager
def place_in(kind: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    """Open a place of a kind of `PLACES`; at the end, nothing outside the prefix of the bucket was touched."""
    if kind == "folder":
        yield lambda name: str(folder / "kept" / name)
        return
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "id")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    with s3_server("bucket") as server, rights_on_prefix(server, "bucket", "team") as (address, refused):
        yield lambda name: s3_url(address, f"bucket/team/{name}")
        assert refused == []
