"""Turns of conversations in nats per byte, compared with a plain forward pass over transformers' own rendering."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from services.base.errors import InvalidArgumentError
from services.evaluation.nats_per_byte import nats_per_byte
from services.wire.messages import Message, Messages
from services.wire.passage import Passage
from tests.fakes.tiny_model import make_tiny_model

TEMPLATE = "{% for m in messages %}{{ '<|pad|>' + m.role + '\n' + m.content + '<|eos|>' }}{% endfor %}"
MESSAGES: list[Message] = [{"role": "user", "content": "Who was there?"}]
WORDS = ("They were all there.", "one of them — 👍", "the man")


def test_a_turn_is_read_behind_its_messages_and_scored_alone(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "model", vocabulary_size=400, seed=3)
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    passages = [Passage(words.encode(), b"", True, Messages(MESSAGES).to_bytes()) for words in WORDS]
    scores = nats_per_byte(folder, passages, chat_template=TEMPLATE, device="cpu")
    for words, nats in zip(WORDS, scores.nats_W, strict=True):
        conversation = [*MESSAGES, {"role": "assistant", "content": words}]
        ids = tokenizer.apply_chat_template(conversation, chat_template=TEMPLATE, return_dict=False)
        said = tokenizer(words, add_special_tokens=False)["input_ids"]
        assert ids[-1 - len(said) : -1] == said
        with torch.inference_mode():
            logprobs = torch.log_softmax(model(torch.tensor([ids])).logits[0].double(), dim=-1)
        first = len(ids) - 1 - len(said)
        expected = -sum(float(logprobs[first + n - 1, token_id]) for n, token_id in enumerate(said))
        assert nats == pytest.approx(expected, abs=1e-3)


def test_messages_without_a_template_are_refused(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "model", vocabulary_size=400, seed=3)
    with pytest.raises(InvalidArgumentError, match="chat_template"):
        nats_per_byte(folder, [Passage(b"a", b"", True, Messages(MESSAGES).to_bytes())], device="cpu")
