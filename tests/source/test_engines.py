"""The engines agree: vLLM behind Serve and gRPC, and transformers here, score the real SmolLM2 alike."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from fusion.v1 import block_pb2, source_pb2, source_pb2_grpc
from fusion_core.blocks import Block
from services.base.errors import InvalidArgumentError
from services.models.catalogue import resolve_model
from services.rpc.auth import call_metadata
from services.rpc.channel import open_channel
from services.source.config import SourceConfig, parse_source
from services.source.engines.config import TransformersConfig
from services.source.scorer import Scorer
from services.wire.block import decode_block
from services.wire.passage import Passage
from tests.fakes.live import Live
from tests.fakes.tiny_model import make_tiny_model, sentences

pytestmark = pytest.mark.timeout(900)

TEXTS = [
    b"The capital of France is Paris.",
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich — 日本語 👍\r\n\tdone".encode(),
    b"def add(a: int, b: int) -> int:\n    return a + b\n",
    sentences(600, seed=5).encode(),
]


def scored_here(config: SourceConfig, texts: list[bytes], top_k: int) -> list[Block]:
    async def run() -> list[Block]:
        scorer = await Scorer.load(config, resolve_model(config.model))
        blocks = [await scorer.score(prompt, top_k) for prompt in scorer.encode(list(map(Passage, texts)))]
        scorer.engine.close()
        return blocks

    return asyncio.run(run())


def test_vllm_behind_grpc_agrees_with_transformers(live: Live) -> None:
    with open_channel(live.deployment.grpc_address) as channel:
        stub = source_pb2_grpc.SourceServiceStub(channel)
        info = stub.GetSourceInfo(source_pb2.GetSourceInfoRequest(), metadata=call_metadata("smollm2"), timeout=60)
        request = source_pb2.ScoreRequest(texts=TEXTS, top_k=16, dtype=block_pb2.LOGPROB_DTYPE_FLOAT32)
        response = stub.Score(request, metadata=call_metadata("smollm2"), timeout=300)
    assert info.engine.startswith("vllm ")
    assert info.logprobs_path == "tap"  # "flat": the installed vLLM has moved the door, see vllm_tap.py
    over_grpc = [decode_block(message) for message in response.blocks]
    config = live.recipe.sources[0].model_copy(update={"engine": TransformersConfig(dtype="float32")})
    for served, here in zip(over_grpc, scored_here(config, TEXTS, 16), strict=True):
        assert served.vocabulary == here.vocabulary == info.vocabulary
        np.testing.assert_array_equal(served.token_ids_T, here.token_ids_T)
        np.testing.assert_array_equal(served.byte_ends_T, here.byte_ends_T)
        np.testing.assert_allclose(served.gold_T, here.gold_T, atol=1e-3)
        np.testing.assert_allclose(served.topk_logprobs_TK, here.topk_logprobs_TK, atol=1e-3)
        np.testing.assert_allclose(np.exp(served.tail_T), np.exp(here.tail_T), atol=1e-3)
        # Candidates may swap places only where their probabilities agree to within the tolerance.
        differ = served.topk_ids_TK != here.topk_ids_TK
        assert differ.mean() < 0.02


def test_scores_equal_a_plain_forward_pass(tmp_path: Path) -> None:
    """Against log_softmax over all logits, written out: row t predicts token t, BOS is context and no row."""
    folder = make_tiny_model(tmp_path / "tiny", vocabulary_size=400, seed=2)
    config = SourceConfig(name="tiny", model=str(folder), engine="transformers", dtype="float32")
    text = TEXTS[1]
    [block] = scored_here(config, [text], 8)
    block.validate()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    ids = tokenizer(text.decode(), add_special_tokens=False)["input_ids"]
    assert block.token_ids_T.tolist() == ids
    with torch.no_grad():
        logits = model(torch.tensor([[tokenizer.bos_token_id, *ids]])).logits[0, :-1].double()
    logprobs = torch.log_softmax(logits, dim=-1).numpy()
    rows = np.arange(len(ids))
    np.testing.assert_allclose(block.gold_T, logprobs[rows, ids], atol=1e-4)
    order = np.sort(logprobs, axis=1)[:, ::-1]
    np.testing.assert_allclose(block.topk_logprobs_TK, order[:, :8], atol=1e-4)
    np.testing.assert_allclose(np.exp(block.tail_T), np.exp(order[:, 8:]).sum(axis=1), atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bos_token": "<nobody>"}, "bos_token: '<nobody>' is no special token"),
        ({"engine_args": {"enforce_eager": True}}, "engine_args: only engine vllm"),
        ({"device": "cuda"}, "device: cuda is asked for"),
        ({"top_k": 500}, "top_k: 500 is more than the vocabulary's 400"),
        ({"engine": "vllm", "torch_threads": 1}, "torch_threads: only engine transformers"),
        ({"address": "host:9000", "bos_token": "<s>"}, "bos_token: leave it out with address"),
    ],
)
def test_settings_that_cannot_be_honoured_are_named(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    if changes.get("device") == "cuda" and torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    folder = make_tiny_model(tmp_path / "tiny", vocabulary_size=400, seed=2)
    values = {"name": "tiny", "model": str(folder), "engine": "transformers"} | changes
    with pytest.raises(ValueError, match=message):
        scored_here(parse_source(values), TEXTS[:1], 4)


def test_tokens_in_flight_are_bounded(tmp_path: Path) -> None:
    """Texts wait their turn instead of running together, and all are answered."""
    folder = make_tiny_model(tmp_path / "tiny", vocabulary_size=400, seed=2)
    config = SourceConfig(
        name="tiny", model=str(folder), engine="transformers", max_tokens=200, max_tokens_in_flight=201
    )

    async def run() -> None:
        scorer = await Scorer.load(config, folder)
        texts = [sentences(100, seed=n).encode()[:100] for n in range(6)]
        prompts = scorer.encode(list(map(Passage, texts)))
        peak = 0
        score = scorer.engine.score

        async def watched(prompt: list[int], top_k: int):  # type: ignore[no-untyped-def]
            nonlocal peak, running
            running += len(prompt)
            peak = max(peak, running)
            try:
                return await score(prompt, top_k)
            finally:
                running -= len(prompt)

        running = 0
        scorer.engine.score = watched  # type: ignore[assignment]
        blocks = await asyncio.gather(*(scorer.score(prompt, 4) for prompt in prompts))
        assert [block.text_bytes for block in blocks] == texts
        assert peak <= 201
        with pytest.raises(InvalidArgumentError, match="accepts 1 to 200"):
            scorer.encode([Passage(b"1 2 3 " * 100)])
        scorer.engine.close()

    asyncio.run(run())
