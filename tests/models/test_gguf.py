"""Tokenizers out of GGUF files against independent implementations of what those files describe."""

from __future__ import annotations

import re
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2
from transformers import AutoModelForCausalLM, AutoTokenizer

from services.models import gguf as gguf_conversion
from tests.fakes.files import tiny_gguf

texts = st.lists(
    st.sampled_from(
        ["the", " the", "ab", "in", "ing", " ", "  ", "   ", " " * 9, "\n", "\n\n", "\t\t", "1", "12", "345"]
    )
    | st.sampled_from(["é", "漢", "🙂", "<table>", "'s", ".", "\x01", "½", "٣", "▁", "Q"])
    | st.text(max_size=3),
    max_size=12,
).map("".join)


@cache
def tokenizer(write: Any) -> Any:
    """The tokenizer that the conversion makes of the file that `write` writes, checked, as loaded from its folder."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tiny.gguf"
        write(path)
        fields = {key: field.contents() for key, field in gguf.GGUFReader(str(path)).fields.items()}
        rebuilt = gguf_conversion.rebuild_tokenizer(AutoTokenizer.from_pretrained(folder, gguf_file=path.name), fields)
        gguf_conversion.check_tokenizer(rebuilt, fields)
        rebuilt.save_pretrained(Path(folder) / "saved")
        return AutoTokenizer.from_pretrained(Path(folder) / "saved")


def smollm(path: Path) -> None:
    tiny_gguf.write_smollm(path, train=False)


@cache
def sentencepiece() -> SentencePieceProcessor:
    """The real SentencePiece library, given the pieces of the Gemma file."""
    model = sentencepiece_model_pb2.ModelProto()
    kinds = model.SentencePiece
    types = {1: kinds.NORMAL, 3: kinds.CONTROL, 4: kinds.USER_DEFINED, 6: kinds.BYTE}
    for piece, kind, score in zip(*tiny_gguf.gemma_pieces(), strict=True):
        stored = piece.replace(" ", "▁") if kind == tiny_gguf.USER_DEFINED else piece
        model.pieces.add(piece=stored, score=score, type=kinds.UNKNOWN if piece == "<unk>" else types[kind])
    model.trainer_spec.model_type = model.trainer_spec.BPE
    model.trainer_spec.byte_fallback = True
    model.trainer_spec.pad_id, model.trainer_spec.eos_id, model.trainer_spec.bos_id, model.trainer_spec.unk_id = range(
        4
    )
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.add_dummy_prefix = model.normalizer_spec.remove_extra_whitespaces = False
    return SentencePieceProcessor(model_proto=model.SerializeToString())


@settings(deadline=None, max_examples=150)
@given(texts)
def test_gemma_tokenizer_is_sentencepiece(text: str) -> None:
    if any(control in text for control in tiny_gguf.GEMMA_CONTROL):
        return  # SentencePiece never reads control tokens in a text
    assert tokenizer(tiny_gguf.write_gemma)(text)["input_ids"] == [2, *sentencepiece().encode(text)]


@settings(deadline=None, max_examples=150)
@given(texts)
def test_smollm_tokenizer_is_byte_level_bpe_with_single_digits(text: str) -> None:
    assert tokenizer(smollm)(text)["input_ids"] == tiny_gguf.encode_smollm(text)


def test_special_roles_are_those_of_the_file() -> None:
    gemma, smol = tokenizer(tiny_gguf.write_gemma), tokenizer(smollm)
    assert (gemma.pad_token_id, gemma.eos_token_id, gemma.bos_token_id, gemma.unk_token_id) == (0, 1, 2, 3)
    assert (smol.unk_token_id, smol.bos_token_id, smol.eos_token_id, smol.pad_token_id) == (0, 1, 2, 2)
    assert smol("<|im_end|>")["input_ids"] == [2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokenizer.ggml.tokens": ["<other>", *tiny_gguf.smollm_pieces()[1:]]}, "id 0 is '<|endoftext|>'"),
        ({"tokenizer.ggml.tokens": tiny_gguf.smollm_pieces()[:-1]}, "ids, the GGUF has"),
        ({"tokenizer.ggml.eos_token_id": 0}, "eos is 2, the GGUF has 0"),
        ({"tokenizer.ggml.add_bos_token": True}, "does not survive"),
    ],
)
def test_a_tokenizer_that_contradicts_its_file_is_refused(change: dict[str, Any], message: str) -> None:
    pieces = tiny_gguf.smollm_pieces()
    fields = {
        "tokenizer.ggml.tokens": pieces,
        "tokenizer.ggml.token_type": [tiny_gguf.CONTROL] * 3 + [tiny_gguf.NORMAL] * (len(pieces) - 3),
        **change,
    }
    fields["tokenizer.ggml.token_type"] = fields["tokenizer.ggml.token_type"][: len(fields["tokenizer.ggml.tokens"])]
    with pytest.raises(ValueError, match=re.escape(message)):
        gguf_conversion.check_tokenizer(tokenizer(smollm), fields)


def test_converted_weights_are_the_original_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf, "GGUFReader", gguf.GGUFReader)  # convert() replaces it; put back afterwards
    original = tiny_gguf.write_smollm(tmp_path / "tiny.gguf", train=True)
    gguf_conversion.convert(tmp_path / "tiny.gguf", tmp_path / "out")
    converted = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert converted.dtype == torch.float32
    ids = torch.tensor([[1, 50, 60, 70, 80]])
    torch.testing.assert_close(converted(input_ids=ids).logits, original(input_ids=ids).logits)


def test_a_model_that_does_not_know_english_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf, "GGUFReader", gguf.GGUFReader)
    tiny_gguf.write_smollm(tmp_path / "tiny.gguf", train=False)
    with pytest.raises(ValueError, match="broken weights"):
        gguf_conversion.convert(tmp_path / "tiny.gguf", tmp_path / "out")
