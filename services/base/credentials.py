"""URLs that carry credentials: known, refused in settings, and cut out of messages."""

from __future__ import annotations

import re
from urllib.parse import parse_qsl, urlsplit

_SECRET_KEY = re.compile(r"key|secret|token|passw|credential|sas|signature", re.IGNORECASE)
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^\s'\"]+")
_CREDENTIAL_VARIABLES = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or a role of the machine or pod)",
    "s3a": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or a role of the machine or pod)",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS",
    "gcs": "GOOGLE_APPLICATION_CREDENTIALS",
    "abfs": "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY",
    "abfss": "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY",
    "az": "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY",
}


def carries_credentials(location: str) -> bool:
    """Return whether a URL holds a user name, a password, or a query parameter that is a secret by its name."""
    if "://" not in location:
        return False
    parts = urlsplit(location)
    # Azure's own form is container@account: a user name without a password.
    user = "@" in parts.netloc and (parts.scheme not in {"abfs", "abfss"} or ":" in parts.netloc.rpartition("@")[0])
    return user or any(_SECRET_KEY.search(name) for name, _ in parse_qsl(parts.query, keep_blank_values=True))


def refuse_credentials(location: str, setting: str) -> None:
    """Raise ValueError, without the secret, when a URL carries credentials: files and logs would keep them."""
    if carries_credentials(location):
        scheme = urlsplit(location).scheme
        where = _CREDENTIAL_VARIABLES.get(scheme, "the environment variables of its client")
        raise ValueError(f"{setting}: a {scheme}:// URL with credentials in it is not allowed; give them as {where}")


def without_credentials(text: str) -> str:
    """Return a text for messages and logs in which every URL that carries credentials is cut after its scheme."""
    return _URL.sub(lambda url: f"{url[0].partition('://')[0]}://***" if carries_credentials(url[0]) else url[0], text)
