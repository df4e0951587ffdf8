"""Folders whose tokenizer transformers would make otherwise than the file that lies there, or not at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fusion_core.vocabulary import Vocabulary
from fusion_core.vocabulary.tokenizer_files import load_tokenizer
from services.distill.target.config import TargetConfig
from services.distill.target.prepare import prepare_target
from tests.fakes.real_tokenizers import folder as real_folder
from tests.fakes.tokenizers import CORPUS, train

PROBE = "The capital of\n 中文 1234 it's"


def write(folder: Path, family: str, **config: Any) -> Tokenizer:
    """Write `tokenizer.json` and `tokenizer_config.json`; return the tokenizer that the file describes."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = train(family, 640)
    tokenizer.save(str(folder / "tokenizer.json"))
    roles = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(roles | config))
    return tokenizer


@pytest.mark.parametrize(
    ("family", "class_name"), [("llama3", "LlamaTokenizerFast"), ("qwen", "GPT2Tokenizer"), ("gemma", "LlamaTokenizer")]
)
def test_the_file_decides_and_not_the_class_that_the_folder_names(
    family: str, class_name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    own = write(tmp_path, family, tokenizer_class=class_name)
    subject = Vocabulary.from_pretrained(tmp_path)
    for text in (PROBE, *CORPUS):
        assert subject.encode(text.encode()).token_ids_T.tolist() == own.encode(text, add_special_tokens=False).ids
    assert subject.encode(PROBE.encode()).lossless_T.all()
    (warning,) = subject.warnings
    assert warning in caplog.messages and str(tmp_path) in warning and class_name.removesuffix("Fast") in warning
    assert (subject.bos_id, subject.eos_id, subject.pad_id) == tuple(map(own.token_to_id, ("<bos>", "<eos>", "<pad>")))
    load_tokenizer(tmp_path).tokenizer.save_pretrained(tmp_path / "saved")
    again = Vocabulary.from_pretrained(tmp_path / "saved")
    assert again.fingerprint == subject.fingerprint and not again.warnings


def test_a_target_with_such_a_tokenizer_splits_as_its_source(tmp_path: Path) -> None:
    write(tmp_path / "source", "llama3", tokenizer_class="LlamaTokenizerFast")
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_layers": 1, "num_heads": 1}
    config = TargetConfig.model_validate({"tokenizer": str(tmp_path / "source"), "config": shape})
    made = prepare_target(config, [], tmp_path / "target", seed=0)
    source = Vocabulary.from_pretrained(tmp_path / "source")
    assert Vocabulary.from_pretrained(made).fingerprint == source.fingerprint


def test_a_class_that_splits_as_the_file_does_is_no_matter(tmp_path: Path) -> None:
    write(tmp_path, "byte_level", tokenizer_class="GPT2Tokenizer")
    assert Vocabulary.from_pretrained(tmp_path).warnings == ()


def test_roles_that_only_the_class_knows_are_kept(tmp_path: Path) -> None:
    """GPT-2's own tokenizer_config.json names no token."""
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / file).write_bytes((real_folder("gpt4o") / file).read_bytes())
    config = {"tokenizer_class": "GPT2Tokenizer"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    subject = Vocabulary.from_pretrained(tmp_path)
    assert subject.eos_id == subject.special_tokens["<|endoftext|>"] == 199999
    assert subject.warnings and subject.encode(b"it's 1234567\r\n").lossless_T.all()


@pytest.mark.parametrize(("flag", "warned", "digits"), [(None, True, 1), (False, False, 1), (True, False, 3)])
def test_mistrals_word_pattern_is_mended_when_asked_and_named_when_not(
    flag: bool | None, warned: bool, digits: int, tmp_path: Path
) -> None:
    shipped = real_folder("gpt35turbo")  # the pattern that was shipped with Mistral's tokenizers by mistake
    (tmp_path / "tokenizer.json").write_bytes((shipped / "tokenizer.json").read_bytes())
    settings = json.loads((shipped / "tokenizer_config.json").read_text()) | {"tokenizer_class": "TokenizersBackend"}
    settings |= {} if flag is None else {"fix_mistral_regex": flag}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mistral", "transformers_version": "4.50.0"}))
    subject = Vocabulary.from_pretrained(tmp_path)
    assert [("fix_mistral_regex" in warning and str(tmp_path) in warning) for warning in subject.warnings] == (
        [True] if warned else []
    )
    assert subject.encode(b"123").num_tokens == digits


def test_a_prefix_space_that_is_wished_for_and_not_in_the_file_is_named(tmp_path: Path) -> None:
    write(tmp_path, "llama3", tokenizer_class="PreTrainedTokenizerFast", add_prefix_space=True)
    (warning,) = Vocabulary.from_pretrained(tmp_path).warnings
    assert "add_prefix_space: true" in warning
    write(tmp_path, "byte_level_prefix", tokenizer_class="PreTrainedTokenizerFast", add_prefix_space=True)
    assert Vocabulary.from_pretrained(tmp_path).warnings == ()


def test_files_that_cannot_be_read_are_refused_in_one_line(tmp_path: Path) -> None:
    write(tmp_path / "cut", "llama3", tokenizer_class="PreTrainedTokenizerFast")
    file = tmp_path / "cut" / "tokenizer.json"
    file.write_text(file.read_text()[:1000])
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "cut", tmp_path / "empty"):
        with pytest.raises(ValueError, match=f"tokenizer: cannot load one from {folder}"):
            Vocabulary.from_pretrained(folder)


def bpe(**settings: Any) -> Tokenizer:
    pieces = ["\u2581", "a", "b", "c", "\u2581a", "ab"]
    merges = [("\u2581", "a"), ("a", "b")]
    return Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, merges, **settings))


def whole_words() -> Tokenizer:
    tokenizer = bpe()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


def spaces_removed() -> Tokenizer:
    tokenizer = bpe()
    tokenizer.normalizer = normalizers.Replace(" ", "")
    return tokenizer


def joined_by_spaces() -> Tokenizer:
    tokenizer = bpe()
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.WordPiece()
    return tokenizer


@pytest.mark.parametrize(
    ("tokenizer", "reason"),
    [
        (
            Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1, "##b": 2}, unk_token="[UNK]")),
            "WordPiece tokenizers are not",
        ),
        (Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1}, unk_token="[UNK]")), "WordLevel tokenizers are not"),
        (Tokenizer(models.BPE({"a": 0, "b</w>": 1}, [], end_of_word_suffix="</w>")), "end_of_word_suffix '</w>'"),
        (
            Tokenizer(models.BPE({"a": 0, "##b": 1}, [], continuing_subword_prefix="##")),
            "continuing_subword_prefix '##'",
        ),
        (whole_words(), "drops the space of 'a a'"),
        (spaces_removed(), "drops the space of 'a a'"),
        (joined_by_spaces(), r"decoder \(WordPiece\) writes something between tokens"),
    ],
)
def test_kinds_whose_tokens_do_not_determine_the_bytes_are_refused(
    tokenizer: Tokenizer, reason: str, tmp_path: Path
) -> None:
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"tokenizer: .*{reason}.* allowed"):
        Vocabulary.from_pretrained(tmp_path)
