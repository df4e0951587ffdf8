"""A model that broke serves nothing more: found at start, by the canary under way, or by a look at the block itself."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from grpc_health.v1 import health_pb2

from fusion.v1 import source_pb2
from services.base.errors import UnavailableError
from services.rpc.auth import call_metadata
from services.source.canary import BatchEffect, CanaryRecord
from services.source.config import SourceConfig
from services.source.engines.base import Engine, PromptScores, SampledTokens, TokenSampling
from services.source.engines.load import load_engine
from services.source.servicer import SourceServicer
from services.wire.plausible import implausible_scores
from tests.fakes.tiny_model import make_tiny_model

TEXT = b"the man said that it was time"


class Context:
    """Stands for the context object that Serve hands to a method."""

    def __init__(self) -> None:
        self.code: Any = None

    def invocation_metadata(self) -> tuple[tuple[str, str], ...]:
        return call_metadata("tiny")

    def peer(self) -> str:
        return "ipv4:127.0.0.1:50000"

    def set_code(self, code: Any) -> None:
        self.code = code

    def set_details(self, details: str) -> None:
        pass

    def set_trailing_metadata(self, metadata: Any) -> None:
        pass


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FUSION_HOME", str(tmp_path / "home"))
    return make_tiny_model(tmp_path / "tiny", vocabulary_size=400, seed=2)


def with_servicer(folder: Path, run: Callable[[SourceServicer], Any], **canary: Any) -> None:
    async def main() -> None:
        servicer = SourceServicer.__new__(SourceServicer)
        config = SourceConfig.model_validate(
            {"name": "tiny", "model": str(folder), "engine": "transformers", "top_k": 8, "canary": canary}
        )
        await servicer.__init__(config)  # type: ignore[misc]  # as Serve does
        await run(servicer)
        await servicer.close()

    asyncio.run(main())


async def is_serving(servicer: SourceServicer) -> bool:
    response = await servicer.Check(health_pb2.HealthCheckRequest(), grpc_context=Context())  # type: ignore[call-arg]
    return bool(response.status == health_pb2.HealthCheckResponse.SERVING)


async def score(servicer: SourceServicer) -> Any:
    return await servicer.Score(source_pb2.ScoreRequest(texts=[TEXT]), grpc_context=Context())  # type: ignore[call-arg]


async def stream(servicer: SourceServicer) -> list[Any]:
    async def requests() -> Any:
        yield source_pb2.StreamScoresRequest(open=source_pb2.StreamScoresOpen())
        yield source_pb2.StreamScoresRequest(texts=source_pb2.ScoreTexts(texts=[TEXT]))
        yield source_pb2.StreamScoresRequest(credit={"blocks": 1})

    frames = servicer.StreamScores(requests(), grpc_context=Context())  # type: ignore[call-arg]
    return [frame async for frame in frames if frame.blocks]


async def assert_serves_nothing(servicer: SourceServicer, reason: str) -> None:
    assert not await is_serving(servicer)
    for call in (score, stream):
        with pytest.raises(UnavailableError, match=reason):
            await call(servicer)
    info = await servicer.GetSourceInfo(source_pb2.GetSourceInfoRequest(), grpc_context=Context())  # type: ignore[call-arg]
    assert reason in info.problem


def test_zeroed_weights_on_disk_are_noticed_before_anything_is_served(folder: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    model.save_pretrained(folder)
    with_servicer(folder, lambda servicer: assert_serves_nothing(servicer, "its weights are lost"))


@pytest.mark.parametrize(("value", "reason"), [(0.0, "its weights are lost"), (float("nan"), "NaN")])
def test_weights_lost_under_way_never_reach_a_client(folder: Path, value: float, reason: str) -> None:
    """Between two canaries: the first block after the loss is held back, and so is all that follows."""

    async def run(servicer: SourceServicer) -> None:
        assert await is_serving(servicer)
        assert len((await score(servicer)).blocks) == 1
        assert len(await stream(servicer)) == 1
        with torch.no_grad():
            servicer._scorer.engine._model.lm_head.weight.fill_(value)  # type: ignore[attr-defined]
        with pytest.raises(UnavailableError, match=reason):
            await score(servicer)
        await assert_serves_nothing(servicer, reason)

    with_servicer(folder, run)


def test_drift_is_noticed_by_the_canary(folder: Path) -> None:
    """Weights that are wrong but plausible: only the record of the first run tells."""

    async def run(servicer: SourceServicer) -> None:
        with torch.no_grad():
            weight = servicer._scorer.engine._model.lm_head.weight  # type: ignore[attr-defined]
            weight.copy_(weight.flip(0) * 3)
        async with asyncio.timeout(60):
            while await is_serving(servicer):
                await asyncio.sleep(0.01)
        await assert_serves_nothing(servicer, "nats per token off")

    with_servicer(folder, run, interval_seconds=0.05)


def test_the_record_outlives_the_replica(folder: Path, tmp_path: Path) -> None:
    """A second replica of the same weights compares itself with the first one's run, not with its own."""
    with_servicer(folder, score)
    [file] = (tmp_path / "home" / "canaries").glob("*.npy")
    with_servicer(folder, score)
    np.save(file, np.load(file) - 1)
    with_servicer(folder, lambda servicer: assert_serves_nothing(servicer, "1.000 nats per token off"))


def test_a_home_that_cannot_be_written_keeps_the_record_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FUSION_HOME", str(tmp_path / "file"))
    record = CanaryRecord(("weights",))
    assert record.drift(np.float32([-1, -2])) == 0
    assert record.drift(np.float32([-1, -3])) == pytest.approx(0.5)


def look(scores: PromptScores) -> str | None:
    return implausible_scores(scores.gold_T, scores.topk_logprobs_TK, vocabulary_size=50)


def sound_scores() -> PromptScores:
    logits = torch.randn(6, 50, generator=torch.Generator().manual_seed(0))
    logprobs = torch.log_softmax(logits, dim=1)
    top = logprobs.topk(8, dim=1)
    return PromptScores(logprobs[:, 0].numpy(), top.indices.int().numpy(), top.values.numpy())


def test_a_sound_block_passes() -> None:
    assert look(sound_scores()) is None


@pytest.mark.parametrize("value", [np.nan, np.inf, 0.0, -np.inf])
@pytest.mark.parametrize("column", ["gold_T", "topk_logprobs_TK"])
def test_one_wrong_row_is_enough(column: str, value: float) -> None:
    """NaN, infinities and mass above one in a single row; certainty (0) of the realised token alone is no mistake."""
    scores = sound_scores()
    getattr(scores, column)[3] = value
    expected_sound = column == "gold_T" and value == 0.0
    assert (look(scores) is None) == expected_sound


class Company(Engine):
    """A real engine whose log-probabilities are lower by `shift` for texts that are asked for at once: vLLM's rounding,
    as large as a test wants it."""

    dtype, path, determinism = "float32", "arrays", "depends on its batch"

    def __init__(self, inside: Engine, shift: float) -> None:
        self._inside, self._shift, self._under_way = inside, np.float32(shift), 0
        self.name_and_version = inside.name_and_version

    async def score(self, prompt_ids: Sequence[int], top_k: int) -> PromptScores:
        self._under_way += 1
        await asyncio.sleep(0)  # all that are asked for at once have come
        shift = self._shift if self._under_way > 1 else np.float32(0)
        scores = await self._inside.score(prompt_ids, top_k)
        self._under_way -= 1
        return PromptScores(scores.gold_T - shift, scores.topk_ids_TK, scores.topk_logprobs_TK - shift)

    def generate(self, prompt_ids: Sequence[int], how: TokenSampling) -> AsyncGenerator[SampledTokens, None]:
        return self._inside.generate(prompt_ids, how)

    async def check_health(self) -> None:
        await self._inside.check_health()

    def close(self) -> None:
        self._inside.close()


@pytest.fixture
def in_company(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Lets the sources of a test answer in a batch as far apart as asked for."""

    def shifted(shift: float) -> None:
        async def load(config: SourceConfig, folder: Path, vocabulary_size: int) -> Engine:
            return Company(await load_engine(config, folder, vocabulary_size), shift)

        monkeypatch.setattr("services.source.scorer.load_engine", load)

    return shifted


async def determinism(servicer: SourceServicer) -> str:
    info = await servicer.GetSourceInfo(source_pb2.GetSourceInfoRequest(), grpc_context=Context())  # type: ignore[call-arg]
    assert await is_serving(servicer)
    return str(info.determinism)


def test_what_company_changes_is_measured_at_the_start(folder: Path, in_company: Callable[[float], None]) -> None:
    async def run(servicer: SourceServicer) -> None:
        found = await determinism(servicer)
        assert found.startswith("depends on its batch; measured at the start: ")
        assert "differ by at most 0.031 nats, 100.0% of their candidates are the same" in found

    in_company(0.03125)
    with_servicer(folder, run)


def test_an_engine_that_runs_each_text_alone_has_nothing_to_measure(folder: Path) -> None:
    async def run(servicer: SourceServicer) -> None:
        assert "measured" not in await determinism(servicer)

    with_servicer(folder, run)


def test_the_comparison_with_the_record_allows_for_company(
    folder: Path, tmp_path: Path, in_company: Callable[[float], None]
) -> None:
    """0.055 nats off the record are too many alone, and not where a batch moves numbers by 0.02."""
    with_servicer(folder, score)
    [file] = (tmp_path / "home" / "canaries").glob("*.npy")
    np.save(file, np.load(file) - np.float32(0.055))
    with_servicer(folder, lambda servicer: assert_serves_nothing(servicer, "0.055 nats per token off"))

    async def run(servicer: SourceServicer) -> None:
        await servicer._scorer.check_canary()
        assert await is_serving(servicer)

    in_company(0.02)
    with_servicer(folder, run)


def test_a_source_whose_numbers_depend_on_company_too_much_serves_nothing(
    folder: Path, in_company: Callable[[float], None]
) -> None:
    in_company(0.25)
    reason = r"0.250 nats per token apart alone and together, and canary.tolerance_nats is 0.05"
    with_servicer(folder, lambda servicer: assert_serves_nothing(servicer, reason))
    with_servicer(folder, determinism, tolerance_nats=0.3)


def test_candidates_that_swap_places_are_the_same() -> None:
    one = PromptScores(np.float32([-1, -2]), np.int32([[3, 4], [5, 6]]), np.float32([[-1, -1], [-1, -2]]))
    other = PromptScores(np.float32([-1, -2.5]), np.int32([[4, 3], [5, 7]]), np.float32([[-1, -1], [-1, -3]]))
    assert BatchEffect.between([one], [other]) == BatchEffect(0.25, 1.0, 0.75)
