"""Fused windows in somebody else's trainer: the same loss, a stream that resumes, steps of a real Trainer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma2ForCausalLM, Trainer, TrainingArguments

from services.distill.data.batch import collate, pack
from services.distill.huggingface import FusedCollator, FusedDataset, FusedLossMixin, example_of
from services.distill.target.module import DistillModule
from services.fusion.client import FusedWindow, StreamRequest
from tests.fakes.blocks import random_block
from tests.fakes.fusion_stream import FakeFusion, corpus, tiny_target

REQUEST = StreamRequest(dataset="toy", split="train", seed=3)


class FusedTrainer(FusedLossMixin, Trainer):
    fusion_lambda = 0.25


def arguments(folder: Path, **settings: Any) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(folder / "out"),
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        remove_unused_columns=False,
        disable_tqdm=True,
        **settings,
    )


def streamed(tmp_path: Path, **settings: Any) -> tuple[Path, FakeFusion, FusedDataset]:
    target = tiny_target(tmp_path)
    fake = FakeFusion(target, corpus(12), ends=True, **settings)
    return target, fake, FusedDataset(fake, REQUEST, tokenizer=target)


def test_the_loss_is_that_of_fusion_distill(tmp_path: Path) -> None:
    target, fake, dataset = streamed(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(target).eval()
    examples = list(dataset)
    blocks = [w.block for w in fake.stream(REQUEST) if isinstance(w, FusedWindow)]
    assert len(examples) == len(blocks) == 12
    batch = FusedCollator()(examples)
    trainer = FusedTrainer(model=model, args=arguments(tmp_path))
    loss = trainer.compute_loss(model, batch)

    module = DistillModule(model, vocabulary_size=model.config.vocab_size)
    ours = collate(pack(blocks, None), fake.vocabulary.bos_id or 0, vocabulary_size=model.config.vocab_size)
    ones = torch.ones(ours.num_tokens)
    assert ours.rows is not None
    fused = float(ours.rows.mask_N.sum())
    expected = module(ours, ones * 0.25 / ours.num_tokens, ones * 0.75 / fused).total
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    halves = [
        trainer.compute_loss(model, FusedCollator()(examples[part]), num_items_in_batch=ours.num_tokens)
        for part in (slice(6), slice(6, 12))
    ]
    assert float(sum(halves).detach()) == pytest.approx(
        float(loss.detach()), rel=1e-2
    )  # masked tokens are spread a little unevenly
    _, outputs = trainer.compute_loss(model, batch, return_outputs=True)
    assert set(outputs) == {"loss"}


def test_a_real_trainer_learns_from_the_stream(tmp_path: Path) -> None:
    target, _, dataset = streamed(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(target)
    collator = FusedCollator()
    before = float(
        FusedTrainer(model=model, args=arguments(tmp_path)).compute_loss(model, collator(list(dataset))).detach()
    )
    trainer = FusedTrainer(
        model=model,
        args=arguments(
            tmp_path, max_steps=6, per_device_train_batch_size=4, learning_rate=3e-3, gradient_accumulation_steps=2
        ),
        train_dataset=dataset,
        data_collator=collator,
    )
    trainer.train()
    model.eval()
    assert float(trainer.compute_loss(model, collator(list(streamed(tmp_path)[2]))).detach()) < before - 0.05


def test_a_stream_goes_on_where_its_state_says(tmp_path: Path) -> None:
    _, _, dataset = streamed(tmp_path, skipped=frozenset({2}))
    whole = [example["input_ids"].tolist() for example in dataset]
    assert dataset.skipped == 1 and len(whole) == 11
    assert [example["input_ids"].tolist() for example in dataset] == whole  # a pass that has ended begins anew
    for taken in (1, 5, 11):
        _, _, first = streamed(tmp_path, skipped=frozenset({2}))
        passing = iter(first)
        head = [next(passing)["input_ids"].tolist() for _ in range(taken)]
        state = json.loads(json.dumps(first.state_dict()))
        _, _, second = streamed(tmp_path, skipped=frozenset({2}))
        second.load_state_dict(state)
        assert head + [example["input_ids"].tolist() for example in second] == whole
        assert second.skipped == 1


def test_columns_follow_transformers_and_carry_the_rows() -> None:
    block = random_block(num_tokens=6, k=4, num_context=3)
    example = example_of(block, 2)
    before = 1 + block.context_ids_C.size
    assert example["input_ids"].tolist() == [7, *block.context_ids_C, *block.token_ids_T]
    assert example["labels"].tolist() == [-100] * before + block.token_ids_T.tolist()
    batch = FusedCollator(pad_id=9)([example, example_of(random_block(num_tokens=2, k=2), 2)])
    assert batch["input_ids"][1].tolist()[3:] == [9] * (before + 6 - 3)
    assert batch["attention_mask"].sum(dim=1).tolist() == [before + 6, 3]
    learned = batch["labels"] != -100
    assert learned.sum(dim=1).tolist() == [6, 2]
    np.testing.assert_allclose(batch["topk_logprobs"][learned][:6], block.topk_logprobs_TK)
    assert batch["fused"][0, before:].tolist() == block.mask_T.tolist() and not batch["fused"][~learned].any()
    assert (batch["topk_ids"][learned][6:, 2:] == -1).all() and (batch["topk_ids"][~learned] == -1).all()
    assert torch.isneginf(batch["topk_logprobs"][learned][6:, 2:]).all()


def test_what_cannot_be_honoured_is_said(tmp_path: Path) -> None:
    _, _, dataset = streamed(tmp_path)
    with pytest.raises(ValueError, match="num_workers: must be 0"):
        next(iter(DataLoader(dataset, batch_size=None, num_workers=1)))
    with pytest.raises(ValueError, match=r"topk_ids: .*remove_unused_columns=False"):
        FusedCollator()([{"input_ids": [1], "labels": [1]}])


def test_a_model_that_caps_its_logits_is_refused(tmp_path: Path) -> None:
    config = Gemma2Config(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8,
    )  # fmt: skip
    trainer = FusedTrainer(model=Gemma2ForCausalLM(config), args=arguments(tmp_path))
    with pytest.raises(ValueError, match=r"FusedLossMixin: .*final_logit_softcapping"):
        trainer.compute_loss(trainer.model, {})
