"""The bytes of every id, read from a `tokenizer.json` description.

Covered: byte-level BPE (GPT-2's printable stand-ins for bytes), SentencePiece-style BPE and Unigram (U+2581 for a
space, `<0xNN>` for single bytes). Not covered, and refused: WordPiece, WordLevel, and BPE with word-end or
continuation marks, whose pieces do not say which bytes lie between two words.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

SPACE_MARKER = "\u2581"
_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _byte_level_alphabet() -> dict[int, str]:
    """GPT-2's map from a byte to a printable character (openai/gpt-2, `bytes_to_unicode`)."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    alphabet = {byte: chr(byte) for byte in printable}
    for number, byte in enumerate(byte for byte in range(256) if byte not in printable):
        alphabet[byte] = chr(256 + number)
    return alphabet


CHARACTER_OF_BYTE = _byte_level_alphabet()
BYTE_OF_CHARACTER = {character: byte for byte, character in CHARACTER_OF_BYTE.items()}


def components(node: Any) -> Iterator[dict[str, Any]]:
    """Every normalizer, pre-tokenizer or decoder under `node`, sequences flattened."""
    if not node:
        return
    for key in ("normalizers", "pretokenizers", "decoders"):
        if key in node:
            for child in node[key]:
                yield from components(child)
            return
    yield node


def is_byte_level(description: dict[str, Any]) -> bool:
    """Whether the model's pieces are written in GPT-2's stand-ins for bytes."""
    parts = (description.get(key) for key in ("normalizer", "pre_tokenizer", "decoder"))
    return any(part["type"] == "ByteLevel" for node in parts for part in components(node))


def check_supported(description: dict[str, Any]) -> None:
    """Raises ValueError for a tokenizer whose ids do not stand for bytes."""
    model = description["model"]
    kind = model.get("type") or ("Unigram" if "unk_id" in model else "BPE")
    if kind not in ("BPE", "Unigram"):
        raise ValueError(
            f"tokenizer: {kind} tokenizers are not supported, their tokens do not determine the bytes of the text; "
            "allowed are byte-level BPE, SentencePiece-style BPE and Unigram"
        )
    for mark in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(mark):
            raise ValueError(f"tokenizer: BPE with {mark} {model[mark]!r} is not supported, allowed is none")


def pieces_by_id(description: dict[str, Any]) -> dict[int, str]:
    """The model's own pieces, added tokens not included."""
    vocabulary = description["model"]["vocab"]
    if isinstance(vocabulary, dict):
        return {token_id: piece for piece, token_id in vocabulary.items()}
    return {token_id: piece for token_id, (piece, _) in enumerate(vocabulary)}


def unknown_id(description: dict[str, Any]) -> int | None:
    """The id that stands for "cannot be represented", which has no bytes of its own."""
    model = description["model"]
    if isinstance(model["vocab"], list):
        unk_id: int | None = model.get("unk_id")
        return unk_id
    unk_token = model.get("unk_token")
    return model["vocab"].get(unk_token) if unk_token is not None else None


def bytes_by_id(description: dict[str, Any], special_ids: frozenset[int]) -> list[bytes]:
    """The bytes of ids 0..V-1; special ids and holes in the numbering have none."""
    byte_level = is_byte_level(description)
    marked = any(
        SPACE_MARKER in str(part)
        for key in ("normalizer", "pre_tokenizer", "decoder")
        for part in components(description.get(key))
    )
    byte_fallback = bool(description["model"].get("byte_fallback")) or any(
        part["type"] == "ByteFallback" for part in components(description.get("decoder"))
    )

    def of_piece(piece: str) -> bytes:
        if byte_level:
            try:
                return bytes(BYTE_OF_CHARACTER[character] for character in piece)
            except KeyError:  # a piece outside the alphabet stands for itself, as in the ByteLevel decoder
                return piece.encode("utf-8", "ignore")
        if byte_fallback and (match := _BYTE_PIECE.fullmatch(piece)):
            return bytes([int(match[1], 16)])
        return (piece.replace(SPACE_MARKER, " ") if marked else piece).encode("utf-8", "ignore")

    table = {token_id: of_piece(piece) for token_id, piece in pieces_by_id(description).items()}
    table |= {added["id"]: added["content"].encode() for added in description.get("added_tokens", ())}
    size = max(table, default=-1) + 1
    return [b"" if token_id in special_ids else table.get(token_id, b"") for token_id in range(size)]
