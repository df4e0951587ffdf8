"""The programs in examples/ and the Python of the pages, run as they stand, against real services."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from services.deploy.local_ray import deployments, free_port
from services.fusion.client import StreamRequest
from services.source.config import SourceConfig
from services.wire.passage import Passage
from tests.examples.pages import REPOSITORY, code_blocks
from tests.fakes.services.plain_fusion import PlainFusion, plain_fusion
from tests.fakes.services.plain_source import plain_source
from tests.fakes.tiny_model import make_tiny_model

EXAMPLES = REPOSITORY / "examples"


@pytest.fixture(scope="module")
def fusion(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PlainFusion]:
    with plain_fusion(tmp_path_factory.mktemp("examples")) as running:
        yield running


def run(*words: str | Path) -> str:
    done = subprocess.run([sys.executable, *words], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_two_texts_are_fused(fusion: PlainFusion) -> None:
    program, target = EXAMPLES / "fuse_two_texts.py", fusion.recipe.target_folder
    printed = run(program, "--address", fusion.address, "--target", target)
    first, second = printed.split("'def add(a, b)")
    for part, text in ((first, "The capital of France is"), (second, "def add(a, b):\n    return a")):
        [block] = fusion.client().fuse([Passage(text.encode(), ends_document=True)])
        weights = [float(weight) for weight in re.findall(r"weight ([\d.]+)", part)]
        assert weights == [round(share.weight, 2) for share in block.shares]
        probabilities = [float(p) for p in re.findall(r"next b.*: ([\d.]+)$", part, re.MULTILINE)]
        np.testing.assert_allclose(probabilities, np.exp(block.topk_logprobs_TK[-1, :3]), atol=0.05)


def test_a_stream_goes_on_where_the_last_program_stopped(fusion: PlainFusion, tmp_path: Path) -> None:
    def windows(count: int) -> list[int]:
        cursor = ("--cursor", tmp_path / "cursor.json")
        options = ("--address", fusion.address, "--dataset", "words", "--windows", str(count))
        return [
            int(index)
            for index in re.findall(r"window (\d+): ", run(EXAMPLES / "resume_a_stream.py", *options, *cursor))
        ]

    whole = [window.index for window in fusion.client().stream(StreamRequest("words", "train", seed=0))]
    assert [*windows(3), *windows(4), *windows(len(whole))] == whole
    assert windows(3) == []


@pytest.mark.drill
@pytest.mark.timeout(1200)
def test_a_captured_corpus_is_streamed_while_no_source_runs(home: Path, tmp_path: Path) -> None:
    (tmp_path / "docs").symlink_to(REPOSITORY / "docs")
    program = Path(sys.executable).parent
    environment = os.environ | {"PATH": f"{program}:{os.environ['PATH']}", "PORT": str(free_port())}
    ports = [f"service.{kind}_port={free_port()}" for kind in ("http", "dashboard")]
    command = [str(EXAMPLES / "capture_then_fuse.sh"), *(word for port in ports for word in ("--set", port))]
    before = {deployment.name for deployment in deployments()}
    try:
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    finally:
        for deployment in deployments():
            if deployment.name not in before:
                deployment.stop()
    assert done.returncode == 0, done.stderr
    assert "all good" in done.stdout
    assert len(re.findall(r"^window \d+: \d+ tokens", done.stdout, re.MULTILINE)) == 5
    assert "synthetic: down" in done.stdout


def test_dialogues_become_conversations_that_their_recipe_reads(home: Path, tmp_path: Path) -> None:
    def here(*words: str | Path) -> str:
        done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "899 conversations" in here(sys.executable, EXAMPLES / "dialogues.py", "dialogues.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "dialogues.jsonl").read_text().splitlines()]
    assert len(rows) == 899
    for row in rows:
        assert [message["role"] for message in row["messages"][:2]] == ["user", "assistant"]
        assert all(message["content"].strip() for message in row["messages"])
    assert "good; 2 sources" in here(Path(sys.executable).with_name("fusion"), "validate", EXAMPLES / "dialogues.yaml")


@pytest.mark.parametrize("page", ["README.md", "docs/sources.md", "docs/failures.md"])
def test_the_python_of_a_page_runs(page: str, fusion: PlainFusion) -> None:
    [snippet] = [block for block in code_blocks(page, "python") if "SourceClient(" not in block]
    for ours, here in (
        ("127.0.0.1:9000", fusion.address),
        ("runs/quickstart/target", str(fusion.recipe.target_folder)),
        ("lee-news", "words"),
    ):
        snippet = snippet.replace(ours, here)
    assert run("-c", snippet).strip()


def test_the_python_that_asks_a_source_for_answers_runs(tmp_path: Path) -> None:
    [snippet] = [block for block in code_blocks("docs/sources.md", "python") if "SourceClient(" in block]
    model = make_tiny_model(tmp_path / "model", vocabulary_size=400, seed=0)
    config = SourceConfig(name="smollm2", model=str(model), engine="transformers", chat_template="plain", top_k=8)
    with plain_source(config) as source:
        printed = run("-c", snippet.replace("127.0.0.1:9000", source.address))
    assert len(re.findall(r"(?:length|stop_token) \d+$", printed, re.MULTILINE)) == 2


def test_a_trainer_of_one_s_own_learns_from_the_stream(fusion: PlainFusion, tmp_path: Path) -> None:
    words = ("--address", fusion.address, "--dataset", "words", "--target", str(fusion.recipe.target_folder))
    printed = run(EXAMPLES / "own_trainer.py", *words, "--steps", "2", "--output", tmp_path / "trained")
    assert printed.splitlines()[-1].endswith("trained for 2 steps")
    assert len(re.findall(r"'loss': ", printed)) == 2
    assert (tmp_path / "trained" / "model.safetensors").exists()
