"""The bytes of every id, read from a `tokenizer.json` description.

Covered: byte-level BPE (GPT-2's printable stand-ins for bytes), SentencePiece-style BPE and Unigram (U+2581 for a
space, `<0xNN>` for single bytes). WordPiece, WordLevel, and BPE with word-end or continuation
marks are refused: their pieces do not say which bytes lie between two words.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from tokenizers import Tokenizer

SPACE_MARKER = "\u2581"
_BETWEEN = "\U0010fffd"
"""A character that no piece holds: the last one for private use."""
BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _byte_level_alphabet() -> dict[int, str]:
    """Return GPT-2's map from a byte to a printable character (openai/gpt-2, `bytes_to_unicode`)."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    alphabet = {byte: chr(byte) for byte in printable}
    for number, byte in enumerate(byte for byte in range(256) if byte not in printable):
        alphabet[byte] = chr(256 + number)
    return alphabet


CHARACTER_OF_BYTE = _byte_level_alphabet()
BYTE_OF_CHARACTER = {character: byte for byte, character in CHARACTER_OF_BYTE.items()}


def components(node: Any) -> Iterator[dict[str, Any]]:
    """Yield every normalizer, pre-tokenizer or decoder under `node`, sequences flattened."""
    if not node:
        return
    for key in ("normalizers", "pretokenizers", "decoders"):
        if key in node:
            for child in node[key]:
                yield from components(child)
            return
    yield node


def is_byte_level(description: dict[str, Any]) -> bool:
    """Return whether the model's pieces are written in GPT-2's stand-ins for bytes."""
    parts = (description.get(key) for key in ("normalizer", "pre_tokenizer", "decoder"))
    return any(part["type"] == "ByteLevel" for node in parts for part in components(node))


def check_supported(description: dict[str, Any]) -> None:
    """Raise ValueError for a tokenizer whose ids do not stand for bytes."""
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
    """Return the model's own pieces, without added tokens."""
    vocabulary = description["model"]["vocab"]
    if isinstance(vocabulary, dict):
        return {token_id: piece for piece, token_id in vocabulary.items()}
    return {token_id: piece for token_id, (piece, _) in enumerate(vocabulary)}


def split_merge(merge: str | list[str]) -> tuple[str, str]:
    """Return the two parts of a merge, which `tokenizer.json` writes as "a b" or as ["a", "b"], by its version."""
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right


def unknown_id(description: dict[str, Any]) -> int | None:
    """Return the id that stands for "cannot be represented", which has no bytes of its own."""
    model = description["model"]
    if isinstance(model["vocab"], list):
        unk_id: int | None = model.get("unk_id")
        return unk_id
    unk_token = model.get("unk_token")
    return model["vocab"].get(unk_token) if unk_token is not None else None


def added_by_id(description: dict[str, Any]) -> dict[int, str]:
    """Return the added tokens that are no pieces of the model."""
    pieces = pieces_by_id(description)
    added = ((int(token["id"]), token["content"]) for token in description.get("added_tokens", ()))
    return {token_id: content for token_id, content in added if token_id not in pieces}


def bytes_by_id(description: dict[str, Any], special_ids: frozenset[int]) -> list[bytes]:
    """Return the bytes of ids 0..V-1 as the decoder writes them behind other tokens; special ids and holes have none.

    A piece of the model that is an added token as well is a piece: Gemma 3's runs of U+2581 are both, and its decoder
    writes spaces. An added token that is no piece stands for its own text where pieces are written in stand-ins for
    bytes, because it is found in a text before that is rewritten.

    Raises:
        ValueError: a decoder that writes something between tokens, or drops some.
    """
    pieces, added = pieces_by_id(description), added_by_id(description)
    if is_byte_level(description):
        table = {token_id: _from_alphabet(piece) for token_id, piece in pieces.items()}
        table |= {token_id: content.encode() for token_id, content in added.items()}
    else:
        everything = added | pieces
        decoded = _decoded(description, list(everything.values()))
        table = {token_id: text.encode() for token_id, text in zip(everything, decoded, strict=True)}
        if has_byte_pieces(description):
            table |= {
                token_id: bytes([int(match[1], 16)])
                for token_id, piece in pieces.items()
                if (match := BYTE_PIECE.fullmatch(piece))
            }
    size = max(table, default=-1) + 1
    return [b"" if token_id in special_ids else table.get(token_id, b"") for token_id in range(size)]


def has_byte_pieces(description: dict[str, Any]) -> bool:
    """Return whether `<0xNN>` stands for a byte."""
    by_decoder = any(part["type"] == "ByteFallback" for part in components(description.get("decoder")))
    return by_decoder or bool(description["model"].get("byte_fallback"))


def _from_alphabet(piece: str) -> bytes:
    try:
        return bytes(BYTE_OF_CHARACTER[character] for character in piece)
    except KeyError:  # a piece outside the alphabet stands for itself, as in the ByteLevel decoder
        return piece.encode()


def _decoded(description: dict[str, Any], pieces: list[str]) -> list[str]:
    """Return each piece as the decoder writes it in the middle of a text."""
    if not description.get("decoder"):
        parts = (part for key in ("normalizer", "pre_tokenizer") for part in components(description.get(key)))
        marked = any(SPACE_MARKER in str(part) for part in parts)
        return [piece.replace(SPACE_MARKER, " ") for piece in pieces] if marked else pieces
    bare = {"version": "1.0", "model": {"type": "BPE", "vocab": {}, "merges": []}, "decoder": description["decoder"]}
    decoder = Tokenizer.from_str(json.dumps(bare)).decoder
    # One call for all: a private character stands between each two, and in front, where decoders strip a space.
    between = [_BETWEEN] * (2 * len(pieces) + 1)
    between[1::2] = pieces
    decoded: list[str] = decoder.decode(between).split(_BETWEEN)[1:-1]
    if len(decoded) != len(pieces) or decoder.decode([_BETWEEN, _BETWEEN]) != 2 * _BETWEEN:
        kinds = ", ".join(part["type"] for part in components(description["decoder"]))
        raise ValueError(
            f"tokenizer: its decoder ({kinds}) writes something between tokens or drops some, so that tokens do not "
            "determine the bytes of the text; allowed are decoders that write token by token"
        )
    return decoded
