"""Load every tokenizer that a recipe names and try it on a text, so that an unusable one is known before a start."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from fusion_core.vocabulary import Vocabulary
from services.models.catalogue import resolve_model
from services.models.chat_template import MODEL
from services.models.chat_tokenizer import open_chat
from services.models.packages import file_sha256
from services.recipes.recipe import Recipe, RecipeError
from services.source.config import AnySource

_PROBE = "The capital of  France,\nnaïve 数字 12345:\n\tif x != 1: 👍\n"
"""Text with runs of spaces, accents, Chinese, digits, a tab, line ends and an emoji."""
_TOKEN_FILES = (
    "tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "special_tokens_map.json", "added_tokens.json",
)  # fmt: skip
"""Files that decide ids, splitting or roles, beside tokenizer_config.json."""
_NO_PART_OF_A_TOKENIZER = frozenset(
    {
        "chat_template", "model_max_length", "padding_side", "truncation_side", "add_bos_token", "add_eos_token",
        "name_or_path", "processor_class", "model_input_names",
    }
)  # fmt: skip
"""Settings in tokenizer_config.json that decide neither ids nor splitting nor roles."""


def check_tokenizers(recipe: Recipe, *, tried: Collection[str] = ()) -> None:
    """Raise RecipeError with a line per tokenizer that cannot be used, naming its key.

    `tried`: identities of tokenizers that have been used before; loading a large one takes seconds.
    """
    if problems := list(tokenizer_problems(recipe, tried=tried)):
        raise RecipeError("\n".join(problems))


def tokenizer_identity(folder: Path) -> str:
    """Return a hash that changes when ids, splitting or roles of a folder's tokenizer do, without loading it.

    Chat templates, sizes and sides of padding do not count. For a folder without any such file, it is the path.
    """
    files = [folder / name for name in _TOKEN_FILES if (folder / name).is_file()]
    if not files:
        return str(folder)
    settings = _json(folder / "tokenizer_config.json")
    if isinstance(settings, dict):
        settings = {key: value for key, value in settings.items() if key not in _NO_PART_OF_A_TOKENIZER}
    model = _json(folder / "config.json")
    decides = [
        {file.name: file_sha256(file) for file in files},
        settings,
        model.get("model_type") if isinstance(model, dict) else None,  # names the class where no setting does
    ]
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()


def _json(file: Path) -> Any:
    """Return the content of a JSON file: None without a file, its bytes in hexadecimal where it is not JSON."""
    if not file.is_file():
        return None
    text = file.read_bytes()
    try:
        return json.loads(text)
    except ValueError:
        return text.hex()


def template_identity(folder: Path, chosen: str | None) -> str:
    """Return a hash that changes with the chat template that `chosen` names, without loading it; empty for none."""
    if chosen is None:
        return ""
    own: list[Any] = []
    if chosen == MODEL:
        config = _json(folder / "tokenizer_config.json")
        own = [config.get("chat_template") if isinstance(config, dict) else config]
        own += [file.read_text(encoding="utf-8") for file in sorted(folder.glob("**/*.jinja"))]
    return hashlib.sha256(json.dumps([chosen, own]).encode()).hexdigest()


def _template_problems(recipe: Recipe, tried: Collection[str]) -> Iterator[str]:
    """Yield a line per chat template that is missing or cannot be used."""
    chosen = [(f"sources.{n}", source.model, source.chat_template) for n, source in enumerate(recipe.sources)]
    if recipe.target.model is not None:
        chosen.append(("target", recipe.target.model, recipe.target_chat_template))
    for key, model, template in chosen:
        try:
            folder = resolve_model(model)
        except ValueError:  # missing folders are reported elsewhere
            continue
        if template is not None and template_identity(folder, template) not in tried:
            try:
                open_chat(folder, template)
            except ValueError as error:
                yield f"{key}.{' '.join(str(error).split())}"


def tokenizer_problems(recipe: Recipe, *, tried: Collection[str] = ()) -> Iterator[str]:
    """Yield a line per tokenizer that cannot be used; missing folders are left out."""
    loaded: dict[Path, Vocabulary | str] = {}
    for key, folder, source in _folders(recipe):
        if tried and tokenizer_identity(folder) in tried:
            continue
        if folder not in loaded:
            loaded[folder] = _load(folder)
        vocabulary = loaded[folder]
        if isinstance(vocabulary, str):
            yield f"{key}: {vocabulary}"
        elif source is not None:
            yield from _role_problems(key.removesuffix(".model"), source, vocabulary)
    yield from _template_problems(recipe, tried)


def _folders(recipe: Recipe) -> Iterator[tuple[str, Path, AnySource | None]]:
    """Yield key and folder of every tokenizer that a recipe names, and the source that it belongs to."""
    named: list[tuple[str, str, AnySource | None]] = [
        (f"sources.{index}.model", source.model, source) for index, source in enumerate(recipe.sources)
    ]
    if recipe.target.model is not None:
        named.append(("target.model", recipe.target.model, None))
    for key, name, source in named:
        with suppress(ValueError):  # missing folders are reported elsewhere
            yield key, resolve_model(name), source
    tokenizer = recipe.target.tokenizer
    if tokenizer is not None and tokenizer.folder is not None:
        folder = Path(tokenizer.folder).expanduser()
        if folder.is_dir():
            yield "target.tokenizer", folder, None


def _load(folder: Path) -> Vocabulary | str:
    """Return the folder's vocabulary, or in one line why it cannot be used."""
    try:
        vocabulary = Vocabulary.from_pretrained(folder)
        vocabulary.encode(_PROBE.encode())
    except ValueError as error:
        return " ".join(str(error).split())
    return vocabulary


def _role_problems(key: str, source: AnySource, vocabulary: Vocabulary) -> Iterator[str]:
    for role in ("bos_token", "eos_token"):
        name = getattr(source, role, None)
        if name is not None and name not in vocabulary.special_tokens:
            known = ", ".join(vocabulary.special_tokens) or "none"
            yield f"{key}.{role}: {name!r} is no special token of {source.model}; it has {known}"
