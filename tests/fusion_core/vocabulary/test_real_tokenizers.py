"""The tokenizers of real families against the library that they are made for: `tokenizers` with their own files."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from fusion_core.alignment.byte.projection import ByteProjection
from fusion_core.vocabulary import Vocabulary
from fusion_core.vocabulary.tokenizer_files import load_tokenizer
from tests.fakes.real_tokenizers import FAMILIES, NASTY, flat_block, folder, real_vocabulary

REWRITES = {"claude", "qwen3"}
"""Families whose normalizer rewrites text: composed characters, and NFKC's compatibility forms."""
SENTENCEPIECE = {"gemini", "gemma3", "llama2"}
"""Families that read U+2581 as a space."""
TWINS = {"gemini", "llama3_1"}
"""Families that differ from Gemma 3 and Llama 3 in nothing that saving could change; loading them twice takes long."""


@dataclass(frozen=True)
class Family:
    name: str
    folder: Path
    tokenizer: Any
    vocabulary: Vocabulary
    own: Tokenizer
    """The file as the library reads it, with nothing added."""
    config: dict[str, Any]


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Iterator[Family]:
    path = folder(request.param)
    own = Tokenizer.from_file(str(path / "tokenizer.json"))
    config = json.loads((path / "tokenizer_config.json").read_text())
    tokenizer = load_tokenizer(path).tokenizer
    yield Family(request.param, path, tokenizer, Vocabulary.from_tokenizer(tokenizer), own, config)


def test_every_id_has_the_bytes_that_the_decoder_writes(family: Family) -> None:
    """In company: behind an ordinary token and in front of one, which is where ids stand but for the first."""
    subject, (letter,) = family.vocabulary, family.own.encode("xa", add_special_tokens=False).ids[-1:]
    ids = [i for i in range(subject.size) if i not in subject.special_ids]
    between = subject.token_bytes(letter)
    written = family.own.decode_batch([[letter, i, letter] for i in ids], skip_special_tokens=False)
    byte_level = family.name not in SENTENCEPIECE
    for token_id, text in zip(ids, written, strict=True):
        token = subject.token_bytes(token_id)
        expected = (between + token + between).decode(errors="replace")
        if not byte_level and len(token) == 1 and token[0] >= 0x80:
            assert text.removeprefix(between.decode()) == "\ufffd" + between.decode(), token_id
        else:
            assert text == expected.removeprefix(" ") or text == expected, token_id


def test_every_id_alone_has_the_bytes_that_the_decoder_writes(family: Family) -> None:
    subject = family.vocabulary
    ids = [i for i in range(subject.size) if i not in subject.special_ids and subject.token_bytes(i).isascii()]
    for token_id, text in zip(ids, family.own.decode_batch([[i] for i in ids], skip_special_tokens=False), strict=True):
        token = subject.token_bytes(token_id).decode()
        assert text == token or (subject.has_dummy_prefix and " " + text == token), token_id


def test_text_is_split_as_the_file_says(family: Family) -> None:
    plain = "The capital of  France\n\tdef f(x):\r\n  return 1234567  # it's 中文的句子。日本語 naïve HTTPResponse 👍🏽"
    for text in (plain, " " + plain, "   "):
        expected = family.own.encode(text, add_special_tokens=False).ids
        assert family.vocabulary.encode(text.encode()).token_ids_T.tolist() == expected
    assert family.vocabulary.encode(plain.encode()).lossless_T.all()


def test_a_nasty_text_is_covered_and_lossless_where_it_says_so(family: Family) -> None:
    text = NASTY.encode()
    encoding = family.vocabulary.encode(text)
    starts = [0, *encoding.byte_ends_T.tolist()]
    assert starts[-1] == len(text)
    for t, token in enumerate(encoding.token_ids_T.tolist()):
        covered, written = text[starts[t] : starts[t + 1]], family.vocabulary.token_bytes(token)
        if encoding.lossless_T[t]:
            assert written == covered or (t == 0 and family.vocabulary.has_dummy_prefix and written == b" " + covered)
    if family.name not in REWRITES:
        lossy = [text[starts[t] : starts[t + 1]].decode() for t in np.flatnonzero(~encoding.lossless_T)]
        assert all("\u2581" in part for part in lossy)
        assert family.name in SENTENCEPIECE or not lossy
    assert encoding.lossless_T.mean() > 0.9


def test_roles_are_those_of_the_configuration_and_cannot_be_written(family: Family) -> None:
    subject = family.vocabulary
    for role, token_id in (("bos_token", subject.bos_id), ("eos_token", subject.eos_id), ("pad_token", subject.pad_id)):
        named = family.config.get(role)
        content = named["content"] if isinstance(named, dict) else named
        assert token_id == (None if content is None else family.own.token_to_id(content))
        if token_id is not None:
            assert token_id in subject.special_ids and subject.special_tokens[content] == token_id
    assert subject.special_ids and all(subject.token_bytes(i) == b"" for i in subject.special_ids)
    names = " ".join(subject.special_tokens)
    assert not set(subject.encode(names.encode()).token_ids_T.tolist()) & subject.special_ids


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in TWINS], indirect=True)
def test_the_fingerprint_is_stable_over_save_and_load(family: Family, tmp_path: Path) -> None:
    family.tokenizer.save_pretrained(tmp_path)
    assert Vocabulary.from_pretrained(tmp_path).fingerprint == family.vocabulary.fingerprint


def test_runs_of_spaces_that_are_also_added_tokens_are_spaces() -> None:
    """Gemma 3's own file has runs of U+2581 both as pieces and as added tokens."""
    gemma = real_vocabulary("gemma3")
    assert gemma.token_bytes(138) == b"  "
    encoding = gemma.encode(b"a  b")
    assert encoding.lossless_T.all() and encoding.byte_ends_T.tolist() == [1, 3, 4]


def test_almost_no_row_of_python_is_masked_from_gemma3_to_gpt2() -> None:
    source, target = real_vocabulary("gemma3"), real_vocabulary("gpt2")
    text = Path(argparse.__file__).read_bytes()[:20_000]
    rows = ByteProjection(source, target).project(flat_block(source, text), target.encode(text))
    assert rows.masked_share < 0.01


def test_padding_with_an_ordinary_piece_leaves_it_in_the_text() -> None:
    from transformers import AutoTokenizer

    plain = real_vocabulary("gpt2")
    padded = Vocabulary.from_tokenizer(AutoTokenizer.from_pretrained(folder("gpt2"), pad_token="!"))
    text = b"Hi! Hello!! !\n"
    assert padded.pad_id == 0 and padded.token_bytes(0) == b"!"
    assert padded.encode(text).token_ids_T.tolist() == plain.encode(text).token_ids_T.tolist()
    for role in ("eos_token", "unk_token"):
        tokenizer = AutoTokenizer.from_pretrained(folder("gpt2"), **{role: "!"})
        if role == "eos_token":
            with pytest.raises(ValueError, match="eos_token '!' is an ordinary piece"):
                Vocabulary.from_tokenizer(tokenizer)
        else:
            assert Vocabulary.from_tokenizer(tokenizer).encode(text).lossless_T.all()
