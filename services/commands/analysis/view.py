"""`fusion view`: what each source says of a text, token by token, as one file or as a page that asks for texts."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fusion_core.blocks import Block
from fusion_core.fusion import FusionConfig, fuse
from fusion_core.fusion.attribution import attribute
from services.base.atomic import write_whole
from services.commands.analysis.scoring import opened_fuser, score_by_all
from services.corpus.ledger import Corpus, Window
from services.fusion.fuser import Fuser
from services.recipes.recipe import Recipe, RecipeError
from services.store.capture_plan import Place
from services.web.shown import shown_text
from services.web.token_page import token_page
from services.web.token_view import ScoredText, Strategy, token_view
from services.wire.messages import Messages, check_messages
from services.wire.passage import Passage


@dataclass(frozen=True, slots=True)
class ChosenPassage:
    """The passage to show and its name; its place in the corpus if it has one."""

    passage: Passage
    place: Place | None
    title: str
    window: Window | None = None


def own_text(recipe: Recipe, text: bytes, where: str) -> ChosenPassage:
    """Return the passage of a user's own text; RecipeError names it by `where` when it cannot be scored."""
    _check_size(recipe, text, where)
    return ChosenPassage(Passage(text, ends_document=True), None, f"{recipe.name}: a text of {len(text)} bytes")


def own_conversation(recipe: Recipe, messages: Sequence[dict[str, Any]]) -> ChosenPassage:
    """Return the passage of a conversation's last message behind those before it; raises RecipeError."""
    try:
        check_messages(list(messages))
    except ValueError as error:
        raise RecipeError(str(error)) from error
    if not messages:
        raise RecipeError("messages: must not be empty")
    *before, last = messages
    if last["role"] != "assistant":
        raise RecipeError(f"messages[{len(before)}].role: the last message must be the assistant's")
    text = (last.get("content") or "").encode()
    written = Messages(before).to_bytes()
    _check_size(recipe, text, f"messages[{len(before)}].content", len(written))
    title = f"{recipe.name}: a message of {len(text)} bytes behind {len(before)}"
    return ChosenPassage(Passage(text, ends_document=True, messages=written), None, title)


def corpus_window(recipe: Recipe, corpus: Corpus, split: str, window: int) -> ChosenPassage:
    """Return the passage of a window; RecipeError names the split or window that is not there."""
    if split not in corpus.splits:
        raise RecipeError(f"--split {split}: the corpus has {', '.join(corpus.splits)}")
    if window >= (number := corpus.num_windows(split)):
        there = f"windows 0 to {number - 1}" if number else "no windows"
        raise RecipeError(f"--window {window}: split {split} has {there}")
    found = corpus.window(split, window)
    title = f"{recipe.name}: window {window} of {split}, document {found.document}"
    return ChosenPassage(found.passage, Place(corpus.fingerprint(split), window), title, found)


def _check_size(recipe: Recipe, text: bytes, where: str, num_before: int = 0) -> None:
    if not text:
        raise RecipeError(f"{where}: must not be empty")
    try:
        text.decode()
    except UnicodeDecodeError as error:
        raise RecipeError(f"{where}: must be UTF-8, byte {error.start} is not") from error
    most = recipe.service.max_text_bytes
    if len(text) + num_before > most:
        raise RecipeError(f"{where}: {len(text) + num_before} bytes, service.max_text_bytes allows {most}")


def write_view(recipe: Recipe, chosen: ChosenPassage, path: Path, *, against: str | None, top: int) -> Path:
    """Write the page of a passage and return its path.

    Args:
        recipe: the run, whose corpus and target are prepared.
        chosen: the passage.
        path: of the page.
        against: a second strategy to show beside the recipe's.
        top: candidates shown per row.

    Raises RecipeError naming the models that do not take the text, UnavailableError when a source does not answer.
    """
    strategies = [recipe.fusion] if against is None else [recipe.fusion, with_strategy(recipe, against)]

    async def ask() -> dict[str, Any]:
        async with opened_fuser(recipe) as fuser:
            return await view_of(fuser, recipe, chosen, strategies, top)

    shown = asyncio.run(ask())
    write_whole(path, token_page(shown["view"], title=shown["title"], before=shown["before"]))
    return path


async def view_of(
    fuser: Fuser, recipe: Recipe, chosen: ChosenPassage, strategies: Sequence[FusionConfig], top: int
) -> dict[str, Any]:
    """Return what a page shows of a passage: `view` as `token_view` gives it, `title` and `before`. Raises as
    `write_view`."""
    scored = await score_by_all(fuser, chosen.passage, place=chosen.place, window=chosen.window)
    if isinstance(scored[0], str):
        raise RecipeError(f"the text is not taken by {', '.join(map(str, scored))}")
    prompt, fused = scored
    blocks = {name: block for name, block in fused.blocks.items() if block is not None}
    rows = {name: of_source for name, of_source in fused.rows.items() if of_source is not None}
    text = ScoredText(prompt.encoding, blocks, rows, fuser.vocabularies, fuser.target)

    def made() -> dict[str, Any]:
        shown = []
        for config in strategies:
            block: Block = fused.block
            if config is not recipe.fusion:
                least = min(config.min_sources, len(rows))
                block = fuse(prompt.text, prompt.encoding, rows, config, fuser.target.fingerprint, min_sources=least)
            shown.append(Strategy(_name(config), block, attribute(blocks, rows, prompt.encoding, block, config)))
        return token_view(text, shown, top)

    before = (chosen.passage.messages or chosen.passage.context).decode("utf-8", errors="replace")
    return {
        "view": await asyncio.to_thread(made),
        "title": shown_text(chosen.title),
        "before": shown_text(before),
    }


def with_strategy(recipe: Recipe, strategy: str) -> FusionConfig:
    """Return the recipe's section `fusion` with another strategy; `fixed` weighs all sources alike."""
    fusion = recipe.fusion
    if strategy == fusion.strategy != "fixed":
        return fusion
    of_others: dict[str, Any] = {"weights": {}, "prior": {}}
    if strategy == "fixed":
        of_others |= {"weights": {source.name: 1.0 for source in recipe.sources}, "min_weight": 0.0}
    if strategy == "online":
        of_others |= {"scope": "window"}
    return FusionConfig.model_validate(fusion.model_dump() | {"strategy": strategy} | of_others)


def _name(config: FusionConfig) -> str:
    if config.strategy == "fixed":
        return f"fixed {', '.join(f'{name} {weight:g}' for name, weight in config.weights.items())}"
    return "online" if config.strategy == "online" else f"{config.strategy} by {config.scope}"
