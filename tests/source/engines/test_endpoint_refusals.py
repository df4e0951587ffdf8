"""A server that is no sound source is refused, with the reason and the key that it does not fit."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from services.base.errors import UnavailableError
from services.base.settings import explain
from services.source.config import parse_source
from services.source.scorer import Scorer
from services.wire.passage import Passage
from tests.fakes.services.model_server import ModelServer, model_server
from tests.fakes.tiny_model import make_tiny_model
from tests.source.engines.served import config, scored

TEXT = b"the man said that it was time"
FLAVOURS = ["vllm", "sglang"]


def without_rows(value: Any) -> Any:
    return {"choices": [{"text": "x", "prompt_logprobs": None}], "meta_info": {"input_token_logprobs": []}}


def other_ids(value: Any) -> Any:
    for row in (value.get("choices") or [{"prompt_logprobs": []}])[0]["prompt_logprobs"][1:]:
        row.pop(next(iter(row)))
    for entry in value.get("meta_info", {}).get("input_token_logprobs", []):
        entry[1] += 1
    return value


def shorter(value: Any) -> Any:
    of_sglang = [rows for key, rows in value.get("meta_info", {}).items() if key.startswith("input_")]
    for rows in (*(c["prompt_logprobs"] for c in value.get("choices", [])), *of_sglang):
        rows.pop()
    return value


@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize(
    ("spoil", "reason"),
    [(without_rows, "hosted endpoints"), (other_ids, "own ids do not come back|entries"), (shorter, "entries for a")],
)
def test_a_server_that_gives_no_such_rows_is_refused(folder: Path, flavour: str, spoil: Any, reason: str) -> None:
    with model_server(folder, flavour) as server:

        def break_down() -> None:
            server.spoil = spoil

        with pytest.raises(UnavailableError, match=reason):  # under way
            scored(config(folder, server), folder, break_down)
        with pytest.raises(ValueError, match=rf"engine\.url: .*({reason})"):  # at the start
            scored(config(folder, server), folder, break_down)


def nan(value: Any) -> Any:
    for choice in value.get("choices", ()):
        next(iter(choice["prompt_logprobs"][1].values()))["logprob"] = float("nan")
    for entry in value.get("meta_info", {}).get("input_token_logprobs", [])[1:2]:
        entry[0] = float("nan")
    return value


def excess(value: Any) -> Any:
    for choice in value.get("choices", ()):
        for entry in choice["prompt_logprobs"][1].values():
            entry["logprob"] = -0.1
    for rows in value.get("meta_info", {}).get("input_top_logprobs", [])[1:2]:
        for entry in rows:
            entry[0] = -0.1
    return value


@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize(("spoil", "reason"), [(nan, "NaN"), (excess, "more than one")])
def test_impossible_numbers_make_the_source_serve_nothing(folder: Path, flavour: str, spoil: Any, reason: str) -> None:
    async def run(server: ModelServer) -> None:
        scorer = await Scorer.load(config(folder, server), folder)
        [prompt] = scorer.encode([Passage(TEXT)])
        server.spoil = spoil
        with pytest.raises(UnavailableError, match=reason):
            await scorer.score(prompt, 8)
        scorer.engine.close()

    with model_server(folder, flavour) as server:
        asyncio.run(run(server))


@pytest.mark.parametrize(
    ("engine", "values", "reason"),
    [
        ({"model": "large"}, {}, r"engine\.model: .*serves no model 'large'; it has tiny"),
        ({}, {"max_tokens": 511}, "max_tokens: 511 and two more .* max_model_len is 512"),
        ({}, {"top_k": 33}, "top_k: .*max allowed: 32.*--max-logprobs 33"),
        ({"api_key_env": "NOT_SET_ANYWHERE"}, {}, r"engine\.api_key_env: .*is not set"),
        ({"flavour": "sglang"}, {}, r"engine\.flavour: .*404"),
    ],
)
def test_settings_that_the_server_does_not_fit_are_named(
    folder: Path, engine: dict[str, Any], values: dict[str, Any], reason: str
) -> None:
    with model_server(folder) as server, pytest.raises((ValueError, UnavailableError), match=reason):
        scored(config(folder, server, engine, **values), folder, lambda: None)


def test_the_tokenizer_of_another_model_is_refused(folder: Path, tmp_path: Path) -> None:
    other = make_tiny_model(tmp_path / "other", vocabulary_size=400, seed=77)
    for flavour in FLAVOURS:
        with model_server(other, flavour) as server, pytest.raises(ValueError, match="is not the tokenizer of tiny"):
            scored(config(folder, server), folder, lambda: None)


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"engine": {"kind": "openai", "url": "http://user:word@host", "model": "m"}}, "credentials"),
        ({"engine": {"kind": "openai", "url": "host:8000", "model": "m"}}, "expected http://HOST:PORT"),
        ({"engine": "openai"}, r"engine\.url"),
        ({"engine": {"kind": "openai", "url": "http://h", "model": "m"}, "dtype": "float32"}, "dtype: .*no model"),
        ({"engine": {"kind": "openai", "url": "http://h", "model": "m"}, "address": "h:1"}, "engine: leave it out"),
    ],
)
def test_settings_are_checked_before_anything_is_asked(values: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason) as caught:
        parse_source({"name": "there", "model": "m"} | values)
    assert "word" not in (explain(caught.value) if isinstance(caught.value, ValidationError) else str(caught.value))
