"""Scored windows on disk, so that an epoch, a second target or another strategy pays no source pass twice.

One file a window and source, named by what it depends on; a file appears complete or not at all.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path

from google.protobuf.message import DecodeError

from fusion.v1 import block_pb2, source_pb2
from fusion_core.blocks import Block
from services.common.errors import InvalidArgumentError
from services.common.passage import Passage
from services.common.wire import decode_block, encode_block


class BlockStore:
    """A folder of encoded blocks. Raises ValueError when the folder cannot be written."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            raise ValueError(f"service.store: cannot write to {folder}: {error.strerror}") from error

    @staticmethod
    def key(info: source_pb2.GetSourceInfoResponse, top_k: int, passage: Passage) -> str:
        """Content address: the passage, and all of a source that its answer depends on."""
        parts = (info.revision, info.vocabulary, info.bos_token, info.engine, info.dtype, str(top_k), "")
        digest = hashlib.sha256("\0".join(parts).encode())
        digest.update(passage.identity)
        return digest.hexdigest()

    def get(self, key: str) -> Block | None:
        """The block, or None when it is not there or unreadable (it is then scored again and replaced)."""
        try:
            return decode_block(block_pb2.TokenBlock.FromString(self._path(key).read_bytes()))
        except (OSError, DecodeError, InvalidArgumentError):
            return None

    def put(self, key: str, block: Block) -> None:
        """Writes atomically; raises OSError when the disk is full."""
        path = self._path(key)
        path.parent.mkdir(exist_ok=True)
        data = encode_block(block).SerializeToString()
        handle, temporary = tempfile.mkstemp(dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as stream:
                stream.write(data)
            Path(temporary).replace(path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise

    def _path(self, key: str) -> Path:
        return self._folder / key[:2] / key
