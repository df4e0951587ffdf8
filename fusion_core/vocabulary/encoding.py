"""Token ids of a text with the byte at which each ends."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fusion_core.arrays import Bool, Int32


@dataclass(frozen=True, slots=True, eq=False)
class Encoding:
    """The tokens of one text.

    Attributes:
        token_ids_T: int32 ids; no special tokens are added.
        byte_ends_T: int32, end offset of every token in the text's UTF-8; the last one is the text's length. A dummy
            prefix (the space some tokenizers put in front) takes no bytes of the text.
        lossless_T: bool, whether the token's bytes are exactly the bytes that it covers.
        ends_document: whether the last token is the EOS behind the text, which covers no bytes.
    """

    token_ids_T: Int32
    byte_ends_T: Int32
    lossless_T: Bool
    ends_document: bool = False

    @property
    def num_tokens(self) -> int:
        return int(self.token_ids_T.shape[0])

    def with_end(self, eos_id: int) -> Encoding:
        """Return the encoding with EOS behind the text."""
        assert not self.ends_document, "a text ends once"
        num_bytes = self.byte_ends_T[-1] if self.num_tokens else 0
        return Encoding(
            np.append(self.token_ids_T, np.int32(eos_id)),
            np.append(self.byte_ends_T, np.int32(num_bytes)),
            np.append(self.lossless_T, True),
            ends_document=True,
        )

    def without_end(self) -> Encoding:
        """Return the encoding of the text alone; itself when there is no EOS behind it."""
        if not self.ends_document:
            return self
        return Encoding(self.token_ids_T[:-1], self.byte_ends_T[:-1], self.lossless_T[:-1])
