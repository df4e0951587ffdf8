"""Two trainers and a stranger at one service: each trainer gets its shard, and nobody without the token gets a byte."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from ray.serve.generated import serve_pb2

from fusion.v1 import block_pb2, fusion_pb2, fusion_pb2_grpc, source_pb2, source_pb2_grpc
from services.corpus.ledger import Corpus
from services.fusion.client import FusedWindow, StreamRequest
from services.rpc.channel import open_channel
from tests.security.deployment import SECOND_TOKEN, TOKEN, Guarded

pytestmark = pytest.mark.timeout(900)

OPENING = fusion_pb2.StreamFusedRequest(
    open=fusion_pb2.StreamFusedOpen(dataset="sentences", split="train", world_size=1, num_epochs=1)
)
CREDIT = block_pb2.Credit(blocks=4)
STRANGERS: dict[str, tuple[tuple[str, str], ...]] = {
    "no token": (),
    "wrong token": (("authorization", "Bearer token-of-nobody"),),
    "part of the token": (("authorization", f"Bearer {TOKEN[:-1]}"),),
    "token without its scheme": (("authorization", TOKEN),),
    "empty token": (("authorization", "Bearer "),),
}


def every_call(channel: grpc.Channel) -> dict[str, Callable[[tuple[tuple[str, str], ...]], Any]]:
    """All methods that carry anything of users or models, on the applications that have them."""
    fusion = fusion_pb2_grpc.FusionServiceStub(channel)
    source = source_pb2_grpc.SourceServiceStub(channel)

    def of(application: str, token: tuple[tuple[str, str], ...]) -> dict[str, Any]:
        return {"metadata": (("application", application), *token), "timeout": 30}

    def opened() -> Iterator[source_pb2.StreamScoresRequest]:
        yield source_pb2.StreamScoresRequest(open=source_pb2.StreamScoresOpen())
        yield source_pb2.StreamScoresRequest(texts=source_pb2.ScoreTexts(texts=[b"x"]))
        yield source_pb2.StreamScoresRequest(credit=CREDIT)

    return {
        "GetFusionInfo": lambda t: fusion.GetFusionInfo(fusion_pb2.GetFusionInfoRequest(), **of("fusion", t)),
        "Fuse": lambda t: fusion.Fuse(fusion_pb2.FuseRequest(texts=[b"the"]), **of("fusion", t)),
        "StreamFused": lambda t: list(
            fusion.StreamFused(iter([OPENING, fusion_pb2.StreamFusedRequest(credit=CREDIT)]), **of("fusion", t))
        ),
        "GetSourceInfo": lambda t: source.GetSourceInfo(source_pb2.GetSourceInfoRequest(), **of("one", t)),
        "Score": lambda t: source.Score(source_pb2.ScoreRequest(texts=[b"the"]), **of("one", t)),
        "StreamScores": lambda t: list(source.StreamScores(opened(), **of("one", t))),
    }


def test_each_trainer_gets_its_shard_and_the_stranger_nothing(guarded: Guarded) -> None:
    shards: dict[int, list[FusedWindow]] = {}
    statuses: list[grpc.StatusCode] = []
    done = threading.Event()

    def train(rank: int, token: str) -> None:
        request = StreamRequest("sentences", "train", seed=5, rank=rank, world_size=2)
        shards[rank] = list(guarded.client(token).stream(request, prefetch_windows=4))

    def knock() -> None:
        with open_channel(guarded.address) as channel:
            calls = every_call(channel)
            while not done.is_set() or not statuses:
                for call in calls.values():
                    for token in STRANGERS.values():
                        try:
                            call(token)
                            statuses.append(grpc.StatusCode.OK)
                        except grpc.RpcError as error:
                            statuses.append(error.code())

    stranger = threading.Thread(target=knock)
    stranger.start()
    trainers = [threading.Thread(target=train, args=(rank, token)) for rank, token in enumerate((TOKEN, SECOND_TOKEN))]
    for trainer in trainers:
        trainer.start()
    for trainer in trainers:
        trainer.join()
    done.set()
    stranger.join()

    corpus = Corpus.open(guarded.recipe.corpus_folder)
    indices = [{window.index for window in shards[rank]} for rank in (0, 1)]
    assert sum(map(len, shards.values())) == corpus.num_windows("train")
    assert indices[0] | indices[1] == set(range(corpus.num_windows("train")))
    assert not indices[0] & indices[1]
    for window in (*shards[0], *shards[1]):
        assert window.block.text_bytes == corpus.window("train", window.index).text
    assert len(statuses) >= 30
    assert set(statuses) == {grpc.StatusCode.UNAUTHENTICATED}


@pytest.mark.parametrize("stranger", STRANGERS)
def test_every_method_refuses_a_stranger(stranger: str, guarded: Guarded) -> None:
    with open_channel(guarded.address) as channel:
        for name, call in every_call(channel).items():
            with pytest.raises(grpc.RpcError) as caught:
                call(STRANGERS[stranger])
            assert caught.value.code() == grpc.StatusCode.UNAUTHENTICATED, name
            assert caught.value.details() == "authorization: a valid bearer token is required", name
            good = (("authorization", f"Bearer {TOKEN}"),)
            assert call(good), name


def test_health_and_reflection_are_public_and_say_nothing_of_data(guarded: Guarded) -> None:
    """Probes carry no token, and the protos are public anyway: names of services and their schemas, no more."""
    with open_channel(guarded.address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        answer = health.Check(health_pb2.HealthCheckRequest(), metadata=(("application", "fusion"),), timeout=120)
        assert answer == health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.SERVING)
        asked = reflection_pb2.ServerReflectionRequest(list_services="")
        answers = list(
            reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(iter([asked]), timeout=120)
        )
        services = {service.name for service in answers[0].list_services_response.service}
        assert services == {
            "fusion.v1.FusionService",
            "fusion.v1.SourceService",
            "grpc.health.v1.Health",
            "grpc.reflection.v1alpha.ServerReflection",
        }
        # Serve's own service, which nothing switches off: names of applications.
        listed = channel.unary_unary(
            "/ray.serve.RayServeAPIService/ListApplications",
            response_deserializer=serve_pb2.ListApplicationsResponse.FromString,
        )(b"", timeout=120)
        assert set(listed.application_names) == {"fusion", "one", "two", "cracked"}
