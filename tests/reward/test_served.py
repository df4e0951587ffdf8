"""The reward model as a recipe trains and serves it: on Ray Train and Ray Serve, through Serve's gRPC proxy."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import grpc
import pytest
import torch
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from safetensors.torch import load_file

from services.base.errors import InvalidArgumentError
from services.deploy.local_ray import enable_ray_authentication, free_port
from services.deploy.serve_config import serve_config
from services.recipes.load import load_recipe
from services.reward.client import RewardClient, Scored, ScoreStream
from services.reward.train import RewardJob, run
from services.rpc.health_check import health_of
from tests.reward.planted import planted_job, planted_pairs
from tests.reward.test_commands import a_recipe

pytestmark = pytest.mark.drill


def test_workers_of_ray_train_do_the_same(trained: RewardJob, tmp_path: Path) -> None:
    import ray

    enable_ray_authentication()
    try:
        ray.init(address="local", num_cpus=4, include_dashboard=False)
        job = planted_job(tmp_path, num_workers=1)
        assert run(job)
        weights, wanted = (load_file(one.files.model / "model.safetensors") for one in (job, trained))
        assert all(torch.equal(weights[name], wanted[name]) for name in wanted)
        together = replace(job, run_folder=tmp_path / "two", config=job.config.model_copy(update={"num_workers": 2}))
        assert run(together)
        weights = load_file(together.files.model / "model.safetensors")
        assert all(torch.isfinite(value).all() for value in weights.values())
    finally:
        ray.shutdown()


def test_it_scores_through_the_proxy(trained: RewardJob, tmp_path: Path) -> None:
    enable_ray_authentication()
    from tests.fakes.services.local_serve import local_serve

    recipe = load_recipe(a_recipe(tmp_path, trained, serve={"max_items": 8}), {})
    service = recipe.service.model_copy(update={"grpc_port": free_port(), "http_port": free_port()})
    recipe = recipe.model_copy(update={"service": service})
    answers = [Scored(pair.messages, pair.chosen, pair.domain) for pair in planted_pairs(40, seed=5)]

    async def main() -> None:
        client, stream = RewardClient(recipe.fusion_address), ScoreStream(recipe.fusion_address, timeout_seconds=120)
        try:
            assert set((await client.info(timeout_seconds=60)).domains) == {"brief", "rich"}
            called = await client.score(answers[:8])
            assert (await asyncio.gather(*map(stream.score, answers)))[:8] == pytest.approx(called, abs=1e-4)
            with pytest.raises(InvalidArgumentError, match=r"items\[0\]\.domain: 'loud'"):
                await client.score([replace(answers[0], domain="loud")])
        finally:
            await stream.close()
            await client.close()

    with local_serve(serve_config(recipe, only=["reward"])):
        asyncio.run(asyncio.wait_for(main(), 300))
        assert health_of(recipe.fusion_address, "reward") == "SERVING"
        with grpc.insecure_channel(recipe.fusion_address) as channel:
            asked = reflection_pb2.ServerReflectionRequest(list_services="")
            [listed] = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(iter([asked]), timeout=60)
        assert "fusion.v1.RewardService" in {service.name for service in listed.list_services_response.service}
