"""The fusion service over real gRPC: fuses, streams under credits, refuses what is wrong and goes on serving."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from fusion.v1 import block_pb2, fusion_pb2, fusion_pb2_grpc, source_pb2, source_pb2_grpc
from fusion_core.vocabulary import Vocabulary
from services.base.errors import FailedPreconditionError
from services.corpus.ledger import Corpus
from services.fusion.client import StreamRequest
from services.rpc.auth import call_metadata
from services.rpc.channel import open_channel
from services.wire.block import decode_block
from services.wire.cursor import Cursor
from services.wire.passage import Passage
from tests.fakes.live import Live

pytestmark = pytest.mark.timeout(900)

TEXT = "The capital of France is Paris, and naïve people say so. 👍".encode()
Code = grpc.StatusCode


@pytest.fixture(scope="module")
def channel(live: Live) -> Iterator[grpc.Channel]:
    with open_channel(live.deployment.grpc_address) as channel:
        yield channel


def fuse(channel: grpc.Channel, request: fusion_pb2.FuseRequest, application: str = "fusion") -> Any:
    stub = fusion_pb2_grpc.FusionServiceStub(channel)
    return stub.Fuse(request, metadata=call_metadata(application), timeout=120)


def stream(channel: grpc.Channel, *messages: fusion_pb2.StreamFusedRequest) -> Any:
    stub = fusion_pb2_grpc.FusionServiceStub(channel)
    return stub.StreamFused(iter(messages), metadata=call_metadata("fusion"), timeout=120)


def opening(**changes: Any) -> fusion_pb2.StreamFusedRequest:
    values = {"dataset": "sentences", "split": "train", "world_size": 1} | changes
    return fusion_pb2.StreamFusedRequest(open=fusion_pb2.StreamFusedOpen(**values))


def granting(blocks: int) -> fusion_pb2.StreamFusedRequest:
    return fusion_pb2.StreamFusedRequest(credit=block_pb2.Credit(blocks=blocks))


def test_info_names_sources_and_data_sets(live: Live) -> None:
    info = live.client.info()
    target = Vocabulary.from_pretrained(live.recipe.target_folder)
    assert (info.vocabulary, info.vocabulary_size) == (target.fingerprint, target.size)
    assert [(source.name, source.serving) for source in info.sources] == [("smollm2", True), ("tiny", True)]
    corpus = Corpus.open(live.recipe.corpus_folder)
    assert {(d.name, d.split, d.num_windows) for d in info.datasets} == {
        ("sentences", split, corpus.num_windows(split)) for split in ("train", "held_out")
    }


def test_fused_rows_are_distributions_over_the_target(live: Live) -> None:
    [block] = live.client.fuse([TEXT])
    block.validate()
    target = Vocabulary.from_pretrained(live.recipe.target_folder)
    np.testing.assert_array_equal(block.token_ids_T, target.encode(TEXT).token_ids_T)
    assert b"".join(target.token_bytes(int(i)) for i in block.token_ids_T) == TEXT
    assert block.mask_T.all()
    assert (block.topk_ids_TK == block.token_ids_T[:, None]).any(axis=1).all()
    assert [share.present for share in block.shares] == [True, True]
    assert sum(share.weight for share in block.shares) == pytest.approx(1, abs=1e-5)
    # A trained model knows the text better than a random one, and avg_ce must see that.
    smollm2, tiny = block.shares
    assert smollm2.nats_per_byte < tiny.nats_per_byte
    assert smollm2.weight > 0.95


def test_one_source_alone_keeps_its_own_loss(live: Live) -> None:
    """The projection carries the realised path exactly: nats per byte equal the source's own on the same bytes."""
    [block] = live.client.fuse([TEXT], sources=["smollm2"])
    assert [share.name for share in block.shares] == ["smollm2"]
    with open_channel(live.deployment.grpc_address) as channel:
        response = source_pb2_grpc.SourceServiceStub(channel).Score(
            source_pb2.ScoreRequest(texts=[TEXT], dtype=block_pb2.LOGPROB_DTYPE_FLOAT32),
            metadata=call_metadata("smollm2"),
            timeout=120,
        )
    own = decode_block(response.blocks[0])
    assert block.nats_per_byte == pytest.approx(own.nats_per_byte, rel=1e-4)


def test_stream_delivers_every_window_once_per_epoch_and_resumes(live: Live) -> None:
    corpus = Corpus.open(live.recipe.corpus_folder)
    everything = list(range(corpus.num_windows("train")))
    request = StreamRequest(dataset="sentences", split="train", seed=3, num_epochs=2)
    windows = list(live.client.stream(request, prefetch_windows=5))
    epochs = [[w.index for w in group] for _, group in itertools.groupby(windows, lambda w: w.cursor.epoch)]
    assert [sorted(epoch) for epoch in epochs] == [everything, everything]
    assert epochs[0] != epochs[1]
    for window in windows[:5]:
        assert window.block.text_bytes == corpus.window("train", window.index).text
    stop = len(everything) + 3
    resumed = StreamRequest(dataset="sentences", split="train", seed=3, num_epochs=2, cursor=windows[stop - 1].cursor)
    assert [w.index for w in live.client.stream(resumed)] == [w.index for w in windows[stop:]]


def test_shards_are_disjoint_and_complete(live: Live) -> None:
    corpus = Corpus.open(live.recipe.corpus_folder)
    shards = [
        [
            w.index
            for w in live.client.stream(
                StreamRequest(dataset="sentences", split="train", seed=3, rank=rank, world_size=3)
            )
        ]
        for rank in range(3)
    ]
    assert sorted(itertools.chain(*shards)) == list(range(corpus.num_windows("train")))


def test_no_more_blocks_than_credits(channel: grpc.Channel) -> None:
    """The client closes its side after a few credits: just so many blocks come, then the stream ends well."""
    frames = list(stream(channel, opening(), granting(2), granting(5)))
    assert sum(len(frame.blocks) for frame in frames) == 7
    assert frames[-1].cursor.received == 7


def test_control_stream_carries_tokens_only(live: Live) -> None:
    window = next(live.client.stream(StreamRequest("sentences", "held_out", seed=0, tokens_only=True)))
    assert window.block.k == 0
    assert not window.block.mask_T.any()


def test_health_check_is_the_standard_one(channel: grpc.Channel) -> None:
    stub = health_pb2_grpc.HealthStub(channel)
    for application in ("fusion", "smollm2", "tiny"):
        response = stub.Check(health_pb2.HealthCheckRequest(), metadata=call_metadata(application), timeout=60)
        assert response.status == health_pb2.HealthCheckResponse.SERVING
    with pytest.raises(grpc.RpcError) as caught:
        stub.Check(health_pb2.HealthCheckRequest(service="nobody"), metadata=call_metadata("tiny"), timeout=60)
    assert caught.value.code() == Code.NOT_FOUND


def request(**values: Any) -> fusion_pb2.FuseRequest:
    return fusion_pb2.FuseRequest(**({"texts": [TEXT]} | values))


BAD_FUSE = {
    "no text": (request(texts=[]), Code.INVALID_ARGUMENT, "texts: 1 to 4"),
    "too many texts": (request(texts=[TEXT] * 5), Code.INVALID_ARGUMENT, "texts: 1 to 4"),
    "empty text": (request(texts=[TEXT, b""]), Code.INVALID_ARGUMENT, "texts[1]: must not be empty"),
    "text beyond the window": (request(texts=[b"x" * 4097]), Code.INVALID_ARGUMENT, "texts[0]: 4097 bytes; at most"),
    "text beyond a source": (request(texts=[b"1 2 3 " * 400]), Code.INVALID_ARGUMENT, "tokens; source"),
    "invalid UTF-8": (request(texts=[b"abc\xff"]), Code.INVALID_ARGUMENT, "texts[0]: not UTF-8 at byte 3"),
    "k of 0": (request(k=0), Code.INVALID_ARGUMENT, "k: must be 1 to 16"),
    "k above the limit": (request(k=17), Code.INVALID_ARGUMENT, "k: must be 1 to 16"),
    "unknown dtype": (request(dtype=9), Code.INVALID_ARGUMENT, "dtype: 9"),
    "unknown source": (request(sources=["nobody"]), Code.NOT_FOUND, "sources: 'nobody'"),
    "other vocabulary": (request(expected_vocabulary="f00"), Code.FAILED_PRECONDITION, "expected_vocabulary: f00"),
}


@pytest.mark.parametrize("case", BAD_FUSE)
def test_bad_request_is_refused_and_the_service_goes_on(case: str, channel: grpc.Channel) -> None:
    bad, code, message = BAD_FUSE[case]
    with pytest.raises(grpc.RpcError) as caught:
        fuse(channel, bad)
    assert (caught.value.code(), message in caught.value.details()) == (code, True), caught.value.details()
    assert len(fuse(channel, request(sources=["tiny"])).blocks) == 1


BAD_STREAM: dict[str, tuple[Callable[[], tuple[fusion_pb2.StreamFusedRequest, ...]], grpc.StatusCode, str]] = {
    "nothing": (lambda: (), Code.INVALID_ARGUMENT, "starts with `open`"),
    "credit first": (lambda: (granting(1),), Code.INVALID_ARGUMENT, "starts with `open`"),
    "opened twice": (lambda: (opening(), opening()), Code.INVALID_ARGUMENT, "only credits"),
    "credit of 0": (lambda: (opening(), granting(0)), Code.INVALID_ARGUMENT, "credit.blocks"),
    "unknown data set": (lambda: (opening(dataset="../x"),), Code.NOT_FOUND, "dataset: '../x'"),
    "unknown source": (lambda: (opening(sources=["tiny", "nobody"]),), Code.NOT_FOUND, "sources: 'nobody'"),
    "unknown split": (lambda: (opening(split="x"),), Code.NOT_FOUND, "split: 'x'"),
    "rank": (lambda: (opening(rank=1),), Code.INVALID_ARGUMENT, "rank: "),
    "world size": (lambda: (opening(world_size=0),), Code.INVALID_ARGUMENT, "world_size: "),
    "k of 0": (lambda: (opening(k=0),), Code.INVALID_ARGUMENT, "k: "),
    "other vocabulary": (lambda: (opening(expected_vocabulary="f"),), Code.FAILED_PRECONDITION, "expected_vocabulary"),
    "foreign cursor": (
        lambda: (opening(cursor=fusion_pb2.Cursor(plan="other")),),
        Code.FAILED_PRECONDITION,
        "cursor.plan",
    ),
}


@pytest.mark.parametrize("case", BAD_STREAM)
def test_bad_stream_is_refused(case: str, channel: grpc.Channel) -> None:
    messages, code, message = BAD_STREAM[case]
    with pytest.raises(grpc.RpcError) as caught:
        list(stream(channel, *messages()))
    assert (caught.value.code(), message in caught.value.details()) == (code, True), caught.value.details()


def test_unknown_application_is_not_found(channel: grpc.Channel) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        fuse(channel, request(), application="nobody")
    assert caught.value.code() == Code.NOT_FOUND
    assert "nobody" in caught.value.details()


def test_a_stream_of_one_source_is_that_source_s_own_mapped_rows(live: Live) -> None:
    """Window for window what `Fuse` gives for the source alone."""
    request = StreamRequest("sentences", "held_out", seed=0, sources=("tiny",))
    list(itertools.islice(live.client.stream(request), 3))  # into the store, whose rounding then is that of all answers
    for window in itertools.islice(live.client.stream(request), 3):
        block = window.block
        [share] = block.shares
        assert (share.name, share.present, share.weight) == ("tiny", True, 1.0)
        passage = Passage(block.text_bytes, ends_document=block.ends_document)
        [alone] = live.client.fuse([passage], sources=["tiny"])
        np.testing.assert_array_equal(block.topk_ids_TK, alone.topk_ids_TK)
        np.testing.assert_allclose(block.topk_logprobs_TK, alone.topk_logprobs_TK, atol=2e-3)


def test_client_refuses_another_vocabulary(live: Live) -> None:
    with pytest.raises(FailedPreconditionError, match="expected_vocabulary"):
        next(live.client.stream(StreamRequest("sentences", "train", seed=0, expected_vocabulary="f00")))


def test_client_refuses_a_cursor_of_another_seed(live: Live) -> None:
    cursor = next(live.client.stream(StreamRequest("sentences", "train", seed=1, tokens_only=True))).cursor
    assert isinstance(cursor, Cursor)
    with pytest.raises(FailedPreconditionError, match=r"cursor\.plan"):
        next(live.client.stream(StreamRequest("sentences", "train", seed=2, cursor=cursor, tokens_only=True)))


BAD_SCORE = {
    "no text": ({"texts": []}, Code.INVALID_ARGUMENT, "texts: 1 to"),
    "empty text": ({"texts": [b""]}, Code.INVALID_ARGUMENT, "texts[0]: must not be empty"),
    "too long": ({"texts": [b"1 2 3 " * 400]}, Code.INVALID_ARGUMENT, "accepts 1 to 255"),
    "invalid UTF-8": ({"texts": [b"\xc3("]}, Code.INVALID_ARGUMENT, "not UTF-8 at byte 0"),
    "top_k of 0": ({"top_k": 0}, Code.INVALID_ARGUMENT, "top_k: must be 1 to 16"),
    "top_k above": ({"top_k": 17}, Code.INVALID_ARGUMENT, "top_k: must be 1 to 16"),
    "other vocabulary": ({"expected_vocabulary": "f00"}, Code.FAILED_PRECONDITION, "expected_vocabulary"),
}


@pytest.mark.parametrize("case", BAD_SCORE)
def test_source_refuses_bad_requests(case: str, channel: grpc.Channel) -> None:
    values, code, message = BAD_SCORE[case]
    stub = source_pb2_grpc.SourceServiceStub(channel)
    with pytest.raises(grpc.RpcError) as caught:
        bad = source_pb2.ScoreRequest(**({"texts": [TEXT]} | values))
        stub.Score(bad, metadata=call_metadata("smollm2"), timeout=60)
    assert (caught.value.code(), message in caught.value.details()) == (code, True), caught.value.details()
    good = stub.Score(source_pb2.ScoreRequest(texts=[TEXT]), metadata=call_metadata("smollm2"), timeout=60)
    decode_block(good.blocks[0])
