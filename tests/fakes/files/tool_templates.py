"""Chat templates of families that call tools, as published (trl's package holds copies), with tiny tokenizers."""

from __future__ import annotations

import importlib.util
import re
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizerFast

from services.models.chat_template import ChatTemplate
from services.models.chat_tokenizer import ChatTokenizer
from services.source.answers.chat_prompt import ChatPrompts
from tests.fakes.tokenizers import train

FORMATS = {
    **{"qwen2_5": "hermes", "qwen3": "hermes", "llama3_1": "llama3", "llama3_2": "llama3"},
    **{"deepseekv3": "deepseek", "internlm2": "internlm2"},
}
"""The format of the calls that each family's template writes."""
_CONTROL = re.compile(r"<\|[a-z_]+\|>|<｜[^｜]+｜>")
_WORD_MARKS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
"""Added tokens of Qwen's tokenizers, which do not call them special."""
_MARKS = ("<|python_tag|>", "<|eom_id|>")


def template_text(family: str) -> str:
    """The family's template."""
    if family == "internlm2":
        return ChatTemplate.built_in("internlm2")
    spec = importlib.util.find_spec("trl")
    assert spec is not None and spec.submodule_search_locations, "trl is installed for development"
    return (Path(spec.submodule_search_locations[0]) / "chat_templates" / f"{family}.jinja").read_text("utf-8")


@cache
def tool_tokenizer(family: str) -> Any:
    """A byte-level tokenizer of transformers with the tokens that the family's template names, and the template."""
    text = template_text(family)
    tokenizer = Tokenizer.from_str(train("byte_level", 640).to_str())
    tokenizer.post_processor = None
    more = _MARKS if family.startswith("llama") else ()
    tokenizer.add_special_tokens(sorted({*_CONTROL.findall(text), *more} - {"<|date|>"}))
    tokenizer.add_tokens([AddedToken(name, normalized=False) for name in _WORD_MARKS if name in text])
    wrapped: Any = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", unk_token="<unk>"
    )
    wrapped.chat_template = text
    return wrapped


@cache
def tool_prompts(family: str) -> ChatPrompts:
    """The prompts of a source with the family's template."""
    tokenizer = tool_tokenizer(family)
    chat = ChatTokenizer(tokenizer, ChatTemplate.of(tokenizer))
    return ChatPrompts(Path("nowhere"), chat.vocabulary, chat, source=family)
