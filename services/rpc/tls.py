"""TLS of a client, for addresses that ask for it: `grpcs://host:port`. Without that prefix a channel is plain.

Three files, read anew for every channel, so that certificates are renewed without a restart: `FUSION_TLS_CA`
(the authorities that may have signed the server's certificate; default gRPC's own), `FUSION_TLS_CERT` and
`FUSION_TLS_KEY` (the client's own, where the server wants one). `FUSION_TLS_SERVER_NAME` is the name that the server's
certificate has to carry where the address is another, as behind a forwarded port.
"""

from __future__ import annotations

import os
import ssl
from pathlib import Path

import grpc

SCHEME = "grpcs://"
ADDRESS_PATTERN = r"^(grpcs://)?[^\s/]+:\d+$"
"""Pattern of every setting that names a gRPC service by its address."""

_CA, _CERT, _KEY, _NAME = "FUSION_TLS_CA", "FUSION_TLS_CERT", "FUSION_TLS_KEY", "FUSION_TLS_SERVER_NAME"


def split_address(address: str) -> tuple[str, bool]:
    """Return host:port, and whether the address asks for TLS."""
    return address.removeprefix(SCHEME), address.startswith(SCHEME)


def channel_credentials() -> grpc.ChannelCredentials:
    """Return the credentials that the environment names; ValueError names the variable of an unusable file."""
    ca, cert, key = _read(_CA), _read(_CERT), _read(_KEY)
    if (cert is None) != (key is None):
        given, missing = (_CERT, _KEY) if key is None else (_KEY, _CERT)
        raise ValueError(f"{given}: goes with {missing}, which is not set")
    _check()
    return grpc.ssl_channel_credentials(root_certificates=ca, private_key=key, certificate_chain=cert)


def server_name_options() -> list[tuple[str, str]]:
    """Return the channel options for `FUSION_TLS_SERVER_NAME`."""
    name = os.environ.get(_NAME, "").strip()
    return [("grpc.ssl_target_name_override", name)] if name else []


def _read(variable: str) -> bytes | None:
    path = os.environ.get(variable)
    if not path:
        return None
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ValueError(f"{variable}: cannot read {path}: {error.strerror}") from error


def _check() -> None:
    """Read the files with OpenSSL, which says what is wrong with them: gRPC fails later, and without a reason."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    if ca := os.environ.get(_CA):
        try:
            context.load_verify_locations(ca)
        except ssl.SSLError as error:
            raise ValueError(f"{_CA}: {ca} holds no certificates in PEM: {error.reason}") from error
    if cert := os.environ.get(_CERT):
        key = os.environ[_KEY]
        try:
            context.load_cert_chain(cert, key, password=lambda: b"")  # never ask for a password at a terminal
        except ssl.SSLError as error:
            raise ValueError(f"{_CERT}, {_KEY}: {cert} and {key} are no pair in PEM: {error.reason}") from error
