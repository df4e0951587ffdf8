"""Passages scored by the sources of a recipe and fused here, as the fusion service does it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fusion_core.fusion import FusedInDetail
from services.base.errors import UnavailableError
from services.corpus.ledger import Window
from services.fusion.fuser import Fuser
from services.fusion.sources.remote import RefusedTextError
from services.fusion.target_text import UnfusableTextError
from services.models.prompt import Prompt
from services.recipes.recipe import Recipe
from services.store.capture_plan import Place
from services.wire.passage import Passage


@asynccontextmanager
async def opened_fuser(recipe: Recipe) -> AsyncIterator[Fuser]:
    """Give the sources of a recipe and its target, whose folder is prepared; what was scored goes to the store."""
    fuser = Fuser(recipe.fusion_service(), {})
    try:
        yield fuser
    finally:
        await fuser.close()


async def score_by_all(
    fuser: Fuser, passage: Passage, *, place: Place | None = None, window: Window | None = None
) -> tuple[Prompt, FusedInDetail] | tuple[str, ...]:
    """Return the target's tokens of a passage and its fusion, or the names of the sources that do not take it.

    Stored windows are not asked for. With `window` only those sources are asked that `fusion.sources_by` names for its
    domain, else all. "target" stands for the target among the names. Raises UnavailableError when a
    source has neither the passage in the store nor an answer.
    """
    try:
        names = fuser.names if window is None else fuser.names_for(window, fuser.names)
        prompt = await asyncio.to_thread(fuser.encode, passage)
    except UnfusableTextError:
        return ("target",)
    try:
        fused = await fuser.fuse_in_detail(passage, prompt, names=names, streamed=True, place=place)
    except UnfusableTextError as error:
        return error.refused_by or ("target",)
    except UnavailableError as error:
        raise _not_scored(error) from error
    for problem in fused.problems.values():
        if not isinstance(problem, RefusedTextError):
            raise _not_scored(problem) from problem
    return tuple(fused.problems) or (prompt, fused)


def _not_scored(problem: Exception) -> UnavailableError:
    return UnavailableError(
        f"a passage is not in the store, and not scored: {problem}. `fusion up` starts the sources, `fusion capture` "
        "stores what they say"
    )
