"""A model behind HTTP scores as it does here, and what no sound server answers is refused with the reason."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fusion.v1 import source_pb2
from fusion_core.blocks import Block
from services.base.errors import DeadlineExceededError, UnavailableError
from services.rpc.deadline import caller_deadline, timeout_metadata
from services.source.config import SourceConfig
from services.source.engines.base import TokenSampling
from services.source.engines.load import load_engine
from services.source.scorer import Scorer
from services.source.servicer import SourceServicer
from services.wire.passage import Passage
from tests.fakes.services.model_server import ModelServer, model_server
from tests.fakes.services.plain_source import plain_source
from tests.fakes.tiny_model import sentences
from tests.source.engines.served import config, outage, remote, scored
from tests.source.test_canary import Context, is_serving

TEXTS = [b"the man said that it was time", "Zwölf Boxkämpfer — 日本 👍\r\n".encode(), sentences(300, seed=5).encode()]
FLAVOURS = ["vllm", "sglang"]


def blocks(config: SourceConfig, folder: Path) -> list[Block]:
    async def run() -> list[Block]:
        scorer = await Scorer.load(config, folder)
        prompts = scorer.encode(list(map(Passage, TEXTS)))
        found = await asyncio.gather(*(scorer.score(prompt, 8) for prompt in prompts))
        scorer.engine.close()
        return list(found)

    return asyncio.run(run())


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_rows_are_those_of_the_same_model_here(folder: Path, flavour: str) -> None:
    here = SourceConfig.model_validate({"name": "here", "model": str(folder), "top_k": 8, "engine": "transformers"})
    with model_server(folder, flavour) as server:
        there = blocks(config(folder, server, {"url": server.url + "/v1/"}), folder)
        assert all(body.get("model", "tiny") == "tiny" for body in server.asked)
    for one, other in zip(there, blocks(here, folder), strict=True):
        one.validate()
        assert one.token_ids_T.tolist() == other.token_ids_T.tolist()
        np.testing.assert_array_equal(one.topk_ids_TK, other.topk_ids_TK)
        for column in ("gold_T", "topk_logprobs_TK", "tail_T"):
            np.testing.assert_allclose(getattr(one, column), getattr(other, column), atol=1e-4)


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_an_answer_s_log_probabilities_are_the_model_s_own(folder: Path, flavour: str) -> None:
    """Whatever the temperature: the engine asks for the rows of prompt and answer."""
    how = TokenSampling(temperature=0.2, top_p=0.5, max_new_tokens=5, seed=2**63 - 1, stop_ids=(1,))

    async def run(server: ModelServer) -> list[tuple[list[int], list[float]]]:
        engine = await load_engine(config(folder, server), folder, 400)
        found = [tuple(tokens) async for tokens in engine.generate([0, 5, 6, 7], how)]
        engine.close()
        return found  # type: ignore[return-value]

    with model_server(folder, flavour) as server:
        [(ids, logprobs)] = asyncio.run(run(server))
        expected = [own[1] for own, _ in server.rows([0, 5, 6, 7, *ids], 1)][-5:]
    assert len(ids) == 5
    np.testing.assert_allclose(logprobs, expected, atol=1e-4)


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_the_description_names_the_served_model_and_not_where_it_is(folder: Path, flavour: str) -> None:
    async def described(server: ModelServer, **engine: Any) -> source_pb2.GetSourceInfoResponse:
        servicer = SourceServicer.__new__(SourceServicer)
        await servicer.__init__(config(folder, server, engine))  # type: ignore[misc]  # as Serve does
        assert await is_serving(servicer)
        info = await servicer.GetSourceInfo(source_pb2.GetSourceInfoRequest(), grpc_context=Context())  # type: ignore[call-arg]
        server.down = True
        assert not await is_serving(servicer)
        await servicer.check_health()  # no other replica would help
        await servicer.close()
        server.down = False
        return info  # type: ignore[no-any-return]

    with model_server(folder, flavour) as server, model_server(folder, flavour) as copy:
        info = asyncio.run(described(server))
        assert info.engine == f"openai 9.8.7 (flavour={flavour}, model=tiny)"
        assert info.logprobs_path == "json"
        assert asyncio.run(described(copy)) == info
        renamed = asyncio.run(described(copy, revision="tuned"))
        copy.root = "org/other"
        assert len({info.revision, renamed.revision, asyncio.run(described(copy)).revision}) == 3


def test_the_key_is_sent_and_shown_nowhere(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    with model_server(folder, key="sk-right") as server:
        settings = config(folder, server, {"api_key_env": "KEY_OF_A_TEST"})
        monkeypatch.setenv("KEY_OF_A_TEST", "sk-right")
        assert scored(settings, folder, lambda: None).gold_T.shape == (3,)
        for status in (400, 500, 503):
            with pytest.raises(UnavailableError, match=str(status)) as caught:
                scored(settings, folder, lambda status=status: server.statuses.append(status))  # type: ignore[misc]
            assert "sk-right" not in str(caught.value)
        monkeypatch.setenv("KEY_OF_A_TEST", "sk-wrong")
        with pytest.raises(UnavailableError, match=r"engine\.api_key_env: .*401") as caught:
            scored(settings, folder, lambda: None)
        assert "sk-wrong" not in str(caught.value)
    assert "sk-" not in caplog.text + settings.model_dump_json() + settings.engine_name


def test_an_overloaded_server_is_asked_again(folder: Path) -> None:
    with model_server(folder) as server:
        patient = config(folder, server, {"retry_seconds": 30})
        rows = scored(patient, folder, lambda: server.statuses.extend([429, 503]))
        assert rows.topk_ids_TK.shape == (3, 8)
        assert len(server.asked) == 4  # the probe, two refusals, the answer
        with pytest.raises(UnavailableError, match="429"):
            scored(config(folder, server), folder, lambda: server.statuses.append(429))


def test_a_silent_server_costs_no_more_than_the_deadline(folder: Path) -> None:
    with model_server(folder) as server:
        with pytest.raises(DeadlineExceededError, match=r"did not answer within 0\.7 s"):
            scored(config(folder, server, {"timeout_seconds": 0.7}), folder, server.silent.set)

        async def run() -> None:
            server.silent.clear()
            engine = await load_engine(config(folder, server), folder, 400)
            server.silent.set()
            with pytest.raises((TimeoutError, DeadlineExceededError)):
                async with caller_deadline(timeout_metadata(0.2)):
                    await engine.score([0, 5, 6, 7], 8)
            engine.close()

        asyncio.run(run())


def test_another_model_after_a_lost_connection_is_refused(folder: Path) -> None:
    async def run(server: ModelServer) -> None:
        engine = await load_engine(config(folder, server), folder, 400)
        server.down = True
        with pytest.raises(UnavailableError, match="cannot be reached"):
            await engine.score([0, 5, 6], 8)
        server.down, server.root = False, "org/other"
        with pytest.raises(UnavailableError, match="came back with another model"):
            await engine.score([0, 5, 6], 8)
        server.root = "org/tiny"
        assert (await engine.score([0, 5, 6], 8)).gold_T.shape == (2,)
        engine.close()

    with model_server(folder) as server:
        asyncio.run(run(server))


def test_the_breaker_opens_while_the_server_is_away_and_closes_after(folder: Path) -> None:
    windows = [Passage(sentences(60, seed=n).encode()) for n in range(12)]

    async def run(server: ModelServer, address: str) -> None:
        source = remote(address, folder)
        try:
            await outage(source, windows, lambda: setattr(server, "down", True), lambda: setattr(server, "down", False))
        finally:
            await source.close()

    with model_server(folder) as server, plain_source(config(folder, server)) as served:
        asyncio.run(run(server, served.address))
