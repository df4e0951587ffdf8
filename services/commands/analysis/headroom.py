"""`fusion headroom`: sources, their best mixture, the fused rows and the target compared before anything is trained."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from fusion_core.arrays import Float64
from services.base.errors import NotFoundError, ServiceError, UnavailableError
from services.base.version import git_revision
from services.commands.analysis.scoring import opened_fuser, score_by_all
from services.commands.evaluate import evaluate_folder
from services.commands.prepare import corpus_and_target, prepare
from services.corpus.ledger import TRAIN, Corpus, Window
from services.evaluation.headroom.forecast import forecast
from services.evaluation.headroom.measured import FUSED, Measured, mean_outside, measure
from services.fusion.sources.remote import RemoteSource
from services.recipes.recipe import Recipe, RecipeError
from services.source.config import AnySource
from services.store.capture_plan import Place
from services.wire.passage import Passage

_IN_FLIGHT = 16
"""Windows that are scored at once."""
_TIMED = 16
"""Windows by which a source is timed."""

Progress = Callable[[str, int, int], None]


def headroom(recipe: Recipe, split: str, num_windows: int, progress: Progress) -> dict[str, Any]:
    """Measure on windows spread evenly over a split whether fusing the recipe's sources can help.

    Windows come from the store where they are there, else from the sources that run. A window that a source or the
    target does not take byte for byte is left out for all. A pretrained target is scored too, here. Fused rows are
    measured before `fusion.soften`: softened ones are no measure of the sources.

    Args:
        recipe: the run.
        split: name of the split.
        num_windows: most windows to look at.
        progress: called with a name, the number of windows that are done, and the number of all.

    Raises RecipeError for an unknown split or when no window is left, UnavailableError when a source has neither the
    windows in the store nor an answer.
    """
    prepare(recipe, save=False)
    corpus = corpus_and_target(recipe)
    if split not in corpus.splits:
        raise RecipeError(f"--split {split}: the corpus has {', '.join(corpus.splits)}")
    total = corpus.num_windows(split)
    spread = np.unique(np.linspace(0, total - 1, min(num_windows, total)).astype(int)).tolist() if total else []
    chosen = [corpus.window(split, index) for index in spread]
    plain = recipe.model_copy(update={"fusion": recipe.fusion.model_copy(update={"soften": 1.0})})
    measured, left_out = asyncio.run(_measure(plain, corpus.fingerprint(split), chosen, progress))
    kept = [window for window in chosen if window.index in measured]
    if not kept:
        reasons = ", ".join(f"{name} {number}" for name, number in left_out.items())
        raise RecipeError(f"--split {split}: no window is taken by all models (not taken: {reasons or 'none there'})")
    names = [source.name for source in recipe.sources]
    windows = [measured[window.index] for window in kept]
    tops = {source.name: source.top_k for source in recipe.sources} | {FUSED: recipe.fusion.k_out}
    return {
        "corpus": corpus.name,
        "split": split,
        "fingerprint": corpus.fingerprint(split),
        "git_revision": git_revision(),
        "windows": len(kept),
        "left_out": dict(left_out),
        "sources": names,
        "fusion": recipe.fusion.model_dump(mode="json"),
        "outside_k": mean_outside(windows, tops),
        "cost": asyncio.run(_costs(recipe, corpus, [window.passage for window in kept[:_TIMED]])),
        **forecast(names, windows, strategy=recipe.fusion.strategy, target_nats_W=_target_nats(recipe, kept)),
    }


async def _measure(
    recipe: Recipe, fingerprint: str, windows: Sequence[Window], progress: Progress
) -> tuple[dict[int, Measured], Counter[str]]:
    """Return the windows that all models take, by index, and how many each model does not take."""
    measured, left_out, gate = dict[int, Measured](), Counter[str](), asyncio.Semaphore(_IN_FLIGHT)
    num_done = itertools.count(1)

    def count() -> None:
        progress("windows", next(num_done), len(windows))

    async with opened_fuser(recipe) as fuser:

        async def score(window: Window) -> None:
            async with gate:
                scored = await score_by_all(fuser, window.passage, place=Place(fingerprint, window.index))
                if isinstance(scored[0], str):
                    left_out.update(scored)
                    return
                _, fused = scored
                blocks = {name: block for name, block in fused.blocks.items() if block is not None}
                rows = {name: of_source for name, of_source in fused.rows.items() if of_source is not None}
                lossy = [name for name, block in blocks.items() if not block.mask_T[: block.num_text_tokens].all()]
                if not lossy:
                    measured[window.index] = await asyncio.to_thread(
                        measure, blocks, rows, fused.block, document=window.document, domain=window.domain
                    )
                left_out.update(lossy)

        try:
            async with asyncio.TaskGroup() as tasks:
                for window in windows:
                    tasks.create_task(score(window)).add_done_callback(lambda _: count())
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None
    return measured, left_out


def _target_nats(recipe: Recipe, windows: Sequence[Window]) -> Float64 | None:
    """Return the nats that a pretrained target loses on each window; None for one that starts from scratch."""
    if recipe.target.model is None:
        return None
    return evaluate_folder(recipe, windows, recipe.target_folder).nats_W


async def _costs(recipe: Recipe, corpus: Corpus, passages: Sequence[Passage]) -> dict[str, dict[str, float | str]]:
    """Return by source the seconds that it takes for a million bytes, and for the split `train`.

    Measured now where the source answers, one after the other; else what `curate.seconds_per_megabyte` says. A source
    without either is left out.
    """
    told = recipe.curate.seconds_per_megabyte if recipe.curate is not None else {}
    costs: dict[str, dict[str, float | str]] = {}
    for source in recipe.sources:
        seconds = await _timed(recipe, source, passages)
        basis = "measured" if seconds is not None else "curate.seconds_per_megabyte"
        if seconds is None:
            seconds = told.get(source.name)
        if seconds is not None:
            train = seconds * corpus.num_bytes(TRAIN) / 1e6
            costs[source.name] = {"seconds_per_megabyte": seconds, "train_seconds": train, "basis": basis}
    return costs


async def _timed(recipe: Recipe, config: AnySource, passages: Sequence[Passage]) -> float | None:
    """Return the seconds that a running source takes for a million bytes of text; None when it does not answer."""
    source = RemoteSource(recipe.endpoint(config), recipe.service)
    try:
        await source.identity()
        await source.score(passages[0])
        start = time.perf_counter()
        await asyncio.gather(*(source.score(passage) for passage in passages))
        seconds = time.perf_counter() - start
    except (UnavailableError, NotFoundError):
        return None
    except ServiceError as error:
        raise RecipeError(f"source {config.name}: {error}") from error
    finally:
        await source.close()
    return seconds / sum(len(passage.text) for passage in passages) * 1e6
