"""`fusion view`: a page that shows what each source says of a text, token by token."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fusion_core.blocks import Block
from fusion_core.fusion import FusionConfig, fuse
from fusion_core.fusion.attribution import attribute
from services.base.atomic import write_whole
from services.commands.analysis.scoring import opened_fuser, score_by_all
from services.commands.prepare import corpus_and_target, prepare
from services.corpus.ledger import Window
from services.recipes.recipe import Recipe, RecipeError
from services.store.capture_plan import Place
from services.web.shown import shown_text
from services.web.token_page import token_page
from services.web.token_view import ScoredText, Strategy, token_view
from services.wire.passage import Passage


@dataclass(frozen=True, slots=True)
class ChosenPassage:
    """The passage to show and its name; its place in the corpus if it has one."""

    passage: Passage
    place: Place | None
    title: str
    window: Window | None = None


def chosen_passage(recipe: Recipe, *, text: bytes | None, split: str, window: int) -> ChosenPassage:
    """Return the passage of a user's own text, or else of a window; what is missing of corpus and target is made.

    Raises RecipeError naming the option that cannot be honoured.
    """
    prepare(recipe, save=False)
    if text is not None:
        if not text:
            raise RecipeError("--text, --file: must not be empty")
        try:
            text.decode()
        except UnicodeDecodeError as error:
            raise RecipeError(f"--text, --file: must be UTF-8, byte {error.start} is not") from error
        if len(text) > recipe.service.max_text_bytes:
            most = recipe.service.max_text_bytes
            raise RecipeError(f"--text, --file: {len(text)} bytes, service.max_text_bytes allows {most}")
        return ChosenPassage(Passage(text, ends_document=True), None, f"{recipe.name}: a text of {len(text)} bytes")
    corpus = corpus_and_target(recipe)
    if split not in corpus.splits:
        raise RecipeError(f"--split {split}: the corpus has {', '.join(corpus.splits)}")
    if window >= corpus.num_windows(split):
        raise RecipeError(f"--window {window}: split {split} has windows 0 to {corpus.num_windows(split) - 1}")
    found = corpus.window(split, window)
    title = f"{recipe.name}: window {window} of {split}, document {found.document}"
    return ChosenPassage(found.passage, Place(corpus.fingerprint(split), window), title, found)


def write_view(recipe: Recipe, chosen: ChosenPassage, path: Path, *, against: str | None, top: int) -> Path:
    """Write the page of a passage and return its path.

    Args:
        recipe: the run.
        chosen: the passage.
        path: of the page.
        against: a second strategy to show beside the recipe's.
        top: candidates shown per row.

    Raises RecipeError naming the models that do not take the text, UnavailableError when a source does not answer.
    """
    view = asyncio.run(_view(recipe, chosen, against, top))
    before = chosen.passage.messages or chosen.passage.context
    title = shown_text(chosen.title)
    write_whole(path, token_page(view, title=title, before=shown_text(before.decode("utf-8", errors="replace"))))
    return path


async def _view(recipe: Recipe, chosen: ChosenPassage, against: str | None, top: int) -> dict[str, Any]:
    async with opened_fuser(recipe) as fuser:
        scored = await score_by_all(fuser, chosen.passage, place=chosen.place, window=chosen.window)
        if isinstance(scored[0], str):
            raise RecipeError(f"the text is not taken by {', '.join(map(str, scored))}")
        prompt, fused = scored
        configs = [recipe.fusion]
        if against is not None:
            configs.append(_with_strategy(recipe, against))
        blocks = {name: block for name, block in fused.blocks.items() if block is not None}
        rows = {name: of_source for name, of_source in fused.rows.items() if of_source is not None}
        text = ScoredText(prompt.encoding, blocks, rows, fuser.vocabularies, fuser.target)
        strategies = []
        for config in configs:
            block: Block = fused.block
            if config is not recipe.fusion:
                least = min(config.min_sources, len(rows))
                block = fuse(prompt.text, prompt.encoding, rows, config, fuser.target.fingerprint, min_sources=least)
            found = attribute(blocks, rows, prompt.encoding, block, config)
            strategies.append(Strategy(_name(config), block, found))
        return await asyncio.to_thread(token_view, text, strategies, top)


def _with_strategy(recipe: Recipe, strategy: str) -> FusionConfig:
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
