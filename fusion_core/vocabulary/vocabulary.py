"""A tokenizer seen as a table from ids to bytes, and the splitting of a text into such ids.

Shape legend: V ids, B bytes of all ids together, T tokens of one text.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from fusion_core.arrays import Int32
from fusion_core.vocabulary import backend
from fusion_core.vocabulary.byte_ends import ends_when_lossless, ends_with_losses
from fusion_core.vocabulary.byte_table import ByteTable
from fusion_core.vocabulary.encoding import Encoding
from fusion_core.vocabulary.fingerprint import vocabulary_fingerprint
from fusion_core.vocabulary.first_tokens import FirstTokens
from fusion_core.vocabulary.roles import Roles, control_ids
from fusion_core.vocabulary.token_bytes import SPACE_MARKER, bytes_by_id, check_supported, is_byte_level
from fusion_core.vocabulary.tokenizer_files import load_tokenizer


class Vocabulary:
    """The bytes and roles of a tokenizer's ids, and its splitting of text.

    Attributes:
        size: ids are 0..size-1, added tokens included.
        byte_table: the bytes of every id, and the ids in order of their bytes; control tokens have no bytes.
        bos_id, eos_id, pad_id: the roles, None where the tokenizer has no such token.
        special_ids: all ids that are control tokens, the unknown token included.
        special_tokens: ids of the control tokens by their names, such as "<bos>".
        has_dummy_prefix: whether a space is put in front of a text before it is split.
        warnings: what a user should know about the folder that the tokenizer was loaded from, one line each.
        fingerprint: 16 hexadecimal digits that differ when ids, their bytes, the way of splitting or the roles do.
    """

    def __init__(self, description: dict[str, Any], roles: Roles, special_ids: frozenset[int]) -> None:
        """Take the parsed content of `tokenizer.json` and the roles; see `from_pretrained` and `from_tokenizer`."""
        check_supported(description)
        self.special_ids = control_ids(description, roles, special_ids)
        self.warnings: tuple[str, ...] = ()
        self.bos_id, self.eos_id, self.pad_id = roles["bos"], roles["eos"], roles["pad"]
        self.special_tokens = {
            added["content"]: int(added["id"])
            for added in description.get("added_tokens", ())
            if added["id"] in self.special_ids
        }
        token_bytes = bytes_by_id(description, self.special_ids)
        self.byte_table = ByteTable(token_bytes)
        self.size = self.byte_table.size
        self._dummy_prefix = backend.dummy_prefix(description)
        self.has_dummy_prefix = self._dummy_prefix is not backend.DummyPrefix.NONE
        self.fingerprint = vocabulary_fingerprint(description, token_bytes, roles, self.special_ids)
        described = backend.text_description(description, self.special_ids)
        self._backend: Tokenizer = backend.build(described)
        self._first_tokens = FirstTokens(
            self.byte_table, described, self._backend, byte_level=is_byte_level(description)
        )
        self._check_spaces(token_bytes)

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, eos_token: str | None = None) -> Vocabulary:
        """Load the fast tokenizer of a model folder (or hub name), which splits as its `tokenizer.json` says.

        Args:
            folder: where the tokenizer is.
            eos_token: name of the control token that ends a document; the tokenizer's own EOS when not set.

        Raises:
            ValueError: the folder has no fast tokenizer, or one whose tokens do not stand for bytes (WordPiece), or one
                that is Python code, or no such control token.
        """
        tokenizer, warnings = load_tokenizer(folder)
        vocabulary = cls.from_tokenizer(tokenizer, eos_token=eos_token)
        vocabulary.warnings = warnings
        return vocabulary

    @classmethod
    def from_tokenizer(
        cls, tokenizer: Any, *, eos_token: str | None = None, control_ids: Collection[int] = ()
    ) -> Vocabulary:
        """Read a `PreTrainedTokenizerFast` (in transformers 5: any tokenizer with a `backend_tokenizer`).

        `control_ids` are added tokens that stand for no text although the tokenizer does not mark them as special.

        Raises:
            ValueError: a slow tokenizer, or one whose tokens do not stand for bytes (WordPiece), or an `eos_token` that
                is no control token.
        """
        backend_tokenizer = getattr(tokenizer, "backend_tokenizer", None)
        if not isinstance(backend_tokenizer, Tokenizer):
            raise ValueError(
                f"tokenizer: {type(tokenizer).__name__} is a slow tokenizer, which is not supported; "
                "allowed are fast tokenizers (a folder with tokenizer.json)"
            )
        roles = {"bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id, "pad": tokenizer.pad_token_id}
        special_ids = frozenset([*tokenizer.all_special_ids, *control_ids])
        description = json.loads(backend_tokenizer.to_str())
        if eos_token is not None:
            control = {
                added["content"]: int(added["id"])
                for added in description["added_tokens"]
                if added["special"] or added["id"] in control_ids
            }
            if eos_token not in control:
                known = ", ".join(control) or "none"
                raise ValueError(f"eos_token: {eos_token!r} is no special token of the tokenizer; it has {known}")
            roles["eos"] = control[eos_token]
        return cls(description, roles, special_ids)

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes of one id; none for control tokens, holes and ids beyond the table (padded heads)."""
        return self.byte_table.token_bytes(token_id)

    def encode(self, text: bytes) -> Encoding:
        """Return the tokens of one text; see `encode_batch`."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[bytes], *, continues: bool = False) -> list[Encoding]:
        """Return the tokens of every text as the model reads it: none added, names of control tokens read as text.

        A text of which the tokenizer keeps nothing has no tokens. Texts that continue others get no dummy prefix.

        Raises:
            ValueError: a text is not UTF-8; names the text's index and the offset of the first bad byte.
        """
        decoded = [_decode(text, index) for index, text in enumerate(texts)]
        tokenizer = self._first_tokens.middle if continues else self._backend
        encodings = [
            self._lossless(text, e.ids, prefixed=self.has_dummy_prefix and not continues)
            for text, e in zip(texts, tokenizer.encode_batch_fast(decoded, add_special_tokens=False), strict=True)
        ]
        return [
            encoding if encoding is not None else self._with_losses(text, characters, continues)
            for encoding, text, characters in zip(encodings, texts, decoded, strict=True)
        ]

    def first_tokens(self, remainders: Sequence[bytes]) -> Int32:
        """Return the first token id of each remainder, split as in the middle of a text (no dummy prefix).

        Returns:
            int32 ids, -1 where the tokenizer has no token whose bytes start the remainder. Remainders need not be
            valid UTF-8: then the valid part decides where it can, else merges on bytes or the longest match.
        """
        return self.leading_tokens(remainders, 1)[:, 0]

    def leading_tokens(self, remainders: Sequence[bytes], count: int) -> Int32:
        """Return int32 [R, count]: the first tokens of each remainder as in `first_tokens`, -1 behind the last one."""
        return self._first_tokens.of(remainders, count)

    def num_virtual_bytes(self, token_ids_T: Int32, byte_ends_T: Int32) -> int:
        """Return 1 when the first token of a text holds a dummy prefix that is not in the text, else 0."""
        if not self.has_dummy_prefix or token_ids_T.shape[0] == 0:
            return 0
        first = self.token_bytes(int(token_ids_T[0]))
        return int(first.startswith(b" ") and len(first) == int(byte_ends_T[0]) + 1)

    def spells(self, text: bytes, token_ids_T: Int32, byte_ends_T: Int32) -> bool:
        """Return whether the tokens' bytes are the text, after at most a dummy prefix, and end at these offsets.

        All ids must be below `size`.
        """
        text_N, ends_T = np.frombuffer(text, dtype=np.uint8), np.empty_like(token_ids_T)
        table = self.byte_table
        return any(
            ends_when_lossless(table.bytes_B, table.offsets_V1, token_ids_T, text_N, num_virtual, ends_T)
            and np.array_equal(ends_T, byte_ends_T)
            for num_virtual in ((0, 1) if self.has_dummy_prefix else (0,))
        )

    def _check_spaces(self, token_bytes: Sequence[bytes]) -> None:
        """Raise ValueError when no token holds the space between two words, as with a pre-tokenizer for whole words."""
        word = next((token for token in token_bytes if token.isalpha() and token.islower()), None)
        if word is None:
            return
        text = word + b" " + word
        tokens = b"".join(token_bytes[token_id] for token_id in self.encode(text).token_ids_T)
        if b" " not in tokens.strip():
            raise ValueError(
                f"tokenizer: it drops the space of {text.decode()!r}, so that its tokens do not determine the bytes of "
                "a text; allowed are tokenizers whose tokens hold the spaces"
            )

    def _lossless(self, text: bytes, ids: list[int], prefixed: bool) -> Encoding | None:
        """Return the encoding when the tokens' bytes are exactly the text, after at most a dummy prefix; else None."""
        token_ids_T = np.array(ids, dtype=np.int32)
        text_N = np.frombuffer(text, dtype=np.uint8)
        ends_T = np.empty_like(token_ids_T)
        table = self.byte_table
        for num_virtual in (0, 1) if prefixed and ids else (0,):
            if ends_when_lossless(table.bytes_B, table.offsets_V1, token_ids_T, text_N, num_virtual, ends_T):
                return Encoding(token_ids_T, ends_T, np.ones(len(ids), dtype=np.bool_))
        return None

    def _with_losses(self, text: bytes, characters: str, continues: bool) -> Encoding:
        """Return the encoding of a text that the tokenizer changes, from the spans that it reports."""
        tokenizer = self._first_tokens.middle if continues else self._backend
        encoding = tokenizer.encode(characters, add_special_tokens=False)
        token_ids_T = np.array(encoding.ids, dtype=np.int32)
        spans_T2 = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)
        text_N = np.frombuffer(text, dtype=np.uint8)
        starts_C = np.flatnonzero((text_N & 0xC0) != 0x80)
        byte_of_character_C1 = np.append(starts_C, len(text)).astype(np.int64)
        prefixed = self._dummy_prefix is backend.DummyPrefix.ALWAYS or (
            self.has_dummy_prefix and not characters.startswith((" ", SPACE_MARKER))
        )
        prefixed &= not continues
        num_virtual = int(prefixed and len(token_ids_T) > 0 and self.token_bytes(int(token_ids_T[0])).startswith(b" "))
        ends_T, lossless_T = np.empty_like(token_ids_T), np.empty(len(token_ids_T), dtype=np.bool_)
        ends_with_losses(
            self.byte_table.bytes_B,
            self.byte_table.offsets_V1,
            token_ids_T,
            spans_T2,
            byte_of_character_C1,
            text_N,
            num_virtual,
            ends_T,
            lossless_T,
        )
        return Encoding(token_ids_T, ends_T, lossless_T)


def _decode(text: bytes, index: int) -> str:
    try:
        return text.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"text {index}: not UTF-8 at byte {error.start} ({error.reason})") from None
