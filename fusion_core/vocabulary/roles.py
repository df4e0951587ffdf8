"""The control tokens of a tokenizer, and the ids with a role beside their part in ordinary text.

GPT-2 has no padding token, and many use a piece such as "!" for it. That piece is needed to write text: it keeps its
bytes, and the merges that name it stay.
"""

from __future__ import annotations

from typing import Any

from fusion_core.vocabulary.token_bytes import (
    BYTE_PIECE,
    has_byte_pieces,
    pieces_by_id,
    split_merge,
    unknown_id,
)

Roles = dict[str, int | None]
"""Ids by "bos", "eos" and "pad"; None where the tokenizer has no such token."""


def control_ids(description: dict[str, Any], roles: Roles, special_ids: frozenset[int]) -> frozenset[int]:
    """Return the ids that stand for no text: special tokens and the unknown token, but for pieces that text needs.

    Args:
        description: the parsed content of `tokenizer.json`.
        roles: ids of the roles.
        special_ids: ids that are special by the tokenizer's configuration.

    Raises:
        ValueError: EOS or the unknown token is a piece that text needs, so that its id would mean two things.
    """
    unk_id = unknown_id(description)
    special = special_ids | {int(added["id"]) for added in description.get("added_tokens", ()) if added["special"]}
    special |= {unk_id} if unk_id is not None else set()
    pieces = {token_id: piece for token_id, piece in pieces_by_id(description).items() if token_id in special}
    needed = _needed_by_text(description, pieces, roles)
    for role, token_id in (("eos_token", roles["eos"]), ("unk_token", unk_id)):
        if token_id in needed:
            raise ValueError(
                f"tokenizer: {role} {pieces[token_id]!r} is an ordinary piece of its model as well; "
                "allowed are tokens that stand for no text"
            )
    return special - needed


def _needed_by_text(description: dict[str, Any], pieces: dict[int, str], roles: Roles) -> frozenset[int]:
    """Return the special pieces without which the model would split some text otherwise, or not at all."""
    model, vocabulary = description["model"], description["model"]["vocab"]
    only_pads = roles["pad"] not in (roles["bos"], roles["eos"]) and roles["pad"] is not None
    if isinstance(vocabulary, list):  # Unigram: control pieces have score 0
        scored = {token_id for token_id in pieces if vocabulary[token_id][1] != 0.0}
        return frozenset(i for i in scored if len(pieces[i]) == 1 or (only_pads and i == roles["pad"]))
    if not pieces:
        return frozenset()
    names = set(pieces.values())
    parts, products = set(), set()
    for merge in model.get("merges", ()):
        left, right = split_merge(merge)
        if left in names or right in names:
            parts |= {left, right} & names
        if left + right in names:
            products.add(left + right)
    byte_pieces = has_byte_pieces(description)

    def needed(token_id: int, piece: str) -> bool:
        # A merge may make the name of a control token by chance; padding has no other use, so there it is a word.
        by_merges = piece in parts or (piece in products and only_pads and token_id == roles["pad"])
        of_alphabet = len(piece) == 1  # what merges start from
        return by_merges or of_alphabet or (byte_pieces and BYTE_PIECE.fullmatch(piece) is not None)

    return frozenset(token_id for token_id, piece in pieces.items() if needed(token_id, piece))
