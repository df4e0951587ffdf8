"""One bearer token for all services: `FUSION_TOKEN`, or the content of the file named by `FUSION_TOKEN_FILE`."""

from __future__ import annotations

import hmac
import os
from collections.abc import Iterable
from pathlib import Path

from services.common.errors import UnauthenticatedError

Metadata = tuple[tuple[str, str], ...]


def read_token() -> str | None:
    """The token in force now, or None when the services are open. The file is read anew, so that it can be rotated."""
    if path := os.environ.get("FUSION_TOKEN_FILE"):
        try:
            return Path(path).read_text(encoding="utf-8").strip()
        except OSError as error:
            raise UnauthenticatedError(f"FUSION_TOKEN_FILE: cannot read {path}: {error.strerror}") from error
    return os.environ.get("FUSION_TOKEN") or None


def call_metadata(application: str, token: str | None = None) -> Metadata:
    """Metadata of a call: the Serve application that it is for, and the bearer token where there is one."""
    token = token or read_token()
    authorization = (("authorization", f"Bearer {token}"),) if token else ()
    return (("application", application), *authorization)


def check_token(metadata: Iterable[tuple[str, str]]) -> None:
    """Raises UnauthenticatedError unless the call carries the token in force; compares in constant time."""
    expected = read_token()
    if expected is None:
        return
    given = next((value for key, value in metadata if key == "authorization"), "")
    if not hmac.compare_digest(given.encode(), f"Bearer {expected}".encode()):
        raise UnauthenticatedError("authorization: a valid bearer token is required")
