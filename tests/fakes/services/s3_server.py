"""A real S3 server (moto's) for tests, and a guard in front of it that gives rights on one prefix only.

The server runs in an environment of its own, made once from `requirements/s3-server.txt`.
"""

from __future__ import annotations

import hashlib
import http.client
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from services.base.atomic import whole_folder
from services.base.home import exclusive, fusion_home

_LOCK = Path(__file__).parents[3] / "requirements" / "s3-server.txt"
_HOME = fusion_home()  # a test may move it later; the environment is shared
_SERVE = """
import sys
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()
server.stop()
"""


def _python() -> Path:
    folder = _HOME / "environments" / f"s3-server-{hashlib.sha256(_LOCK.read_bytes()).hexdigest()[:12]}"
    uv = shutil.which("uv", path=str(Path(sys.executable).parent)) or "uv"
    with exclusive(folder):
        if not folder.is_dir():
            with whole_folder(folder) as partial:
                subprocess.run([uv, "venv", "--quiet", "--relocatable", partial / "env"], check=True)
                python = partial / "env" / "bin" / "python"
                subprocess.run([uv, "pip", "install", "--quiet", "--python", python, "-r", _LOCK], check=True)
    return folder / "env" / "bin" / "python"


@contextmanager
def s3_server(*buckets: str) -> Iterator[str]:
    """Run an empty server with these buckets; yields its `host:port`."""
    command = [str(_python()), "-c", _SERVE]
    environment = {"PATH": "/usr/bin:/bin", "AWS_ACCESS_KEY_ID": "id", "AWS_SECRET_ACCESS_KEY": "secret"}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        address = f"127.0.0.1:{next(line for line in process.stdout if line.strip().isdigit()).strip()}"
        try:
            for bucket in buckets:
                assert _forward(address, "PUT", f"/{bucket}", b"", {})[0] == 200
            yield address
        finally:
            process.stdin.close()


@contextmanager
def rights_on_prefix(address: str, bucket: str, prefix: str) -> Iterator[tuple[str, list[str]]]:
    """Run a guard in front of a server that allows objects below a prefix, and listings of it, and nothing else.

    It may be used as a proxy as well.

    This is what a policy grants with GetObject, PutObject and DeleteObject on `bucket/prefix/*`, and ListBucket under
    the condition that `s3:prefix` begins so. HeadBucket is refused. Yields the guard's address and what it refused.
    """
    refused: list[str] = []

    class Guard(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _answer(self) -> None:
            body = self._body()
            url = urlsplit(self.path)
            named, _, key = unquote(url.path).lstrip("/").partition("/")
            listed = parse_qs(url.query, keep_blank_values=True).get("prefix", [""])[0]
            deletes = self.command == "POST" and "delete" in parse_qs(url.query, keep_blank_values=True)
            allowed = deletes or (key if key else listed if self.command == "GET" else "").startswith(f"{prefix}/")
            if named == bucket and allowed:
                dropped = {"host", "transfer-encoding", "content-length", "expect"}
                headers = {name: value for name, value in self.headers.items() if name.lower() not in dropped}
                status, answered, content = _forward(address, self.command, f"{url.path}?{url.query}", body, headers)
            else:
                refused.append(f"{self.command} {self.path}")
                content = b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"
                status, answered = 403, {"Content-Type": "application/xml", "Content-Length": str(len(content))}
            self.send_response(status)
            for name, value in answered.items():
                if name.lower() not in {"transfer-encoding", "connection", "date", "server"}:
                    self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def _body(self) -> bytes:
            if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length", 0)))
            parts = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)

        do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = _answer

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Guard) as guard:
        threading.Thread(target=guard.serve_forever, daemon=True).start()
        try:
            yield f"127.0.0.1:{guard.server_port}", refused
        finally:
            guard.shutdown()


def _forward(
    address: str, method: str, path: str, body: bytes, headers: dict[str, str]
) -> tuple[int, dict[str, str], bytes]:
    connection = http.client.HTTPConnection(address, timeout=60)
    connection.request(method, path, body, headers)
    response = connection.getresponse()
    content = response.read()
    connection.close()
    answered = dict(response.getheaders())
    if method != "HEAD":
        answered["Content-Length"] = str(len(content))
    return response.status, answered, content


def s3_url(address: str, path: str) -> str:
    """Return the URL of `bucket/path` on a server."""
    return f"s3://{path}?endpoint_override={address}&scheme=http&region=us-east-1"
