"""The recall service on Ray Serve, through its gRPC proxy: killed under a stream, and deployed for a corpus alone."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from contextlib import suppress

import psutil
import pytest
import torch

from fusion.v1 import recall_pb2
from services.base.errors import DeadlineExceededError
from services.commands.prepare import corpus_and_target
from services.deploy.local_ray import deployments, enable_ray_authentication, free_port
from services.deploy.serve_config import serve_config
from services.recall.client import KeyBlockStream, LongText, RecallClient
from services.recall.judge import Judge
from services.recall.selector import Selection, select
from services.recipes.recipe import Recipe
from services.rpc.health_check import health_of
from tests.fakes.files.tiny_encoder import write_encoder
from tests.fakes.tiny_model import make_tiny_model

pytestmark = [pytest.mark.drill, pytest.mark.timeout(900)]
_NUM_TEXTS = 400


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    folder = tmp_path_factory.mktemp("recall")
    torch.manual_seed(0)
    Judge.load(write_encoder(folder / "encoder"), fresh=True).save(folder / "judge")
    model = make_tiny_model(folder / "model", vocabulary_size=400, seed=1)
    rows = [{"text": text_of(n), "question": "Where is Anna?", "answer": f"{n}"} for n in range(12)]
    (folder / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    ports = {key: free_port() for key in ("grpc_port", "http_port", "dashboard_port")}
    return Recipe.model_validate(
        {
            "name": "long",
            "output_dir": str(folder / "runs"),
            "corpus": {
                "files": [f"{folder}/long.jsonl"],
                "recall": {"question": "question", "answer": "answer", "budget_bytes": 200},
                "held_out_share": 0.3,
                "shared_run_bytes": None,
            },
            "sources": [{"name": "one", "model": str(model), "address": "127.0.0.1:1", "chat_template": "plain"}],
            "target": {"model": str(model), "chat_template": "plain"},
            "service": ports,
            "recall": {"judge": str(folder / "judge"), "num_cpus": 1, "hops": [1, 2]},
        }
    )


def text_of(number: int) -> str:
    return "".join(f"Anna {n} lives in the city 😀. Boris {number} was 木の下で river! " for n in range(30))


@pytest.fixture
def served(recipe: Recipe) -> Iterator[psutil.Process]:
    enable_ray_authentication()
    from tests.fakes.services.local_serve import local_serve

    with local_serve(serve_config(recipe, only=["recall"])) as ray:
        yield ray


def replicas(ray: psutil.Process) -> list[psutil.Process]:
    found = []
    for process in ray.children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if "ServeReplica:recall:" in " ".join(process.cmdline()):
                found.append(process)
    return found


def test_a_replica_that_is_killed_under_a_stream_loses_and_repeats_nothing(
    recipe: Recipe, served: psutil.Process
) -> None:
    assert recipe.recall is not None
    address, texts = recipe.fusion_address, [text_of(number).encode() for number in range(_NUM_TEXTS)]
    settings = recall_pb2.RecallSettings(budget_bytes=200, hops=[1, 2])

    async def main() -> list[tuple[int, int]]:
        stream, client = KeyBlockStream(address, settings=settings, attempts=20), RecallClient(address)
        found: list[tuple[int, int]] = []
        try:
            info = await client.info(timeout_seconds=60)
            assert (info.judge, len(info.revision), info.window_tokens) == (recipe.recall.judge, 32, 64)  # type: ignore[union-attr]
            questions = (LongText(text, "Where is Anna?") for text in texts)
            async for each in stream.in_order(questions):
                assert isinstance(each, recall_pb2.KeyBlocks)
                found.append([(b.start_byte, b.end_byte, b.hop) for b in each.blocks])  # type: ignore[arg-type]
                if len(found) in {20, 200}:
                    [replica] = replicas(served)
                    replica.kill()
            impatient = RecallClient(address, timeout_seconds=0.5)
            with pytest.raises(DeadlineExceededError):
                await impatient.select([LongText(b"Anna lives. " * 80_000, "Where?")])
            await impatient.close()
        finally:
            await stream.close()
            await client.close()
        return found

    found = asyncio.run(asyncio.wait_for(main(), 600))
    judge = Judge.load(recipe.recall.judge or "")
    wanted = [
        [(b.start_byte, b.end_byte, b.hop) for b in select(judge, text.decode(), "Where is Anna?", chosen).blocks]
        for chosen in [Selection(200, hops=(1, 2))]
        for text in texts
    ]
    assert found == wanted
    assert health_of(address, "recall") == "SERVING"


def test_a_corpus_deploys_the_service_for_as_long_as_it_needs_it(recipe: Recipe) -> None:
    enable_ray_authentication()
    lines: list[str] = []
    corpus = corpus_and_target(recipe, lines.append)
    assert "key blocks: 12 conversations" in lines
    assert corpus.num_windows("train") + corpus.num_windows("held_out") == 12
    assert [deployment.name for deployment in deployments() if deployment.name == recipe.name] == []
    assert corpus_and_target(recipe).record == corpus.record
