"""Mixtures of experts as sources: folders that an engine would compute wrongly are refused. The drill serves tiny ones
of every family with both engines, and the refused ones past the refusal."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from services.base.errors import SettingError
from services.distill.target.config import TargetConfig
from services.distill.target.prepare import prepare_target
from services.source.config import SourceConfig
from services.source.engines.load import load_engine
from services.source.engines.mixtures import check_mixture
from tests.bench.moe.sources import both_engines
from tests.fakes.files.tiny_mixtures import LATENT, MIXTURES, REFUSED, write_mixture
from tests.fakes.fusion_stream import FakeFusion, corpus
from tests.fakes.training import job_in, train


def source(folder: Path, kind: str, **settings: Any) -> SourceConfig:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(settings))
    return SourceConfig.model_validate({"name": "moe", "model": str(folder), "engine": kind})


@pytest.mark.parametrize(
    ("kind", "settings", "reason"),
    [
        ("vllm", {"model_type": "qwen2_moe", "qkv_bias": False}, "qkv_bias: false in config.json: vLLM reads biases"),
        ("vllm", {"model_type": "olmoe", "norm_topk_prob": True}, "norm_topk_prob: true in config.json: vLLM does not"),
        (
            "vllm",
            {"model_type": "deepseek_v2", "norm_topk_prob": True},
            "norm_topk_prob: true in config.json: vLLM",
        ),
        ("transformers", {"model_type": "deepseek_v2", "norm_topk_prob": True}, "norm_topk_prob: true"),
        ("vllm", {"model_type": "deepseek_v3"}, "a deepseek_v3 has latent attention, for which vLLM on a CPU"),
    ],
)
def test_a_folder_that_the_engine_computes_wrongly_is_refused_at_the_start(
    tmp_path: Path, kind: str, settings: dict[str, Any], reason: str
) -> None:
    config = source(tmp_path / "moe", kind, **settings)
    with pytest.raises(SettingError, match=f"^model: .*{reason}") as error:
        asyncio.run(load_engine(config, tmp_path / "moe", 400))
    assert error.value.setting == "model"


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("vllm", {"model_type": "qwen2_moe"}),
        ("vllm", {"model_type": "olmoe"}),
        ("transformers", {"model_type": "deepseek_v2", "norm_topk_prob": None}),
        ("transformers", {"model_type": "deepseek_v3", "norm_topk_prob": True}),
        ("vllm", {"model_type": "qwen3_moe", "norm_topk_prob": True}),
        ("transformers", {"model_type": "qwen2_moe", "qkv_bias": False}),
        ("transformers", {"model_type": "olmoe", "norm_topk_prob": True}),
        ("synthetic", {"model_type": "olmoe", "norm_topk_prob": True}),
    ],
)
def test_other_folders_are_accepted(tmp_path: Path, kind: str, settings: dict[str, Any]) -> None:
    check_mixture(source(tmp_path / "moe", kind, **settings), tmp_path / "moe")


def test_latent_attention_is_accepted_on_gpus_where_vllm_finds_the_biases_of_routers(tmp_path: Path) -> None:
    folder = tmp_path / "moe"
    for settings in ({"model_type": "deepseek_v2"}, {"model_type": "deepseek_v3", "topk_method": "noaux_tc"}):
        check_mixture(source(folder, "vllm", **settings).model_copy(update={"num_gpus": 1}), folder)
    config = source(folder, "vllm", model_type="deepseek_v3").model_copy(update={"num_gpus": 1})
    with pytest.raises(SettingError, match=r"^model: .*topk_method: noaux_tc in config\.json"):
        check_mixture(config, folder)


@pytest.mark.drill
@pytest.mark.timeout(900)
@pytest.mark.parametrize("family", [family for family in MIXTURES if family not in LATENT])
def test_both_engines_agree(tmp_path: Path, family: str) -> None:
    found = both_engines(write_mixture(tmp_path / "tiny", family))
    assert found.apart < found.bound
    assert found.company.largest_nats < 1e-4


@pytest.mark.drill
@pytest.mark.timeout(900)
@pytest.mark.parametrize("family", REFUSED)
def test_what_is_refused_still_scores_otherwise(tmp_path: Path, family: str) -> None:
    """Where this fails, the installed vLLM computes what the folder says: take the family out of `mixtures.py`."""
    folder = write_mixture(tmp_path / "tiny", family, **REFUSED[family])
    assert not both_engines(folder).apart < 1e-2


@pytest.mark.drill
@pytest.mark.timeout(900)
@pytest.mark.parametrize("init", ["residual", "split"])
def test_vllm_serves_the_folder_that_training_wrote(tmp_path: Path, init: str) -> None:
    shape = {"hidden_size": 128, "num_layers": 2, "num_heads": 4, "intermediate_size": 192, "max_positions": 256}
    config = TargetConfig.model_validate({"config": shape, "tokenizer": {"train": {"vocabulary_size": 300}}})
    target = prepare_target(config, [text.decode() for text in corpus(50)], tmp_path / "target", seed=1)
    moe = {"shards": 6, "shared": 2, "copies": 2, "init": init, "router_std": 0.5}
    job = job_in(tmp_path / "run", target, moe=moe, learning_rate=1e-2)
    train(job, FakeFusion(target, corpus(18)))
    found = both_engines(job.files.model)
    assert found.apart < found.bound
    assert found.company.largest_nats < 1e-4
