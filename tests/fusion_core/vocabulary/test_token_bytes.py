"""Bytes of ids and control tokens of tokenizers made for the purpose, against the library's decoder and encoder."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from fusion_core.vocabulary import Vocabulary
from tests.fakes.tokenizers import FAMILIES, description, train, vocabulary

LETTERS = [chr(code) for code in range(ord("a"), ord("z") + 1)]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def wrap(tokenizer: Tokenizer, **roles: str) -> Vocabulary:
    described: dict[str, Any] = json.loads(tokenizer.to_str())
    ids = {role: tokenizer.token_to_id(roles[role]) if role in roles else None for role in ("bos", "eos", "pad")}
    return Vocabulary(described, ids, frozenset(i for i in ids.values() if i is not None))


def sentencepiece(decoder: decoders.Decoder | None, *pieces: str, **settings: Any) -> Tokenizer:
    """BPE over single letters, the space marker and bytes, with more pieces that no merge makes."""
    everything = ["<unk>", *BYTES, "\u2581", "\u2581\u2581", "\u2581a", *LETTERS, "\n", *pieces]
    merges = [("\u2581", "\u2581"), ("\u2581", "a")]
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys(everything))}
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True, **settings))
    tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
    if decoder is not None:
        tokenizer.decoder = decoder
    return tokenizer


def llama_decoder(*more: decoders.Decoder) -> decoders.Decoder:
    return decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), *more])


DECODERS = {
    "gemma": llama_decoder(),
    "llama": llama_decoder(decoders.Strip(" ", 1, 0)),
    "metaspace": decoders.Metaspace(prepend_scheme="always"),
    "metaspace never": decoders.Metaspace(prepend_scheme="never"),
    "pattern": decoders.Sequence(
        [decoders.ByteFallback(), decoders.Fuse(), decoders.Replace(Regex("\u2581"), " "), decoders.Strip(" ", 1, 0)]
    ),
}


@pytest.mark.parametrize("name", DECODERS)
def test_pieces_have_the_bytes_that_the_decoder_writes_in_company(name: str) -> None:
    tokenizer = sentencepiece(DECODERS[name])
    subject, letter = wrap(tokenizer), tokenizer.token_to_id("x")
    for token_id in range(subject.size):
        token = subject.token_bytes(token_id)
        if token_id in subject.special_ids or (len(token) == 1 and token[0] >= 0x80):
            continue
        if name.startswith("metaspace") and tokenizer.id_to_token(token_id) in BYTES:
            assert token == bytes([int(tokenizer.id_to_token(token_id)[3:5], 16)])  # the model writes these for bytes
            continue
        assert tokenizer.decode([letter, token_id, letter], skip_special_tokens=False) == f"x{token.decode()}x"
    assert subject.token_bytes(tokenizer.token_to_id("<0xE6>")) == b"\xe6"
    assert subject.token_bytes(tokenizer.token_to_id("\u2581\u2581")) == b"  "
    assert subject.encode("a  b a 日\n".encode()).lossless_T.all()


@pytest.mark.parametrize("flags", [{}, {"normalized": True}, {"lstrip": True}, {"rstrip": True}, {"single_word": True}])
@pytest.mark.parametrize("family", ["gemma", "llama", "metaspace", "llama3", "byte_level"])
def test_added_tokens_cover_what_they_match(family: str, flags: dict[str, bool]) -> None:
    """Spaces that a token swallows are covered by it and never called lossless."""
    tokenizer = Tokenizer.from_str(json.dumps(description(family)))
    tokenizer.add_tokens(
        [AddedToken("<tool>", **{"normalized": False, **flags}), AddedToken("naïve", normalized=False)]
    )
    subject = wrap(tokenizer, bos="<bos>", eos="<eos>", pad="<pad>")
    tool = tokenizer.token_to_id("<tool>")
    assert subject.token_bytes(tool) == b"<tool>"
    assert subject.token_bytes(tokenizer.token_to_id("naïve")) == "naïve".encode()
    text = "the <tool> cat naïve  <tool>".encode()
    encoding = subject.encode(text)
    assert tool in encoding.token_ids_T and encoding.byte_ends_T[-1] == len(text)
    start = 0
    for t, (token, end) in enumerate(zip(encoding.token_ids_T.tolist(), encoding.byte_ends_T.tolist(), strict=True)):
        written = subject.token_bytes(token)
        same = written == text[start:end] or (t == 0 and subject.has_dummy_prefix and written == b" " + text[start:end])
        assert bool(encoding.lossless_T[t]) == same
        start = end


def test_a_piece_that_is_an_added_token_too_is_a_piece() -> None:
    tokenizer = sentencepiece(llama_decoder())
    tokenizer.add_tokens([AddedToken("\u2581\u2581", normalized=False), AddedToken("\n", normalized=False)])
    subject = wrap(tokenizer)
    assert subject.token_bytes(tokenizer.token_to_id("\u2581\u2581")) == b"  "
    encoding = subject.encode(b"a  b\n")
    assert encoding.lossless_T.all() and tokenizer.token_to_id("\u2581\u2581") in encoding.token_ids_T
    assert not subject.encode("\u2581\u2581".encode()).lossless_T.any()


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_by_an_ordinary_piece_changes_no_text(family: str) -> None:
    plain = vocabulary(family)
    text = b"a ! ab!! the thing"
    used = [int(i) for i in plain.encode(text).token_ids_T if int(i) not in plain.special_ids]
    for token_id in used:
        described = description(family)
        piece = train(family, 640).id_to_token(token_id)
        added = {"id": token_id, "content": piece, "special": True, "normalized": False}
        flags = {"single_word": False, "lstrip": False, "rstrip": False}
        described["added_tokens"].append(added | flags)
        described["added_tokens"].sort(key=lambda token: token["id"])
        roles = {"bos": plain.bos_id, "eos": plain.eos_id, "pad": token_id}
        padded = Vocabulary(described, roles, plain.special_ids | {token_id})
        assert padded.pad_id == token_id and padded.token_bytes(token_id) == plain.token_bytes(token_id)
        assert np.array_equal(padded.encode(text).token_ids_T, plain.encode(text).token_ids_T)


def test_a_control_token_whose_name_a_merge_makes_cannot_be_written() -> None:
    vocab = {piece: i for i, piece in enumerate(["<s>", "<", "s", ">", "s>", "\u2581", "a"])}
    tokenizer = Tokenizer(models.BPE(vocab, [("s", ">"), ("<", "s>")]))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="never")
    tokenizer.add_special_tokens(["<s>"])
    subject = wrap(tokenizer, bos="<s>", eos="<s>")
    assert subject.encode(b"a<s> a").token_ids_T.tolist() == [6, 1, 4, 5, 6]
    assert subject.token_bytes(0) == b"" and subject.special_tokens == {"<s>": 0}


@pytest.mark.parametrize("role", ["eos_token", "unk_token"])
def test_a_role_that_no_ordinary_piece_can_play_is_refused_by_name(role: str) -> None:
    tokenizer = Tokenizer.from_str(json.dumps(description("byte_level")))
    if role == "unk_token":
        tokenizer.model.unk_token = "t"
    with pytest.raises(ValueError, match=f"tokenizer: {role} 't' is an ordinary piece .*; allowed are"):
        wrap(tokenizer, eos="t" if role == "eos_token" else "<eos>")
