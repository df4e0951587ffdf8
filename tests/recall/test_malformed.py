"""Malformed requests to the recall service: each is answered or refused by its field, and the service lives."""

from __future__ import annotations

from collections.abc import Iterator

import grpc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusion.v1 import recall_pb2
from services.recall.config import RecallConfig
from services.rpc.health_check import health_of
from tests.fakes.services.plain_recall import ScriptedJudge, plain_recall
from tests.recall.test_servicer import key_blocks


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with plain_recall(
        RecallConfig(max_documents=4, max_text_bytes=2000, max_question_bytes=300), ScriptedJudge()
    ) as found:
        yield found


ODD = st.one_of(st.binary(max_size=30), st.text(max_size=20).map(str.encode), st.just(b"a" * 2500))
REQUESTS = st.builds(
    recall_pb2.SelectKeyBlocksRequest,
    documents=st.lists(st.builds(recall_pb2.RecallDocument, text=ODD, question=ODD), max_size=6),
    settings=st.one_of(
        st.none(),
        st.builds(recall_pb2.RecallSettings, hops=st.lists(st.integers(0, 2**32 - 1), max_size=10)),
        st.builds(recall_pb2.RecallSettings, budget_bytes=st.integers(0, 2**32 - 1)),
        st.builds(recall_pb2.RecallSettings, budget_tokens=st.integers(0, 2**32 - 1), rehearsal=st.booleans()),
    ),
)


def check_malformed(address: str, max_examples: int) -> None:
    """Send requests of any fields and bytes of none: each is answered or refused, and the service lives."""
    with grpc.insecure_channel(address) as channel:
        call = channel.unary_unary("/fusion.v1.RecallService/SelectKeyBlocks")

        @settings(max_examples=max_examples, deadline=None)
        @given(st.one_of(REQUESTS.map(lambda request: request.SerializeToString()), st.binary(max_size=60)))
        def send(data: bytes) -> None:
            try:
                call(data, timeout=30)
            except grpc.RpcError as error:
                try:
                    readable = bool(recall_pb2.SelectKeyBlocksRequest.FromString(data)) or True
                except Exception:
                    readable = False
                allowed = {"INVALID_ARGUMENT"} if readable else {"INTERNAL", "UNKNOWN", "INVALID_ARGUMENT"}
                assert error.code().name in allowed, (error.code(), error.details())

        send()
    assert health_of(address, "recall") == "SERVING"
    assert key_blocks(address, b"a\nb\n", "b", budget_bytes=2).blocks


def test_malformed_requests_are_refused(address: str) -> None:
    check_malformed(address, 300)


@pytest.mark.drill
def test_ten_thousand_malformed_requests_are_refused(address: str) -> None:
    check_malformed(address, 10_000)
