"""Checks across the sections of a recipe: names, sizes and keys that have to fit each other."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from fusion_core.fusion import DEFAULT_DOMAIN
from services.base.credentials import refuse_credentials
from services.distill.curriculum import WHOLE_TRAIN
from services.source.config import SourceConfig

if TYPE_CHECKING:
    from services.recipes.recipe import Recipe


def check_sections(recipe: Recipe) -> None:
    """Raise ValueError naming the first key that does not fit another section."""
    _check_names(recipe)
    _check_windows(recipe)
    _check_pools(recipe)
    _check_training(recipe)
    _check_credentials(recipe)
    _check_named_sources(recipe)


def _check_names(recipe: Recipe) -> None:
    """Raise ValueError for names that are used twice, or settings of the mixture that do not fit their number."""
    names = [source.name for source in recipe.sources]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"sources: the name {twice[0]} is used twice")
    if recipe.service.application in names:
        raise ValueError(f"service.application: {recipe.service.application} is the name of a source as well")
    taken = {*names, recipe.service.application}
    for section, served in recipe.all_beside():
        if served.application in taken:
            raise ValueError(f"{section}.application: {served.application} is the name of another application")
        taken.add(served.application)
    if twice := sorted({name for name in recipe.tracking if recipe.tracking.count(name) > 1}):
        raise ValueError(f"tracking: names {twice[0]} twice")
    if recipe.fusion.min_sources > len(names):
        least = recipe.fusion.min_sources
        raise ValueError(f"fusion.min_sources: must be at most the number of sources, {len(names)}, got {least}")
    if recipe.fusion.strategy == "fixed" and (missing := sorted(set(names) - set(recipe.fusion.weights))):
        raise ValueError(f"fusion.weights: no weight for source {missing[0]}")
    if recipe.fusion.prior and (missing := sorted(set(names) - set(recipe.fusion.prior))):
        raise ValueError(f"fusion.prior: none for source {missing[0]}")
    if recipe.fusion.min_weight * len(names) > 1:
        raise ValueError(
            f"fusion.min_weight: must be at most 1 / {len(names)} for {len(names)} sources, got "
            f"{recipe.fusion.min_weight}"
        )


def _check_windows(recipe: Recipe) -> None:
    """Raise ValueError for windows that a source or the service would not take."""
    limits = {
        f"sources.{n}.max_text_bytes": s.max_text_bytes
        for n, s in enumerate(recipe.sources)
        if isinstance(s, SourceConfig)
    }
    corpus = recipe.corpus
    before = "max_history_bytes" if corpus.is_conversations else "context_bytes"
    num_before = getattr(corpus, before)
    windows = {"window_bytes": corpus.window_bytes} | {
        f"pools.{name}.window_bytes": pool.window_bytes
        for name, pool in corpus.pools.items()
        if pool.window_bytes is not None
    }
    for key, limit in (limits | {"service.max_text_bytes": recipe.service.max_text_bytes}).items():
        for window, num_bytes in windows.items():
            if num_bytes > limit:
                raise ValueError(f"corpus.{window}: {num_bytes} is more than {key} = {limit}")
            if num_bytes + num_before > limit:
                together = f"{num_before} and {window} = {num_bytes} together"
                raise ValueError(f"corpus.{before}: {together} are more than {key} = {limit}")


def _check_pools(recipe: Recipe) -> None:
    """Raise ValueError for a stage of the curriculum that draws from a pool which the corpus does not have."""
    stages, pools = recipe.distill.stages or (), recipe.corpus.pools
    if stages and WHOLE_TRAIN in pools:
        raise ValueError(f"corpus.pools: {WHOLE_TRAIN} is the whole split in distill.stages; rename the pool")
    for number, stage in enumerate(stages):
        if unknown := sorted(set(stage.mixture) - {WHOLE_TRAIN, *pools}):
            raise ValueError(
                f"distill.stages.{number}.mixture: no pool is called {unknown[0]}; there are "
                f"{', '.join((WHOLE_TRAIN, *pools))} (see corpus.pools)"
            )


def _check_training(recipe: Recipe) -> None:
    """Raise ValueError for settings of training that the target or the service cannot honour."""
    if recipe.distill.lora is not None and recipe.target.model is None:
        raise ValueError("distill.lora: adapters need a pretrained target (target.model), this one is from scratch")
    if recipe.distill.on_policy is not None and not recipe.corpus.target_context:
        raise ValueError(
            "corpus.target_context: false lets the target read no prompt, and distill.on_policy is about answers to "
            "prompts; leave it out"
        )
    tokenizer = recipe.target.tokenizer
    if recipe.fusion.alignment.method == "transport" and tokenizer is not None and tokenizer.train is not None:
        raise ValueError(
            "fusion.alignment: transport matches candidates with those of a source that has the target's "
            "vocabulary, and target.tokenizer.train makes a new one; allowed here: byte, min_edit"
        )
    prefetch, allowed = recipe.distill.prefetch_per_worker, recipe.service.per_client.blocks
    if prefetch > allowed and recipe.service.address is None:
        raise ValueError(
            f"distill.prefetch_windows: {prefetch} is more than service.per_client.blocks = {allowed} "
            "(two batches when not set)"
        )
    if recipe.distill.k is not None and recipe.distill.k > recipe.fusion.k_out:
        raise ValueError(f"distill.k: {recipe.distill.k} is more than fusion.k_out = {recipe.fusion.k_out}")


def _check_credentials(recipe: Recipe) -> None:
    """Raise ValueError for a URL with a password in it."""
    stores = [("service.store", recipe.service.store), ("distill.storage", recipe.distill.storage)]
    stores += [("corpus.folder", recipe.corpus.folder)]
    stores += [("curate.folder", recipe.curate.folder)] if recipe.curate is not None else []
    stores += [("sample.store", recipe.sample.store)] if recipe.sample is not None else []
    for key, location in stores:
        if location is not None:
            refuse_credentials(location, key)


def _check_named_sources(recipe: Recipe) -> None:
    """Raise ValueError for a key that names a source which the recipe does not have."""
    training = recipe.recall.train if recipe.recall is not None else None
    labels = training.labels if training is not None else None
    names, weights = [source.name for source in recipe.sources], recipe.fusion.weights
    by_domain = {
        f"fusion.sources_by.{domain}": () if chosen == "all" else chosen
        for domain, chosen in recipe.fusion.sources_by.items()
    }
    mixed = {"distill.sources": recipe.distill.sources or ()} | by_domain
    named: dict[str, Iterable[str]] = {
        "fusion.weights": weights,
        "fusion.prior": recipe.fusion.prior,
        "recall.train.labels.source": () if labels is None else (labels.source,),
        "sample.sources": (recipe.sample.sources if recipe.sample is not None else None) or (),
        "curate.seconds_per_megabyte": recipe.curate.seconds_per_megabyte if recipe.curate is not None else (),
        **mixed,
    }
    for key, used in named.items():
        if unknown := sorted(set(used) - set(names)):
            raise ValueError(f"{key}: no source is called {unknown[0]}; there are {', '.join(names)}")
    for key, chosen in by_domain.items():
        if chosen and recipe.distill.sources and not set(chosen) & set(recipe.distill.sources):
            raise ValueError(f"distill.sources: {key} names none of them, and windows without a source are skipped")
    for key, chosen in mixed.items():
        if chosen and weights and not any(map(weights.get, chosen)):
            raise ValueError(f"{key}: fusion.weights gives all of them 0")
    if set(recipe.fusion.sources_by) - {DEFAULT_DOMAIN} and recipe.corpus.domain_field is None:
        raise ValueError("fusion.sources_by: needs corpus.domain_field, which names the domain of a record")
