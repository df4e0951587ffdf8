"""A client in another language: Node finds the API by server reflection, or in protos/, and decodes a block."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_reflection.v1alpha import reflection

from fusion.v1 import fusion_pb2, fusion_pb2_grpc
from fusion_core.blocks import Block
from services.wire.block import encode_block
from tests.fakes.blocks import random_block
from tests.fakes.live import Live

REPOSITORY = Path(__file__).parents[2]
CLIENT = REPOSITORY / "tests" / "clients" / "node"
TEXT = "Zürich ist schön 🙂"

pytestmark = pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")


class OneBlock(fusion_pb2_grpc.FusionServiceServicer):
    """Answers every text with the same distributions; wants a token and the right application."""

    def __init__(self, block: Block) -> None:
        self.block = block
        self.spoil: Callable[[Any], None] = lambda block: None

    def Fuse(self, request: Any, context: grpc.ServicerContext) -> Any:  # noqa: N802
        metadata = dict(context.invocation_metadata())
        if metadata.get("authorization") != "Bearer secret":
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "authorization: a bearer token is needed")
        if metadata.get("application") != "fusion":
            context.abort(grpc.StatusCode.NOT_FOUND, "application: no such application")
        block = encode_block(replace(self.block, text_bytes=request.texts[0]), request.dtype)
        self.spoil(block)
        return fusion_pb2.FuseResponse(blocks=[block])


@pytest.fixture
def block() -> Block:
    block = random_block(num_tokens=3, k=6)
    ends = np.array([7, 11, len(TEXT.encode())], dtype=np.int32)
    ids, logprobs = block.topk_ids_TK.copy(), block.topk_logprobs_TK.copy()
    ids[2, 5:], logprobs[2, 5:] = -1, -np.inf
    tail = np.log1p(-np.exp(logprobs).sum(axis=1)).astype(np.float32)
    return replace(block, byte_ends_T=ends, topk_ids_TK=ids, topk_logprobs_TK=logprobs, tail_T=tail)


@pytest.fixture
def service(block: Block) -> Iterator[tuple[str, OneBlock]]:
    server = grpc.server(ThreadPoolExecutor(4))
    servicer = OneBlock(block)
    fusion_pb2_grpc.add_FusionServiceServicer_to_server(servicer, server)
    names = (fusion_pb2.DESCRIPTOR.services_by_name["FusionService"].full_name, reflection.SERVICE_NAME)
    reflection.enable_server_reflection(names, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}", servicer
    server.stop(None)


@pytest.fixture(scope="module", autouse=True)
def packages() -> None:
    """The client's npm packages, as its lock file names them."""
    installed, lock = CLIENT / "node_modules" / ".package-lock.json", CLIENT / "package-lock.json"
    if not installed.is_file() or installed.stat().st_mtime < lock.stat().st_mtime:
        subprocess.run(["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund"], cwd=CLIENT, check=True)


def node(address: str, *options: str, text: str = TEXT) -> subprocess.CompletedProcess[str]:
    command = ["node", str(CLIENT / "client.mjs"), address, f"--text={text}", *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize("api", ["v1alpha", "protos"])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float16", 1e-3), ("float32", 1e-6)])
def test_node_decodes_a_block(
    api: str, dtype: str, tolerance: float, service: tuple[str, OneBlock], block: Block
) -> None:
    protos = [f"--protos={REPOSITORY / 'protos'}"] if api == "protos" else []
    done = node(service[0], "--token=secret", f"--dtype={dtype}", *protos)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["api"] == api
    assert (answer["num_tokens"], answer["k"], answer["vocabulary"], answer["dtype"]) == (3, 6, "v", dtype)
    assert [candidate["id"] for candidate in answer["top"]] == block.topk_ids_TK[2, :5].tolist()
    logprobs = [candidate["logprob"] for candidate in answer["top"]]
    assert logprobs == pytest.approx(block.topk_logprobs_TK[2, :5].tolist(), rel=tolerance)
    assert answer["last_mass"] == pytest.approx(1.0, abs=5 * tolerance)
    assert answer["last_gold_logprob"] == pytest.approx(float(block.gold_T[2]), rel=1e-6)
    assert [source["name"] for source in answer["sources"]] == ["a", "b"]


@pytest.mark.parametrize("largest", [2**16 - 2, 2**16 - 1, 2**24 - 2, 2**24 - 1])
def test_node_decodes_ids_of_every_width(largest: int, service: tuple[str, OneBlock], block: Block) -> None:
    block.topk_ids_TK[2, 1] = largest
    done = node(service[0], "--token=secret")
    assert done.returncode == 0, done.stderr
    assert [candidate["id"] for candidate in json.loads(done.stdout)["top"]] == block.topk_ids_TK[2, :5].tolist()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ([], "UNAUTHENTICATED", "authorization: a bearer token is needed"),
        (["--token=secret", "--application=other"], "NOT_FOUND", "application: no such application"),
    ],
)
def test_node_sees_the_status_of_a_refusal(
    options: list[str], error: str, message: str, service: tuple[str, OneBlock]
) -> None:
    done = node(service[0], *options)
    assert done.returncode == 1
    assert json.loads(done.stderr) == {"error": error, "message": message}


def test_node_refuses_a_column_of_the_wrong_length(service: tuple[str, OneBlock]) -> None:
    def shorten(block: Any) -> None:
        block.gold = block.gold[:-4]

    service[1].spoil = shorten
    done = node(service[0], "--token=secret")
    assert done.returncode == 1
    assert json.loads(done.stderr)["message"] == "gold: 8 bytes, expected 3 x 4"


@pytest.mark.timeout(900)
def test_node_fuses_on_the_live_service(live: Live) -> None:
    """Through Serve's proxy, which serves reflection itself."""
    done = node(live.deployment.grpc_address, text="The capital of France is")
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["api"] in {"v1", "v1alpha"}
    assert answer["vocabulary"] == live.client.info().vocabulary
    assert answer["last_mass"] == pytest.approx(1.0, abs=5e-3)
    assert {source["name"] for source in answer["sources"]} == {"smollm2", "tiny"}
