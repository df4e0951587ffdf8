"""Numbers that client and server of every call agree on."""

from __future__ import annotations

PROTOCOL_VERSION = 4
"""Version of protos/fusion/v1. It grows when a side that does not know of a change would go wrong."""
MAX_MESSAGE_BYTES = 64 * 1024 * 1024
"""Largest message that a client or a server takes, in bytes."""
FRAME_BYTES = 1024 * 1024
"""Size that frames on a stream are filled up to: Serve's proxy carries only some hundred frames a second."""
MAX_BLOCK_BYTES = MAX_MESSAGE_BYTES - 2 * FRAME_BYTES
"""Largest block, or blocks of a unary answer together: a frame may hold almost `FRAME_BYTES` before it."""
