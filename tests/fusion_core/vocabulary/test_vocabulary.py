from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers

from fusion_core.vocabulary import Encoding, Vocabulary
from tests.fakes.strategies import texts
from tests.fakes.tokenizers import (
    CORPUS,
    FAMILIES,
    LOSSLESS,
    SPECIAL,
    WITHOUT_PREFIX,
    description,
    train,
    vocabulary,
    wrap,
)

families = st.sampled_from(FAMILIES)


def spans(vocabulary: Vocabulary, encoding: Encoding, text: bytes) -> list[tuple[bytes, bytes]]:
    """(bytes of the token, bytes of the text it covers), token by token."""
    starts = [0, *encoding.byte_ends_T][: encoding.num_tokens]
    return [
        (vocabulary.token_bytes(int(token)), text[start:end])
        for token, start, end in zip(encoding.token_ids_T, starts, encoding.byte_ends_T, strict=True)
    ]


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(LOSSLESS), texts(lossless=True))
def test_concatenated_token_bytes_give_the_text_back(family: str, text: bytes) -> None:
    encoding = vocabulary(family).encode(text)
    joined = b"".join(token for token, _ in spans(vocabulary(family), encoding, text))
    assert joined in (text, b" " + text) if family in WITHOUT_PREFIX else joined == text
    assert encoding.lossless_T.all()


@settings(max_examples=300, deadline=None)
@given(families, texts())
def test_every_token_that_is_called_lossless_has_the_bytes_it_covers(family: str, text: bytes) -> None:
    encoding = vocabulary(family).encode(text)
    assert np.all(np.diff(encoding.byte_ends_T, prepend=0) >= 0)
    if text and encoding.num_tokens:
        assert encoding.byte_ends_T[-1] == len(text)
    for position, (token, covered) in enumerate(spans(vocabulary(family), encoding, text)):
        if encoding.lossless_T[position]:
            assert token == covered or (position == 0 and token == b" " + covered)


@settings(max_examples=300, deadline=None)
@given(families, texts(), st.booleans(), st.integers(0, 99))
def test_an_encoding_without_losses_spells_its_text_and_no_other(
    family: str, text: bytes, continues: bool, at: int
) -> None:
    subject = vocabulary(family)
    [encoding] = subject.encode_batch([text], continues=continues)
    if not encoding.num_tokens or not encoding.lossless_T.all():
        return
    assert subject.spells(text, encoding.token_ids_T, encoding.byte_ends_T)
    at %= encoding.num_tokens
    for column in (0, 1):
        changed = [encoding.token_ids_T.copy(), encoding.byte_ends_T.copy()]
        changed[column][at] = (changed[column][at] + 1) % subject.size
        assert not subject.spells(text, *changed)
    assert not subject.spells(text + b"x", encoding.token_ids_T, encoding.byte_ends_T)


@settings(max_examples=200, deadline=None)
@given(families, texts())
def test_ids_are_those_of_the_tokenizer_itself(family: str, text: bytes) -> None:
    """On text without names of control tokens, the splitting is exactly the library's own."""
    plain = text.decode()
    for name in SPECIAL:
        plain = plain.replace(name, "")
    expected = train(family, 640).encode(plain, add_special_tokens=False).ids
    assert vocabulary(family).encode(plain.encode()).token_ids_T.tolist() == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_control_tokens_cannot_be_written(family: str) -> None:
    subject = vocabulary(family)
    text = "a<eos>b <bos><pad> \U0010ffff2\U0010fffe".encode()
    unk_id = description(family)["model"].get("unk_id", 3)  # may stand for characters that cannot be represented
    assert not {int(i) for i in subject.encode(text).token_ids_T} & (subject.special_ids - {unk_id})


@settings(max_examples=200, deadline=None)
@given(families, st.binary(max_size=4) | texts(max_pieces=1).map(lambda text: text[:7]))
def test_prefix_range_holds_exactly_the_tokens_that_start_so(family: str, prefix: bytes) -> None:
    subject = vocabulary(family)
    low, high = subject.byte_table.prefix_range(prefix)
    expected = {i for i in range(subject.size) if subject.token_bytes(i).startswith(prefix)}
    assert set(subject.byte_table.sorted_ids_V[low:high].tolist()) == expected
    for token in sorted(expected)[:3]:
        if prefix:
            at = subject.byte_table.offsets_V1[token] + len(prefix) - 1
            assert (subject.byte_table.prefix_low_B[at], subject.byte_table.prefix_high_B[at]) == (low, high)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(LOSSLESS), texts(max_pieces=3, lossless=True))
def test_first_token_of_text_is_that_of_the_tokenizer_without_dummy_prefix(family: str, text: bytes) -> None:
    subject = vocabulary(family)
    bare = vocabulary(WITHOUT_PREFIX.get(family, family))
    encoding = bare.encode(text)
    expected = bare.token_bytes(int(encoding.token_ids_T[0])) if text else b""
    if family != "gemma" and bare is vocabulary("gemma") and expected in (b"\n\n", b"\n\n\n", b"\t\t", b"<table>"):
        return  # only the family without prefix has these added tokens
    assert subject.token_bytes(int(subject.first_tokens([text])[0])) == expected


@settings(max_examples=200, deadline=None)
@given(families, st.binary(max_size=8))
def test_first_token_of_any_bytes_starts_them(family: str, remainder: bytes) -> None:
    subject = vocabulary(family)
    first = int(subject.first_tokens([remainder])[0])
    if first < 0:
        # Only lossy families, the empty remainder, and U+2581 (which reads as a space) have no first token.
        assert family not in LOSSLESS or not remainder or b"\xe2\x96\x81" in remainder
    else:
        assert subject.token_bytes(first) and remainder.startswith(subject.token_bytes(first))


def test_first_token_of_bytes_cut_in_a_character_follows_the_merges() -> None:
    subject = vocabulary("byte_level")
    whole = "日本語".encode()
    for cut in range(1, len(whole)):
        tokens = [subject.token_bytes(int(subject.first_tokens([whole[:cut]])[0]))]
        assert whole.startswith(tokens[0])
    # A cut that leaves whole tokens in front does not change them.
    the = subject.encode(b"the cat ").token_ids_T[0]
    assert subject.first_tokens([b"the cat \xe6"])[0] == the
    assert subject.first_tokens([b"", b"\xff"])[0] == -1


@pytest.mark.parametrize("family", FAMILIES)
def test_batch_equals_single_texts_and_survives_pickling(family: str) -> None:
    subject = pickle.loads(pickle.dumps(vocabulary(family)))
    batch = [line.encode() for line in CORPUS] + [b""]
    for encoding, text in zip(subject.encode_batch(batch), batch, strict=True):
        alone = vocabulary(family).encode(text)
        assert np.array_equal(encoding.token_ids_T, alone.token_ids_T)
        assert np.array_equal(encoding.byte_ends_T, alone.byte_ends_T)
        assert encoding.token_ids_T.dtype == encoding.byte_ends_T.dtype == np.int32
    assert subject.fingerprint == vocabulary(family).fingerprint
    assert np.array_equal(
        subject.first_tokens([b"\xe6\x97", b" the"]), vocabulary(family).first_tokens([b"\xe6\x97", b" the"])
    )


def test_text_that_is_not_utf8_is_refused_with_its_place() -> None:
    with pytest.raises(ValueError, match=r"text 1: not UTF-8 at byte 3"):
        vocabulary("gemma").encode_batch([b"fine", b"abc\xff", b"fine"])


def test_fingerprint_tells_tables_merges_and_roles_apart() -> None:
    base = description("byte_level")
    changed = [copy.deepcopy(base) for _ in range(4)]
    changed[0]["model"]["merges"].reverse()
    changed[1]["pre_tokenizer"]["use_regex"] = False
    vocab = changed[2]["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    prints = {wrap(item).fingerprint for item in (base, *changed[:3])}
    roles = {"bos": 1, "eos": 3, "pad": 0}
    prints.add(Vocabulary(base, roles, frozenset(range(4))).fingerprint)
    assert len(prints) == 5
    # How merges are written down, and what is added around a text, is not part of it.
    changed[3]["model"]["merges"] = [" ".join(merge) for merge in base["model"]["merges"]]
    changed[3]["post_processor"] = None
    assert wrap(changed[3]).fingerprint == wrap(base).fingerprint


def test_roles_holes_and_duplicates() -> None:
    changed = description("gemma")
    changed["model"]["vocab"]["farout"] = len(changed["model"]["vocab"]) + 50
    subject = wrap(changed)
    assert (subject.bos_id, subject.eos_id, subject.pad_id) == (1, 2, 0)
    assert subject.special_ids == {0, 1, 2, 3}
    assert all(subject.token_bytes(i) == b"" for i in (0, 1, 2, 3, subject.size, 10**6, -1))
    assert subject.token_bytes(subject.size - 1) == b"farout"
    assert subject.token_bytes(subject.size - 2) == b""  # a hole in the numbering
    assert subject.byte_table.prefix_range(b"\n")[1] - subject.byte_table.prefix_range(b"\n")[0] >= 2  # "\n" and <0x0A>


def test_wordpiece_and_word_marks_are_refused() -> None:
    wordpiece = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1, "##b": 2}, unk_token="[UNK]"))
    marked = Tokenizer(models.BPE({"a": 0, "b</w>": 1}, [], end_of_word_suffix="</w>"))
    marked.pre_tokenizer = pre_tokenizers.Whitespace()
    for tokenizer, named in ((wordpiece, "WordPiece"), (marked, "end_of_word_suffix")):
        with pytest.raises(ValueError, match=named):
            Vocabulary(json.loads(tokenizer.to_str()), {"bos": None, "eos": None, "pad": None}, frozenset())


def test_from_transformers(tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path / "model"
    fast = PreTrainedTokenizerFast(
        tokenizer_object=train("gemma", 640), bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", unk_token="<unk>"
    )
    fast.save_pretrained(str(folder))
    loaded = Vocabulary.from_pretrained(folder)
    assert loaded.fingerprint == Vocabulary.from_tokenizer(fast).fingerprint
    assert (loaded.bos_id, loaded.eos_id, loaded.pad_id) == (1, 2, 0)
    text = CORPUS[2].encode()
    assert loaded.encode(text).token_ids_T.tolist() == train("gemma", 640).encode(CORPUS[2]).ids
    with pytest.raises(ValueError, match="slow tokenizer"):
        Vocabulary.from_tokenizer(object())
    with pytest.raises(ValueError, match="no folder"):
        Vocabulary.from_pretrained(folder / "missing")
