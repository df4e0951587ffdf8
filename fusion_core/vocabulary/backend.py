"""The tokenizers that split a text, derived from a model's own `tokenizer.json` description.

Three variants of one description:
    text    as the model reads user text; control tokens cannot be written by the user
    middle  as `text`, but without the dummy prefix and the stripping at the start of a text
    raw     byte-level BPE on bytes that are not valid UTF-8: the merges alone, no pre-tokenizer
"""

from __future__ import annotations

import copy
import json
import secrets
from enum import Enum
from typing import Any

from tokenizers import Tokenizer

from fusion_core.vocabulary.token_bytes import components, pieces_by_id, split_merge

_NONCE = secrets.token_hex(16)


def _unwritable(token_id: int) -> str:
    """Return a name for a control token that no text contains: nobody can know the random part."""
    return f"\U0010ffff{_NONCE}:{token_id}\U0010fffe"


def text_description(description: dict[str, Any], control_ids: frozenset[int]) -> dict[str, Any]:
    """Return the description with control tokens renamed, and without everything that adds, cuts or randomises.

    Control tokens keep their ids. Renaming them makes "<eos>" in user text ordinary text: Unigram models and BPE with
    `ignore_merges` would otherwise find the control token's own name in the vocabulary. Special tokens that text
    needs (see `roles`) are ordinary pieces here.
    """
    pieces = pieces_by_id(description)
    added_tokens = [
        {**added, "content": _unwritable(added["id"]), "lstrip": False, "rstrip": False, "normalized": False}
        if added["id"] in control_ids
        else added
        for added in description.get("added_tokens", ())
        if added["id"] in control_ids or not added["special"] or added["id"] not in pieces
    ]
    changes = {"truncation": None, "padding": None, "post_processor": None}
    return {**description, **changes, "model": _text_model(description, control_ids), "added_tokens": added_tokens}


def _text_model(description: dict[str, Any], control_ids: frozenset[int]) -> dict[str, Any]:
    model = dict(description["model"])
    vocabulary = model["vocab"]
    if "dropout" in model:
        model["dropout"] = None
    if isinstance(vocabulary, list):
        model["vocab"] = [[_unwritable(i) if i in control_ids else p, s] for i, (p, s) in enumerate(vocabulary)]
        return model
    renamed = {piece: _unwritable(i) for piece, i in vocabulary.items() if i in control_ids}
    if not renamed:
        return model
    model["vocab"] = {renamed.get(piece, piece): i for piece, i in vocabulary.items()}
    # Merges that make a control token's name would write it from text.
    model["merges"] = [merge for merge in model["merges"] if "".join(split_merge(merge)) not in renamed]
    if model.get("unk_token") in renamed:
        model["unk_token"] = renamed[model["unk_token"]]
    return model


def _without_start_of_text(node: Any) -> Any:
    """Return a normalizer or pre-tokenizer without dummy prefix and stripping; None when that leaves nothing."""
    if not node:
        return None
    for key in ("normalizers", "pretokenizers"):
        if key in node:
            kept = [child for child in map(_without_start_of_text, node[key]) if child is not None]
            return {**node, key: kept} if kept else None
    if node["type"] in ("Prepend", "Strip"):
        return None
    if node["type"] == "Metaspace":
        return {**node, "prepend_scheme": "never"}
    if node["type"] == "ByteLevel" and "add_prefix_space" in node:
        return {**node, "add_prefix_space": False}
    return node


class DummyPrefix(Enum):
    """The rule by which a tokenizer puts a space in front of a text before it splits it."""

    NONE = "none"
    ALWAYS = "always"
    UNLESS_THERE = "unless there"  # only in front of a text that does not start with a space


def dummy_prefix(description: dict[str, Any]) -> DummyPrefix:
    """Return the rule that normalizer and pre-tokenizer follow."""
    parts = [p for key in ("normalizer", "pre_tokenizer") for p in components(description.get(key))]
    if any(part["type"] == "Prepend" for part in parts):
        return DummyPrefix.ALWAYS
    for part in parts:
        if part["type"] == "Metaspace" and part.get("prepend_scheme", "always") != "never":
            return DummyPrefix.UNLESS_THERE
        if part["type"] == "ByteLevel" and part.get("add_prefix_space"):
            return DummyPrefix.UNLESS_THERE
    return DummyPrefix.NONE


def middle_description(description: dict[str, Any]) -> dict[str, Any]:
    """Return the description for a piece of text that does not stand at the start of a text."""
    middle = copy.copy(description)
    for key in ("normalizer", "pre_tokenizer"):
        middle[key] = _without_start_of_text(description.get(key))
    return middle


def raw_description(description: dict[str, Any]) -> dict[str, Any]:
    """Return the description for input that is already written in the byte-level alphabet: merges only."""
    return {**description, "normalizer": None, "pre_tokenizer": None}


def build(description: dict[str, Any]) -> Tokenizer:
    """Return the tokenizer of a description; raises ValueError for one that does not fit together."""
    try:
        backend = Tokenizer.from_str(json.dumps(description, ensure_ascii=False))
    except Exception as error:  # the Rust library raises nothing more specific
        raise ValueError(f"tokenizer: its description cannot be used: {error}") from error
    backend.encode_special_tokens = True
    return backend
