"""Text made visible: nothing in it moves, hides or reorders what is around it."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable

_JOINERS = frozenset("\u200c\u200d")
"""Invisible characters that belong to the writing of words and emoji."""


def shown_text(text: str) -> str:
    """Return a text with signs for its control characters; lines still end, behind a sign."""
    return "".join("⏎\n" if character == "\n" else _sign(character) for character in text)


def shown_label(text: str) -> str:
    """Return the text of a token to stand alone: white space too is a sign, and a combining mark has a base."""
    label = "".join(_sign(character) for character in text).replace(" ", "␣")
    return f"◌{label}" if label and unicodedata.category(label[0]).startswith("M") else label


def label_of_bytes(data: bytes) -> str:
    """Return the label of a token's bytes; bytes that are no characters stand as hexadecimal numbers."""
    return shown_label(data.decode("utf-8", errors="backslashreplace"))


def shown_tokens(tokens: Iterable[bytes]) -> list[str]:
    """Return what each token shows of a text that all of them spell.

    A character that several tokens spell stands in the last of them, in the others their bytes in hexadecimal numbers.
    A token without bytes shows nothing.
    """
    shown, pending = [], b""
    for token in tokens:
        data = pending + token
        whole = _whole_characters(data)
        pending = data[whole:]
        text = shown_text(data[:whole].decode("utf-8", errors="backslashreplace"))
        shown.append(text or "".join(f"‹{byte:02X}›" for byte in token))
    return shown


def _whole_characters(data: bytes) -> int:
    """Return the number of bytes before a character that is not complete."""
    for back in range(1, min(4, len(data)) + 1):
        byte = data[-back]
        if byte & 0xC0 == 0x80:
            continue
        size = 2 if byte & 0xE0 == 0xC0 else 3 if byte & 0xF0 == 0xE0 else 4 if byte & 0xF8 == 0xF0 else 1
        return len(data) - back if size > back else len(data)
    return len(data)


def _sign(character: str) -> str:
    code = ord(character)
    if character == "\n":
        return "⏎"
    if character == "\t":
        return "⇥"
    if code < 0x20:
        return chr(0x2400 + code)
    if code == 0x7F:
        return "␡"
    if unicodedata.category(character) in {"Cc", "Cf", "Co", "Cs", "Cn", "Zl", "Zp"} and character not in _JOINERS:
        return f"[U+{code:04X}]"
    return character
