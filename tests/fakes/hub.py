"""A model hub on this machine: the few answers of the real one that a download needs, of one repository, owner/tiny."""

from __future__ import annotations

import hashlib
import json
import secrets
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

import huggingface_hub.constants
import pytest

REPOSITORY = "owner/tiny"


@dataclass
class Hub:
    """What the hub has and how it behaves; may be changed while it runs.

    Attributes:
        address: its URL.
        revision: commit of the branch `main`.
        files: the repository's files by name.
        announced: SHA-256 that it announces of some files.
        gated: files are refused, and asking for them names no token that would do.
        token: where it is set, requests without it are refused as for a private repository.
        breaks_after: connections break after so many bytes of a file; later requests for it are refused.
        requests: all requests, `METHOD PATH`, with the range that was asked for.
        num_bytes: bytes of files that were sent.
    """

    address: str = ""
    revision: str = field(default_factory=lambda: secrets.token_hex(20))  # clients remember the files of a commit
    files: dict[str, bytes] = field(default_factory=dict)
    announced: dict[str, str] = field(default_factory=dict)
    gated: bool = False
    token: str = ""
    breaks_after: int | None = None
    requests: list[str] = field(default_factory=list)
    num_bytes: int = 0


class _Server(ThreadingHTTPServer):
    def __init__(self, hub: Hub) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.hub = hub


class _Handler(BaseHTTPRequestHandler):
    """Answers for the hub of its server."""

    server: _Server

    def do_GET(self) -> None:
        asked = self.headers.get("Range", "")
        hub = self.server.hub
        hub.requests.append(f"{self.command} {self.path} {asked}".strip())
        if hub.token and self.headers.get("Authorization") != f"Bearer {hub.token}":
            self._answer(401, b"", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})
        elif "/tree/" in self.path and not hub.gated:
            entries = [
                {"type": "file", "path": name, "size": len(data), "oid": "b" * 40} for name, data in hub.files.items()
            ]
            self._json(entries)
        elif self.path == f"/api/models/{REPOSITORY}" or (not hub.gated and self.path.startswith("/api/")):
            if "/revision/" in self.path and not any(
                f"/revision/{name}" in self.path for name in ("main", hub.revision)
            ):
                self._answer(404, b"", {"X-Error-Code": "RevisionNotFound", "X-Error-Message": "Invalid rev"})
                return
            siblings = [
                {"rfilename": name, "size": len(data), "blobId": hashlib.sha1(data).hexdigest()}
                | (
                    {"lfs": {"sha256": hub.announced[name], "size": 1, "pointerSize": 1}}
                    if name in hub.announced
                    else {}
                )
                for name, data in hub.files.items()
            ]
            self._json({"id": REPOSITORY, "sha": hub.revision, "siblings": siblings})
        elif hub.gated:
            self._answer(403, b"", {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted"})
        else:
            self._file(unquote(self.path.rsplit("/", 1)[-1]), asked)

    do_HEAD = do_GET

    def _file(self, name: str, asked: str) -> None:
        hub = self.server.hub
        data = hub.files[name]
        headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": hub.revision}
        headers["Accept-Ranges"] = "bytes"
        start = int(asked.removeprefix("bytes=").split("-")[0]) if asked else 0
        if self.command == "GET" and hub.breaks_after is not None and start >= hub.breaks_after:
            self._answer(503, b"", {})
            return
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        self._answer(206 if start else 200, data[start:], headers, broken_at=hub.breaks_after)
        hub.num_bytes += len(data) - start if self.command == "GET" else 0

    def _json(self, body: Any) -> None:
        self._answer(200, json.dumps(body).encode(), {"Content-Type": "application/json"})

    def _answer(self, status: int, body: bytes, headers: dict[str, str], broken_at: int | None = None) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[:broken_at])

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextmanager
def running_hub() -> Iterator[Hub]:
    """Run an empty hub, and let huggingface_hub find it as HF_ENDPOINT would."""
    hub = Hub()
    constants = huggingface_hub.constants
    with _Server(hub) as server, pytest.MonkeyPatch.context() as patch:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        hub.address = f"http://127.0.0.1:{server.server_port}"
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template.replace(constants.ENDPOINT, hub.address))
        patch.setattr(constants, "ENDPOINT", hub.address)
        yield hub
        server.shutdown()
