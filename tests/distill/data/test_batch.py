"""Batches as tensors: windows side by side must give what each of them gives alone."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from services.distill.data.batch import collate, pack
from services.distill.target.module import DistillModule
from services.models.weights import check_head, load_model
from tests.fakes.fusion_stream import FakeFusion, corpus
from tests.fakes.product_types import ProductTypes


@pytest.fixture
def blocks(target):
    fusion = FakeFusion(target, corpus(6))
    return [fusion.block(text, tokens_only=False, k=3 + number) for number, text in enumerate(corpus(6))]


def test_rows_follow_the_windows_and_inputs_are_one_behind(blocks):
    batch = collate(pack(blocks, None), bos=0, vocabulary_size=300)
    assert batch.num_tokens == sum(block.num_tokens for block in blocks)
    assert batch.inputs_BL[:, 0].tolist() == [0] * 6
    assert batch.rows is not None
    assert int(batch.rows.mask_N.sum()) == sum(int(block.mask_T.sum()) for block in blocks)
    start = 0
    for row, block in enumerate(blocks):
        rows = slice(start, start + block.num_tokens)
        assert batch.inputs_BL[row, 1 : block.num_tokens].tolist() == block.token_ids_T[:-1].tolist()
        assert batch.valid_BL[row].sum() == block.num_tokens
        assert batch.token_ids_N[rows].tolist() == block.token_ids_T.tolist()
        assert np.array_equal(batch.rows.ids_NK[rows, : block.k].numpy(), block.topk_ids_TK)
        assert (batch.rows.ids_NK[rows, block.k :] == -1).all()
        assert torch.isneginf(batch.rows.logprobs_NK[rows, block.k :]).all()
        start = rows.stop


def test_the_end_row_is_eos_behind_the_last_token(target):
    fusion = FakeFusion(target, corpus(3), ends=True)
    blocks = [fusion.block(text, tokens_only=False, k=4) for text in corpus(3)]
    batch = collate(pack(blocks, None), bos=0, vocabulary_size=300)
    for row, block in enumerate(blocks):
        last = block.num_tokens - 1
        assert batch.valid_BL[row].sum() == block.num_tokens
        assert batch.inputs_BL[row, last] == block.token_ids_T[last - 1]
    ends = np.cumsum([block.num_tokens for block in blocks]) - 1
    assert batch.token_ids_N[ends].tolist() == [fusion.vocabulary.eos_id] * 3


def test_windows_of_a_batch_do_not_see_each_other_or_the_padding(blocks, target):
    module = DistillModule(load_model(target).double(), vocabulary_size=300)

    def losses(chosen):
        batch = collate(pack(chosen, None), bos=0, vocabulary_size=300)
        ones = torch.ones(batch.num_tokens, dtype=torch.float64)
        result = module(batch, ones, ones)
        return result.clm_N, result.fusion_N

    together, alone = losses(blocks), [losses([block]) for block in blocks]
    torch.testing.assert_close(together[0], torch.cat([clm for clm, _ in alone]))
    torch.testing.assert_close(together[1], torch.cat([fusion for _, fusion in alone]))


def test_the_first_row_is_predicted_from_bos_alone(blocks, target):
    model = load_model(target)
    batch = collate(pack(blocks[:1], None), bos=0, vocabulary_size=300, tokens_only=True)
    clm = DistillModule(model, vocabulary_size=300)(batch, torch.ones(batch.num_tokens), None).clm_N
    tokens = torch.tensor([[0, *blocks[0].token_ids_T.tolist()]])
    logprobs = torch.log_softmax(model(input_ids=tokens).logits[0, :-1], dim=-1)
    torch.testing.assert_close(clm, -logprobs.gather(1, tokens[0, 1:, None])[:, 0])


def test_under_autocast_the_lm_head_multiplies_in_bfloat16(blocks, target):
    module = DistillModule(load_model(target), vocabulary_size=300, autocast=torch.bfloat16)
    batch = collate(pack(blocks, None), bos=0, vocabulary_size=300)
    weights = torch.full((batch.num_tokens,), 1 / batch.num_tokens)
    with ProductTypes() as recorded:
        losses = module(batch, weights, weights)
    assert len(recorded.types_with(300)) == 3, "the logits and two gradients"
    assert all(types == {torch.bfloat16} for types in recorded.types_with(300))
    losses.total.backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in module.parameters())


def test_no_windows_make_a_batch_without_rows_that_still_has_gradients(target):
    module = DistillModule(load_model(target), vocabulary_size=300)
    batch = collate([], bos=0, vocabulary_size=300)
    assert batch.num_tokens == 0
    module(batch, torch.ones(0), torch.ones(0)).total.backward()
    gradients = [parameter.grad for parameter in module.parameters()]
    assert all(gradient is not None and not gradient.any() for gradient in gradients)


def test_ids_outside_the_vocabulary_are_refused(blocks):
    with pytest.raises(ValueError, match="token_ids: id"):
        collate(pack(blocks, None), bos=0, vocabulary_size=5)
    with pytest.raises(ValueError, match="topk_ids: id"):
        collate(pack([replace(blocks[0], topk_ids_TK=blocks[0].topk_ids_TK + 300)], None), bos=0, vocabulary_size=300)
    with pytest.raises(ValueError, match="context_ids: id 300"):
        context = np.array([7, 300], dtype=np.int32)
        collate(pack([replace(blocks[0], context_ids_C=context)], None), bos=0, vocabulary_size=300)


def test_heads_that_are_more_than_a_matrix_are_refused(target):
    model = load_model(target)
    model.config.final_logit_softcapping = 30.0
    with pytest.raises(ValueError, match="final_logit_softcapping"):
        check_head(model)
    model.config.final_logit_softcapping = None
    model.lm_head = torch.nn.Linear(32, 300)
    with pytest.raises(ValueError, match="bias"):
        check_head(model)
