"""The door that the tap uses, with vLLM's real front end: it fails here first when a new vLLM moves it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from services.source.engines import vllm_tap
from tests.fakes.vllm_requests import scoring_request

T, K = 37, 8


@pytest.fixture
def front_end() -> Iterator[Any]:
    """vLLM's module with the tap in place, and as it was afterwards."""
    output_processor = pytest.importorskip("vllm.v1.engine.output_processor")
    before = output_processor.LogprobsProcessor
    assert vllm_tap.open_tap() is None, "the installed vLLM has moved the door: see vllm_tap.py"
    yield output_processor
    output_processor.LogprobsProcessor = before


def request(name: str, extra_args: dict[str, Any] | None) -> Any:
    return scoring_request(name, list(range(T + 1)), K, extra_args=extra_args)


def answer(name: str, ids: torch.Tensor, logprobs: torch.Tensor) -> Any:
    from vllm.v1.engine import EngineCoreOutput, FinishReason
    from vllm.v1.outputs import LogprobsTensors

    tensors = LogprobsTensors(ids, logprobs, torch.zeros(len(ids), dtype=torch.int32))
    return EngineCoreOutput(
        request_id=name,
        new_token_ids=[5],
        new_prompt_logprobs_tensors=tensors,
        finish_reason=FinishReason.LENGTH,
    )


def test_marked_requests_get_arrays_and_others_what_vllm_gives(front_end: Any) -> None:
    """Two requests at once, and the numbers of the tapped one are those of vLLM's own flat lists."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 1000, (T, K + 1), generator=generator, dtype=torch.int32)
    logprobs = torch.randn(T, K + 1, generator=generator)
    processor = front_end.OutputProcessor(None, log_stats=False)
    queues = {}
    for name, mark in (("tapped", vllm_tap.MARK), ("plain", None)):
        queues[name] = front_end.RequestOutputCollector(request(name, mark).sampling_params.output_kind, name)
        processor.add_request(request(name, mark), None, queue=queues[name])
    processor.process_outputs([answer(name, ids, logprobs) for name in queues])
    tapped, plain = (queues[name].get_nowait().prompt_logprobs for name in queues)
    assert isinstance(tapped, vllm_tap.RawPromptLogprobs)
    found_ids, found_logprobs = tapped.columns()
    np.testing.assert_array_equal(found_ids, np.asarray(plain.token_ids).reshape(T, K + 1))
    np.testing.assert_array_equal(found_logprobs, np.asarray(plain.logprobs, dtype=np.float32).reshape(T, K + 1))
    assert found_ids.ctypes.data == ids.data_ptr()  # the engine's own memory: nothing was copied on the way


def test_a_cancelled_request_leaves_nothing_behind(front_end: Any) -> None:
    processor = front_end.OutputProcessor(None, log_stats=False)
    processor.add_request(request("gone", vllm_tap.MARK), None)
    processor.abort_requests(["gone"], internal=True)
    ids = torch.zeros((T, K + 1), dtype=torch.int32)
    assert not processor.process_outputs([answer("gone", ids, ids.float())]).request_outputs
    assert not processor.request_states
    assert not processor.external_req_ids


def test_chunks_of_one_prompt_are_joined() -> None:
    raw = vllm_tap.RawPromptLogprobs()
    ids, logprobs = torch.arange(30, dtype=torch.int32).reshape(10, 3), torch.randn(10, 3)
    raw.append(ids[:4], logprobs[:4])
    raw.append(ids[4:], logprobs[4:])
    np.testing.assert_array_equal(raw.columns()[0], ids.numpy())
    np.testing.assert_array_equal(raw.columns()[1], logprobs.numpy())


@pytest.mark.parametrize("change", ["method", "fields", "user"])
def test_a_door_that_moved_is_found_out(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever changes, the tap says so and leaves vLLM alone."""
    output_processor = pytest.importorskip("vllm.v1.engine.output_processor")
    from vllm.v1.engine.logprobs import LogprobsProcessor

    monkeypatch.setattr(output_processor, "LogprobsProcessor", LogprobsProcessor)  # an engine may have opened the tap
    if change == "method":
        monkeypatch.setattr(LogprobsProcessor, "_update_prompt_logprobs", lambda self, tensors, more: None)
    elif change == "fields":
        monkeypatch.setattr("vllm.v1.outputs.LogprobsTensors._fields", ("logprobs", "logprob_token_ids"))
    else:
        monkeypatch.setattr(output_processor, "LogprobsProcessor", object)
    before = output_processor.LogprobsProcessor
    assert vllm_tap.open_tap() is not None
    assert output_processor.LogprobsProcessor is before
