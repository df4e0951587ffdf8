"""InternLM2's SentencePiece model as a `tokenizer.json`, with the tokens that the chat models put in place of pieces.

The original tokenizer is Python code around a SentencePiece BPE model. The same splitting in a `tokenizer.json`: every
way to put a piece together from two others is a merge, in the order of the pieces' scores. Pieces that SentencePiece
takes before all merges (user-defined ones) are added tokens that are read on normalised text. Added tokens of
tokenizer_config.json stand at the ids that it gives them: `<|im_start|>` has the id of an unused piece.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

from fusion_core.vocabulary.token_bytes import SPACE_MARKER
from services.models.internlm2.config import read_json
from services.models.weights import CHAT_TEMPLATES

MODEL, CONFIG, TEMPLATE = "tokenizer.model", "tokenizer_config.json", "chat_template.jinja"
_ROLES = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
"""The names that the published tokenizer has where the folder names none."""
_NORMAL, _USER_DEFINED, _UNUSED, _BYTE = 1, 4, 5, 6  # types of pieces
_BPE = 2
_FLAGS = ("lstrip", "rstrip", "single_word", "normalized", "special")


@dataclass(frozen=True, slots=True)
class BuiltTokenizer:
    """A tokenizer as transformers reads it: the three files' contents.

    Attributes:
        backend: the content of tokenizer.json.
        config: of tokenizer_config.json.
        templates: chat templates by name, the one for all conversations as `default`.
    """

    backend: Tokenizer
    config: dict[str, Any]
    templates: dict[str, str]

    @property
    def size(self) -> int:
        """The number of ids up to the highest."""
        return max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

    def save(self, folder: Path) -> None:
        """Write the files to a folder."""
        self.backend.save(str(folder / "tokenizer.json"))
        (folder / CONFIG).write_text(json.dumps(self.config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        for name, template in self.templates.items():
            path = folder / (TEMPLATE if name == "default" else f"{CHAT_TEMPLATES}/{name}.jinja")
            path.parent.mkdir(exist_ok=True)
            path.write_text(template, encoding="utf-8")


def build_tokenizer(folder: Path) -> BuiltTokenizer:
    """Return the tokenizer of an InternLM2 folder; raises ValueError for what a tokenizer.json cannot express."""
    proto, config = _read_proto(folder / MODEL), read_json(folder / CONFIG)
    roles = {role: _content(config.get(role)) or name for role, name in _ROLES.items()}
    added = _added_tokens(folder, config, proto, roles)
    pieces = {token_id: piece.piece for token_id, piece in enumerate(proto.pieces)}
    pieces |= {token_id: str(token.content) for token_id, token in added.items()}
    ids = {piece: token_id for token_id, piece in pieces.items()}
    if len(ids) < len(pieces):
        twice = next(piece for token_id, piece in pieces.items() if ids[piece] != token_id)
        raise ValueError(f"{folder / CONFIG}: {twice!r} is an added token, and a piece of {MODEL} with another id")
    backend = Tokenizer(
        models.BPE(
            vocab=ids,
            merges=list(_merges(folder, proto, frozenset(added))),
            unk_token=roles["unk_token"],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    prefixed = proto.normalizer_spec.add_dummy_prefix
    spaces = normalizers.Replace(" ", SPACE_MARKER)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE_MARKER), spaces]) if prefixed else spaces
    steps: list[Any] = [decoders.Replace(SPACE_MARKER, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefixed else steps)
    backend.add_tokens(_user_defined(folder, proto, frozenset(added)))
    backend.add_tokens([token for _, token in sorted(added.items())])
    ends = {key: config.get(key, key == "add_bos_token") for key in ("add_bos_token", "add_eos_token")}
    backend.post_processor = _around(roles, ids, **ends)
    kept = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **roles,
        **ends,
        "clean_up_tokenization_spaces": False,
        "model_max_length": config.get("model_max_length"),
        "padding_side": config.get("padding_side"),
    }
    written = {key: value for key, value in kept.items() if value is not None}
    return BuiltTokenizer(backend, written, _templates(folder, config))


def _read_proto(path: Path) -> Any:
    """Return the SentencePiece model; raises ValueError unless it is a BPE model that changes nothing but spaces."""
    from google.protobuf.message import DecodeError
    from transformers.convert_slow_tokenizer import import_protobuf

    proto = import_protobuf().ModelProto()  # type: ignore[no-untyped-call]
    try:
        proto.ParseFromString(path.read_bytes())
    except (OSError, DecodeError) as error:
        raise ValueError(f"{path}: is no SentencePiece model: {error}") from error
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    for key, found, allowed in (
        ("model_type", trainer.model_type, _BPE),
        ("byte_fallback", trainer.byte_fallback, True),
        ("treat_whitespace_as_suffix", trainer.treat_whitespace_as_suffix, False),
        ("precompiled_charsmap", normalizer.precompiled_charsmap != b"", False),
        ("remove_extra_whitespaces", normalizer.remove_extra_whitespaces, False),
        ("escape_whitespaces", normalizer.escape_whitespaces, True),
    ):
        if found != allowed:
            raise ValueError(f"{path}: {key} is {found}, in InternLM2's tokenizer it is {allowed}")
    return proto


def _content(token: Any) -> str | None:
    """Return the name of a special token, which is a string or an object."""
    name: str | None = token["content"] if isinstance(token, dict) else token
    return name


def _added_tokens(folder: Path, config: dict[str, Any], proto: Any, roles: dict[str, str]) -> dict[int, AddedToken]:
    """Return the added tokens by id: those that the folder states, and the roles at the ids of their pieces."""
    where = folder / CONFIG
    piece_ids = {piece.piece: token_id for token_id, piece in enumerate(proto.pieces)}
    stated: dict[int, dict[str, Any]] = {
        int(key): value for key, value in config.get("added_tokens_decoder", {}).items()
    }
    older = folder / "added_tokens.json"
    for content, token_id in (read_json(older) if older.is_file() else {}).items():
        stated.setdefault(int(token_id), {"content": content, "special": True})
    names = {value["content"] for value in stated.values()}
    special = [*roles.values(), *filter(None, map(_content, config.get("additional_special_tokens") or []))]
    for name in special:
        if name not in names:
            if name not in piece_ids:
                raise ValueError(f"{where}: special token {name!r} has no id, and is no piece of {MODEL}")
            stated.setdefault(piece_ids[name], {"content": name, "special": True})
    return {
        token_id: AddedToken(value["content"], **{flag: bool(value.get(flag, False)) for flag in _FLAGS})
        for token_id, value in stated.items()
    }


def _user_defined(folder: Path, proto: Any, replaced: frozenset[int]) -> list[AddedToken]:
    """Return the pieces that SentencePiece takes before any merge, longest first where several fit."""
    pieces = [
        piece.piece
        for token_id, piece in enumerate(proto.pieces)
        if piece.type == _USER_DEFINED and token_id not in replaced
    ]
    if pieces and proto.normalizer_spec.add_dummy_prefix:
        raise ValueError(
            f"{folder / MODEL}: user-defined pieces ({pieces[0]!r}) together with add_dummy_prefix are not supported"
        )
    return [AddedToken(piece, normalized=True, special=False) for piece in pieces]


def _merges(folder: Path, proto: Any, replaced: frozenset[int]) -> Iterator[tuple[str, str]]:
    """Yield the merges, those that make the piece of the highest score first.

    SentencePiece takes the highest score, and the leftmost pair where scores are equal. Here the pairs of one piece
    have an order as well, which decides only where two pairs that overlap make the same piece.
    """
    kept = [(token_id, piece) for token_id, piece in enumerate(proto.pieces) if token_id not in replaced]
    parts = {piece.piece for _, piece in kept if piece.type in (_NORMAL, _UNUSED)}
    for _, piece in sorted(kept, key=lambda item: (-item[1].score, item[0])):
        if piece.type not in (_NORMAL, _UNUSED):
            continue
        text = piece.piece
        pairs = [(text[:at], text[at:]) for at in range(1, len(text)) if text[:at] in parts and text[at:] in parts]
        if pairs and piece.type == _UNUSED:
            raise ValueError(f"{folder / MODEL}: the unused piece {text!r} can be put together, which is not supported")
        yield from pairs


def _around(roles: dict[str, str], ids: dict[str, int], *, add_bos_token: bool, add_eos_token: bool) -> Any:
    """Return the step that puts BOS in front of a text and EOS behind it, where asked for."""

    def one(sequence: str, kind: int) -> Sequence[str]:
        front = [f"{roles['bos_token']}:{kind}"] if add_bos_token else []
        back = [f"{roles['eos_token']}:{kind}"] if add_eos_token else []
        return [*front, f"${sequence}:{kind}", *back]

    named = [roles["bos_token"]] * add_bos_token + [roles["eos_token"]] * add_eos_token
    return processors.TemplateProcessing(
        single=one("A", 0), pair=[*one("A", 0), *one("B", 1)], special_tokens=[(name, ids[name]) for name in set(named)]
    )


def _templates(folder: Path, config: dict[str, Any]) -> dict[str, str]:
    """Return the chat templates of the folder by name; none for many base models."""
    stated = config.get("chat_template")
    templates = {"default": stated} if isinstance(stated, str) else {t["name"]: t["template"] for t in stated or ()}
    if (file := folder / TEMPLATE).is_file():
        templates["default"] = file.read_text(encoding="utf-8")
    return templates
