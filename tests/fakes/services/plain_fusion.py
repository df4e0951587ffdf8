"""A real fusion service without Ray: the servicer on a plain gRPC server in this process, over `plain_source`s."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fusion.v1 import fusion_pb2_grpc
from services.commands.prepare import prepare
from services.fusion.client import FusionClient
from services.fusion.servicer import FusionServicer
from services.recipes.recipe import Recipe
from services.source.config import SourceConfig
from tests.fakes.services.on_thread import served
from tests.fakes.services.plain_source import PlainSource, plain_source
from tests.fakes.tiny_model import make_tiny_model, sentences


@dataclass
class PlainFusion:
    """A running service: its address, its sources, and the recipe that it was made from."""

    address: str
    drain: Callable[[], None]
    sources: list[PlainSource]
    recipe: Recipe

    def client(self, **settings: Any) -> FusionClient:
        return FusionClient(self.address, **({"patience_seconds": 30} | settings))

    @property
    def num_windows(self) -> int:
        return next(d.num_windows for d in self.client().info().datasets if d.split == "train")


@contextmanager
def plain_fusion(
    folder: Path,
    *,
    min_sources: int = 1,
    num_sources: int = 2,
    alignment: str = "byte",
    native: bool = False,
    k_out: int = 8,
    top_k: int = 8,
    documents: Sequence[str] = (),
    windows: Mapping[str, Any] | None = None,
    tokenizer: str | None = None,
    max_positions: int = 2048,
    chat_templates: Sequence[str] = (),
    corpora: Sequence[str] = (),
    sources_by: Mapping[str, Any] | None = None,
    fusion: Mapping[str, Any] | None = None,
    **service: Any,
) -> Iterator[PlainFusion]:
    """Two synthetic sources with vocabularies of their own, and what fuses them; `service` are keys of that section.

    With `native` the target has the first source's tokenizer, else that of the folder `tokenizer`, or one of its own.
    `documents` are the corpus, generated ones by default; `windows` are keys of its section. `chat_templates` are the
    sources', where the corpus holds conversations, and one more may be the target's. `corpora` are folders of further
    data sets, and `sources_by` is the key of section `fusion`; `fusion` are further keys of it.
    """
    corpus = _write_documents(folder / "documents", documents)
    with ExitStack() as stack:
        sources, entries = [], []
        for number in range(num_sources):
            model = folder / f"model-{number}"
            if not model.exists():
                make_tiny_model(model, vocabulary_size=400 + 50 * number, seed=number)
            name = f"source-{number}"
            settings: dict[str, Any] = {"name": name, "model": str(model), "top_k": top_k}
            if chat_templates:
                settings["chat_template"] = chat_templates[number]
            sources.append(stack.enter_context(plain_source(SourceConfig(engine="synthetic", **settings))))
            entries.append({**settings, "address": sources[-1].address})
        small = {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "intermediate_size": 64}
        small["max_positions"] = max_positions
        of_target = str(folder / "model-0") if native else tokenizer or {"train": {"vocabulary_size": 300}}
        target: dict[str, Any] = {"config": small, "tokenizer": of_target}
        if len(chat_templates) > num_sources:
            target["chat_template"] = chat_templates[num_sources]
        of_fusion = {"k_out": k_out, "min_sources": min_sources, "alignment": alignment, "sources_by": sources_by or {}}
        recipe = Recipe.model_validate(
            {
                "name": "plain",
                "output_dir": str(folder / "runs"),
                "corpus": {"name": "words", "files": [f"{corpus}/*.txt"], "window_bytes": 128, **(windows or {})},
                "sources": entries,
                "target": target,
                "fusion": of_fusion | dict(fusion or {}),
                "service": {"store": None, "heartbeat_seconds": 0.2, "breaker_pause_seconds": 0.3, **service},
            }
        )
        prepare(recipe, save=False)
        config = recipe.fusion_service()
        config = config.model_copy(update={"corpora": (*config.corpora, *corpora)})
        add = fusion_pb2_grpc.add_FusionServiceServicer_to_server
        running = stack.enter_context(served(FusionServicer, add, config))

        def drain() -> None:
            running.loop.call_soon_threadsafe(running.servicer._draining.begin)

        yield PlainFusion(running.address, drain, sources, recipe)


def _write_documents(folder: Path, documents: Sequence[str]) -> Path:
    folder.mkdir(exist_ok=True)
    for number, text in enumerate(documents or [sentences(600, seed=number) for number in range(12)]):
        (folder / f"{number}.txt").write_text(text, encoding="utf-8")
    return folder
