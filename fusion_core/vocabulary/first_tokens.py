"""The first tokens of a piece from the middle of a text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from fusion_core.arrays import Int32
from fusion_core.vocabulary import backend
from fusion_core.vocabulary.byte_table import ByteTable
from fusion_core.vocabulary.token_bytes import CHARACTER_OF_BYTE


class FirstTokens:
    """The first tokens of remainders. `middle` is the tokenizer of text that does not start a document."""

    def __init__(
        self, byte_table: ByteTable, description: dict[str, Any], text_backend: Tokenizer, byte_level: bool
    ) -> None:
        self._byte_table = byte_table
        middle = backend.middle_description(description)
        same = all(middle[key] == description.get(key) for key in ("normalizer", "pre_tokenizer"))
        self.middle = text_backend if same else backend.build(middle)
        self._raw = backend.build(backend.raw_description(description)) if byte_level else None

    def of(self, remainders: Sequence[bytes], count: int) -> Int32:
        """Return the first tokens of each remainder; see `Vocabulary.leading_tokens`."""
        valid = [_valid_part(remainder) for remainder in remainders]
        encoded = self.middle.encode_batch_fast(valid, add_special_tokens=False)
        leading_RN = np.full((len(remainders), count), -1, dtype=np.int32)
        for index, (remainder, characters, encoding) in enumerate(zip(remainders, valid, encoded, strict=True)):
            ids = encoding.ids
            # Bytes after the valid part can still join its last token, but no earlier one; and only byte-level
            # tokens join parts of characters.
            if self._raw is not None and len(characters.encode()) < len(remainder):
                ids = ids[:-1]
            at = 0
            for place in range(count):
                if at == len(remainder):
                    break
                token = ids[place] if place < len(ids) else self._of_bytes(remainder[at:])
                token_bytes = self._byte_table.token_bytes(token)
                # A tokenizer that rewrites the text may give a token with other bytes, which is no first token.
                if not token_bytes or not remainder.startswith(token_bytes, at):
                    break
                leading_RN[index, place] = token
                at += len(token_bytes)
        return leading_RN

    def _of_bytes(self, remainder: bytes) -> int:
        """Return the first token of bytes that are not UTF-8: by the merges, else the longest that starts them."""
        if self._raw is None:
            return self._byte_table.longest_prefix(remainder)
        mapped = "".join(CHARACTER_OF_BYTE[byte] for byte in remainder)
        ids = self._raw.encode(mapped, add_special_tokens=False).ids
        return ids[0] if ids else -1


def _valid_part(remainder: bytes) -> str:
    """Return the longest valid UTF-8 text at the start of the remainder."""
    try:
        return remainder.decode()
    except UnicodeDecodeError as error:
        return remainder[: error.start].decode()
