"""A user's text is in no error and in no log, whatever goes wrong with it on its way through a live service."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest

from fusion.v1 import block_pb2, fusion_pb2, fusion_pb2_grpc, source_pb2, source_pb2_grpc
from services.fusion.client import StreamRequest
from services.rpc.channel import open_channel
from tests.security.deployment import MARKER, Guarded

pytestmark = pytest.mark.timeout(900)
Code = grpc.StatusCode
TEXT = f"{MARKER} is a word.".encode()
CONTROL = "no-such-data-set-which-the-log-may-name"


@pytest.fixture(scope="module")
def channel(guarded: Guarded) -> Iterator[grpc.Channel]:
    with open_channel(guarded.address) as channel:
        yield channel


def fuse(channel: grpc.Channel, guarded: Guarded, **values: Any) -> Any:
    request = fusion_pb2.FuseRequest(**values)
    return fusion_pb2_grpc.FusionServiceStub(channel).Fuse(request, metadata=guarded.metadata(), timeout=120)


def score(channel: grpc.Channel, guarded: Guarded, source: str, **values: Any) -> Any:
    request = source_pb2.ScoreRequest(**values)
    return source_pb2_grpc.SourceServiceStub(channel).Score(request, metadata=guarded.metadata(source), timeout=120)


def stream_scores(channel: grpc.Channel, guarded: Guarded, source: str, text: bytes) -> Any:
    messages = [
        source_pb2.StreamScoresRequest(open=source_pb2.StreamScoresOpen()),
        source_pb2.StreamScoresRequest(texts=source_pb2.ScoreTexts(texts=[text])),
        source_pb2.StreamScoresRequest(credit=block_pb2.Credit(blocks=1)),
    ]
    stub = source_pb2_grpc.SourceServiceStub(channel)
    return list(stub.StreamScores(iter(messages), metadata=guarded.metadata(source), timeout=120))


PRECEDING = [block_pb2.TextContext(preceding=TEXT + b"\xff")]
FAILING: dict[str, tuple[grpc.StatusCode, Callable[[grpc.Channel, Guarded], Any]]] = {
    "not UTF-8": (Code.INVALID_ARGUMENT, lambda c, g: fuse(c, g, texts=[TEXT + b"\xff"])),
    "context not UTF-8": (Code.INVALID_ARGUMENT, lambda c, g: fuse(c, g, texts=[b"x"], contexts=PRECEDING)),
    "too long": (Code.INVALID_ARGUMENT, lambda c, g: fuse(c, g, texts=[TEXT * 300])),
    "not UTF-8 at a source": (Code.INVALID_ARGUMENT, lambda c, g: score(c, g, "one", texts=[TEXT + b"\xff"])),
    "too long for a source": (Code.INVALID_ARGUMENT, lambda c, g: score(c, g, "one", texts=[TEXT * 300])),
    "too long on a stream": (Code.INVALID_ARGUMENT, lambda c, g: stream_scores(c, g, "one", TEXT * 300)),
    "engine fails": (Code.INTERNAL, lambda c, g: score(c, g, "cracked", texts=[TEXT])),
    "engine fails on a stream": (Code.INTERNAL, lambda c, g: stream_scores(c, g, "cracked", TEXT)),
    "source fails": (Code.UNAVAILABLE, lambda c, g: fuse(c, g, texts=[TEXT], sources=["cracked"])),
    "source throws the text back": (Code.UNAVAILABLE, lambda c, g: fuse(c, g, texts=[TEXT], sources=["foreign"])),
}


def test_no_error_and_no_log_holds_the_text(guarded: Guarded, channel: grpc.Channel) -> None:
    for case, (code, call) in FAILING.items():
        with pytest.raises(grpc.RpcError) as caught:
            call(channel, guarded)
        assert caught.value.code() == code, f"{case}: {caught.value}"
        assert caught.value.details(), case
        assert MARKER not in str(caught.value), case
    # One document of the corpus breaks two of the four sources; its window comes all the same.
    request = StreamRequest("sentences", "train", seed=0)
    windows = list(guarded.client().stream(request, prefetch_windows=8))
    [marked] = [window for window in windows if MARKER.encode() in window.block.text_bytes]
    assert [share.name for share in marked.block.shares if not share.present] == ["cracked", "foreign"]
    with pytest.raises(Exception, match=CONTROL):
        next(guarded.client().stream(StreamRequest(CONTROL, "train", seed=0)))
    deadline = time.monotonic() + 60
    while not files_with(guarded, CONTROL):  # what Serve logs of a failed call does arrive there
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert files_with(guarded, "IndexError")  # and so does the engine's error, by its type
    assert files_with(guarded, MARKER) == []


def files_with(guarded: Guarded, text: str) -> list[str]:
    """All of Ray's and Serve's logs that hold it, those of standard output and error included."""
    files = [path for path in guarded.log_folder().rglob("*") if path.is_file()]
    assert any("serve" in str(path) for path in files)
    return [str(path) for path in files if text.encode() in path.read_bytes()]


ELSEWHERE = (
    *("../sentences", "sentences/", "/etc/passwd", "./sentences", "..", ".", "sentences/../sentences", "sentences\x00"),
    *("..\\sentences", "~", "%2e%2e/sentences", "file:///etc/passwd", ""),
)


@pytest.mark.parametrize("name", ELSEWHERE)
def test_names_lead_nowhere_but_to_what_is_configured(name: str, guarded: Guarded, channel: grpc.Channel) -> None:
    stub = fusion_pb2_grpc.FusionServiceStub(channel)
    for field in ("dataset", "split"):
        values = {"dataset": "sentences", "split": "train", "world_size": 1, field: name}
        opening = fusion_pb2.StreamFusedRequest(open=fusion_pb2.StreamFusedOpen(**values))
        with pytest.raises(grpc.RpcError) as caught:
            list(stub.StreamFused(iter([opening]), metadata=guarded.metadata(), timeout=60))
        assert caught.value.code() == Code.NOT_FOUND
        assert caught.value.details().startswith(f"{field}: ")
    if name:
        with pytest.raises(grpc.RpcError) as caught:
            fuse(channel, guarded, texts=[b"x"], sources=[name])
        assert caught.value.code() == Code.NOT_FOUND
