"""Loading the fast tokenizer of a model folder, so that a text is split as the folder's own `tokenizer.json` says.

For many tokenizer classes transformers takes only the vocabulary from `tokenizer.json` and rebuilds normalizer,
pre-tokenizer and decoder as they usually are in the class that `tokenizer_config.json` names. Where the file has
others (DeepSeek-V3's byte-level BPE under the class LlamaTokenizerFast) the rebuilt tokenizer loses text.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import Tokenizer

from fusion_core.vocabulary.backend import DummyPrefix, dummy_prefix

logger = logging.getLogger(__name__)

_PROBES = (
    "The capital of",
    " a  b   c",
    "def f(x):\n\n    return x + 1\t# 3.14 + 1234567\r\n",
    "中文的句子。日本語の文章です。",
    "It's l'élève; we'll SHOUT HTTPResponse camelCase 👍🏽",
)
_ROLES = ("bos_token", "eos_token", "pad_token", "unk_token")
_MODEL_SETTINGS = ("unk_token", "unk_id", "fuse_unk", "byte_fallback", "ignore_merges", "dropout")
_UPPER_CASE_WORDS = r"\p{Lu}"
"""Part of the pattern that Mistral's tokenizers split words with; the one shipped by mistake lacks it."""


class LoadedTokenizer(NamedTuple):
    """A tokenizer of transformers, and one line for each thing about it that a user should know."""

    tokenizer: Any
    warnings: tuple[str, ...]


def load_tokenizer(folder: str | Path) -> LoadedTokenizer:
    """Return the tokenizer of a model folder (or hub name), with the pipeline of its `tokenizer.json` if it has one.

    Warnings are logged as well. The files that the tokenizer's `save_pretrained` writes split text in the same way.

    Raises:
        ValueError: no such folder, no tokenizer in it, a file that cannot be read, or one that is Python code.
    """
    if isinstance(folder, Path) and not folder.is_dir():
        raise ValueError(f"tokenizer: no folder {folder}")
    try:
        loaded = _load(str(folder))
    except Exception as error:  # the Rust library raises plain Exception for a file that it cannot use
        raise ValueError(f"tokenizer: cannot load one from {folder}: {error or type(error).__name__}") from error
    for warning in loaded.warnings:
        logger.warning(warning)
    return loaded


def _load(folder: str) -> LoadedTokenizer:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast  # takes seconds, and only this function needs it
    from transformers.models.auto.tokenization_auto import get_tokenizer_config
    from transformers.utils.hub import cached_file

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    warnings: tuple[str, ...] = ()
    file = cached_file(folder, "tokenizer.json", _raise_exceptions_for_missing_entries=False)
    if file is not None and type(tokenizer) is not PreTrainedTokenizerFast:
        # This class takes everything from the file.
        own: Any = PreTrainedTokenizerFast.from_pretrained(folder)
        by_class = getattr(tokenizer, "backend_tokenizer", None)
        if not isinstance(by_class, Tokenizer) or not _same_pipeline(own.backend_tokenizer, by_class):
            warnings = _difference(folder, own.backend_tokenizer, tokenizer)
            _add_roles(own, tokenizer)
            tokenizer = own
    return LoadedTokenizer(tokenizer, warnings + _ignored(folder, tokenizer, get_tokenizer_config(folder)))


def _same_pipeline(one: Tokenizer, other: Tokenizer) -> bool:
    """Return whether two tokenizers with the file's vocabulary prepare, split and merge text by the same settings."""

    def settings(tokenizer: Tokenizer) -> list[Any]:
        parts = (tokenizer.normalizer, tokenizer.pre_tokenizer, tokenizer.decoder)
        model = tokenizer.model
        return [
            type(model),
            *(part and part.__getstate__() for part in parts),
            *(getattr(model, name, None) for name in _MODEL_SETTINGS),
        ]

    return settings(one) == settings(other)


def _difference(folder: str, own: Tokenizer, by_class: Any) -> tuple[str, ...]:
    """Return a warning when the tokenizer that transformers makes of a class splits text otherwise than the file."""
    name, backend = type(by_class).__name__, getattr(by_class, "backend_tokenizer", None)
    for probe in _PROBES:
        ids = own.encode(probe, add_special_tokens=False).ids
        if not isinstance(backend, Tokenizer) or backend.encode(probe, add_special_tokens=False).ids != ids:
            return (
                f"tokenizer: transformers' {name} splits {probe!r} otherwise than the tokenizer.json in {folder} says; "
                "here the file decides",
            )
    return ()


def _add_roles(own: Any, by_class: Any) -> None:
    """Give `own` the roles that the other tokenizer has from its class alone, for tokens that are in the file."""
    for role in _ROLES:
        token = getattr(by_class, role, None)
        if token is not None and getattr(own, role) is None and own.backend_tokenizer.token_to_id(token) is not None:
            own.add_special_tokens({role: token})


def _ignored(folder: str, tokenizer: Any, config: dict[str, Any]) -> tuple[str, ...]:
    """Return a warning for each setting of splitting that the folder states or lacks and the tokenizer ignores."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        return ()
    warnings = []
    # transformers marks a tokenizer of Mistral's so when its folder does not say whether to correct it.
    marked = getattr(backend, "fix_mistral_regex", None) is False and config.get("fix_mistral_regex") is None
    if marked and _UPPER_CASE_WORDS not in str(backend.pre_tokenizer and backend.pre_tokenizer.__getstate__()):
        warnings.append(
            f"tokenizer: {folder} has the word pattern that Mistral's models were not trained with; put "
            '"fix_mistral_regex": true into its tokenizer_config.json to mend it, or false to keep it'
        )
    asked = config.get("add_prefix_space")
    parts = {
        key: json.loads(part.__getstate__()) if part else None
        for key, part in (("normalizer", backend.normalizer), ("pre_tokenizer", backend.pre_tokenizer))
    }
    if isinstance(asked, bool) and asked != (dummy_prefix(parts) is not DummyPrefix.NONE):
        warnings.append(
            f"tokenizer: add_prefix_space: {str(asked).lower()} in {folder}/tokenizer_config.json is not followed, "
            "its tokenizer.json says otherwise"
        )
    return tuple(warnings)
