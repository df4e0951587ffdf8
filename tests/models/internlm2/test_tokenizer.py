"""The converted tokenizer against SentencePiece itself, transformers, and what our vocabularies promise."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from fusion_core.vocabulary import Vocabulary
from services.models.chat_tokenizer import ChatTokenizer
from services.models.internlm2.tokenizer import build_tokenizer
from services.wire.messages import Messages
from tests.fakes.files.tiny_internlm2 import CHAT_TOKENS, sentencepiece_model, tokenizer_config
from tests.fakes.real_tokenizers import NASTY

MESSAGES = [
    {"role": "system", "content": "You are terse."},
    {"role": "user", "content": " Say <|im_end|> twice.  \n\n"},
    {"role": "assistant", "content": "No.\n"},
    {"role": "user", "content": "日本語?"},
]
KINDS = ("chat", "base", "prefixed")

texts = st.lists(
    st.sampled_from(
        ["the", " the", "ab", "aba", "ing", " ", "  ", "   ", " " * 5, " " * 9, "\n", "\n\n", "\n\n\n", "\t"]
    )
    | st.sampled_from(
        ["1", "12", "é", "漢", "日本", "🙂", "[UNUSED_TOKEN_1]", "<0x41>", "\x00", "▁", "▁▁", "Q", "\r\n"]
    )
    | st.text(max_size=3),
    max_size=12,
).map("".join)


def write_original(folder: Path, model: bytes, config: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.model").write_bytes(model)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@cache
def model_of(kind: str) -> bytes:
    return sentencepiece_model(dummy_prefix=kind == "prefixed", user_defined=kind != "prefixed")


@cache
def converted(kind: str) -> Path:
    """A folder with the tokenizer that the conversion makes."""
    folder = Path(mkdtemp(prefix=f"internlm2-{kind}-"))
    original = write_original(
        folder / "original", model_of(kind), tokenizer_config(model_of(kind), chat=kind == "chat")
    )
    build_tokenizer(original).save(folder)
    return folder


@cache
def sentencepiece(kind: str) -> SentencePieceProcessor:
    return SentencePieceProcessor(model_proto=model_of(kind))


@cache
def loaded(kind: str) -> Any:
    return AutoTokenizer.from_pretrained(converted(kind))


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=150)
@given(text=texts)
def test_ids_are_sentencepiece_s(kind: str, text: str) -> None:
    if any(name in text for name in ("<s>", "</s>", "<unk>")):
        return  # SentencePiece never reads control tokens in a text
    assert loaded(kind)(text)["input_ids"] == [1, *sentencepiece(kind).encode(text)]


@pytest.mark.parametrize("kind", KINDS)
def test_a_nasty_text_has_sentencepiece_s_ids_and_comes_back(kind: str) -> None:
    text = NASTY.replace("<s> </s>", "")
    vocabulary = Vocabulary.from_pretrained(converted(kind))
    encoding = vocabulary.encode(text.encode())
    assert encoding.token_ids_T.tolist() == sentencepiece(kind).encode(text)
    plain = text.replace("▁", "_")
    encoding = vocabulary.encode(plain.encode())
    assert encoding.lossless_T.all()
    written = b"".join(map(vocabulary.token_bytes, encoding.token_ids_T.tolist()))
    assert written == (b" " if kind == "prefixed" else b"") + plain.encode()
    assert loaded(kind).decode(loaded(kind)(plain, add_special_tokens=False)["input_ids"]) == plain


@pytest.mark.parametrize("kind", KINDS)
def test_every_id_has_the_bytes_of_its_piece(kind: str) -> None:
    vocabulary, original = Vocabulary.from_pretrained(converted(kind)), sentencepiece(kind)
    assert vocabulary.size == original.get_piece_size() == 700
    for token_id in range(vocabulary.size):
        piece = original.id_to_piece(token_id)
        if token_id in vocabulary.special_ids:
            assert vocabulary.token_bytes(token_id) == b""
        elif original.is_byte(token_id):
            assert vocabulary.token_bytes(token_id) == bytes([int(piece[3:5], 16)])
        else:
            assert vocabulary.token_bytes(token_id) == piece.replace("▁", " ").encode()
    assert vocabulary.special_ids == {0, 1, 2} | (set(range(694, 700)) if kind == "chat" else set())
    assert (vocabulary.bos_id, vocabulary.eos_id, vocabulary.pad_id) == (1, 2, 2)
    assert not vocabulary.warnings


def test_chat_tokens_stand_at_their_ids_and_cannot_be_written() -> None:
    tokenizer, vocabulary = loaded("chat"), Vocabulary.from_pretrained(converted("chat"))
    assert tokenizer.convert_tokens_to_ids(list(CHAT_TOKENS)) == list(range(694, 700))
    text = "<|im_start|>user\nHi<|im_end|>\n"
    words = sentencepiece("chat").encode("user\nHi"), sentencepiece("chat").encode("\n")
    assert tokenizer(text)["input_ids"] == [1, 699, *words[0], 698, *words[1]]
    ids = vocabulary.encode(text.encode()).token_ids_T
    assert not set(ids.tolist()) & vocabulary.special_ids
    assert b"".join(map(vocabulary.token_bytes, ids.tolist())) == text.encode()


def test_the_chat_template_writes_chatml() -> None:
    tokenizer, chat = loaded("chat"), ChatTokenizer.from_pretrained(converted("chat"))
    expected = "<s>" + "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in MESSAGES)
    expected += "<|im_start|>assistant\n"
    assert tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True) == expected
    original = sentencepiece("chat")
    by_hand = [1]
    for message in MESSAGES:
        by_hand += [699, *original.encode(f"{message['role']}\n{message['content']}"), 698, *original.encode("\n")]
    by_hand += [699, *original.encode("assistant\n")]
    assert chat.encode_messages(Messages(MESSAGES)).tolist() == by_hand
    assert chat.vocabulary.eos_id == 698 and chat.ends_at_once
    with pytest.raises(ValueError, match="no chat template of its own"):
        ChatTokenizer.from_pretrained(converted("base"))


def test_a_folder_of_the_published_size(tmp_path: Path) -> None:
    """92,544 ids: most pieces are made up here, the chat tokens stand where the published ones do."""
    proto = sentencepiece_model_pb2.ModelProto.FromString(model_of("chat"))
    kinds, lowest = proto.SentencePiece, min(piece.score for piece in proto.pieces)
    for number in range(len(proto.pieces), 92_544):
        unused = number >= 92_397
        name = f"[UNUSED_{number}]" if unused else f"the{number:x}"
        kind = kinds.USER_DEFINED if unused else kinds.NORMAL
        proto.pieces.add(piece=name, score=lowest - number, type=kind)
    model = proto.SerializeToString()
    built = build_tokenizer(write_original(tmp_path / "original", model, tokenizer_config(model, chat=True)))
    built.save(tmp_path)
    vocabulary = Vocabulary.from_pretrained(tmp_path)
    assert built.size == vocabulary.size == 92_544
    assert vocabulary.special_tokens["<|im_start|>"] == 92_543 and vocabulary.special_tokens["<|plugin|>"] == 92_538
    text = NASTY.replace("<s> </s>", "") + "the1000 thefff [UNUSED_92400] the2000"
    expected = SentencePieceProcessor(model_proto=model).encode(text)
    assert vocabulary.encode(text.encode()).token_ids_T.tolist() == expected and 92_400 in expected


@pytest.mark.parametrize("name", ["added_tokens.json", "additional_special_tokens", "beyond"])
def test_added_tokens_are_read_wherever_the_folder_states_them(tmp_path: Path, name: str) -> None:
    config, model = tokenizer_config(model_of("base"), chat=False), model_of("base")
    original = write_original(tmp_path / "original", model, config)
    if name == "added_tokens.json":
        del config["added_tokens_decoder"]
        (original / name).write_text(json.dumps({"<|im_end|>": 698}))
        expected = {"<s>": 1, "<|im_end|>": 698}
    elif name == "beyond":
        config["added_tokens_decoder"]["702"] = {"content": "<image>", "special": True}
        expected = {"<s>": 1, "<image>": 702}
    else:
        config[name] = ["[UNUSED_TOKEN_9]"]
        expected = {"<s>": 1, "[UNUSED_TOKEN_9]": 699}
    built = build_tokenizer(write_original(original, model, config))
    for token, token_id in expected.items():
        assert built.backend.encode(f"a{token}", add_special_tokens=False).ids[-1] == token_id
    assert built.size == max(700, *(token_id + 1 for token_id in expected.values()))
    reread = Tokenizer.from_str(built.backend.to_str())
    assert reread.get_vocab() == built.backend.get_vocab()


def test_several_templates_and_a_file_of_its_own(tmp_path: Path) -> None:
    config = tokenizer_config(model_of("chat"), chat=True)
    config["chat_template"] = [{"name": "default", "template": "{{ 1 }}"}, {"name": "tool_use", "template": "{{ 2 }}"}]
    built = build_tokenizer(write_original(tmp_path / "original", model_of("chat"), config))
    built.save(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template == {"default": "{{ 1 }}", "tool_use": "{{ 2 }}"}
    (tmp_path / "original" / "chat_template.jinja").write_text("{{ 3 }}")
    assert build_tokenizer(tmp_path / "original").templates["default"] == "{{ 3 }}"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda proto, config: proto.trainer_spec.ClearField("byte_fallback"), "byte_fallback is False"),
        (lambda proto, config: setattr(proto.trainer_spec, "model_type", 1), "model_type is 1"),
        (lambda proto, config: setattr(proto.normalizer_spec, "remove_extra_whitespaces", True), "remove_extra_white"),
        (lambda proto, config: setattr(proto.normalizer_spec, "add_dummy_prefix", True), "user-defined pieces"),
        (lambda proto, config: config.update(bos_token="<bos>"), "special token '<bos>' has no id"),
        (
            lambda proto, config: config["added_tokens_decoder"].update({"9": {"content": proto.pieces[500].piece}}),
            "is an added token, and a piece of tokenizer.model with another id",
        ),
    ],
)
def test_a_tokenizer_that_cannot_be_expressed_is_refused(tmp_path: Path, change: Any, message: str) -> None:
    proto = sentencepiece_model_pb2.ModelProto.FromString(model_of("chat"))
    config = tokenizer_config(model_of("chat"), chat=True)
    change(proto, config)
    with pytest.raises(ValueError, match=message):
        build_tokenizer(write_original(tmp_path / "original", proto.SerializeToString(), config))


def test_a_file_that_is_no_sentencepiece_model_is_refused(tmp_path: Path) -> None:
    original = write_original(tmp_path / "original", b"\xff\xff\xff", {})
    with pytest.raises(ValueError, match=r"tokenizer\.model: is no SentencePiece model"):
        build_tokenizer(original)
    (original / "tokenizer.model").unlink()
    with pytest.raises(ValueError, match=r"tokenizer\.model: is no SentencePiece model"):
        build_tokenizer(original)
