"""Conversations in tokens, compared with what transformers makes of them.

The oracle writes with `apply_chat_template`. Where no word looks like a control token its ids decide as well; where
some do, the names and bytes of all ids must spell what it writes, with no more control tokens than without such words.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.models.chat_template import PLAIN, ChatTemplate, TurnRefusedError
from services.models.chat_tokenizer import ChatTokenizer, TurnTokens
from services.wire.messages import Message, Messages
from tests.fakes.chat import END_OF_TURN, LOOK_ALIKES, TEMPLATES, chat_tokenizer, conversation, words

STYLES = ("byte_level", "llama3", "gemma", "llama", "metaspace")
CHATS: dict[tuple[str, str], ChatTokenizer] = {}


def chat(style: str, template: str) -> ChatTokenizer:
    if (style, template) not in CHATS:
        tokenizer = chat_tokenizer(style, template)
        chosen = PLAIN if template == PLAIN else "model"
        CHATS[style, template] = ChatTokenizer(tokenizer, ChatTemplate.of(tokenizer, chosen))
    return CHATS[style, template]


def fit_for(template: str, messages: list[Message]) -> list[Message]:
    """The messages as they are for templates that take null, with empty contents for others."""
    if "tool_calls" in TEMPLATES[template]:
        return messages
    return [{**message, "content": message["content"] or ""} for message in messages]


def all_ids(turn: TurnTokens) -> list[int]:
    first = [] if turn.first_id is None else [turn.first_id]
    return [*first, *turn.context_ids.tolist(), *turn.words.token_ids_T.tolist()]


def spelled(tokenizer: ChatTokenizer, ids: list[int]) -> bytes:
    names = {token_id: name.encode() for name, token_id in tokenizer.vocabulary.special_tokens.items()}
    return b"".join(names.get(token_id) or tokenizer.vocabulary.token_bytes(token_id) for token_id in ids)


def control_tokens(tokenizer: ChatTokenizer, ids: list[int]) -> list[int]:
    return [token_id for token_id in ids if token_id in tokenizer.vocabulary.special_ids]


styles = st.sampled_from(STYLES)
templates = st.sampled_from(sorted(TEMPLATES))
randoms = st.integers(0, 2**32).map(random.Random)


@settings(max_examples=150, deadline=None)
@given(styles, templates, randoms)
def test_ids_are_those_of_transformers(style: str, template: str, rng: random.Random) -> None:
    tokenizer, messages, content = chat(style, template), conversation(rng), words(rng)
    turn = tokenizer.encode_turn(Messages(messages), content.encode(), ends=True)
    oracle: Any = chat_tokenizer(style, template)
    whole = [*fit_for(template, messages), {"role": "assistant", "content": content}]
    expected = oracle.apply_chat_template(whole, tokenize=True, return_dict=False)
    joint = oracle.apply_chat_template(whole, tokenize=False)
    # The words are split apart: their white space does not melt into the template's, nor its space into their token.
    melts = content[:1].isspace() or (template == "brackets" and not tokenizer.vocabulary.has_dummy_prefix)
    # A token such as "\nc" may hold the template's line end and the first letter.
    num_before = len(all_ids(turn)) - len(turn.words.token_ids_T)
    before, joined = (spelled(tokenizer, ids[:num_before]) for ids in (all_ids(turn), expected))
    melts = melts or (joined != before and joined.startswith(before))
    if not melts:
        assert all_ids(turn) == expected[: len(all_ids(turn))]
        assert turn.words.ends_document
    if style in {"byte_level", "llama3", "gemma"}:
        assert joint.encode().startswith(spelled(tokenizer, all_ids(turn)))
    ids = tokenizer.encode_messages(Messages(messages)).tolist()
    generation = oracle.apply_chat_template(
        fit_for(template, messages), tokenize=True, return_dict=False, add_generation_prompt=True
    )
    assert ids == generation


@settings(max_examples=150, deadline=None)
@given(styles, templates, randoms)
def test_rows_cover_exactly_the_words(style: str, template: str, rng: random.Random) -> None:
    tokenizer, messages = chat(style, template), conversation(rng)
    content = words(rng, look_alikes=rng.random() < 0.5).encode()
    encoding = tokenizer.encode_turn(Messages(messages), content, ends=True).words
    assert encoding.token_ids_T[-1] == tokenizer.vocabulary.special_tokens[END_OF_TURN[template]]
    text = encoding.without_end()
    assert text.byte_ends_T[-1] == len(content)
    starts_T = np.concatenate(([0], text.byte_ends_T[:-1]))
    for token_id, start, end, lossless in zip(
        text.token_ids_T.tolist(), starts_T.tolist(), text.byte_ends_T.tolist(), text.lossless_T.tolist(), strict=True
    ):
        if lossless:
            token = tokenizer.vocabulary.token_bytes(token_id)
            assert content[start:end] in {token, token.removeprefix(b" ") if start == 0 else token}
    trimmed = template == "trimmed"
    first, last = content[:1].isspace() and trimmed, content[-1:].isspace() and trimmed
    assert text.lossless_T[0] == (not first and not (last and text.num_tokens == 1))
    assert text.lossless_T[-1] == (not last and not (first and text.num_tokens == 1))
    assert text.lossless_T[1:-1].all()


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(("byte_level", "llama3", "gemma")), templates, randoms)
def test_words_that_look_like_control_tokens_stay_words(style: str, template: str, rng: random.Random) -> None:
    tokenizer, messages = chat(style, template), conversation(rng, look_alikes=True)
    content = f"{words(rng)} x{rng.choice(LOOK_ALIKES)}y".strip()
    ids = all_ids(tokenizer.encode_turn(Messages(messages), content.encode(), ends=True))
    whole = [*fit_for(template, messages), {"role": "assistant", "content": content}]
    written = chat_tokenizer(style, template).apply_chat_template(whole, tokenize=False)
    assert written.encode().startswith(spelled(tokenizer, ids))
    harmless = [
        {**message, "content": message["content"] and "word"} if message["content"] is not None else message
        for message in messages
    ]
    plain = all_ids(tokenizer.encode_turn(Messages(harmless), b"word", ends=True))
    assert control_tokens(tokenizer, ids) == control_tokens(tokenizer, plain)


def test_a_word_in_a_tool_call_or_schema_is_no_control_token_either() -> None:
    tokenizer = chat("llama3", "chatml")
    call = {"function": {"name": "<|im_end|>", "arguments": {"<|im_start|>": "<|im_end|>"}}}
    messages: list[Message] = [
        {"role": "user", "content": "go", "name": "<|im_start|>"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "<|im_end|>"},
    ]
    turn = tokenizer.encode_turn(Messages(messages), b"done", ends=True)
    names = tokenizer.vocabulary.special_tokens
    start, end = names["<|im_start|>"], names["<|im_end|>"]
    assert control_tokens(tokenizer, all_ids(turn)) == [start, end, start, end, start, end, start, end]
    spelling = spelled(tokenizer, all_ids(turn)).decode()
    assert '{"function": {"name": "<|im_end|>", "arguments": {"<|im_start|>": "<|im_end|>"}}}' in spelling


def test_thoughts_of_the_turn_itself_are_words_and_a_template_that_thinks_puts_marks_before_others() -> None:
    tokenizer = chat("llama3", "thinking")
    question: list[Message] = [{"role": "user", "content": "2+2?"}]
    thought = tokenizer.encode_turn(Messages(question), b"<think>\nhm\n</think>\n\n4")
    plain = tokenizer.encode_turn(Messages(question), b"4")
    assert spelled(tokenizer, all_ids(thought)).endswith(b"assistant\n<think>\nhm\n</think>\n\n4")
    assert spelled(tokenizer, all_ids(plain)).endswith(b"assistant\n<think>\n\n</think>\n\n4")
    assert thought.words.lossless_T.all() and plain.words.num_tokens < thought.words.num_tokens


def test_plain_is_what_the_documentation_says() -> None:
    template = ChatTemplate.of(chat_tokenizer("gemma", PLAIN), PLAIN)
    messages: list[Message] = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
    ]
    shown = "Be brief.\n\nUser:\nHi\n\nAssistant:\nHello\n\n"
    assert template.render(messages) == shown
    assert template.render(messages, add_generation_prompt=True) == f"{shown}Assistant:\n"
    turn = chat("gemma", PLAIN).encode_turn(Messages(messages[:2]), b"Hello", ends=True)
    assert turn.first_id is None
    assert turn.words.token_ids_T[-1] == chat("gemma", PLAIN).vocabulary.special_tokens["<eos>"]


@pytest.mark.parametrize(
    ("template", "content", "reason"),
    [
        ("{% for m in messages %}{{ m.content | upper }}{% endfor %}", "abc", "otherwise than they are"),
        ("{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}", "abc", "2 times"),
        ("{% for m in messages %}{{ m.role }}{% endfor %}", "abc", "0 times"),
        ("{{ raise_exception('no questions') }}", "abc", "no questions"),
        ("{% for m in messages %}{{ m.content + m.nothing.at_all }}{% endfor %}", "abc", "refuses"),
    ],
)
def test_a_template_that_does_not_write_the_words_as_they_are_is_refused(
    template: str, content: str, reason: str
) -> None:
    with pytest.raises(TurnRefusedError, match=reason):
        ChatTemplate(template, {}).write_turn([{"role": "user", "content": "hm"}], content)


def test_text_between_the_words_and_the_end_of_turn_masks_the_end_row() -> None:
    tokenizer = chat_tokenizer("llama3", "chatml")
    spaced = ChatTemplate.of(tokenizer, "{% for m in messages %}{{ m.content + ' ' + eos_token }}{% endfor %}")
    turn = ChatTokenizer(tokenizer, spaced).encode_turn(Messages([{"role": "user", "content": "a"}]), b"b", ends=True)
    assert turn.words.lossless_T.tolist() == [True, False]


def test_the_hash_follows_the_text() -> None:
    tokenizer = chat_tokenizer("llama3", "chatml")
    hashes = {ChatTemplate.of(tokenizer, chosen).hash for chosen in ("model", PLAIN, "{{ messages }}")}
    assert len(hashes) == 3 and all(len(each) == 16 for each in hashes)
    assert ChatTemplate.of(tokenizer, TEMPLATES["chatml"]).hash == ChatTemplate.of(tokenizer).hash


def test_a_model_without_a_template_says_what_to_set() -> None:
    with pytest.raises(ValueError, match="no chat template of its own; set `plain`"):
        ChatTemplate.of(chat_tokenizer("llama3", "none"))
