"""Make the files that services and training need: the corpus in windows, the target's folder, the resolved recipe."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

from fusion_core.fusion import DEFAULT_DOMAIN
from fusion_core.vocabulary import Vocabulary
from services.base.errors import SettingError
from services.commands.recall.corpus import recalled_corpus
from services.corpus.cleaning.published import DOCUMENTS, check_curated, copy_documents
from services.corpus.ledger import Corpus
from services.corpus.prepare import WindowTokenizer, plan_corpus, read_text
from services.distill.target.prepare import prepare_target
from services.models.catalogue import resolve_model
from services.models.chat_tokenizer import ChatTokenizer
from services.recipes.recipe import Recipe, RecipeError
from services.recipes.resolve import resolve, resolve_sources
from services.recipes.tokenizers import check_tokenizers, template_identity, tokenizer_identity


def prepare(recipe: Recipe, print_line: Callable[[str], None] = lambda line: None, *, save: bool = True) -> Path:
    """Make the files that are missing; return the file of the resolved recipe, in the run folder.

    With `save=False` a file that is there stays: it is the recipe of the running services, which a training run must
    not change.

    Raises RecipeError or ValueError naming the key that cannot be honoured.
    """
    resolve_sources(recipe)
    check_tokenizers(recipe, tried=_tried_tokenizers(recipe))
    try:
        recipe.run_folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RecipeError(f"output_dir: cannot write to {recipe.run_folder}: {error.strerror}") from error
    corpus_and_target(recipe, print_line)
    path = recipe.run_folder / "recipe.yaml"
    if save or not path.is_file():
        recipe.save(path)
    return path


def _tried_tokenizers(recipe: Recipe) -> set[str]:
    """Return the identities of the tokenizers that the windows on disk were planned with."""
    try:
        record = Corpus.open(recipe.corpus_folder).record
    except ValueError:
        return set()
    tried = (entry for entry in record["planned_for"] if entry[0] in record["vocabularies"])
    return {identity for entry in tried for identity in (entry[1], *entry[4:])}


def corpus_and_target(recipe: Recipe, print_line: Callable[[str], None] = lambda line: None) -> Corpus:
    """Return the corpus in windows that suit the tokenizers of all sources and of the target; make missing files.

    The target comes second: its tokenizer may be trained on the text, and the windows are planned for it too.
    """

    print_line(f"corpus {recipe.corpus.name}")
    if recipe.curate is not None and recipe.reads_curated:
        try:
            ledger = check_curated(recipe.curate, recipe.curated_location)
            if (url := recipe.curate.folder) is not None:
                copy_documents(url, ledger["identity"], recipe.curated_folder.absolute() / DOCUMENTS)
        except ValueError as error:
            raise RecipeError(f"curate.{error}") from error
    try:
        config = recipe.corpus if recipe.corpus.recall is None else recalled_corpus(recipe, print_line)
        text = read_text(config, recipe.corpus_folder)
        target = recipe.target
        if target.model is not None:
            target = target.model_copy(update={"model": str(resolve("target.model", target.model))})
        folder, seed = recipe.target_folder, recipe.distill.seed
        prepare_target(target, text.train_texts(), folder, seed, corpus_fingerprint=text.fingerprint)
        print_line(f"target {folder}")
        limits = _max_positions(folder), recipe.corpus.target_context
        own = _tokenizer("target", folder, *limits, recipe.target_chat_template, is_target=True)
        corpus = plan_corpus(text, [*_source_tokenizers(recipe, print_line), own])
    except SettingError as error:
        raise RecipeError(f"corpus.{error}") from error
    _check_domains(recipe, corpus)
    for split in corpus.splits:
        info = corpus.record["splits"][split]
        line = f"{split}: {corpus.num_windows(split)} windows, {corpus.num_bytes(split):,} bytes"
        if info["num_cuts"] and info["num_cuts_at_boundaries"] is not None:
            line += f", {info['num_cuts_at_boundaries']} of {info['num_cuts']} cuts at boundaries of every tokenizer"
        print_line(line)
        for turns in _turn_lines(info.get("turns", {})):
            print_line(f"{split}: {turns}")
    return corpus


def _check_domains(recipe: Recipe, corpus: Corpus) -> None:
    """Raise RecipeError naming the first document that `fusion.sources_by` has no entry for."""
    if not recipe.fusion.sources_by or DEFAULT_DOMAIN in recipe.fusion.sources_by:
        return
    for split in corpus.splits:
        for document, domain in corpus.domains(split):
            try:
                recipe.fusion.sources_of(domain, ())
            except LookupError as error:
                raise RecipeError(f"fusion.{error}: document {document}") from error


def _turn_lines(turns: dict[str, dict[str, int]]) -> Iterator[str]:
    """Yield what became of the turns of conversations that are no windows, or are not read by every model."""
    reasons = {
        "tool_calls": "that only call tools",
        "empty": "without words",
        "too_long": "too long for a window or a model",
        "refused": "refused by chat templates",
    }
    if left_out := turns.get("left_out"):
        yield "left out: " + ", ".join(f"{number} turns {reasons[reason]}" for reason, number in left_out.items())
    for name, number in turns.get("refused_by", {}).items():
        yield f"{name}: its chat template does not write {number} turns"


def _source_tokenizers(recipe: Recipe, print_line: Callable[[str], None]) -> Iterator[WindowTokenizer]:
    for index, source in enumerate(recipe.sources):
        try:
            folder = resolve_model(source.model)
        except ValueError as error:
            print_line(f"windows are planned without the tokenizer of sources.{index}: {error}")
        else:
            template = source.chat_template if recipe.corpus.is_conversations else None
            yield _tokenizer(f"sources[{index}]", folder, source.max_tokens, True, template, eos_token=source.eos_token)


def _tokenizer(
    name: str,
    folder: Path,
    max_tokens: int | None,
    reads_context: bool,
    template: str | None,
    *,
    eos_token: str | None = None,
    is_target: bool = False,
) -> WindowTokenizer:
    return WindowTokenizer(
        name,
        tokenizer_identity(folder),
        lambda: Vocabulary.from_pretrained(folder),
        max_tokens,
        reads_context,
        is_target,
        template_identity(folder, template),
        None if template is None else lambda: ChatTokenizer.from_pretrained(folder, template, eos_token=eos_token),
    )


def _max_positions(folder: Path) -> int | None:
    """Return the longest input that the target can be trained on: BOS, context, and all tokens but the last."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    positions: int | None = config.get("text_config", config).get("max_position_embeddings")
    return positions
