"""All checks on one overlay."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from services.deploy.k8s.overlay import differences, overlay_files
from services.recipes.load import load_recipe
from tests.k8s.check import network, schemas
from tests.k8s.check.confinement import accounts_have_no_rights, images_are_pinned, pods_are_confined
from tests.k8s.check.durability import (
    budgets_let_nodes_drain,
    deadlines_cover_waits,
    followers_get_ready,
    models_are_fetched,
    object_stores_are_reached,
    requests_follow_the_recipe,
)
from tests.k8s.check.manifests import REPOSITORY, Document
from tests.k8s.check.references import addresses_exist, ports_exist, references_exist, selectors_match
from tests.k8s.check.serving import (
    commands_are_ours,
    imports_work,
    messages_are_bounded,
    ray_versions_agree,
    serve_configs_hold,
    sizes_fit,
)

PARTS = {
    "cpu-dev": ("base",),
    "gpu": ("base",),
    "external-sources": ("base", "external-sources"),
    "recall": ("base",),
    "production": ("base", "gcs-redis", "gateway", "tracing"),
}
"""What of the README's table each overlay brings."""

RECIPES = {
    "cpu-dev": "quickstart",
    "gpu": "k8s/recipes/gpu.yaml",
    "external-sources": "k8s/recipes/external-sources.yaml",
    "recall": "k8s/recipes/recall.yaml",
}
"""What the folder `recipe` of an overlay is made from."""

RULES: tuple[Callable[[Sequence[Document]], Iterator[str]], ...] = (
    references_exist,
    addresses_exist,
    ports_exist,
    selectors_match,
    imports_work,
    serve_configs_hold,
    messages_are_bounded,
    sizes_fit,
    ray_versions_agree,
    commands_are_ours,
    images_are_pinned,
    pods_are_confined,
    accounts_have_no_rights,
    deadlines_cover_waits,
    budgets_let_nodes_drain,
    followers_get_ready,
    requests_follow_the_recipe,
    object_stores_are_reached,
    models_are_fetched,
)


def stale_files(name: str) -> list[str]:
    """Files of an overlay that are not what `fusion k8s render` makes of its recipe now."""
    recipe = RECIPES[name]
    folder = REPOSITORY / "k8s" / "overlays" / name / "recipe"
    loaded = load_recipe(recipe if recipe == "quickstart" else REPOSITORY / recipe)
    return differences(overlay_files(loaded, base="../../..", run_name="fused"), folder)


def problems(documents: Sequence[Document], parts: Sequence[str]) -> Iterator[str]:
    """A sentence per problem; `parts` are the names in the README's column `with` that the documents stand for."""
    shape = list(schemas.problems(documents))
    yield from shape
    if shape:
        return  # the rules below read what the schemas promise
    for rule in RULES:
        yield from rule(documents)
    yield from network.problems(documents, parts)
