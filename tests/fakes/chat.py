"""Small tokenizers with chat templates of several styles, and conversations that are drawn for them."""

from __future__ import annotations

import random
from functools import cache
from typing import Any

from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizerFast

from services.wire.messages import Message
from tests.fakes.tokenizers import CORPUS, train

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + (m['content'] or '') }}"
    "{% if m.tool_calls %}{% for c in m.tool_calls %}{{ '\n<tool_call>' + (c | tojson) }}{% endfor %}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TRIMMED = (
    "{{ bos_token }}{% for m in messages %}{{ '<|head|>' + m['role'] + '<|body|>\n\n' }}"
    "{{ m['content'] | trim + '<|eot|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|head|>assistant<|body|>\n\n' }}{% endif %}"
)
BARE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '<｜User｜>' + m.content }}"
    "{% elif m.role == 'assistant' %}{{ '<｜Assistant｜>' + m.content + eos_token }}"
    "{% else %}{{ m.content + '\n\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜>' }}{% endif %}"
)
BRACKETS = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}"
    "{% else %}{{ '[INST] ' + m.content + ' [/INST]' }}{% endif %}{% endfor %}"
)
THINKING = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' and loop.last "
    "and '</think>' not in m.content %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEMPLATES = {"chatml": CHATML, "trimmed": TRIMMED, "bare": BARE, "brackets": BRACKETS, "thinking": THINKING}
END_OF_TURN = {
    **{"chatml": "<|im_end|>", "trimmed": "<|eot|>", "bare": "<eos>", "brackets": "<eos>"},
    **{"thinking": "<|im_end|>", "plain": "<eos>"},
}
_CONTROL = ("<|im_start|>", "<|im_end|>", "<|head|>", "<|body|>", "<|eot|>")
_FULL_WIDTH = ("<｜User｜>", "<｜Assistant｜>")
LOOK_ALIKES = (*_CONTROL, *_FULL_WIDTH, "<bos>", "<eos>")
WORDS = [word for line in CORPUS for word in line.split()]


@cache
def chat_tokenizer(style: str, template: str) -> Any:
    """A tokenizer of transformers: a style of tests/fakes/tokenizers.py with a template of `TEMPLATES`, or none."""
    tokenizer = Tokenizer.from_str(train(style, 640).to_str())
    tokenizer.post_processor = None
    tokenizer.add_special_tokens(list(_CONTROL))
    # As in DeepSeek's tokenizers, which do not mark them as special.
    tokenizer.add_tokens([AddedToken(name, normalized=False) for name in _FULL_WIDTH])
    wrapped: Any = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", unk_token="<unk>"
    )
    wrapped.chat_template = TEMPLATES.get(template)
    return wrapped


def words(rng: random.Random, *, look_alikes: bool = False) -> str:
    """A few words in several scripts, code and emoji among them, some with white space around them."""
    drawn = [rng.choice(WORDS) for _ in range(rng.randint(1, 9))]
    if look_alikes:
        drawn.insert(rng.randint(0, len(drawn)), rng.choice(LOOK_ALIKES))
        drawn.append(rng.choice(LOOK_ALIKES))
    around = rng.choice(["", "", "", "\n", "  "]), rng.choice(["", "", " ", "\n"])
    return around[0] + rng.choice([" ", " ", "\n"]).join(drawn) + around[1]


def conversation(rng: random.Random, *, look_alikes: bool = False, alternates: bool = False) -> list[Message]:
    """Messages before an assistant's turn: an empty system message, several turns in a row and tool calls occur.

    `alternates`: users and assistants take turns, and there is nothing else, as the strictest templates want it.
    """
    messages: list[Message] = []
    if not alternates and rng.random() < 0.5:
        messages.append({"role": "system", "content": rng.choice(["", words(rng)])})
    for _ in range(rng.randint(1, 3)):
        messages += [
            {"role": "user", "content": words(rng, look_alikes=look_alikes)},
            {"role": "assistant", "content": words(rng, look_alikes=look_alikes)},
        ]
        if not alternates and rng.random() < 0.3:
            messages.append({"role": "user", "content": words(rng)})
    if not alternates and rng.random() < 0.3:
        call = {"type": "function", "function": {"name": "look_up", "arguments": '{"word": "cat"}'}}
        messages += [
            {"role": "user", "content": "And this one?"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": words(rng)},
        ]
        return messages
    return [*messages, {"role": "user", "content": words(rng, look_alikes=look_alikes)}]
