"""Numbers that both sides of every call agree on."""

from __future__ import annotations

from typing import TypeVar

import numpy as np

Scalar = TypeVar("Scalar", bound=np.generic)


PROTOCOL_VERSION = 2
"""Of protos/fusion/v1. It grows when a side that does not know of a change would do wrong."""


MAX_MESSAGE_BYTES = 64 * 1024 * 1024


FRAME_BYTES = 1024 * 1024
"""Frames on a stream are filled up to this size: Serve's proxy carries only some hundred frames a second."""
