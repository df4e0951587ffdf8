"""A recipe as it reads inside the cluster: every service by the name of its Service, every folder on a volume."""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from urllib.parse import parse_qs, urlsplit

from services.base.home import fusion_home
from services.models.catalogue import MODELS, RECORD
from services.models.reference import is_reference, parse_reference
from services.recipes.defaults import curated_files
from services.recipes.recipe import TRAINED, Recipe, RecipeError
from services.recipes.resolve import models_to_fetch
from services.reward.config import RewardConfig, RewardServiceConfig
from services.source.config import AnySource, SourceAtAddress, SourceConfig

GRPC_PORT = 9000
MODELS_FOLDER, RUNS_FOLDER = PurePosixPath("/data/models"), PurePosixPath("/data/runs")
"""Folders of the volumes in the manifests; FUSION_HOME is /data."""

LONGEST_RAY_NAME = 47
"""Longest name of a RayService or RayJob, in characters: KubeRay appends to it for the names of pods and Services."""

_LONGEST_NAME = LONGEST_RAY_NAME - len("source-")


def service_name(source: SourceConfig) -> str:
    """Return the name of the RayService and of the headless Service of a source that is deployed."""
    return f"source-{source.name}"


def cluster_recipe(recipe: Recipe) -> Recipe:
    """Return the recipe of the preparing and the training job; raises RecipeError for a path that no pod could see."""
    if recipe.service.address is not None:
        raise RecipeError("service.address: leave it out; the overlay brings the fusion service")
    if recipe.verify is not None and recipe.verify.address is None:
        raise RecipeError("verify: there are no manifests of a verifier; give the address of one, or leave it out")
    corpus = recipe.corpus
    if recipe.reads_curated:  # they lie in the run's folder, which is another one in the cluster
        corpus = corpus.model_copy(update={"files": (curated_files(Path(RUNS_FOLDER / recipe.name)),)})
        recipe = recipe.model_copy(update={"corpus": corpus})
    _check_paths(recipe)
    service = recipe.service.model_copy(update={"address": f"fusion:{GRPC_PORT}"})
    if recipe.recall is not None and "recall" in recipe.beside:
        recall = recipe.recall.model_copy(update={"address": f"recall:{GRPC_PORT}", "application": "recall"})
        recipe = recipe.model_copy(update={"recall": recall})
    return recipe.model_copy(
        update={
            "output_dir": str(RUNS_FOLDER),
            "sources": tuple(_by_address(source) for source in recipe.sources),
            "service": service,
            "reward": _reward_by_address(recipe),
        }
    )


def served_model(recipe: Recipe) -> str:
    """Return the folder of the reward model as pods see it; raises RecipeError for one that no pod could see."""
    assert recipe.reward is not None and recipe.reward.serve is not None
    if (model := recipe.reward.serve.model) is None:
        return str(RUNS_FOLDER / recipe.name / "reward" / TRAINED / "model")
    if not any(PurePosixPath(model).is_relative_to(folder) for folder in (MODELS_FOLDER, RUNS_FOLDER)):
        raise RecipeError(f"reward.serve.model: {model} is not below {MODELS_FOLDER} or {RUNS_FOLDER}, where pods look")
    return model


def _reward_by_address(recipe: Recipe) -> RewardConfig | None:
    """Return section `reward` with the address of the service that the overlay brings."""
    if recipe.reward is None or recipe.reward.serve is None or recipe.reward.serve.address is not None:
        return recipe.reward
    served_model(recipe)
    serve = RewardServiceConfig(address=f"reward:{GRPC_PORT}", application=recipe.reward.serve.application)
    return recipe.reward.model_copy(update={"serve": serve})


def model_marker(model: str) -> str:
    """Return the file that is there once a model can be loaded."""
    if is_reference(model):
        return str(MODELS_FOLDER / parse_reference(model).folder.relative_to(fusion_home() / "models") / RECORD)
    if model in MODELS:
        return str(MODELS_FOLDER / model / RECORD)
    return str(PurePosixPath(model) / "config.json")


def object_stores(recipe: Recipe) -> list[str]:
    """Return the URLs of the recipe at which pods keep windows and checkpoints."""
    curated = recipe.curate.folder if recipe.curate is not None else None
    places = (recipe.service.store, recipe.distill.storage, recipe.corpus.folder, curated)
    return [url for url in places if url is not None and "://" in url]


def stored_models(recipe: Recipe) -> list[str]:
    """Return the URLs of the object stores from which the preparing job fetches models."""
    return [name for name in models_to_fetch(recipe) if is_reference(name) and not parse_reference(name).repository]


def port_of_store(url: str) -> int:
    """Return the port of an object store: that of `endpoint_override` in the URL, else that of HTTPS."""
    [endpoint] = parse_qs(urlsplit(url).query).get("endpoint_override", [""])
    parts = urlsplit(endpoint if "://" in endpoint else f"//{endpoint}")
    return parts.port or (80 if parts.scheme == "http" else 443)


def _by_address(source: AnySource) -> SourceAtAddress:
    if isinstance(source, SourceAtAddress):
        return source
    kept = source.model_dump(exclude_unset=True, include=set(SourceAtAddress.model_fields))
    return SourceAtAddress(**kept, address=f"{service_name(source)}:{GRPC_PORT}")


def _check_paths(recipe: Recipe) -> None:
    folders = {f"sources.{index}.model": source.model for index, source in enumerate(recipe.sources)}
    if recipe.target.model is not None:
        folders["target.model"] = recipe.target.model
    if recipe.target.tokenizer is not None and recipe.target.tokenizer.folder is not None:
        folders["target.tokenizer"] = recipe.target.tokenizer.folder
    if recipe.recall is not None and recipe.recall.judge is not None:
        folders["recall.judge"] = recipe.recall.judge
    for key, folder in folders.items():
        if is_reference(folder):
            _check_reference(key, folder)
        elif folder not in MODELS and not PurePosixPath(folder).is_relative_to(MODELS_FOLDER):
            known = ", ".join(MODELS)
            raise RecipeError(
                f"{key}: {folder} is not below {MODELS_FOLDER}, where pods find models, nor one of {known}, nor a URL "
                "(hf://ORG/NAME@REVISION, s3://BUCKET/FOLDER)"
            )
    for key, place in (
        ("service.store", recipe.service.store),
        ("distill.storage", recipe.distill.storage),
        ("corpus.folder", recipe.corpus.folder),
        ("curate.folder", recipe.curate.folder if recipe.curate is not None else None),
    ):
        _check_shared(key, place)
    patterns = [("corpus.files", pattern) for pattern in recipe.corpus.files or ()]
    if recipe.distill.on_policy is not None:
        patterns += [("distill.on_policy.prompts", pattern) for pattern in recipe.distill.on_policy.prompts]
    for key, pattern in patterns:
        if not PurePosixPath(pattern).is_relative_to(RUNS_FOLDER):
            raise RecipeError(f"{key}: {pattern} is not below {RUNS_FOLDER}, where pods find shared files")
    for index, source in enumerate(recipe.sources):
        if len(source.name) > _LONGEST_NAME:
            raise RecipeError(f"sources.{index}.name: {source.name} is longer than {_LONGEST_NAME} characters")


def _check_reference(key: str, url: str) -> None:
    """Refuse a URL that the preparing job cannot fetch into the volume that all pods read."""
    if key == "target.tokenizer":
        raise RecipeError(f"{key}: {url} is not fetched; give a folder below {MODELS_FOLDER}")
    try:
        parse_reference(url)
    except ValueError as error:
        raise RecipeError(f"{key}: {error}") from error


def _check_shared(key: str, place: str | None) -> None:
    """Refuse a place for windows or checkpoints that not every pod finds, later ones included."""
    if place is None:
        return
    scheme, is_url, _ = place.partition("://")
    inside = PurePosixPath(place).is_relative_to(RUNS_FOLDER)
    # Stores and windows may be relative to the run's folder, which lies there.
    relative = (
        key != "distill.storage" and not PurePosixPath(place).is_absolute() and ".." not in PurePosixPath(place).parts
    )
    if scheme in {"file", "memory"} if is_url else not (inside or relative):
        raise RecipeError(
            f"{key}: {place} is no place that all pods share; give a folder below {RUNS_FOLDER} or the URL of an "
            "object store, such as s3://bucket/folder"
        )
