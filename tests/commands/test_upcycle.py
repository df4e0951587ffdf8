"""`fusion upcycle`: the folder it writes, its check, and what it refuses. The drill serves the folder with vLLM."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from fusion_core.moe.upcycle import Upcycling
from fusion_core.vocabulary import Vocabulary
from services.cli.app import app
from services.commands.upcycle import TEXT, upcycle_folder
from services.models.fetch import fetch
from services.source.config import SourceConfig
from services.source.engines.load import load_engine


def run(*arguments: object):
    return CliRunner().invoke(app, ["upcycle", *map(str, arguments)])


@pytest.mark.parametrize("init", ["residual", "split"])
def test_the_folder_answers_like_the_dense_model(tmp_path, target, init):
    done = run(target, tmp_path / "moe", "--init", init, "--shards", 6, "--copies", 3, "--check")
    assert done.exit_code == 0, done.output
    assert "12 experts a layer, 4 active" in done.stdout
    assert "largest difference of a logit from the dense model: " in done.stdout
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "moe")
    assert tokenizer(TEXT).input_ids == AutoTokenizer.from_pretrained(target)(TEXT).input_ids
    ids = tokenizer("what comes next", return_tensors="pt").input_ids
    with torch.no_grad():
        dense, mixture = (
            AutoModelForCausalLM.from_pretrained(folder)(ids).logits for folder in (target, tmp_path / "moe")
        )
    torch.testing.assert_close(mixture, dense, rtol=0, atol=1e-4)


def test_a_folder_above_the_bound_is_not_written(tmp_path, target):
    done = run(target, tmp_path / "moe", "--init", "split", "--shards", 6, "--check", "--bound", 0)
    assert done.exit_code == 1
    assert "more than 0" in done.stderr and "was not written" in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--shards", 7], "shards: must cut intermediate_size = 48 into equal parts that are a multiple of 8, got 7"),
        (["--shared", 8], "shared: must be from 1 to shards - 1 = 7, got 8"),
        (["--shards", 6, "--dense-layers", 2], "dense_layers: must be below the 2 layers, got 2"),
    ],
)
def test_a_shape_that_does_not_fit_is_refused_by_name(tmp_path, target, options, message):
    done = run(target, tmp_path / "moe", *options)
    assert done.exit_code == 2
    assert message in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_there_stays(tmp_path, target):
    done = run(target, tmp_path)
    assert done.exit_code == 2 and "give a new folder" in done.stderr


async def scores_in_vllm(folder: Path, ids: list[int], vocabulary_size: int) -> np.ndarray:
    config = SourceConfig.model_validate(
        {
            "name": "mixture", "model": str(folder), "max_tokens": 255,
            "engine": {"kind": "vllm", "dtype": "float32", "engine_args": {"enforce_eager": True, "max_num_seqs": 2}},
        }
    )  # fmt: skip
    engine = await load_engine(config, folder, vocabulary_size)
    try:
        return (await engine.score(ids, 1)).gold_T
    finally:
        engine.close()


@pytest.mark.drill
@pytest.mark.timeout(900)
@pytest.mark.parametrize("init", ["residual", "split"])
def test_vllm_scores_the_mixture_as_transformers_does_the_dense_model(tmp_path, monkeypatch, init):
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    dense = fetch("smollm2-135m-instruct")
    upcycle_folder(str(dense), tmp_path / "moe", Upcycling(init=init), seed=0)
    vocabulary = Vocabulary.from_pretrained(dense)
    ids = AutoTokenizer.from_pretrained(dense)(TEXT).input_ids
    model = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)
    with torch.no_grad():
        logprobs_TV = torch.log_softmax(model(torch.tensor([ids])).logits[0, :-1].double(), dim=-1)
    expected_T = logprobs_TV[torch.arange(len(ids) - 1), torch.tensor(ids[1:])].numpy()
    served_T = asyncio.run(scores_in_vllm(tmp_path / "moe", ids, vocabulary.size))
    assert np.abs(served_T - expected_T).max() < 1e-4
