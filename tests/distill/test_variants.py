"""What a recipe may change about a run without changing what is learned, and what it may learn otherwise."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
from types import SimpleNamespace

import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from services.base.errors import FailedPreconditionError
from services.distill.data.batch import blocks_of, collate, pack
from services.distill.plan import make_plan
from services.distill.target.config import TargetConfig
from services.distill.target.module import DistillModule
from services.distill.target.prepare import prepare_target
from services.distill.workers.worker import DistillWorker
from services.distill.workers.world import World
from services.fusion.order import StreamPlan
from services.jobs.step_log import read_rows
from services.jobs.storage import newest_complete
from services.models.weights import load_model
from services.wire.cursor import Cursor, num_dealt
from tests.fakes.blocks import random_block
from tests.fakes.fusion_stream import FakeFusion, corpus
from tests.fakes.training import job_in, train, weights

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def blocks(target):
    fusion = FakeFusion(target, corpus(9))
    return [fusion.block(text, tokens_only=False, k=5) for text in corpus(9)]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_windows_give_what_each_gives_alone(blocks, target, attention):
    model = load_model(target).double()
    model.set_attn_implementation(attention)
    module = DistillModule(model, vocabulary_size=300)
    module.check_packing()
    rows = pack(blocks, 100)
    assert max(len(row) for row in rows) > 1 and len(rows) > 1
    batch = collate(rows, bos=0, vocabulary_size=300)
    ones = torch.ones(batch.num_tokens, dtype=torch.float64)
    together = module(batch, ones, ones)
    alone = [
        module(collate(pack([block], None), bos=0, vocabulary_size=300), *2 * [torch.ones(block.num_tokens).double()])
        for block in blocks_of(rows)
    ]
    torch.testing.assert_close(together.clm_N, torch.cat([losses.clm_N for losses in alone]))
    torch.testing.assert_close(together.fusion_N, torch.cat([losses.fusion_N for losses in alone]))


@given(lengths=st.lists(st.integers(1, 40), max_size=30), room=st.integers(1, 50))
def test_every_window_is_packed_once_and_no_row_overflows(lengths, room):
    windows = [random_block(length, 1, seed) for seed, length in enumerate(lengths)]
    rows = pack(windows, room)
    assert sorted(map(id, blocks_of(rows))) == sorted(map(id, windows))
    assert all(len(row) == 1 or sum(reading.num_inputs for reading in row) <= room for row in rows)
    half_full = [row for row in rows if 2 * sum(reading.num_inputs for reading in row) <= room]
    assert len(half_full) <= 1, "first fit leaves no two rows that would fit together"


def test_a_model_that_cannot_keep_windows_apart_is_refused(target):
    class Leaky(torch.nn.Module):
        config = AutoConfig.from_pretrained(target)

        def __init__(self) -> None:
            super().__init__()
            self.embedding = torch.nn.Embedding(300, 8)

        def base_model(self, input_ids, position_ids, use_cache):
            return SimpleNamespace(last_hidden_state=self.embedding(input_ids).cumsum(1))

    with pytest.raises(ValueError, match=r"distill\.pack_tokens: llama lets packed windows see each other"):
        DistillModule(Leaky(), vocabulary_size=300).check_packing()


def test_packing_and_micro_batches_change_nothing_that_is_learned(tmp_path, target):
    plain = job_in(tmp_path / "plain", target, epochs=1)
    train(plain, FakeFusion(target, corpus(18)))
    for name, changes in {
        "packed": {"pack_tokens": 120},
        "micro": {"micro_batch_windows": 3, "pack_tokens": 60},
    }.items():
        job = job_in(tmp_path / name, target, epochs=1, **changes)
        train(job, FakeFusion(target, corpus(18)))
        ours, theirs = read_rows(job.files.metrics), read_rows(plain.files.metrics)
        for key in ("loss", "clm", "fusion", "gradient_norm"):
            assert [row[key] for row in ours] == pytest.approx([row[key] for row in theirs], abs=1e-5)
        trained = weights(job.files.model)
        for key, weight in weights(plain.files.model).items():
            torch.testing.assert_close(trained[key], weight, rtol=0, atol=1e-5)


def test_lambda_moves_and_the_reward_weighs_every_window(tmp_path, target):
    job = job_in(
        tmp_path, target, epochs=1, **{"lambda": 0.2}, lambda_schedule="linear", lambda_end=1.0, reward_weighting=True
    )
    fusion = FakeFusion(target, corpus(18))
    module = DistillModule(load_model(target), vocabulary_size=300)
    train(job, fusion)
    rows = read_rows(job.files.metrics)
    assert [row["lambda"] for row in rows] == pytest.approx([0.2 + 0.8 * step / 5 for step in range(5)])
    # The first step's loss, from the definition: window by window.
    blocks = [
        fusion.block(corpus(18)[index], tokens_only=False, k=8) for index in read_rows(job.files.ledger)[0]["windows"]
    ]
    clm = fused = 0.0
    for block in blocks:
        ones = torch.ones(block.num_tokens)
        losses = module(collate(pack([block], None), bos=0, vocabulary_size=300), ones, ones)
        reward = math.exp(-0.9 * len(block.text_bytes) / block.num_tokens)  # the better of the fake's two sources
        clm += float(losses.clm_N.sum()) * (1 - 0.8 * reward)
        fused += float(losses.fusion_N.sum()) * 0.8 * reward
    tokens, kept = sum(block.num_tokens for block in blocks), sum(int(block.mask_T.sum()) for block in blocks)
    assert rows[0]["loss"] == pytest.approx(clm / tokens + fused / kept, rel=1e-5)


def test_lora_leaves_the_target_alone_and_its_adapter_and_merged_folder_agree(tmp_path, target):
    before = {name: value.clone() for name, value in weights(target).items()}
    lora = {"rank": 4, "alpha": 8.0}
    job = job_in(tmp_path / "whole", target, lora=lora, learning_rate=1e-2)
    train(job, FakeFusion(target, corpus(18)))
    rows = read_rows(job.files.metrics)
    assert rows[-1]["clm"] < rows[0]["clm"]
    for name, weight in weights(target).items():
        assert torch.equal(weight, before[name])

    adapter = load_file(job.files.adapter / "adapter_model.safetensors")
    assert adapter and all(".lora_A." in name or ".lora_B." in name for name in adapter)
    adapted = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(target), str(job.files.adapter))
    merged = AutoModelForCausalLM.from_pretrained(job.files.model)
    assert set(merged.state_dict()) == set(before), "an ordinary folder, without a trace of peft"
    tokens = torch.arange(3, 40)[None]
    with torch.no_grad():
        ours, theirs = merged(tokens).logits, adapted(tokens).logits
        untouched = AutoModelForCausalLM.from_pretrained(target)(tokens).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert (ours - untouched).abs().max() > 0.01

    broken = job_in(tmp_path / "broken", target, lora=lora, learning_rate=1e-2)
    fusion = FakeFusion(target, corpus(18), break_after=19)
    with pytest.raises(FailedPreconditionError, match="the stream broke"):
        train(broken, fusion)
    train(broken, fusion)
    resumed = load_file(broken.files.adapter / "adapter_model.safetensors")
    for name, weight in adapter.items():
        torch.testing.assert_close(resumed[name], weight, rtol=0, atol=1e-6)


SERVED = """
import json, sys
from vllm import LLM, SamplingParams
from vllm.inputs import TokensPrompt
llm = LLM(sys.argv[1], dtype="float32", enforce_eager=True, max_model_len=128, max_num_seqs=1)
settings = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
[answer] = llm.generate([TokensPrompt(prompt_token_ids=json.loads(sys.argv[2]))], settings)
tokens = answer.prompt_token_ids
rows = zip(answer.prompt_logprobs[1:], tokens[1:], strict=True)
print("LOGPROBS", json.dumps([row[token].logprob for row, token in rows]))
"""


def test_a_merged_adapter_s_folder_answers_in_vllm_like_in_transformers(tmp_path):
    """In a process of its own, because vLLM's engine keeps what it has taken."""
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vLLM is not installed")
    made = TargetConfig.model_validate(  # vLLM wants heads of at least 32
        {
            "config": {"hidden_size": 64, "num_layers": 1, "num_heads": 2, "intermediate_size": 64},
            "tokenizer": {"train": {"vocabulary_size": 300}},
        }
    )
    folder = prepare_target(made, [text.decode() for text in corpus(50)], tmp_path / "target", seed=0)
    job = job_in(tmp_path / "run", folder, epochs=1, lora={"rank": 4}, learning_rate=1e-2)
    train(job, FakeFusion(folder, corpus(18)))
    tokens = [0, *range(3, 40)]
    done = subprocess.run(
        [sys.executable, "-c", SERVED, str(job.files.model), json.dumps(tokens)],
        env={**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    [line] = [line for line in done.stdout.splitlines() if line.startswith("LOGPROBS")] or [done.stderr[-2000:]]
    served = torch.tensor(json.loads(line.removeprefix("LOGPROBS")))

    def logprobs(model_folder):
        inputs = torch.tensor([tokens])
        with torch.no_grad():
            rows = torch.log_softmax(AutoModelForCausalLM.from_pretrained(model_folder)(inputs).logits[0, :-1], dim=-1)
        return rows.gather(1, inputs[0, 1:, None])[:, 0]

    torch.testing.assert_close(served, logprobs(job.files.model), rtol=0, atol=1e-3)
    assert (served - logprobs(folder)).abs().max() > 0.02, "the adapter is in it"


@pytest.mark.parametrize(
    "architecture",
    [
        {"model_type": "gpt2", "n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 256},
        {
            "model_type": "qwen3", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "head_dim": 8,
            "num_attention_heads": 2, "num_key_value_heads": 1,
        },
    ],
    ids=["gpt2", "qwen3"],
)  # fmt: skip
def test_any_causal_model_of_transformers_can_be_trained_from_its_configuration(tmp_path, architecture):
    config = TargetConfig.model_validate(
        {"architecture": architecture, "tokenizer": {"train": {"vocabulary_size": 300}}}
    )
    folder = prepare_target(config, [text.decode() for text in corpus(50)], tmp_path / "target", seed=0)
    job = job_in(tmp_path / "run", folder, epochs=1, pack_tokens=100)
    train(job, FakeFusion(folder, corpus(18)))
    rows = read_rows(job.files.metrics)
    assert rows[0]["clm"] == pytest.approx(math.log(300), rel=0.05)
    assert rows[-1]["clm"] < rows[0]["clm"]
    assert AutoModelForCausalLM.from_pretrained(job.files.model).config.model_type == architecture["model_type"]


def test_layers_that_are_not_there_or_the_lm_head_take_no_adapter(tmp_path, target):
    fusion = FakeFusion(target, corpus(4))
    for modules, message in (("nothing_here", "target_modules"), (["lm_head", "q_proj"], "lm_head")):
        job = job_in(tmp_path, target, lora={"target_modules": modules})
        with pytest.raises(ValueError, match=message):
            DistillWorker(job, make_plan(job, fusion), fusion, World())


def test_checkpoints_in_a_store_behind_a_url(tmp_path, target):
    """Through fsspec's in-memory file system, so that nothing of it can pass for a local path."""
    url = "fsspec+memory://bucket/checkpoints"
    job = job_in(tmp_path / "toy" / "run", target, storage=url, epochs=1)
    assert job.checkpoints == f"{url}/toy/run/checkpoints"
    local = job_in(tmp_path / "local", target, epochs=1)
    train(local, FakeFusion(target, corpus(18)))
    assert newest_complete(job.checkpoints) is None

    from pyarrow.fs import FileSystem, copy_files

    files, root = FileSystem.from_uri(job.checkpoints)
    for name in ("step-3", "step-5"):
        for folder in (local.files.checkpoints / name).glob("**/"):
            files.create_dir(f"{root}/{folder.relative_to(local.files.checkpoints)}", recursive=True)
        copy_files(str(local.files.checkpoints / name), f"{root}/{name}", destination_filesystem=files)
    newest = newest_complete(job.checkpoints)
    assert newest is not None and (newest.name, newest.step) == ("step-5", 5)
    with newest.local() as folder:
        AutoModelForCausalLM.from_pretrained(folder)
    files.delete_file(f"{root}/step-5/trainer_state.json")
    newest = newest_complete(job.checkpoints)
    assert newest is not None and newest.name == "step-3"
    assert newest.identity == make_plan(local, FakeFusion(target, corpus(18))).identity
    job.run_folder.mkdir(parents=True)
    job.start_over()
    assert newest_complete(job.checkpoints) is None


@given(
    num_windows=st.integers(1, 40),
    batch=st.integers(4, 9),
    block=st.integers(1, 5),
    attempts=st.lists(st.tuples(st.integers(1, 4), st.integers(1, 3)), min_size=1, max_size=5),
)
def test_a_step_has_the_same_windows_however_often_the_number_of_workers_changes(num_windows, batch, block, attempts):
    def shards(size: int, cursor: Cursor | None) -> list:
        return [StreamPlan("x", num_windows, 0, rank, size, 1, block).windows(cursor) for rank in range(size)]

    order = [step.index for step in shards(1, None)[0]]
    plan, start = StreamPlan("x", num_windows, 0, 0, 1, 1, block).fingerprint, 0
    for size, num_steps in attempts:
        dealt = start
        streams = shards(size, Cursor(epoch=0, dealt=dealt, received=0, plan=plan))
        for _ in range(num_steps):
            stop = min(start + batch, num_windows)
            shares = [
                num_dealt(rank, size, start, stop, shared_from=dealt, block_windows=block) for rank in range(size)
            ]
            got = [next(stream).index for stream, share in zip(streams, shares, strict=True) for _ in range(share)]
            assert sorted(got) == sorted(order[start:stop])
            assert max(shares) - min(shares) <= block
            start = stop
