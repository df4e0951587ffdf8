"""One bearer token for all services: `FUSION_TOKEN`, or the contents of the file in `FUSION_TOKEN_FILE`.

The file may hold several tokens, a line each: the first is sent, all are accepted. To rotate a token without a refused
call, add the new one below the old, then move it above, then remove the old one.

White space around a token, such as a line end, is no part of it. A token with anything but visible ASCII characters
cannot travel in a call's metadata: the error names its variable, and never shows the token.
"""

from __future__ import annotations

import hmac
import os
import re
from collections.abc import Iterable
from pathlib import Path

from services.base.errors import InvalidArgumentError, UnauthenticatedError
from services.rpc.tracing import trace_metadata

Metadata = tuple[tuple[str, str], ...]

_TOKEN = re.compile(r"[!-~]+")
_APPLICATION = re.compile(r"[ -~]+")


def accepted_tokens() -> tuple[str, ...] | None:
    """Return the tokens in force now, or None when the services are open. The file is read anew at every call.

    Raises UnauthenticatedError naming the variable whose file cannot be read or whose token is malformed.
    """
    if path := os.environ.get("FUSION_TOKEN_FILE"):
        where = f"FUSION_TOKEN_FILE: {path}"
        try:
            lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
        except OSError as error:
            raise UnauthenticatedError(f"FUSION_TOKEN_FILE: cannot read {path}: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise UnauthenticatedError(f"{where} is not text in UTF-8") from error
        numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
        return tuple(_checked(line, f"{where}, line {number}") for number, line in numbered)
    return (_checked(token, "FUSION_TOKEN"),) if (token := os.environ.get("FUSION_TOKEN")) else None


def read_token() -> str | None:
    """Return the token to send, or None when the services are open.

    Raises UnauthenticatedError as `accepted_tokens` does, and for a file without any token.
    """
    tokens = accepted_tokens()
    if tokens == ():
        raise UnauthenticatedError(f"FUSION_TOKEN_FILE: {os.environ['FUSION_TOKEN_FILE']} holds no token")
    return tokens[0] if tokens else None


def call_metadata(application: str, token: str | None = None) -> Metadata:
    """Return the metadata of a call: the Serve application that it is for, bearer token and trace where there are any.

    Args:
        application: its name; empty for a cluster that runs just one, such as those on Kubernetes.
        token: takes the place of the environment's.

    Raises InvalidArgumentError for an application that cannot be named in metadata.
    """
    if application and not _APPLICATION.fullmatch(application):
        raise InvalidArgumentError(f"application: a name is printable ASCII characters, got {application!r}")
    token = _checked(token, "token") if token else read_token()
    authorization = (("authorization", f"Bearer {token}"),) if token else ()
    named = (("application", application),) if application else ()
    return (*named, *authorization, *trace_metadata())


def check_token(metadata: Iterable[tuple[str, str | bytes]]) -> None:
    """Raise UnauthenticatedError unless the call carries a token in force; the comparison takes constant time."""
    accepted = accepted_tokens()
    if accepted is None:
        return
    given = next((value for key, value in metadata if key == "authorization"), "")
    given = given if isinstance(given, bytes) else given.encode("utf-8", "surrogatepass")
    if not any(hmac.compare_digest(given, f"Bearer {token}".encode()) for token in accepted):
        raise UnauthenticatedError("authorization: a valid bearer token is required")


def _checked(token: str, where: str) -> str:
    """Return the token without white space around it."""
    token = token.strip()
    if not _TOKEN.fullmatch(token):
        found = "is empty" if not token else "has other characters"
        raise UnauthenticatedError(f"{where}: a token is visible ASCII characters without spaces; this one {found}")
    return token
