"""A real vLLM server on this machine's CPUs as a source by URL, beside the same model loaded here."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest

from services.deploy.local_ray import free_port
from services.source.config import SourceConfig
from services.source.engines.base import TokenSampling
from services.source.scorer import Scorer
from services.wire.passage import Passage
from tests.fakes.services.plain_source import plain_source
from tests.fakes.tiny_model import make_tiny_model, sentences
from tests.source.engines.served import outage, remote

pytestmark = [pytest.mark.drill, pytest.mark.timeout(900)]
TEXTS = [b"the man said that it was time", "Zwölf Boxkämpfer — 日本 👍\r\n".encode(), sentences(300, seed=5).encode()]


class VllmProcess:
    """`vllm serve` in a session of its own, so that its workers end with it."""

    def __init__(self, folder: Path, log: Path) -> None:
        self.port, self._folder, self._log = free_port(), folder, log
        self.url = f"http://127.0.0.1:{self.port}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [
            sys.executable, "-m", "vllm.entrypoints.openai.api_server", f"--model={self._folder}",
            "--served-model-name=tiny", "--host=127.0.0.1", f"--port={self.port}", "--dtype=float32",
            "--enforce-eager", "--max-model-len=512", "--max-logprobs=16", "--max-num-seqs=4",
            "--max-num-batched-tokens=512", "--api-key=sk-drill",
        ]  # fmt: skip
        environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1"}
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                command, stdout=log, stderr=log, env=environment, start_new_session=True, cwd=self._folder
            )
        deadline = time.monotonic() + 400
        while not self._answers():
            assert self._process.poll() is None and time.monotonic() < deadline, self._log.read_text()[-3000:]
            time.sleep(0.5)

    def kill(self) -> None:
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None

    def _answers(self) -> bool:
        try:
            return httpx.get(f"{self.url}/health", timeout=2).is_success
        except httpx.TransportError:
            return False


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[VllmProcess, Path]]:
    pytest.importorskip("vllm")
    place = tmp_path_factory.mktemp("served")
    folder = make_tiny_model(place / "tiny", vocabulary_size=400, seed=2, hidden_size=128)
    process = VllmProcess(folder, place / "log")
    try:
        process.start()
        yield process, folder
    finally:
        process.kill()


@pytest.fixture(autouse=True)
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSION_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("DRILL_KEY", "sk-drill")


def config(folder: Path, process: VllmProcess) -> SourceConfig:
    engine = {"kind": "openai", "url": process.url, "model": "tiny", "api_key_env": "DRILL_KEY", "retry_seconds": 1}
    values = {"name": "there", "model": str(folder), "top_k": 8, "max_top_k": 16, "max_tokens": 255, "engine": engine}
    return SourceConfig.model_validate(values)


def test_rows_and_answers_are_those_of_the_same_model_here(served: tuple[VllmProcess, Path]) -> None:
    process, folder = served
    how = TokenSampling(temperature=0, top_p=1.0, max_new_tokens=6, seed=1, stop_ids=(1,))

    async def run(config: SourceConfig) -> tuple[list[object], list[object]]:
        scorer = await Scorer.load(config, folder)
        prompts = scorer.encode(list(map(Passage, TEXTS)))
        blocks = await asyncio.gather(*(scorer.score(prompt, 8) for prompt in prompts))
        answers = [tokens async for tokens in scorer.engine.generate([0, 5, 6, 7], how)]
        scorer.engine.close()
        return list(blocks), list(answers)

    there, answer_there = asyncio.run(run(config(folder, process)))
    engine = {"kind": "transformers", "dtype": "float32"}
    here, answer_here = asyncio.run(
        run(SourceConfig.model_validate({"name": "here", "model": str(folder), "top_k": 8, "engine": engine}))
    )
    for one, other in zip(there, here, strict=True):
        for column in ("gold_T", "topk_logprobs_TK"):
            np.testing.assert_allclose(getattr(one, column), getattr(other, column), atol=1e-3)
        assert (one.topk_ids_TK != other.topk_ids_TK).mean() < 0.02  # type: ignore[attr-defined]
    ids_here, ids_there = ([i for tokens in found for i in tokens.token_ids] for found in (answer_here, answer_there))  # type: ignore[attr-defined]
    assert ids_there == ids_here


def test_the_server_is_killed_and_started_again_under_a_stream(served: tuple[VllmProcess, Path]) -> None:
    process, folder = served
    windows = [Passage(sentences(60, seed=n).encode()) for n in range(12)]

    async def run(address: str) -> None:
        source = remote(address, folder)
        try:
            await outage(source, windows, process.kill, process.start)
        finally:
            await source.close()

    with plain_source(config(folder, process)) as source:
        asyncio.run(run(source.address))
