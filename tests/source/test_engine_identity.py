"""Whatever changes what a source says is in its name, and so in the identity of stored windows and of the canary."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import Any

import pytest

from fusion.v1 import source_pb2
from fusion_core.vocabulary import Vocabulary
from services.fusion.config import SourceEndpoint
from services.fusion.sources.through_store import stored_identities
from services.source.config import SourceConfig
from services.source.engines.identity import NEUTRAL_ENGINE_ARGS
from services.source.servicer import SourceServicer
from services.store.identity import SourceIdentity
from services.store.store import BlockStore
from tests.fakes.tiny_model import make_tiny_model
from tests.source.test_canary import Context, is_serving


def source(**values: Any) -> SourceConfig:
    return SourceConfig.model_validate({"name": "s", "model": "m"} | values)


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ({}, "vllm"),
        ({"engine_args": {"load_format": "dummy"}}, "vllm (load_format=dummy)"),
        ({"engine_args": {"load_format": "safetensors", "quantization": None}}, "vllm"),
        (
            {"engine_args": {"hf_overrides": {"b": 1, "a": {"rope_theta": 5}}, "quantization": "fp8"}},
            'vllm (hf_overrides={"a": {"rope_theta": 5}, "b": 1}, quantization=fp8)',
        ),
        ({"engine_args": {"an_argument_of_tomorrow": 3}}, "vllm (an_argument_of_tomorrow=3)"),
        ({"engine_args": dict.fromkeys(NEUTRAL_ENGINE_ARGS, 1), "num_gpus": 1}, "vllm"),
        ({"env": {"VLLM_ATTENTION_BACKEND": "FLASHINFER"}}, "vllm (VLLM_ATTENTION_BACKEND=FLASHINFER)"),
        ({"env": {"VLLM_BATCH_INVARIANT": "1"}}, "vllm (VLLM_BATCH_INVARIANT=1)"),
        ({"env": {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "DEBUG", "OMP_NUM_THREADS": "2"}}, "vllm"),
        ({"trust_remote_code": True}, "vllm (trust_remote_code=true)"),
        ({"engine": "transformers", "torch_threads": 2, "device": "cpu"}, "transformers"),
        ({"engine": "transformers", "trust_remote_code": True}, "transformers (trust_remote_code=true)"),
        ({"engine": "synthetic", "synthetic": {"tokens_per_second": 9}}, "synthetic (candidates=64, seed=0)"),
        ({"engine": "synthetic", "synthetic": {"seed": 7}, "max_top_k": 99}, "synthetic (candidates=99, seed=7)"),
    ],
)
def test_the_name_says_what_changes_the_numbers(values: dict[str, Any], name: str) -> None:
    assert source(**values).engine_name == name


def info(engine: str) -> source_pb2.GetSourceInfoResponse:
    return source_pb2.GetSourceInfoResponse(
        model="m", revision="r", vocabulary="v", bos_token="<s>", eos_token="</s>", engine=engine, dtype="float32"
    )


@pytest.mark.parametrize(
    "environment",
    [{}, {"VLLM_SERVICE_HOST": "10.0.0.3", "VLLM_PORT_8000_TCP": "tcp://10.0.0.3:8000", "VLLM_PORT": "1"}],
)
def test_a_running_engine_has_the_configured_name_and_its_version(environment: dict[str, str]) -> None:
    vllm_engine = pytest.importorskip("services.source.engines.vllm")
    pytest.importorskip("vllm")
    config = source(engine_args={"load_format": "dummy", "max_num_seqs": 3})
    running = vllm_engine.full_name(config, environment)
    assert re.fullmatch(r"vllm \S+ \(load_format=dummy\)", running)
    assert SourceIdentity.of(info(running), 64).engine == config.engine_name


def test_variables_of_the_pod_count_as_well() -> None:
    vllm_engine = pytest.importorskip("services.source.engines.vllm")
    pytest.importorskip("vllm")
    running = vllm_engine.full_name(source(), {"VLLM_TEST_FORCE_LOAD_FORMAT": "dummy", "VLLM_LOGGING_LEVEL": "INFO"})
    assert running.endswith(" (VLLM_TEST_FORCE_LOAD_FORMAT=dummy)")


def test_windows_of_other_settings_are_not_taken_for_the_source_s_own(tmp_path: Path) -> None:
    """A source that is away is read from the store; what dummy weights have said must not stand in for it."""
    folder = make_tiny_model(tmp_path / "tiny", vocabulary_size=400, seed=2)
    vocabulary, store = Vocabulary.from_pretrained(folder), BlockStore(str(tmp_path / "store"))
    for engine in ("vllm 0.32.0 (load_format=dummy)", "vllm 0.32.0"):
        answer = info(engine)
        answer.vocabulary = vocabulary.fingerprint
        store.source(SourceIdentity.of(answer, 64)).write_identity()

    def found(**values: Any) -> list[str]:
        endpoint = SourceEndpoint(
            name="s", model=str(folder), address="h:1", application="s", top_k=64, engine=source(**values).engine_name
        )
        return [identity.engine for identity in stored_identities(store, endpoint, vocabulary)]

    assert found() == ["vllm"]
    assert found(engine_args={"load_format": "dummy", "max_num_seqs": 1}) == ["vllm (load_format=dummy)"]
    assert found(engine_args={"quantization": "fp8"}) == []


def test_a_synthetic_source_with_another_top_k_is_another_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its table depends on it: compared with the first one's canary it would call itself broken."""
    monkeypatch.setenv("FUSION_HOME", str(tmp_path / "home"))
    folder = make_tiny_model(tmp_path / "tiny", vocabulary_size=400, seed=2)

    async def start(top_k: int) -> str:
        servicer = SourceServicer.__new__(SourceServicer)
        await servicer.__init__(source(model=str(folder), engine="synthetic", top_k=top_k))  # type: ignore[misc]
        assert await is_serving(servicer)
        request = source_pb2.GetSourceInfoRequest()
        response = await servicer.GetSourceInfo(request, grpc_context=Context())  # type: ignore[call-arg]
        await servicer.close()
        return str(response.engine)

    assert len({asyncio.run(start(top_k)) for top_k in (8, 16, 8)}) == 2
