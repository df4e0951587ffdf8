"""What the service refuses before it works, and what it does for anybody who asks how it is doing."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from fusion_core.vocabulary import Vocabulary
from services.base.errors import FailedPreconditionError, InvalidArgumentError
from services.fusion.client import StreamRequest
from services.rpc.channel import open_channel
from tests.fakes.services.plain_fusion import PlainFusion, plain_fusion
from tests.fakes.tiny_model import sentences


@pytest.fixture(scope="module")
def fusion(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PlainFusion]:
    with plain_fusion(tmp_path_factory.mktemp("limits"), min_sources=2, k_out=256) as running:
        yield running


def test_an_answer_that_fits_no_message_is_refused_before_a_source_is_asked(fusion: PlainFusion) -> None:
    texts = [sentences(32_000, seed=number).encode()[:32_000].decode(errors="ignore").encode() for number in range(32)]
    scored = [source.scored for source in fusion.sources]
    with pytest.raises(InvalidArgumentError, match=r"texts: with 256 candidates .* fit a message"):
        fusion.client().fuse(texts)
    assert [source.scored + source.at_once for source in fusion.sources] == scored
    [block] = fusion.client().fuse([b"the man said so"])
    assert block.k == 256


def test_no_text_is_scored_on_after_another_one_has_failed(fusion: PlainFusion) -> None:
    """Nineteen texts are held by the sources when the twentieth ends the call."""
    for source in fusion.sources:
        source.hold_after, source.refuses = 0, lambda text: b"zebra" in text
    texts = [b"the man said %d" % number for number in range(19)]
    with pytest.raises(InvalidArgumentError, match="0 tokens"):
        fusion.client().fuse([*texts, b"zebra"])
    for source in fusion.sources:
        source.wait_until(holding=False)
        source.hold_after, source.refuses = None, lambda text: False


def test_many_health_checks_ask_every_source_once(fusion: PlainFusion) -> None:
    before = [source.asked_who for source in fusion.sources]
    with open_channel(fusion.address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)

        def check(_: int) -> int:
            return int(stub.Check(health_pb2.HealthCheckRequest(), timeout=60).status)

        with ThreadPoolExecutor(16) as pool:
            assert set(pool.map(check, range(200))) == {health_pb2.HealthCheckResponse.SERVING}
    asked = [source.asked_who - was for source, was in zip(fusion.sources, before, strict=True)]
    assert max(asked) < 20  # once a second, however many ask; 200 on their own


def test_texts_are_tokenised_off_the_event_loop(fusion: PlainFusion, monkeypatch: pytest.MonkeyPatch) -> None:
    encode, on_loop = Vocabulary.encode_batch, []

    def recording(self: Vocabulary, *args: Any, **kwargs: Any) -> Any:
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            pass
        else:
            on_loop.append(threading.current_thread().name)
        return encode(self, *args, **kwargs)

    monkeypatch.setattr(Vocabulary, "encode_batch", recording)
    for split, tokens_only in (("train", False), ("held_out", True), ("train", True)):
        assert list(fusion.client().stream(StreamRequest("words", split, seed=1, tokens_only=tokens_only)))
    fusion.client().fuse([b"the man said so"])
    assert on_loop == []


def test_a_window_that_fits_no_message_ends_its_own_stream_with_the_reason(
    fusion: PlainFusion, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.fusion.stream.MAX_BLOCK_BYTES", 20_000)
    with pytest.raises(FailedPreconditionError, match="ask for fewer candidates"):
        list(fusion.client().stream(StreamRequest("words", "train", seed=1)))
    assert list(fusion.client().stream(StreamRequest("words", "train", seed=1, k=1)))
