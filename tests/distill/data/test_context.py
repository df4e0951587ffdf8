"""Input without loss: rows are predicted from the tokens before them, and nothing is learned about these.

The oracle is a plain forward pass of transformers over BOS, context and text of one window.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from services.distill.data.batch import blocks_of, collate, pack
from services.distill.target.module import DistillModule
from services.evaluation.nats_per_byte import nats_per_byte
from services.jobs.step_log import read_rows
from services.models.prompt import encode_passages
from services.models.weights import load_model
from services.wire.passage import Passage
from tests.distill.data.conversations import SIZE, block_of
from tests.fakes.fusion_stream import FakeFusion, corpus
from tests.fakes.training import job_in, train

pytestmark = pytest.mark.usefixtures("one_thread")

windows = st.lists(st.tuples(st.integers(0, 20), st.integers(1, 20)), min_size=1, max_size=6)
"""Lengths of context and text."""


def blocks_for(lengths, seed=0):
    generator = np.random.default_rng(seed)
    return [
        replace(
            block_of(num_tokens, generator.integers(1, SIZE, num_context), seed=number),
            first_id=None if number % 2 else 1 + number,
        )
        for number, (num_context, num_tokens) in enumerate(lengths)
    ]


@pytest.fixture(scope="module")
def module(target):
    return DistillModule(load_model(target).double().eval(), vocabulary_size=SIZE)


def losses(module, rows):
    batch = collate(rows, bos=0, vocabulary_size=SIZE)
    ones = torch.ones(batch.num_tokens, dtype=torch.float64)
    return module(batch, ones, ones)


def plain_losses(module, block):
    """-log probability of every token of the window, by transformers alone."""
    first_id = 0 if block.first_id is None else block.first_id
    ids = torch.tensor([[first_id, *block.context_ids_C.tolist(), *block.token_ids_T.tolist()]])
    logprobs = torch.log_softmax(module.model(input_ids=ids).logits[0, :-1], dim=-1)
    return -logprobs.gather(1, ids[0, 1:, None])[block.context_ids_C.size :, 0]


@given(lengths=windows, room=st.none() | st.integers(16, 80))
@settings(max_examples=12)
def test_rows_are_those_of_a_plain_pass_over_bos_context_and_text(module, lengths, room):
    rows = pack(blocks_for(lengths), room)
    ordered = blocks_of(rows)
    passed = losses(module, rows)
    torch.testing.assert_close(passed.clm_N, torch.cat([plain_losses(module, block) for block in ordered]))
    alone = [losses(module, pack([block], None)).fusion_N for block in ordered]
    torch.testing.assert_close(passed.fusion_N, torch.cat(alone))


def test_positions_of_a_context_have_no_gradient(module):
    blocks = blocks_for([(7, 5), (0, 4), (3, 9)])
    kept = []

    def keep(_module, _args, output):
        output.last_hidden_state.retain_grad()
        kept.append(output.last_hidden_state)

    hook = module.model.base_model.register_forward_hook(keep)
    losses(module, pack(blocks, None)).total.backward()
    hook.remove()
    [states] = kept
    learns_BL = states.grad.abs().sum(dim=-1) > 0
    for row, block in enumerate(blocks):
        expected = np.zeros(learns_BL.shape[1], dtype=bool)
        expected[block.context_ids_C.size : block.num_inputs] = True
        assert learns_BL[row].tolist() == expected.tolist()


@given(lengths=windows, changed=st.integers(0, 5))
@settings(max_examples=6)
def test_a_window_sees_its_own_context_and_no_other(module, lengths, changed):
    blocks = blocks_for(lengths)
    changed %= len(blocks)
    context = blocks[changed].context_ids_C
    others = list(blocks)
    others[changed] = replace(blocks[changed], context_ids_C=(context % (SIZE - 1) + 1).astype(np.int32))
    before, after = (
        {len(block.text_bytes): part for block, part in zip(blocks_of(rows), parts, strict=True)}
        for rows in (pack(blocks, 200), pack(others, 200))
        for parts in [losses(module, rows).clm_N.split([block.num_tokens for block in blocks_of(rows)])]
    )
    sizes = [len(block.text_bytes) for block in blocks]
    for number, size in enumerate(sizes):
        if sizes.count(size) > 1:
            continue  # told apart by their length
        same = torch.allclose(before[size], after[size])
        assert same == (number != changed or context.size == 0)


def test_packing_counts_the_context():
    blocks = blocks_for([(10, 10), (0, 20), (30, 10)])
    assert [[reading.num_inputs for reading in row] for row in pack(blocks, 40)] == [[40], [20, 20]]


class WithContext(FakeFusion):
    """Every window is read behind the text before it in the list."""

    def passage(self, text):
        texts = [*self.splits["train"], *self.splits["held_out"]]
        return Passage(text, texts[texts.index(text) - 1])

    def block(self, text, *, tokens_only, k):
        [prompt] = encode_passages(self.vocabulary, [self.passage(text)])
        assert prompt.encoding.token_ids_T.tolist() == self.vocabulary.encode(text).token_ids_T.tolist()
        return replace(super().block(text, tokens_only=tokens_only, k=k), context_ids_C=prompt.context_ids)


def test_a_run_counts_the_tokens_with_a_loss_and_is_scored_as_it_learns(tmp_path, target):
    held_out = corpus(5, seed=9)
    job = job_in(tmp_path, target, epochs=1, eval_every_steps=5)
    fusion = WithContext(target, corpus(18), held_out=held_out)
    train(job, fusion)
    rows = read_rows(job.files.metrics)
    for row, ledger in zip(rows, read_rows(job.files.ledger), strict=True):
        blocks = [fusion.block(fusion.splits["train"][index], tokens_only=True, k=0) for index in ledger["windows"]]
        assert row["tokens"] == sum(block.num_tokens for block in blocks)
        assert row["input_tokens"] <= sum(block.num_inputs for block in blocks)
        assert row["input_tokens"] > row["tokens"]
    [evaluation] = read_rows(job.files.evaluations)
    passages = [fusion.passage(text) for text in held_out]
    assert evaluation["nats_per_byte"] == pytest.approx(nats_per_byte(job.files.model, passages).mean, rel=1e-4)
    assert abs(evaluation["nats_per_byte"] - nats_per_byte(job.files.model, held_out).mean) > 1e-3
