"""One bearer token for all services: `FUSION_TOKEN`, or what the file named by `FUSION_TOKEN_FILE` holds.

The file may hold several tokens, a line each: the first is sent, all are accepted. So a token is rotated without a
refused call: the new one is added below the old, then put above it, and then the old one goes.
"""

from __future__ import annotations

import hmac
import os
from collections.abc import Iterable
from pathlib import Path

from services.base.errors import UnauthenticatedError
from services.rpc.tracing import trace_metadata

Metadata = tuple[tuple[str, str], ...]


def accepted_tokens() -> tuple[str, ...] | None:
    """The tokens in force now, or None when the services are open. The file is read anew at every call."""
    if path := os.environ.get("FUSION_TOKEN_FILE"):
        try:
            return tuple(Path(path).read_text(encoding="utf-8").split())
        except OSError as error:
            raise UnauthenticatedError(f"FUSION_TOKEN_FILE: cannot read {path}: {error.strerror}") from error
    return (token,) if (token := os.environ.get("FUSION_TOKEN")) else None


def read_token() -> str | None:
    """The token to send, or None when the services are open; raises UnauthenticatedError for a file without one."""
    tokens = accepted_tokens()
    if tokens == ():
        raise UnauthenticatedError(f"FUSION_TOKEN_FILE: {os.environ['FUSION_TOKEN_FILE']} holds no token")
    return tokens[0] if tokens else None


def call_metadata(application: str, token: str | None = None) -> Metadata:
    """Metadata of a call: the Serve application that it is for, the bearer token and the trace where there is one."""
    token = token or read_token()
    authorization = (("authorization", f"Bearer {token}"),) if token else ()
    return (("application", application), *authorization, *trace_metadata())


def check_token(metadata: Iterable[tuple[str, str]]) -> None:
    """Raises UnauthenticatedError unless the call carries a token in force; compares in constant time."""
    accepted = accepted_tokens()
    if accepted is None:
        return
    given = next((value for key, value in metadata if key == "authorization"), "").encode()
    if not any(hmac.compare_digest(given, f"Bearer {token}".encode()) for token in accepted):
        raise UnauthenticatedError("authorization: a valid bearer token is required")
