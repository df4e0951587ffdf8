"""The services that the benchmark trains against: both real sources and the fusion service, without Ray."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from fusion.v1 import fusion_pb2_grpc
from services.commands.prepare import prepare
from services.fusion.servicer import FusionServicer
from services.recipes.load import load_recipe
from services.recipes.recipe import Recipe
from services.source.config import SourceConfig
from tests.fakes.services.on_thread import served
from tests.fakes.services.plain_source import plain_source


@dataclass(frozen=True)
class Size:
    """Sizes of the benchmark.

    Attributes:
        train_bytes: of the text that the target is first trained on, and that the stream has.
        shape, vocabulary_size: of the target.
        warm_epochs: passes over the text, CLM only, before anything is compared.
        batch_windows: windows of a step, of which half are answers in the rounds.
        round_steps: steps of each of the three rounds.
        num_prompts: held-out prompts that the target answers after each round.
    """

    name: str
    train_bytes: int
    held_out_bytes: int
    shape: Mapping[str, int]
    vocabulary_size: int
    warm_epochs: int
    batch_windows: int
    round_steps: int
    num_prompts: int
    max_new_tokens: int


_SHAPE = {"hidden_size": 192, "num_layers": 4, "num_heads": 4, "intermediate_size": 512, "max_positions": 512}
_TINY = {"hidden_size": 96, "num_layers": 2, "num_heads": 2, "intermediate_size": 192, "max_positions": 512}
FULL = Size("on-policy", 100_000, 16_000, _SHAPE, 2048, 8, 8, round_steps=8, num_prompts=32, max_new_tokens=40)
QUICK = Size("on-policy-quick", 30_000, 5_000, _TINY, 768, 6, 4, round_steps=4, num_prompts=6, max_new_tokens=16)


def recipe_of(size: Size) -> Recipe:
    """The quickstart's corpus and sources, the latter on engine `transformers`, in short windows."""
    quickstart = load_recipe("quickstart")
    kept = {"name", "model", "top_k", "bos_token", "max_tokens"}
    corpus = {"train_bytes": size.train_bytes, "held_out_bytes": size.held_out_bytes, "window_bytes": 256}
    return Recipe.model_validate(
        {
            "name": size.name,
            "output_dir": "runs/bench",
            "corpus": quickstart.corpus.model_dump() | corpus,
            "sources": [
                source.model_dump(include=kept) | {"engine": "transformers", "dtype": "float32", "torch_threads": 1}
                for source in quickstart.sources
            ],
            "target": {"config": dict(size.shape), "tokenizer": {"train": {"vocabulary_size": size.vocabulary_size}}},
            "fusion": {"k_out": 32, "min_sources": 2},
            "service": {"source_timeout_seconds": 1800},
        }
    )


@contextmanager
def serving(size: Size) -> Iterator[tuple[Recipe, str]]:
    """The prepared recipe, and the address of its fusion service. What was scored stays in the recipe's store."""
    recipe = recipe_of(size)
    prepare(recipe, save=False)
    with ExitStack() as stack:
        addresses = {}
        for source in recipe.sources:
            assert isinstance(source, SourceConfig)
            addresses[source.name] = stack.enter_context(plain_source(source)).address
        config = recipe.fusion_service()
        reached = [e.model_copy(update={"address": addresses[e.name]}) for e in config.sources]
        config = config.model_copy(update={"sources": tuple(reached)})
        add = fusion_pb2_grpc.add_FusionServiceServicer_to_server
        yield recipe, stack.enter_context(served(FusionServicer, add, config)).address
