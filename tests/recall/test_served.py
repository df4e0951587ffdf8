"""The recall service in a recipe: what is deployed, under which name, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from services.deploy.serve_config import serve_config
from services.recipes.recipe import Recipe, RecipeError
from services.recipes.resolve import models_to_fetch
from services.recipes.validate import check_recipe


def a_recipe(**recall: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "long",
            "corpus": {"files": ["*.txt"]},
            "sources": [{"name": "one", "model": "/nowhere", "address": "127.0.0.1:1"}],
            "target": {"model": "/nowhere"},
            "recall": recall,
        }
    )


def test_the_section_adds_the_application_where_it_names_a_judge_and_no_address() -> None:
    deployed = serve_config(a_recipe(judge="judge", hops=[2], num_cpus=2))
    assert [entry["name"] for entry in deployed["applications"]] == ["fusion", "recall"]
    args = deployed["applications"][1]["args"]
    assert (args["judge"], args["hops"], args["num_cpus"]) == ("judge", [2], 2)
    assert "fusion.v1.recall_pb2_grpc.add_RecallServiceServicer_to_server" in str(deployed["grpc_options"])
    for config in (serve_config(a_recipe(judge="judge", address="10.0.0.7:9000")), serve_config(a_recipe())):
        assert [entry["name"] for entry in config["applications"]] == ["fusion"]
        assert "Recall" not in str(config["grpc_options"])


@pytest.mark.parametrize("application", ["one", "fusion"])
def test_its_name_is_its_own(application: str) -> None:
    with pytest.raises(ValidationError, match=f"recall.application: {application} is the name of another"):
        a_recipe(judge="judge", application=application)


@pytest.mark.parametrize(
    ("recall", "message"),
    [({"hops": []}, "recall.hops"), ({"hops": [0]}, "recall.hops.0"), ({"judge": ""}, "recall.judge")],
)
def test_a_wrong_key_is_named(recall: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        a_recipe(**recall)


def test_the_application_is_made_of_the_section_and_refuses_other_keys() -> None:
    from services.recall.app import build

    args = serve_config(a_recipe(judge="judge", num_replicas=2, num_gpus=0.5))["applications"][1]["args"]
    deployment = build(args)._bound_deployment  # type: ignore[attr-defined]  # Serve has no public way to look
    assert (deployment.name, deployment.num_replicas) == ("recall", 2)
    assert deployment.ray_actor_options["num_gpus"] == 0.5
    with pytest.raises(ValidationError, match="judges"):
        build({"judges": "judge"})


def test_a_judge_that_is_not_there_is_found_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=rf"(?m)^recall.judge: model folder {tmp_path}/none does not exist"):
        check_recipe(a_recipe(judge=f"{tmp_path}/none"))
    with pytest.raises(RecipeError) as caught:
        check_recipe(a_recipe(judge=f"{tmp_path}/none", address="10.0.0.7:9000"))
    assert "recall" not in str(caught.value)
    assert "smollm2-135m-instruct" in models_to_fetch(a_recipe(judge="smollm2-135m-instruct"))
