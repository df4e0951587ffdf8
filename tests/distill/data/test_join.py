"""Turns of a conversation are read once: the same losses and gradients as turn by turn, from fewer input tokens."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from services.distill.data.batch import blocks_of, collate, pack
from services.distill.data.join import Reading, join
from services.distill.target.module import DistillModule
from services.models.weights import load_model
from tests.distill.data.conversations import SIZE, block_of, conversation

pytestmark = pytest.mark.usefixtures("one_thread")

turns = st.lists(st.tuples(st.integers(0, 6), st.integers(1, 8)), min_size=1, max_size=5)
conversations = st.lists(turns, min_size=1, max_size=4)


def numbers(readings, blocks):
    places = {id(block): number for number, block in enumerate(blocks)}
    return [[places[id(block)] for block in reading.blocks] for reading in readings]


@given(lengths=conversations, seed=st.integers(0, 99))
@settings(max_examples=50)
def test_every_conversation_is_one_reading_in_the_order_of_its_turns(lengths, seed):
    """Whatever the order in which the turns come; a first turn without context is no conversation's second."""
    talks = [conversation(turns, seed=number + 1) for number, turns in enumerate(lengths)]
    blocks = [block for talk in talks for block in talk]
    random.Random(seed).shuffle(blocks)
    readings = join(blocks)
    assert sorted(map(id, blocks_of([readings]))) == sorted(map(id, blocks))
    assert {tuple(map(id, reading.blocks)) for reading in readings} == {tuple(map(id, talk)) for talk in talks}
    firsts = [min(group) for group in numbers(readings, blocks)]
    assert firsts == sorted(firsts)
    assert sum(reading.num_inputs for reading in readings) == sum(talk[-1].num_inputs for talk in talks)


def test_windows_without_context_stay_apart_and_in_order():
    blocks = [block_of(5, np.empty(0), seed) for seed in (3, 1, 2)]
    assert numbers(join([*blocks, blocks[0]]), blocks) == [[0], [1], [2], [0]]
    assert join([]) == []


def test_a_turn_whose_context_does_not_hold_the_one_before_has_a_reading_of_its_own():
    """Cut history, another first message, or an answer that was rewritten in the history."""
    first, second, third = conversation([(4, 3), (2, 5), (3, 4)], seed=1)
    cut = replace(third, context_ids_C=third.context_ids_C[2:])
    assert numbers(join([first, second, cut]), [first, second, cut]) == [[0, 1], [2]]
    rewritten = third.context_ids_C.copy()
    rewritten[second.num_inputs - 2] += 1
    blocks = [first, second, replace(third, context_ids_C=rewritten)]
    assert numbers(join(blocks), blocks) == [[0, 1], [2]]
    assert numbers(join([third, first]), [third, first]) == [[1, 0]], "a turn in between may be missing"
    other_start = replace(second, first_id=9)
    assert numbers(join([first, other_start]), [first, other_start]) == [[0], [1]]


def test_a_turn_may_end_otherwise_in_the_history(target):
    """Its last token is predicted, not read; rows of two turns never stand in one place."""
    module = DistillModule(load_model(target).double().eval(), vocabulary_size=SIZE)
    first, second, third = conversation([(4, 3), (2, 1), (3, 4)], seed=1)
    for ids in (first.token_ids_T, second.token_ids_T):
        ids[-1] = (ids[-1] + 1) % SIZE
    blocks = [third, second, first]
    assert numbers(join(blocks), blocks) == [[2, 1, 0]]

    def clm(rows):
        batch = collate(rows, bos=0, vocabulary_size=SIZE)
        ones = torch.ones(batch.num_tokens, dtype=torch.float64)
        return module(batch, ones, ones).clm_N.detach().split([block.num_tokens for block in blocks_of(rows)])

    together, apart = clm(pack(blocks, None)), clm([[Reading((block,))] for block in (first, second, third)])
    for one, other in zip(together, apart, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
    twice = replace(second, token_ids_T=(second.token_ids_T + 1) % SIZE)
    assert sorted(map(len, numbers(join([second, twice]), [second, twice]))) == [1, 1]


def test_of_several_answers_to_one_question_one_is_joined():
    first, second = conversation([(4, 3), (2, 5)], seed=1)
    other = block_of(6, second.context_ids_C, seed=77)
    readings = join([first, second, other])
    assert sorted(len(reading.blocks) for reading in readings) == [1, 2]
    assert sorted(map(id, blocks_of([readings]))) == sorted(map(id, [first, second, other]))


@given(lengths=conversations, room=st.none() | st.integers(16, 60), seed=st.integers(0, 9))
@settings(max_examples=20)
def test_losses_and_gradients_are_those_of_the_turns_apart(target, lengths, room, seed):
    module = DistillModule(load_model(target).double().eval(), vocabulary_size=SIZE)
    blocks = [block for number, turns in enumerate(lengths) for block in conversation(turns, seed=number + 1)]
    random.Random(seed).shuffle(blocks)

    def losses_and_gradients(rows):
        module.zero_grad()
        batch = collate(rows, bos=0, vocabulary_size=SIZE)
        ones = torch.ones(batch.num_tokens, dtype=torch.float64)
        passed = module(batch, ones, ones)
        passed.total.backward()
        sizes = [block.num_tokens for block in blocks_of(rows)]
        both = zip(blocks_of(rows), passed.clm_N.split(sizes), passed.fusion_N.split(sizes), strict=True)
        return {id(block): torch.stack([clm, fusion]).detach() for block, clm, fusion in both}, [
            parameter.grad.clone() for parameter in module.parameters()
        ]

    rows, apart = pack(blocks, room), [[Reading((block,))] for block in blocks]
    (joined, joined_gradients), (single, single_gradients) = map(losses_and_gradients, (rows, apart))
    assert joined.keys() == single.keys()
    for key, values in single.items():
        torch.testing.assert_close(joined[key], values, rtol=0, atol=1e-5)
    for one, other in zip(joined_gradients, single_gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    num_joined = sum(reading.num_inputs for row in rows for reading in row)
    num_apart = sum(block.num_inputs for block in blocks)
    assert num_joined < num_apart or all(len(turns) == 1 for turns in lengths)


@pytest.mark.parametrize("num_turns", [2, 6])
def test_a_conversation_is_read_once_however_many_turns_it_has(num_turns):
    blocks = conversation([(5, 10)] * num_turns, seed=1)
    [row] = pack(blocks, None)
    [reading] = row
    assert reading.num_inputs == 15 * num_turns
    batch = collate([row], bos=0, vocabulary_size=SIZE)
    assert tuple(batch.inputs_BL.shape) == (1, 15 * num_turns)
    assert batch.num_tokens == int(batch.valid_BL.sum()) == 10 * num_turns
