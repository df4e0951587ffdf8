"""Everything that the drill runs: Ray with Serve, two sources and the fusion service on it, a source that can lie,
relays on the connections, and the consumer. Leaving it ends every process.

    consumer -> relay -> proxy -> fusion -> relay -> proxy -> alpha, beta
                                         -> gamma (bad_source.py)
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any, Self

import psutil

from fusion_core.vocabulary import Vocabulary
from services.commands.prepare import prepare
from services.corpus.ledger import Corpus
from services.deploy.local_ray import free_port
from services.deploy.serve_config import serve_config
from services.recipes.recipe import Recipe
from services.source.config import SourceConfig
from tests.drill.consumer import ConsumerSettings
from tests.drill.ledger import LedgerReader, digest_of
from tests.drill.recomputation import Recomputation
from tests.drill.relay import Relay
from tests.fakes.files.many_shards import many_shards
from tests.fakes.services.local_serve import kill, local_serve
from tests.fakes.tiny_model import make_tiny_model, sentences

PREFETCH_WINDOWS = 16
_NUM_DOCUMENTS = 60
_K = 16
_MIN_SOURCES = 2
_PATIENCE_SECONDS = 240.0
_PACE = {"alpha": 4000.0, "beta": 3500.0, "gamma": 3000.0}
"""Tokens per second."""


class Scene:
    """What is up, and how to get at its parts.

    Args:
        folder: for everything that is written.
        seed: of texts, tokenizers and the order of the stream.
        deadline_seconds: of a source's answer; parts are frozen for longer.
        fusion_replicas: how many; with two, a stream moves to the other one when its own is lost.
        sample_every: one window of so many is computed again in the end.
    """

    def __init__(
        self,
        folder: Path,
        seed: int,
        *,
        deadline_seconds: float = 4.0,
        fusion_replicas: int = 2,
        sample_every: int = 10,
    ) -> None:
        self.folder, self.deadline_seconds = folder, deadline_seconds
        self.ledger = LedgerReader(folder / "ledger.jsonl")
        self._seed, self._sample_every = seed, sample_every
        self._stack = ExitStack()
        self._documents = folder / "documents"
        self._stop = folder / "stop"
        self._gamma_port = free_port()
        self.recipe = self._recipe(fusion_replicas)
        self._consumer: subprocess.Popen[bytes] | None = None
        self._gamma: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    # What can be reached

    @property
    def consumer(self) -> psutil.Process:
        assert self._consumer is not None
        return psutil.Process(self._consumer.pid)

    @property
    def gamma(self) -> psutil.Process:
        assert self._gamma is not None
        return psutil.Process(self._gamma.pid)

    def replicas(self, application: str) -> list[psutil.Process]:
        return self._workers(f"ServeReplica:{application}:")

    def proxies(self) -> list[psutil.Process]:
        return self._workers("ProxyActor")

    def tell_gamma(self, command: str) -> None:
        assert self._gamma is not None and self._gamma.stdin is not None
        self._gamma.stdin.write(f"{command}\n".encode())
        self._gamma.stdin.flush()

    def start_gamma(self) -> None:
        """Starts the source outside of Ray again, at the same address."""
        config = self._source("gamma").model_dump_json()
        self._gamma = self._process(
            "tests.drill.bad_source", str(self._gamma_port), config, stdout=subprocess.PIPE, log="gamma.log"
        )
        assert self._gamma.stdout is not None
        if self._gamma.stdout.readline() != b"ready\n":
            raise RuntimeError(f"gamma did not start, see {self.folder / 'gamma.log'}")

    def start_consumer(self) -> None:
        """Starts the consumer; it goes on from its ledger."""
        self._consumer = self._process(
            "tests.drill.consumer", str(self.folder / "consumer.json"), stdout=subprocess.DEVNULL, log="consumer.log"
        )

    def consumer_ended(self) -> int | None:
        """Exit code of a consumer that has ended; negative when it was killed."""
        assert self._consumer is not None
        return self._consumer.poll()

    def ask_for_end(self) -> None:
        """The consumer ends with the epoch that it is in."""
        self._stop.touch()

    def expected(self) -> dict[int, str]:
        """Digest of every window, from the corpus and the target's tokenizer."""
        corpus, target = Corpus.open(self.recipe.corpus_folder), self.target
        windows = (corpus.window("train", index) for index in range(corpus.num_windows("train")))
        digests = {}
        for window in windows:
            encoding = target.encode(window.text)
            if window.ends_document:
                assert target.eos_id is not None
                encoding = encoding.with_end(target.eos_id)
            digests[window.index] = digest_of(window.text, encoding.token_ids_T)
        return digests

    @property
    def target(self) -> Vocabulary:
        return Vocabulary.from_pretrained(self.recipe.target_folder)

    def recomputation(self) -> Recomputation:
        unpaced = [self._source(name, tokens_per_second=None) for name in _PACE]
        return Recomputation(unpaced, self.target, self.recipe.fusion.tau)

    # How it is put up

    def _start(self) -> None:
        self._documents.mkdir(parents=True)
        for number in range(_NUM_DOCUMENTS):
            text = sentences(700, seed=self._seed * 1000 + number)
            (self._documents / f"{number:03}.txt").write_text(text, encoding="utf-8")
        for size, name in zip((450, 550, 500), _PACE, strict=True):
            make_tiny_model(self.folder / name, vocabulary_size=size, seed=self._seed + size)
        with many_shards(1 << 13):
            prepare(self.recipe)
        self.start_gamma()
        service = self.recipe.service
        to_proxy = self._stack.enter_context(Relay(service.grpc_port))
        self.to_fusion, self.to_sources = to_proxy, self._stack.enter_context(Relay(service.grpc_port))
        config = serve_config(self.recipe)
        [fusion] = [entry for entry in config["applications"] if entry["name"] == service.application]
        for source in fusion["args"]["sources"]:
            if source["name"] != "gamma":
                source["address"] = f"127.0.0.1:{self.to_sources.port}"
        self._ray = self._stack.enter_context(local_serve(config))
        corpus = Corpus.open(self.recipe.corpus_folder)
        settings = ConsumerSettings(
            address=f"127.0.0.1:{self.to_fusion.port}",
            dataset=corpus.name,
            num_windows=corpus.num_windows("train"),
            documents=str(self._documents),
            target=str(self.recipe.target_folder),
            vocabulary=self.target.fingerprint,
            sources=list(_PACE),
            min_sources=_MIN_SOURCES,
            k=_K,
            seed=self._seed,
            prefetch_windows=PREFETCH_WINDOWS,
            patience_seconds=_PATIENCE_SECONDS,
            silence_seconds=max(3.0, self.deadline_seconds),
            sample_every=self._sample_every,
            ledger=str(self.folder / "ledger.jsonl"),
            stop=str(self._stop),
        )
        (self.folder / "consumer.json").write_text(json.dumps(asdict(settings)))
        self.start_consumer()

    def _recipe(self, fusion_replicas: int) -> Recipe:
        sources = [self._source(name).model_dump(mode="json") for name in ("alpha", "beta")]
        gamma = self._source("gamma")
        outside = {key: getattr(gamma, key) for key in ("name", "model", "top_k", "max_tokens")}
        values = {
            "name": "drill",
            "output_dir": str(self.folder / "runs"),
            "corpus": {
                "name": "sentences",
                "files": [f"{self._documents}/*.txt"],
                "window_bytes": 192,
                "context_bytes": 0,
                "held_out_share": 0.05,
                "shared_run_bytes": None,
            },
            "sources": [*sources, outside | {"address": f"127.0.0.1:{self._gamma_port}"}],
            "target": {
                "config": {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "intermediate_size": 64},
                "tokenizer": {"train": {"vocabulary_size": 400}},
            },
            "fusion": {"strategy": "avg_ce", "tau": 0.5, "k_out": _K, "min_sources": _MIN_SOURCES},
            "service": {
                "grpc_port": free_port(),
                "http_port": free_port(),
                "num_replicas": fusion_replicas,
                "source_timeout_seconds": self.deadline_seconds,
                "breaker_pause_seconds": 1,
                "heartbeat_seconds": min(1.0, self.deadline_seconds / 4),
                "store": None,  # every window asks every source, in every epoch
            },
        }
        return Recipe.model_validate(values)

    def _source(self, name: str, **synthetic: Any) -> SourceConfig:
        pace = {"tokens_per_second": _PACE[name], "seed": self._seed + len(name) + ord(name[0])} | synthetic
        return SourceConfig.model_validate(
            {
                "name": name,
                "model": str(self.folder / name),
                "engine": "synthetic",
                "top_k": _K,
                "max_tokens": 400,
                "synthetic": pace,
            }
        )

    def _process(self, module: str, *arguments: str, stdout: int, log: str) -> subprocess.Popen[bytes]:
        with (self.folder / log).open("ab") as stderr:
            process = _spawn([sys.executable, "-m", module, *arguments], stdout, stderr)
        self._stack.callback(kill, [psutil.Process(process.pid)])
        return process

    def _workers(self, title: str) -> list[psutil.Process]:
        found = []
        for process in self._ray.children(recursive=True):
            try:
                if title in " ".join(process.cmdline()) and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except psutil.NoSuchProcess:
                continue
        return found


def _spawn(command: list[str], stdout: int, stderr: IO[bytes]) -> subprocess.Popen[bytes]:
    # Of a session of its own: Ctrl-C is for the drill, which then ends them.
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=stdout, stderr=stderr, start_new_session=True, env=environment
    )
