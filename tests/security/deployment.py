"""A deployment with tokens, for everything that tries to get past them: real Ray, Serve and gRPC, engines that cost
nothing.

Sources: `one` and `two` are synthetic; `cracked` is a tiny model that breaks on one word of its tokenizer; `foreign`
runs in this process and raises that word's text back.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml

from services.deploy.local_ray import Deployment, enable_ray_authentication, free_port
from services.fusion.client import FusionClient
from services.recipes.load import load_recipe
from services.recipes.recipe import Recipe
from services.rpc.auth import call_metadata
from services.source.config import SourceConfig
from tests.fakes.services.plain_source import plain_source
from tests.fakes.tiny_model import make_tiny_model, sentences

TOKEN, SECOND_TOKEN, THIRD_TOKEN = "token-of-a-trainer", "token-of-another", "token-of-a-third"
MARKER = "Zyxomma7Petiolatum"
"""Stands in users' documents, and may be found nowhere else."""
STREAMS, BLOCKS, REQUEST_BYTES = 24, 64, 256 * 1024


@dataclass(frozen=True)
class Guarded:
    """The services that are up, and the recipe that they were started with."""

    recipe: Recipe
    deployment: Deployment

    @property
    def address(self) -> str:
        return self.deployment.grpc_address

    def client(self, token: str = TOKEN, **settings: Any) -> FusionClient:
        return FusionClient(self.address, token=token, patience_seconds=60, timeout_seconds=300, **settings)

    def metadata(self, application: str = "fusion", token: str = TOKEN) -> tuple[tuple[str, str], ...]:
        return call_metadata(application, token)

    def processes(self) -> dict[int, str]:
        """Serve's proxy and the replicas: pid and name."""
        found = {}
        for process in psutil.Process(self.deployment.pid).children(recursive=True):
            try:
                title = " ".join(process.cmdline())
            except psutil.Error:
                continue
            if re.match(r"ray::(ServeReplica|ProxyActor)", title):
                found[process.pid] = title.split()[0].partition(".")[0]  # behind it, the method that is running
        return found

    def resident_bytes(self) -> dict[str, int]:
        """Memory of each of them, by name and pid."""
        return {f"{name} {pid}": psutil.Process(pid).memory_info().rss for pid, name in self.processes().items()}

    def log_folder(self) -> Path:
        """The folder into which Ray writes the logs of this cluster and of all that runs in it."""
        for process in psutil.Process(self.deployment.pid).children(recursive=True):
            if found := re.search(r"(/\S*/session_[\d_-]+)/", " ".join(process.cmdline())):
                return Path(found[1]) / "logs"
        raise AssertionError("no process of Ray names its session")


@contextmanager
def guarded_deployment(folder: Path) -> Iterator[Guarded]:
    """Starts it below `folder`, and stops it in the end."""
    from services.commands.prepare import prepare
    from services.deploy.up import up

    enable_ray_authentication()
    tokens = folder / "tokens"
    tokens.write_text(f"{TOKEN}\n{SECOND_TOKEN}\n{THIRD_TOKEN}\n")
    tiny = make_tiny_model(folder / "tiny", vocabulary_size=500, seed=1)
    environment = {"FUSION_HOME": str(folder / "home"), "FUSION_TOKEN_FILE": str(tokens)}
    with _environment(environment):
        foreign = SourceConfig(name="foreign", model=str(tiny), engine="synthetic", top_k=8)
        with plain_source(foreign, raises_on=MARKER.encode()) as source:
            recipe = _recipe(folder, tiny, source.address)
            deployment = up(recipe, prepare(recipe), lambda states: None)
            try:
                with _environment(dict.fromkeys(environment)):
                    yield Guarded(recipe, deployment)
            finally:
                deployment.stop()


def _recipe(folder: Path, tiny: Path, foreign: str) -> Recipe:
    documents = folder / "documents"
    documents.mkdir()
    for number in range(24):
        text = sentences(500, seed=number)
        (documents / f"{number:02}.txt").write_text(f"{MARKER} {text}" if number == 7 else text, encoding="utf-8")
    limits = {"streams": STREAMS, "blocks": BLOCKS, "request_bytes": REQUEST_BYTES}
    synthetic = {"model": str(tiny), "engine": "synthetic", "top_k": 8, "max_tokens": 511, "per_client": limits}
    recipe = {
        "name": "guarded",
        "output_dir": str(folder / "runs"),
        "corpus": {
            "name": "sentences",
            "files": [f"{documents}/*.txt"],
            "window_bytes": 256,
            "context_bytes": 0,
            "held_out_share": 0.2,
            "shared_run_bytes": None,
        },
        "sources": [
            {"name": "one", **synthetic},
            {"name": "two", **synthetic, "synthetic": {"seed": 2}},
            {
                "name": "cracked",
                "model": str(_cracked_model(folder)),
                "engine": "transformers",
                "top_k": 8,
                "max_tokens": 511,
                "torch_threads": 1,
            },
            {"name": "foreign", "model": str(tiny), "engine": "synthetic", "top_k": 8, "address": foreign},
        ],
        "target": {
            "config": {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "intermediate_size": 64},
            "tokenizer": {"train": {"vocabulary_size": 400}},
        },
        "fusion": {"strategy": "avg_ce", "k_out": 8, "min_sources": 2},
        "service": {
            "grpc_port": free_port(),
            "http_port": free_port(),
            "dashboard_port": free_port(),
            "max_text_bytes": 4096,
            "max_texts": 4,
            "source_timeout_seconds": 30,
            "source_attempts": 2,
            "store": None,
            "per_client": limits,
        },
        "distill": {"batch_windows": 4},
    }
    path = folder / "guarded.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return load_recipe(path)


def _cracked_model(folder: Path) -> Path:
    """Its tokenizer has one token more than its embedding has rows: the engine itself fails on that token."""
    from transformers import AutoTokenizer

    model = make_tiny_model(folder / "cracked", vocabulary_size=500, seed=3)
    tokenizer = AutoTokenizer.from_pretrained(model)
    assert tokenizer.add_tokens([MARKER]) == 1
    tokenizer.save_pretrained(model)
    return model


@contextmanager
def _environment(values: dict[str, str] | dict[str, None]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    _set(values)
    try:
        yield
    finally:
        _set(before)


def _set(values: dict[str, Any]) -> None:
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
