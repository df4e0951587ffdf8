"""Settings of a source: what scaling and limits become, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from ray import serve

from services.source.app import deployment_options
from services.source.config import SourceAtAddress, SourceConfig, parse_source
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
        ({"engine": {"kind": "synthetic"}, "torch_threads": 2}, "torch_threads: only engine transformers takes it"),
        ({"engine": {"dtype": "float32"}, "dtype": "bfloat16"}, "dtype: 'bfloat16', but engine.dtype is 'float32'"),
        ({"engine": {"kind": "transformers", "engine_args": {}}}, "engine.engine_args"),
        ({"engine": "synthetic", "synthetic": 7}, "synthetic: expected a section"),
        ({"engine": {"kind": ["vllm"]}}, "Input should be 'vllm', 'transformers', 'synthetic' or 'openai'"),
        ({"dtype": "int8"}, "\ndtype\n"),
        ({"engine": {"dtype": "int8"}}, "\nengine.dtype\n"),
        ({"engine": "synthetic", "synthetic": {"seed": -1}}, "\nsynthetic.seed\n"),
        ({"address": "host:9000"}, "address: a source with an address is not deployed"),
        ({"application": "other"}, "application goes with address"),
        ({"max_tokens": 100, "max_tokens_in_flight": 100}, "max_tokens_in_flight must be above max_tokens"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError) as caught:
        source(**values)
    assert message in str(caught.value)


FORMS = [
    ({}, {"engine": {}}),
    ({"engine": "vllm", "dtype": "float32"}, {"engine": {"kind": "vllm", "dtype": "float32"}}),
    (
        {"engine_args": {"max_num_seqs": 2}, "trust_remote_code": True, "device": "auto", "synthetic": {}},
        {"engine": {"engine_args": {"max_num_seqs": 2}, "trust_remote_code": True}},
    ),
    (
        {"engine": "transformers", "torch_threads": 1, "engine_args": {}, "placement_strategy": "PACK"},
        {"engine": {"kind": "transformers", "torch_threads": 1}},
    ),
    (
        {"engine": "synthetic", "synthetic": {"seed": 3}, "dtype": "auto"},
        {"engine": {"kind": "synthetic", "seed": 3}},
    ),
]


@pytest.mark.parametrize(("flat", "section"), FORMS)
def test_short_and_long_form_say_the_same(flat: dict[str, Any], section: dict[str, Any]) -> None:
    """A key that the engine does not have is no mistake where it says its default: older dumps name them all."""
    assert source(**flat) == source(**section)


@pytest.mark.parametrize("values", [values for pair in FORMS for values in pair])
def test_what_is_written_down_is_read_again(values: dict[str, Any]) -> None:
    config = source(**values)
    assert SourceConfig.model_validate(config.model_dump(mode="json")) == config
    assert SourceConfig.model_validate(config.model_dump(mode="json", exclude_unset=True)) == config


DUMPED_BEFORE_SECTIONS = {
    "name": "s",
    "model": "m",
    "engine": "transformers",
    "dtype": "float32",
    "device": "auto",
    "top_k": 16,
    "max_top_k": None,
    "bos_token": None,
    "eos_token": None,
    "max_tokens": 2047,
    "max_text_bytes": 32768,
    "per_client": {"streams": 256, "blocks": 16384, "request_bytes": 33554432},
    "max_tokens_in_flight": None,
    "logits_memory_bytes": 2147483648,
    "engine_args": {},
    "synthetic": {"tokens_per_second": None, "delay_seconds": 0.0, "seed": 0},
    "canary": {"interval_seconds": 300.0, "tolerance_nats": 0.05},
    "env": {},
    "trust_remote_code": False,
    "torch_threads": None,
    "address": None,
    "application": None,
    "num_replicas": 1,
    "autoscaling": None,
    "num_cpus": 1.0,
    "num_gpus": 0.0,
    "placement_strategy": "PACK",
    "max_ongoing_requests": 64,
    "max_queued_requests": 256,
}
"""A source as run folders and Serve's stored arguments hold it from before there was a section `engine`."""


def test_older_dumps_stay_readable() -> None:
    assert parse_source(DUMPED_BEFORE_SECTIONS) == source(top_k=16, engine={"kind": "transformers", "dtype": "float32"})
    reached = DUMPED_BEFORE_SECTIONS | {"address": "host:9000", "dtype": "auto"}
    assert parse_source(reached) == SourceAtAddress(name="s", model="m", top_k=16, address="host:9000")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_replicas": 2}, "num_replicas: leave it out with address"),
        ({"autoscaling": {"max_replicas": 2}}, "autoscaling: leave it out with address"),
        ({"dtype": "float32", "torch_threads": None}, "dtype: leave it out with address"),
        ({"engine": {"kind": "synthetic", "seed": 1}}, "engine: leave it out with address"),
        ({"engine": "synthetic", "synthetic": {"seed": 1}}, "synthetic: leave it out with address"),
        ({"colour": "red"}, "colour"),
        ({"num_replicas": 0}, "num_replicas"),
    ],
)
def test_a_source_at_an_address_takes_no_keys_of_a_deployment(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError) as caught:
        parse_source({"name": "s", "model": "m", "address": "host:9000"} | values)
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
