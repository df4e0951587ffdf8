"""Messages in a model's tokens: rendered with its chat template, the names of control tokens in them read as words.

Where no string of a conversation holds the name of a control token, the ids are those of transformers'
`apply_chat_template`. Otherwise these names are hidden while the template runs; what it writes is split at the control
tokens that are left, which are the template's own, and the text between them is tokenised as text.
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fusion_core.vocabulary import Vocabulary
from fusion_core.vocabulary.tokenizer_files import load_tokenizer
from services.base.errors import InvalidArgumentError

_ROLES = ("system", "user", "assistant", "tool")
_TRIAL = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


class ChatPrompts:
    """Renders the messages of a conversation for one model.

    Attributes:
        template_hash: 16 hexadecimal digits of the template's SHA-256; empty when the model has none.
        stop_ids: ids that end an answer: EOS by the source's, the tokenizer's and the model's own account, and the end
            of turn that the template writes behind an assistant's message.
    """

    def __init__(self, folder: Path, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._tokenizer: Any = load_tokenizer(folder).tokenizer
        names = sorted(vocabulary.special_tokens, key=len, reverse=True)
        self._control = re.compile("|".join(map(re.escape, names)) if names else r"(?!)")
        template = self._tokenizer.chat_template
        text = json.dumps(template, sort_keys=True) if isinstance(template, dict) else template
        self.template_hash = hashlib.sha256(text.encode()).hexdigest()[:16] if text else ""
        ids = {vocabulary.eos_id, self._tokenizer.eos_token_id, self._end_of_turn(), *_declared_ends(folder)}
        self.stop_ids = tuple(sorted(i for i in ids if i is not None and 0 <= i < vocabulary.size))

    def token_ids(self, messages: bytes, field: str) -> list[int]:
        """Return the ids of a conversation, JSON, up to where the assistant's reply begins.

        Raises InvalidArgumentError naming the `field`: what is wrong with the messages, or that there is no template.
        """
        if not self.template_hash:
            raise InvalidArgumentError(f"{field}: the model has no chat template; send text")
        parsed = parse_messages(messages, field)
        hidden: dict[str, str] = {}
        shown = _mapped(parsed, lambda text: self._hide(text, hidden))
        rendered = self._render(shown, field, add_generation_prompt=True)
        if not hidden:
            ids: list[int] = self._tokenizer(rendered, add_special_tokens=False)["input_ids"]
            return ids
        return self._split_ids(rendered, hidden)

    def _hide(self, text: str, hidden: dict[str, str]) -> str:
        """Return the text with the names of control tokens replaced by words that nobody can guess."""

        def word(found: re.Match[str]) -> str:
            stand_in = f"x{secrets.token_hex(12)}x"
            hidden[stand_in] = found.group()
            return stand_in

        return self._control.sub(word, text)

    def _split_ids(self, rendered: str, hidden: dict[str, str]) -> list[int]:
        """Return the ids of what the template wrote: its control tokens as such, everything else as text."""
        ids: list[int] = []
        words = re.compile("|".join(map(re.escape, hidden)))
        at = 0
        for control in [*self._control.finditer(rendered), None]:
            text = words.sub(lambda found: hidden[found.group()], rendered[at : control.start() if control else None])
            if text:
                [encoding] = self._vocabulary.encode_batch([text.encode()], continues=bool(ids))
                ids += encoding.token_ids_T.tolist()
            if control:
                ids.append(self._vocabulary.special_tokens[control.group()])
                at = control.end()
        return ids

    def _render(self, messages: list[dict[str, Any]], field: str, *, add_generation_prompt: bool) -> str:
        from jinja2 import TemplateError

        try:
            text: str = self._tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except (TemplateError, ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
            raise InvalidArgumentError(f"{field}: the model's chat template refuses the messages: {error}") from error
        return text

    def _end_of_turn(self) -> int | None:
        """Return the first control token that the template writes behind an assistant's message; None without one."""
        if not self.template_hash:
            return None
        word = f"x{secrets.token_hex(12)}x"
        messages = [_TRIAL[0], _TRIAL[1] | {"content": word}]
        try:
            behind = self._render(messages, "chat_template", add_generation_prompt=False).partition(word)[2]
        except InvalidArgumentError:
            return None
        end = self._control.search(behind)
        return self._vocabulary.special_tokens[end.group()] if end else None


def parse_messages(data: bytes, field: str) -> list[dict[str, Any]]:
    """Return the messages in a JSON list; raises InvalidArgumentError naming the message and what is allowed."""
    try:
        messages = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise InvalidArgumentError(f"{field}: no JSON: {error}") from error
    if not isinstance(messages, list) or not messages:
        raise InvalidArgumentError(f"{field}: expected a list of at least one message")
    for number, message in enumerate(messages):
        where = f"{field}[{number}]"
        if not isinstance(message, dict) or message.get("role") not in _ROLES:
            raise InvalidArgumentError(f"{where}: expected an object whose role is one of {', '.join(_ROLES)}")
        content = message.get("content")
        if not isinstance(content, str) and not (content is None and message.get("tool_calls")):
            raise InvalidArgumentError(f"{where}.content: expected a string")
    return messages


def _mapped(value: Any, change: Callable[[str], str]) -> Any:
    """Return a value of JSON with every string in it changed, keys left alone."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, list):
        return [_mapped(item, change) for item in value]
    if isinstance(value, dict):
        return {key: _mapped(item, change) for key, item in value.items()}
    return value


def _declared_ends(folder: Path) -> list[int]:
    """Return the ids that the model's own files call EOS."""
    found: list[int] = []
    for name in ("generation_config.json", "config.json"):
        try:
            value = json.loads((folder / name).read_text(encoding="utf-8")).get("eos_token_id")
        except (OSError, ValueError):
            continue
        found += [value] if isinstance(value, int) else value if isinstance(value, list) else []
    return found
