"""Malformed requests for every method of a live service, as bytes that no client library would send."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.message import DecodeError, Message
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from fusion.v1 import answer_pb2, block_pb2, fusion_pb2, source_pb2
from services.rpc.deadline import TIMEOUT_KEY
from tests.fuzz.mutation import EDGES_32, junk, mutated

_TIMEOUT_SECONDS = 120.0
_FRAMES = 8
"""Frames that are read of a stream before it is left."""


@dataclass(frozen=True)
class Method:
    """A method, the application that has it, its request and good examples of what is sent on it."""

    path: str
    application: str
    request: type[Message]
    examples: tuple[Message, ...]
    streams: bool = False


_OPENING = fusion_pb2.StreamFusedOpen(dataset="sentences", split="train", world_size=2, seed=1, k=4)
_CREDIT = block_pb2.Credit(blocks=2)
_TEXTS = [b"The time of all.", "Ça va 👍".encode()]
_PROMPTS = [
    answer_pb2.AnswerPrompt(text=_TEXTS[0]),
    answer_pb2.AnswerPrompt(messages=b'[{"role": "user", "content": "Hello <|eos|>"}]'),
]
_SAMPLING = answer_pb2.Sampling(num_answers=2, temperature=0.7, top_p=0.9, max_new_tokens=4, stop=["a"], logprobs=True)
METHODS = (
    Method(
        "/fusion.v1.FusionService/GetFusionInfo",
        "fusion",
        fusion_pb2.GetFusionInfoRequest,
        (fusion_pb2.GetFusionInfoRequest(),),
    ),
    Method(
        "/fusion.v1.FusionService/Fuse",
        "fusion",
        fusion_pb2.FuseRequest,
        (
            fusion_pb2.FuseRequest(texts=_TEXTS, k=4, sources=["one"]),
            fusion_pb2.FuseRequest(
                texts=_TEXTS[:1], sources=["one", "two"], contexts=[block_pb2.TextContext(preceding=b"So ")]
            ),
        ),
    ),
    Method(
        "/fusion.v1.FusionService/StreamFused",
        "fusion",
        fusion_pb2.StreamFusedRequest,
        (fusion_pb2.StreamFusedRequest(open=_OPENING), fusion_pb2.StreamFusedRequest(credit=_CREDIT)),
        streams=True,
    ),
    Method(
        "/fusion.v1.SourceService/GetSourceInfo",
        "one",
        source_pb2.GetSourceInfoRequest,
        (source_pb2.GetSourceInfoRequest(),),
    ),
    Method(
        "/fusion.v1.SourceService/Score",
        "one",
        source_pb2.ScoreRequest,
        (source_pb2.ScoreRequest(texts=_TEXTS, top_k=4, contexts=[block_pb2.TextContext(ends_document=True)] * 2),),
    ),
    Method(
        "/fusion.v1.SourceService/StreamScores",
        "one",
        source_pb2.StreamScoresRequest,
        (
            source_pb2.StreamScoresRequest(open=source_pb2.StreamScoresOpen(top_k=4)),
            source_pb2.StreamScoresRequest(texts=source_pb2.ScoreTexts(texts=_TEXTS)),
            source_pb2.StreamScoresRequest(credit=_CREDIT),
        ),
        streams=True,
    ),
    Method(
        "/fusion.v1.SourceService/Generate",
        "one",
        answer_pb2.GenerateRequest,
        (answer_pb2.GenerateRequest(prompts=_PROMPTS, sampling=_SAMPLING),),
    ),
    Method(
        "/fusion.v1.SourceService/StreamAnswers",
        "one",
        answer_pb2.StreamAnswersRequest,
        (
            answer_pb2.StreamAnswersRequest(open=answer_pb2.StreamAnswersOpen(sampling=_SAMPLING)),
            answer_pb2.StreamAnswersRequest(prompts=answer_pb2.AnswerPrompts(prompts=_PROMPTS)),
            answer_pb2.StreamAnswersRequest(credit=_CREDIT),
        ),
        streams=True,
    ),
    Method(
        "/grpc.health.v1.Health/Check",
        "two",
        health_pb2.HealthCheckRequest,
        (health_pb2.HealthCheckRequest(), health_pb2.HealthCheckRequest(service="fusion.v1.SourceService")),
    ),
    Method(
        "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
        "fusion",
        reflection_pb2.ServerReflectionRequest,
        (
            reflection_pb2.ServerReflectionRequest(list_services=""),
            reflection_pb2.ServerReflectionRequest(file_containing_symbol="fusion.v1.FusionService"),
        ),
        streams=True,
    ),
)

_BAD_METADATA: tuple[tuple[str, str | bytes], ...] = (
    *((TIMEOUT_KEY, value) for value in ("x", "-1", "9" * 30, "", "1e3", "0x10")),
    *(("traceparent", value) for value in ("", "00-0-0-0", "f" * 500)),
    *(("application", value) for value in ("", "nobody", "../fusion", "a" * 2000)),
    *(("authorization", value) for value in ("", "Bearer", "Basic x", "Bearer " + "x" * 2000)),
    ("authorization-bin", b"\xff\x00"),
    ("multiplexed_model_id", "x" * 500),
)
_STRINGS = ("", "../../etc/passwd", "/etc/passwd", "..\\..", "a\x00b", "%s%n", "x" * 5000, "\U0001f44d" * 2000, "one")


@dataclass(frozen=True)
class Outcome:
    """How a call ended, and whether all that was sent on it is a message of the method."""

    method: str
    code: grpc.StatusCode
    details: str
    decodable: bool


def call_case(rng: random.Random, channel: grpc.Channel, token: str) -> Outcome:
    """One malformed call, up to its status."""
    method = rng.choice(METHODS)
    how = rng.choice(_HOW)
    messages = [how(rng, method, at) for at in range(rng.randint(0, 5) if method.streams else 1)]
    metadata = _metadata(rng, method, token)
    code, details = grpc.StatusCode.OK, ""
    try:
        if method.streams:
            stream = channel.stream_stream(method.path)(iter(messages), metadata=metadata, timeout=_TIMEOUT_SECONDS)
            for _ in zip(range(_FRAMES), _frames(stream), strict=False):
                pass
            stream.cancel()
        else:
            channel.unary_unary(method.path)(messages[0], metadata=metadata, timeout=_TIMEOUT_SECONDS)
    except grpc.RpcError as error:
        code, details = error.code(), error.details() or ""
    name = method.path.rpartition("/")[2]
    return Outcome(name, code, details, all(_decodes(method, message) for message in messages))


def _metadata(rng: random.Random, method: Method, token: str) -> tuple[tuple[str, str | bytes], ...]:
    """What a client sends beside a request; one time in eight something of it is wrong."""
    good: dict[str, str | bytes] = {"application": method.application, "authorization": f"Bearer {token}"}
    if rng.random() < 0.125:
        key, value = rng.choice(_BAD_METADATA)
        good[key] = value
    return tuple(good.items())


def _frames(stream: Any) -> Iterator[bytes]:
    yield from stream


def _decodes(method: Method, data: bytes) -> bool:
    try:
        method.request.FromString(data)
    except DecodeError:
        return False
    return True


def _junk(rng: random.Random, method: Method, at: int) -> bytes:
    return junk(rng)


def _mutated(rng: random.Random, method: Method, at: int) -> bytes:
    return mutated(rng, _example(rng, method, at).SerializeToString())


def _of_another_method(rng: random.Random, method: Method, at: int) -> bytes:
    return _example(rng, rng.choice(METHODS), at).SerializeToString()


def _out_of_order(rng: random.Random, method: Method, at: int) -> bytes:
    return rng.choice(method.examples).SerializeToString()


def _hostile(rng: random.Random, method: Method, at: int) -> bytes:
    """A well-formed message with one to three values of its type that make no sense."""
    message = method.request()
    message.CopyFrom(_example(rng, method, at))
    for _ in range(rng.randint(1, 3)):
        _spoil(rng, message)
    return message.SerializeToString()


_HOW: tuple[Callable[[random.Random, Method, int], bytes], ...] = (
    *(_junk, _mutated, _mutated, _hostile, _hostile, _out_of_order, _of_another_method),
)


def _example(rng: random.Random, method: Method, at: int) -> Any:
    """The first message of a stream is its opening, so that mutations get past it."""
    return method.examples[at] if at < len(method.examples) else rng.choice(method.examples)


def _spoil(rng: random.Random, message: Any) -> None:
    fields = list(message.DESCRIPTOR.fields)
    if not fields:
        return
    field = rng.choice(fields)
    if field.message_type is not None:
        inner = getattr(message, field.name)
        if not field.is_repeated:
            _spoil(rng, inner)
        elif rng.random() < 0.5 and inner:
            _spoil(rng, inner[rng.randrange(len(inner))])
        else:
            inner.add()
        return
    value = _value(rng, field)
    if field.is_repeated:
        getattr(message, field.name).extend([value] * rng.choice((1, 2, 300)))
    else:
        setattr(message, field.name, value)


def _value(rng: random.Random, field: Any) -> Any:
    match field.cpp_type:
        case field.CPPTYPE_STRING if field.type == field.TYPE_BYTES:
            return rng.choice((b"", b"\xff\xfe", b"\xc3(", b"\x00", b"a" * 5000, b"1 2 3 " * 300, junk(rng)))
        case field.CPPTYPE_STRING:
            return rng.choice(_STRINGS)
        case field.CPPTYPE_BOOL:
            return rng.random() < 0.5
        case field.CPPTYPE_UINT64:
            return rng.choice((*EDGES_32, 2**63, 2**64 - 1))
        case field.CPPTYPE_UINT32:
            return rng.choice(EDGES_32)
        case _:
            return rng.choice((0, 1, 2, 77, -1, 2**31 - 1, -(2**31)))
