"""What a source reports to Prometheus, scraped from the place that Ray announces."""

from __future__ import annotations

import re
import time

import grpc
import httpx
import pytest
from ray.dashboard.modules.serve.sdk import ServeSubmissionClient

from fusion.v1 import source_pb2, source_pb2_grpc
from services.rpc.auth import call_metadata
from services.rpc.channel import open_channel
from tests.fakes.live import Live

pytestmark = pytest.mark.timeout(900)

TEXT = b"Prometheus stole the fire and gave it to mankind."


def scraped(live: Live) -> dict[str, dict[str, float]]:
    """Values by metric and labels of all nodes."""
    client = ServeSubmissionClient(live.deployment.dashboard)
    targets = [t for group in client._do_request("GET", "/api/prometheus/sd").json() for t in group["targets"]]
    found: dict[str, dict[str, float]] = {}
    for target in targets:
        try:
            page = httpx.get(f"http://{target}/metrics").text
        except httpx.TransportError:  # Ray announces places that nothing listens at as well
            continue
        for line in page.splitlines():
            if match := re.fullmatch(r"ray_llm_fusion_source_(\w+)\{(.*)\} (\S+)", line):
                name, labels, value = match.groups()
                if 'source="smollm2"' in labels:
                    code = re.search(r'code="(\w*)"', labels)
                    found.setdefault(name, {})[code[1] if code else ""] = float(value)
    return found


def exported(found: dict[str, dict[str, float]]) -> bool:
    """Whether all is there: others have called the source before, and a scrape need not be of one moment."""
    names = {"tokens_scored_total", "wire_bytes_total", "engine_seconds_total", "queue_seconds_total"}
    return (
        found.keys() >= names | {"tokens_in_flight", "canary_ok", "texts_scored_total"}
        and "INVALID_ARGUMENT" in found.get("errors_total", {})
        and found["texts_scored_total"][""] >= 4  # the canary's three and this one
        and found["tokens_in_flight"][""] == 0
    )


def test_a_source_reports_what_it_did(live: Live) -> None:
    with open_channel(live.deployment.grpc_address) as channel:
        stub = source_pb2_grpc.SourceServiceStub(channel)
        response = stub.Score(source_pb2.ScoreRequest(texts=[TEXT]), metadata=call_metadata("smollm2"), timeout=300)
        with pytest.raises(grpc.RpcError):
            stub.Score(source_pb2.ScoreRequest(texts=[]), metadata=call_metadata("smollm2"), timeout=300)
    deadline = time.monotonic() + 60
    while not exported(found := scraped(live)):
        assert time.monotonic() < deadline, found
        time.sleep(0.5)  # Ray exports every few seconds
    assert found["tokens_scored_total"][""] >= response.blocks[0].num_tokens
    assert found["wire_bytes_total"][""] >= response.blocks[0].ByteSize()
    assert found["engine_seconds_total"][""] > 0
    assert found["queue_seconds_total"][""] > 0
    assert found["tokens_in_flight"][""] == 0
    assert found["canary_ok"][""] == 1
