"""The verifier as a recipe serves it: on Ray Serve, through its gRPC proxy."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from pydantic import ValidationError

from services.base.errors import DeadlineExceededError, InvalidArgumentError
from services.deploy.k8s.cluster_recipe import cluster_recipe
from services.deploy.local_ray import enable_ray_authentication, free_port
from services.deploy.serve_config import serve_config
from services.recipes.recipe import Recipe, RecipeError
from services.rpc.health_check import health_of
from services.verify.client import VerdictStream, VerifierClient
from tests.verify.sandbox.hacks import TESTS
from tests.verify.sandbox.test_hacks import HONEST, sandbox_of

FIVE = json.dumps({"kind": "answer", "expected": "5"}).encode()
ADD = json.dumps({"kind": "program", "functions": ["add"], "tests": TESTS}).encode()


def a_recipe(**verify: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "judged",
            "corpus": {"files": ["*.txt"]},
            "sources": [{"name": "one", "model": "smollm2-135m-instruct", "address": "127.0.0.1:1"}],
            "target": {"model": "smollm2-135m-instruct"},
            "service": {"grpc_port": free_port(), "http_port": free_port()},
            "verify": verify,
        }
    )


def test_the_section_adds_the_application_unless_one_runs_already() -> None:
    deployed = serve_config(a_recipe(programs_at_once=3))
    assert [entry["name"] for entry in deployed["applications"]] == ["fusion", "verify"]
    assert deployed["applications"][1]["args"]["programs_at_once"] == 3
    elsewhere = serve_config(a_recipe(address="10.0.0.7:9000"))
    without = serve_config(a_recipe().model_copy(update={"verify": None}))
    for config in (elsewhere, without):
        assert [entry["name"] for entry in config["applications"]] == ["fusion"]
        assert not [name for name in config["grpc_options"]["grpc_servicer_functions"] if "Verifier" in name]


@pytest.mark.parametrize("application", ["one", "fusion"])
def test_its_name_is_its_own(application: str) -> None:
    with pytest.raises(ValidationError, match=f"verify.application: {application} is the name of another"):
        a_recipe(application=application)


def test_what_cannot_be_deployed_on_kubernetes_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"^verify: there are no manifests"):
        cluster_recipe(a_recipe())


@pytest.fixture(scope="module")
def served() -> Iterator[str]:
    enable_ray_authentication()
    from tests.fakes.services.local_serve import local_serve

    recipe = a_recipe(bwrap=sandbox_of(seconds=60)._bubblewrap, program_seconds=60)
    with local_serve(serve_config(recipe, only=["verify"])):
        yield recipe.fusion_address


def test_it_judges_through_the_proxy(served: str) -> None:
    submissions = [("#### 5.0", FIVE), ("6", FIVE), (HONEST, ADD), ("import os\nos._exit(0)", ADD)]

    async def main() -> None:
        client, stream = VerifierClient(served), VerdictStream(served, timeout_seconds=120)
        try:
            info = await client.info(timeout_seconds=60)
            assert (info.sandbox_problem, "program" in info.kinds) == ("", True)
            called = await client.verify(submissions)
            assert [verdict.right for verdict in called] == [True, False, True, False]
            assert await asyncio.gather(*map(stream.verdict, submissions * 20)) == called * 20
            with pytest.raises(InvalidArgumentError, match=r"submissions\[0\]\.spec: kind"):
                await client.verify([("x", b"{}")])
            impatient = VerifierClient(served, timeout_seconds=3)
            with pytest.raises(DeadlineExceededError):
                await impatient.verify([("while True:\n    pass", ADD)] * 2)
            await impatient.close()
            assert (await client.verify([(HONEST, ADD)]))[0].right  # long before the 60 s of the two are over
        finally:
            await stream.close()
            await client.close()

    asyncio.run(asyncio.wait_for(main(), 300))
    assert health_of(served, "verify") == "SERVING"


def test_reflection_lists_it(served: str) -> None:
    with grpc.insecure_channel(served) as channel:
        asked = reflection_pb2.ServerReflectionRequest(list_services="")
        [listed] = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(iter([asked]), timeout=60)
    assert "fusion.v1.VerifierService" in {service.name for service in listed.list_services_response.service}
