"""Settings of a source: what scaling and limits become, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from ray import serve

from services.source.app import deployment_options
from services.source.config import SourceConfig
from services.source.engines.memory import rows_at_once, tokens_in_flight


def source(**values: Any) -> SourceConfig:
    return SourceConfig.model_validate({"name": "s", "model": "m"} | values)


def test_autoscaling_reaches_serve() -> None:
    scaling = {"min_replicas": 2, "max_replicas": 5, "target_ongoing_requests": 3}
    deployment = serve.deployment(**deployment_options(source(autoscaling=scaling)))(object)
    found = deployment._deployment_config.autoscaling_config
    assert (found.min_replicas, found.max_replicas, found.target_ongoing_requests) == (2, 5, 3)


def test_tensor_parallel_workers_get_a_bundle_each() -> None:
    config = source(engine_args={"tensor_parallel_size": 4}, num_gpus=4, num_cpus=2, placement_strategy="STRICT_PACK")
    replica = serve.deployment(**deployment_options(config))(object)._replica_config
    assert replica.placement_group_bundles == [{"GPU": 1, "CPU": 2}, {"GPU": 1}, {"GPU": 1}, {"GPU": 1}]
    assert replica.placement_group_strategy == "STRICT_PACK"
    assert replica.ray_actor_options["num_cpus"] == 2
    assert not replica.ray_actor_options.get("num_gpus")


@pytest.mark.parametrize(
    "values",
    [
        {"num_gpus": 1},
        {"num_gpus": 2, "engine_args": {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}},
    ],
)
def test_gpus_of_one_process_group_belong_to_the_replica(values: dict[str, Any]) -> None:
    replica = serve.deployment(**deployment_options(source(**values)))(object)._replica_config
    assert replica.placement_group_bundles is None
    assert replica.ray_actor_options["num_gpus"] == values["num_gpus"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"autoscaling": {"min_replicas": 3, "max_replicas": 2}}, "min_replicas (3) must be at most max_replicas (2)"),
        ({"autoscaling": {"max_replicas": 2}, "num_replicas": 2}, "num_replicas: autoscaling decides it"),
        ({"engine_args": {"tensor_parallel_size": 4}, "num_gpus": 2}, "num_gpus: engine_args ask for 4 workers"),
        ({"placement_strategy": "SPREAD"}, "placement_strategy: only a replica that takes several GPUs"),
        ({"synthetic": {"seed": 1}}, "synthetic: only engine synthetic takes it"),
        ({"engine": "synthetic", "dtype": "float32"}, "dtype: engine synthetic loads no model"),
        ({"engine": "synthetic", "engine_args": {"seed": 1}}, "engine_args: only engine vllm takes it"),
        ({"max_tokens": 100, "max_tokens_in_flight": 100}, "max_tokens_in_flight must be above max_tokens"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError) as caught:
        source(**values)
    assert message in str(caught.value)


@pytest.mark.parametrize("nested", [False, True])
def test_tokens_in_flight_follow_from_memory_and_vocabulary(tmp_path: Path, nested: bool) -> None:
    """A float32 row of 262,144 entries is 1 MiB, and three of them are alive at once."""
    size = {"vocab_size": 262_144}
    (tmp_path / "config.json").write_text(json.dumps({"text_config": size} if nested else size))
    config = source(logits_memory_bytes=3 * 1000 * 2**20)
    assert rows_at_once(config.engine, tmp_path) == 1000
    assert tokens_in_flight(config, tmp_path) == 2048  # a whole text of max_tokens and BOS must fit
    assert tokens_in_flight(source(logits_memory_bytes=3 * 4000 * 2**20), tmp_path) == 8000
    explicit = source(max_tokens_in_flight=5000, max_tokens=600)
    assert tokens_in_flight(explicit, tmp_path) == 5000
    assert rows_at_once(explicit.engine, tmp_path, max_tokens_in_flight=5000) == 2 * 2**30 // (3 * 2**20)


def test_a_model_that_hides_its_vocabulary_needs_a_setting(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="max_tokens_in_flight"):
        rows_at_once(source().engine, tmp_path)
    assert rows_at_once(source().engine, tmp_path, max_tokens_in_flight=5000) == 5000
