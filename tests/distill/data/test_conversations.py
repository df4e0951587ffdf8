"""The target reads a conversation once, in its own rendering, and learns what assistants say and where they stop.

The oracle is transformers: `apply_chat_template` for the ids, and a plain forward pass over them.
"""

from __future__ import annotations

import random
from functools import cache

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fusion_core.blocks import Block
from services.distill.data.batch import blocks_of, collate, pack
from services.distill.target.module import DistillModule
from services.models.chat_template import ChatTemplate
from services.models.chat_tokenizer import ChatTokenizer
from services.models.prompt import encode_passages
from services.wire.messages import Messages
from services.wire.passage import Passage
from tests.fakes.chat import TEMPLATES, chat_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")

WORDS = ["Cats", "sit", "on", "mats", "and", "think", "of", "the", "theatre", "there"]


@cache
def chat_of(style, template):
    tokenizer = chat_tokenizer(style, template)
    return ChatTokenizer(tokenizer, ChatTemplate.of(tokenizer))


@cache
def module_for(size):
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=size, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2
    )
    return DistillModule(LlamaForCausalLM(shape).double().eval(), vocabulary_size=size)


def conversation(seed, num_turns):
    """Questions and answers in turn, of words that no tokenizer joins to a template."""
    rng = random.Random(seed)
    return [
        {"role": role, "content": " ".join(rng.choices(WORDS, k=rng.randint(1, 7)))}
        for _ in range(num_turns)
        for role in ("user", "assistant")
    ]


def blocks_for(chat, messages):
    """What the fusion service sends of the assistant's turns, without distributions."""
    passages = [
        Passage(message["content"].encode(), ends_document=True, messages=Messages(messages[:number]).to_bytes())
        for number, message in enumerate(messages)
        if message["role"] == "assistant"
    ]
    return [
        Block(
            text_bytes=prompt.text,
            token_ids_T=prompt.encoding.token_ids_T,
            byte_ends_T=prompt.encoding.byte_ends_T,
            topk_ids_TK=np.empty((prompt.encoding.num_tokens, 0), dtype=np.int32),
            topk_logprobs_TK=np.empty((prompt.encoding.num_tokens, 0), dtype=np.float32),
            tail_T=np.zeros(prompt.encoding.num_tokens, dtype=np.float32),
            gold_T=np.zeros(prompt.encoding.num_tokens, dtype=np.float32),
            vocabulary=chat.vocabulary.fingerprint,
            mask_T=prompt.encoding.lossless_T,
            ends_document=prompt.encoding.ends_document,
            context_ids_C=prompt.context_ids,
            first_id=prompt.first_id,
        )
        for prompt in encode_passages(chat.vocabulary, passages, chat)
    ]


def expected_losses(tokenizer, module, messages):
    """By turn: -log probability of the answer's tokens and the token that ends it, in transformers' rendering."""
    losses = []
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        text = tokenizer.apply_chat_template(messages[: number + 1], tokenize=False)
        start = text.rindex(message["content"])
        rendered = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        # All of these templates begin with a control token, BOS or another; one ends the turn right behind the words.
        ids = torch.tensor([rendered["input_ids"]])
        places = [
            place
            for place, (first, _) in enumerate(rendered["offset_mapping"])
            if start <= first < start + len(message["content"])
        ]
        logprobs = torch.log_softmax(module.model(input_ids=ids).logits[0, :-1], dim=-1)
        losses.append(-logprobs.gather(1, ids[0, 1:, None])[places[0] - 1 : places[-1] + 1, 0])
    return losses


@pytest.mark.parametrize("style", ["byte_level", "gemma"])
@pytest.mark.parametrize("template", ["chatml", "trimmed", "bare", "thinking"])
@pytest.mark.parametrize("room", [None, 60])
def test_losses_are_those_of_a_plain_pass_over_the_rendered_conversation(style, template, room):
    assert template in TEMPLATES
    tokenizer, chat = chat_tokenizer(style, template), chat_of(style, template)
    module, bos = module_for(len(tokenizer)), tokenizer.bos_token_id
    talks = [conversation(seed, num_turns=1 + seed % 3) for seed in range(4)]
    blocks = [block for messages in talks for block in blocks_for(chat, messages)]
    random.Random(1).shuffle(blocks)
    rows = pack(blocks, room)
    batch = collate(rows, bos, vocabulary_size=len(tokenizer), tokens_only=True)
    losses = module(batch, torch.ones(batch.num_tokens).double(), None).clm_N
    found = {
        block.text_bytes: part
        for block, part in zip(blocks_of(rows), losses.split([b.num_tokens for b in blocks_of(rows)]), strict=True)
    }
    for messages in talks:
        expected = expected_losses(tokenizer, module, messages)
        answers = [message["content"].encode() for message in messages if message["role"] == "assistant"]
        for answer, nats_T in zip(answers, expected, strict=True):
            torch.testing.assert_close(found[answer], nats_T)
    num_readings = sum(len(row) for row in rows)
    # A template that writes an earlier answer otherwise than the last one leaves no turn to join.
    assert num_readings == (len(blocks) if template == "thinking" else len(talks))
