"""Bytes on the bare port: no HTTP at all, HTTP/1, and HTTP/2 that goes wrong at some point."""

from __future__ import annotations

import random
import socket
import struct
from collections.abc import Iterable

from tests.fuzz.mutation import EDGES_32, junk, mutated

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_DATA, _HEADERS, _SETTINGS = 0, 1, 4
_PATIENCE_SECONDS = 120.0
_HEADER_BYTES = 400
"""More than the headers of a call take."""


def raw_case(rng: random.Random, address: str, token: str) -> str:
    """Sends what is wrong, ends its side and reads until the server ends the connection; says how it ended."""
    payload = rng.choice((_noise, _http1, _frames, _call, _cut_call))(rng, token)
    host, _, port = address.rpartition(":")
    with socket.create_connection((host, int(port)), timeout=_PATIENCE_SECONDS) as connection:
        answered = False
        try:
            connection.sendall(payload)
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(65_536):
                answered = True
        except TimeoutError:
            return "hangs"
        except OSError:
            return "connection reset"
    return "answered and closed" if answered else "closed"


def _noise(rng: random.Random, token: str) -> bytes:
    return rng.choice((b"", _PREFACE)) + junk(rng, 4000)


def _http1(rng: random.Random, token: str) -> bytes:
    return mutated(rng, b"POST /fusion.v1.FusionService/Fuse HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n")


def _frames(rng: random.Random, token: str) -> bytes:
    """Frames of any type, flags and stream, some of another length than they say."""
    frames = b"".join(
        _frame(rng.randrange(256) if rng.random() < 0.3 else rng.randrange(10), rng.randrange(256), _stream(rng),
               junk(rng), rng.choice((0, 0, 0, 1, -1, 10_000)))
        for _ in range(rng.randint(1, 20))
    )  # fmt: skip
    return _PREFACE + _frame(_SETTINGS, 0, 0, b"") + frames


def _call(rng: random.Random, token: str) -> bytes:
    """A good opening of a call, and then a body whose gRPC framing is wrong."""
    length = rng.choice((*EDGES_32, rng.randint(0, 100)))
    body = struct.pack(">BI", rng.choice((0, 1, 2, 255)), length) + junk(rng)
    frames = _frame(_HEADERS, 4, 1, _header_block(rng, token)) + _frame(_DATA, rng.choice((0, 1)), 1, body)
    return (
        _PREFACE
        + _frame(_SETTINGS, 0, 0, b"")
        + frames
        + b"".join(_frame(rng.randrange(10), rng.randrange(256), 1, junk(rng)) for _ in range(rng.randint(0, 3)))
    )


def _cut_call(rng: random.Random, token: str) -> bytes:
    """A call with mistakes anywhere.

    Its headers stay ASCII: grpcio's servers on an event loop (seen in 1.85) crash on a path that is not UTF-8. Serve's
    proxy is one, and takes seconds to come back; the gateway lets no such path through.
    """
    payload = mutated(rng, _call(rng, token))
    end = len(_PREFACE) + 18 + _HEADER_BYTES
    return payload[: len(_PREFACE)] + bytes(byte & 0x7F for byte in payload[len(_PREFACE) : end]) + payload[end:]


def opened_call(path: bytes) -> bytes:
    """An HTTP/2 connection with the headers of one call, and nothing behind them."""
    fields = [(b":method", b"POST"), (b":scheme", b"http"), (b":path", path), (b":authority", b"x")]
    fields += [(b"te", b"trailers"), (b"content-type", b"application/grpc")]
    return _PREFACE + _frame(_SETTINGS, 0, 0, b"") + _frame(_HEADERS, 5, 1, _literals(fields))


def _stream(rng: random.Random) -> int:
    return rng.choice((0, 1, 1, 1, 2, 3, 2**31 - 1))


def _frame(kind: int, flags: int, stream: int, payload: bytes, longer: int = 0) -> bytes:
    length = max(0, len(payload) + longer)
    return length.to_bytes(3, "big") + bytes((kind, flags)) + struct.pack(">I", stream) + payload


def _header_block(rng: random.Random, token: str) -> bytes:
    method = rng.choice(("FusionService/Fuse", "FusionService/StreamFused", "SourceService/Score", "Nothing/At"))
    fields = [
        (":method", "POST"),
        (":scheme", "http"),
        (":path", f"/fusion.v1.{method}"),
        (":authority", "x"),
        ("te", "trailers"),
        ("content-type", "application/grpc"),
        ("application", rng.choice(("fusion", "one", "nobody"))),
        ("authorization", f"Bearer {token}"),
        ("grpc-timeout", rng.choice(("5S", "1n", "99999999H", "x"))),
    ]
    return _literals((name.encode(), value.encode()) for name, value in fields)


def _literals(fields: Iterable[tuple[bytes, bytes]]) -> bytes:
    """Literal fields without indexing, no Huffman coding: RFC 7541, section 6.2.2."""
    return b"".join(b"\x00" + _string(name) + _string(value) for name, value in fields)


def _string(text: bytes) -> bytes:
    assert len(text) < 127
    return bytes((len(text),)) + text
