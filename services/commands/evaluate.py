"""Score models in nats per byte on a split: Hugging Face folders, and sources through the fusion service."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fusion_core.vocabulary import Vocabulary
from services.base.atomic import write_whole
from services.base.errors import UnavailableError
from services.base.version import git_revision
from services.commands.prepare import corpus_and_target
from services.corpus.ledger import Corpus, Window
from services.evaluation.controls import training_of
from services.evaluation.experts import describe_experts
from services.evaluation.harness import evaluate_tasks, read_tasks
from services.evaluation.intervals import compare
from services.evaluation.nats_per_byte import Scores, nats_per_byte
from services.evaluation.report.report import EVALUATION
from services.fusion.client import FusionClient, SkippedWindow, StreamRequest
from services.models.catalogue import resolve_model
from services.models.chat_template import TurnRefusedError
from services.models.chat_tokenizer import ChatTokenizer, open_chat
from services.recipes.recipe import Recipe, RecipeError
from services.recipes.resolve import resolve_sources
from services.source.config import AnySource
from services.wire.messages import read_messages

UNTOUCHED = "untouched target"


def split_windows(corpus: Corpus, split: str) -> list[Window]:
    """Return all windows of a split, in order."""
    return [corpus.window(split, index) for index in range(corpus.num_windows(split))]


def evaluate_folder(
    recipe: Recipe, windows: Sequence[Window], folder: Path, *, bos: int | None = None, source: AnySource | None = None
) -> Scores:
    """Score a model on windows, every one behind the model's BOS and its context, as in training.

    The left context is read by sources always, by others where the recipe's target reads it. A turn that the model's
    chat template refuses is an error.
    """
    config = recipe.distill
    passages = [window.passage for window in windows]
    if source is None and not recipe.corpus.target_context:
        passages = [replace(passage, context=b"", messages=b"") for passage in passages]
    return nats_per_byte(
        folder,
        passages,
        bos=bos,
        chat_template=source.chat_template if source else recipe.target_chat_template,
        device=config.device,
        torch_threads=config.torch_threads,
    )


def evaluate_sources(client: FusionClient, corpus: Corpus, split: str) -> tuple[dict[str, float], float]:
    """Return nats per byte of every source on a split, and of their fusion, from one pass of the fused stream."""
    nats: dict[str, float] = {}
    scored: dict[str, int] = {}
    fused, num_bytes = 0.0, 0
    for window in client.stream(StreamRequest(dataset=corpus.name, split=split, seed=0)):
        if isinstance(window, SkippedWindow):
            raise UnavailableError(f"window {window.index} of {split}: {', '.join(window.missing)} did not answer")
        block = window.block
        num_bytes += len(block.text_bytes)
        fused += block.nats_per_byte * len(block.text_bytes)
        for share in block.shares:
            nats.setdefault(share.name, 0.0)
            scored.setdefault(share.name, 0)
            if math.isfinite(share.nats_per_byte):  # a source without a usable row in the window has no loss there
                nats[share.name] += share.nats_per_byte * len(block.text_bytes)
                scored[share.name] += len(block.text_bytes)
    return {name: total / (scored[name] or math.nan) for name, total in nats.items()}, fused / num_bytes


def evaluate(
    recipe: Recipe,
    folders: Sequence[Path],
    split: str,
    *,
    sources: bool = False,
    tasks: Path | None = None,
    print_line: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Score models on a split of the recipe's corpus, with intervals.

    Scores of the recipe's own models are kept in evaluation.json for the report.

    Args:
        folders: the models; when there is none, the target before training and every trained model of the recipe.
        split: name of the split.
        sources: score the sources' own models as well, here and now, with transformers.
        tasks: folder of task files for lm-evaluation-harness, which is then run on every model too.
        print_line: called with a line per model.

    Raises RecipeError naming the model or split that is missing, or what is wrong with the tasks.
    """
    if tasks is not None:
        try:
            read_tasks(tasks)  # before the scoring, which takes long
        except ValueError as error:
            raise RecipeError(f"--tasks: {error}") from error
    models = {str(folder): (resolve_model(str(folder)), None) for folder in folders} or _own_models(recipe)
    source_models = {f"source {source.name}": source for source in recipe.sources} if sources else {}
    models |= _source_models(recipe) if sources else {}
    if not models:
        raise RecipeError(f"{recipe.run_folder}: no target and no trained model yet; name folders, or add --sources")
    corpus = corpus_and_target(recipe)
    if split not in corpus.splits:
        raise RecipeError(f"--split {split}: the corpus has {', '.join(corpus.splits)}")
    windows = split_windows(corpus, split)
    if sources and recipe.corpus.is_conversations:
        windows = _read_by_all(recipe, windows, print_line)
    scores = {}
    for name, (folder, bos) in models.items():
        print_line(f"{name}: {folder}")
        scores[name] = evaluate_folder(recipe, windows, folder, bos=bos, source=source_models.get(name))
        if not scores[name].lossless_W.all():
            print_line(
                f"{name}: its tokenizer does not spell {int((~scores[name].lossless_W).sum())} windows byte for byte"
            )
    results: dict[str, Any] = {}
    if tasks is not None:
        for name, (folder, _) in models.items():
            print_line(f"{name}: tasks in {tasks}")
            results[name] = evaluate_tasks(folder, tasks, device=recipe.distill.device)
    return write_evaluation(
        recipe, corpus, split, windows, scores, sources=list(source_models), tasks=results, keep=not folders
    )


def write_evaluation(
    recipe: Recipe,
    corpus: Corpus,
    split: str,
    windows: Sequence[Window],
    scores: Mapping[str, Scores],
    *,
    sources: Sequence[str] = (),
    tasks: Mapping[str, Any] | None = None,
    keep: bool = True,
) -> dict[str, Any]:
    """Compare the models on the windows of a split that they were scored on; `sources` are the names of sources.

    With `keep`, the comparison is written to evaluation.json in the run folder, for the report.
    """
    documents, domains = ([getattr(window, field) for window in windows] for field in ("document", "domain"))
    evaluation = {
        "corpus": corpus.name,
        "split": split,
        "fingerprint": corpus.fingerprint(split),
        "git_revision": git_revision(),
        "trainings": {
            name: training.to_json() for name in scores if (training := training_of(recipe.run_folder / name))
        },
        "domains": compare(scores, documents, domains),
        "experts": describe_experts(scores, documents, domains, sources=sources),
        "tasks": tasks or {},
    }
    if keep:
        write_whole(recipe.run_folder / EVALUATION, json.dumps(evaluation, indent=2) + "\n")
    return evaluation


def _read_by_all(recipe: Recipe, windows: Sequence[Window], print_line: Callable[[str], None]) -> list[Window]:
    """Return the turns that every source's chat template writes, so that all models are scored on the same ones."""
    read = list(windows)
    for source, folder in zip(recipe.sources, resolve_sources(recipe).values(), strict=True):
        chat = open_chat(folder, source.chat_template)
        kept = [window for window in read if chat is None or _writes(chat, window)]
        if len(kept) < len(read):
            print_line(
                f"source {source.name}: its chat template refuses {len(read) - len(kept)} turns, left out for all"
            )
        read = kept
    if not read:
        raise RecipeError("--sources: there is no turn that every source's chat template writes")
    return read


def _writes(chat: ChatTokenizer, window: Window) -> bool:
    try:
        chat.encode_turn(read_messages(window.messages), window.text, ends=window.ends_document)
    except TurnRefusedError:
        return False
    return True


def _own_models(recipe: Recipe) -> dict[str, tuple[Path, int | None]]:
    models: dict[str, tuple[Path, int | None]] = {}
    if recipe.target_folder.is_dir():
        models[UNTOUCHED] = (recipe.target_folder, None)
    for folder in sorted(recipe.run_folder.glob("*/model")):
        models[folder.parent.name] = (folder, None)
    return models


def _source_models(recipe: Recipe) -> dict[str, tuple[Path, int | None]]:
    models: dict[str, tuple[Path, int | None]] = {}
    for source, folder in zip(recipe.sources, resolve_sources(recipe).values(), strict=True):
        bos = None
        if source.bos_token is not None:
            bos = Vocabulary.from_pretrained(folder).special_tokens.get(source.bos_token)
        models[f"source {source.name}"] = (folder, bos)
    return models
