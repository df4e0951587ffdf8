"""The byte at which every token of a text ends.

Shape legend: T tokens of one text, V ids, B bytes of all ids together, N bytes of the text, C characters of the text.
"""

from __future__ import annotations

from fusion_core.arrays import Bool, Int32, Int64, UInt8
from fusion_core.compiled import compiled


@compiled
def ends_when_lossless(
    bytes_B: UInt8, offsets_V1: Int64, token_ids_T: Int32, text_N: UInt8, num_virtual: int, ends_T: Int32
) -> bool:
    """Fill `ends_T`, and return whether the tokens' bytes are exactly `num_virtual` spaces and then the text."""
    position = -num_virtual
    for t in range(token_ids_T.shape[0]):
        token = token_ids_T[t]
        if offsets_V1[token] == offsets_V1[token + 1]:
            return False
        for at in range(offsets_V1[token], offsets_V1[token + 1]):
            expected = 32 if position < 0 else (text_N[position] if position < text_N.shape[0] else -1)
            if bytes_B[at] != expected:
                return False
            position += 1
        ends_T[t] = max(position, 0)
    return bool(position == text_N.shape[0])


@compiled
def ends_with_losses(
    bytes_B: UInt8,
    offsets_V1: Int64,
    token_ids_T: Int32,
    spans_T2: Int64,
    byte_of_character_C1: Int64,
    text_N: UInt8,
    num_virtual: int,
    ends_T: Int32,
    lossless_T: Bool,
) -> None:
    """Fill `ends_T` and `lossless_T` for a text that the tokenizer changed, from the character spans that it reports.

    A token is lossless when its bytes follow in the text exactly at the end of the previous token. Any other token
    takes the text up to the end of its span, so that dropped and rewritten text belongs to a token marked lossy.
    """
    num_tokens, num_bytes = token_ids_T.shape[0], text_N.shape[0]
    position = 0
    for t in range(num_tokens):
        token = token_ids_T[t]
        skip = num_virtual if t == 0 else 0
        start, length = offsets_V1[token] + skip, offsets_V1[token + 1] - offsets_V1[token] - skip
        span_start, span_end = byte_of_character_C1[spans_T2[t, 0]], byte_of_character_C1[spans_T2[t, 1]]
        end = position + length
        same = length > 0 and end <= span_end and (position >= span_start or end == span_end)
        if same:
            for at in range(length):
                if bytes_B[start + at] != text_N[position + at]:
                    same = False
                    break
        only_prefix = skip > 0 and length == 0
        lossless_T[t] = same or only_prefix
        position = end if same or only_prefix else max(position, span_end)
        ends_T[t] = position
    if num_tokens > 0 and position < num_bytes:
        ends_T[num_tokens - 1] = num_bytes
        lossless_T[num_tokens - 1] = False
