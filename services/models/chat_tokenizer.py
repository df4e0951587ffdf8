"""Conversations in a model's tokens: control tokens where the template writes them, and only there.

Shape legend: T tokens of a turn's words.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from fusion_core.arrays import Int32
from fusion_core.vocabulary import Encoding, Vocabulary
from fusion_core.vocabulary.tokenizer_files import load_tokenizer
from services.models.chat_template import MODEL, ChatTemplate, TurnRefusedError
from services.wire.messages import TOOL_ROLES, Messages

_CONTROL_FORM = re.compile(r"<[|｜].+[|｜]>")  # DeepSeek's names have full-width bars
"""Pattern of the names of control tokens, also of unmarked ones: DeepSeek's <｜User｜> is not marked as special."""
_TOOL_FORM = re.compile(r"</?tool\w*>|\[/?\w*TOOL\w*\]")
"""Pattern of the tokens around calls and results of tools, which some tokenizers hold for words: Qwen's <tool_call>."""
_FIRST_MARK = 0xF0000
"""First code point of a plane for private use, in which no text is expected."""

_LOOK_AHEAD = 32
"""Number of characters of the words that may decide how the white space before them is split."""


@dataclass(frozen=True, slots=True)
class TurnTokens:
    """An assistant's turn in tokens.

    Attributes:
        first_id: the control token that the conversation begins with; None where the template writes none.
        context_ids: int32, all tokens between that and the words.
        words: the tokens of the turn's text; white space that the template leaves out belongs to the first or last
            of them, which is then not lossless.
    """

    first_id: int | None
    context_ids: Int32
    words: Encoding


class ChatTokenizer:
    """The tokenizer of a model that reads conversations.

    Attributes:
        template: writes the conversations.
        vocabulary: its EOS is the token that ends a turn.
        ends_at_once: whether the template writes that token directly behind the words.
        added_tokens: ids by name of the tokens that are read before all merges, control tokens among them.
    """

    def __init__(self, tokenizer: Any, template: ChatTemplate, *, eos_token: str | None = None) -> None:
        """Take the parts; `eos_token` names the control token that ends a turn, by default the template's.

        Raises ValueError when the template cannot write a conversation, or the tokenizer is not supported.
        """
        self.template = template
        self._backend = tokenizer.backend_tokenizer
        added = json.loads(self._backend.to_str())["added_tokens"]
        self.added_tokens: dict[str, int] = {a["content"]: int(a["id"]) for a in added}
        control = {a["content"]: int(a["id"]) for a in added if a["special"] or _CONTROL_FORM.fullmatch(a["content"])}
        end, self.ends_at_once = self._end_of_turn({number: name for name, number in control.items()})
        self.vocabulary = Vocabulary.from_tokenizer(tokenizer, eos_token=eos_token or end, control_ids=control.values())
        self._lengths_V = np.diff(self.vocabulary.byte_table.offsets_V1)
        self._control_ids = np.array(sorted(self.vocabulary.special_ids), dtype=np.int32)
        self._names = _first_characters(name for name in self.vocabulary.special_tokens if len(name) > 1)
        tool_tokens = {n: i for n, i in self.added_tokens.items() if n not in control and _TOOL_FORM.fullmatch(n)}
        self._tool_names = _first_characters(tool_tokens)
        self._written_ids = np.array(sorted({*self._control_ids.tolist(), *tool_tokens.values()}), dtype=np.int32)
        self._prefixed_runs = self._puts_prefix_in_runs()

    @classmethod
    def from_pretrained(cls, folder: str | Path, chosen: str = MODEL, *, eos_token: str | None = None) -> ChatTokenizer:
        """Load a model folder's tokenizer with the chosen template, see `ChatTemplate.of`; raises ValueError."""
        loaded = load_tokenizer(folder)
        try:
            chat = cls(loaded.tokenizer, ChatTemplate.of(loaded.tokenizer, chosen), eos_token=eos_token)
        except TurnRefusedError as error:
            raise ValueError(f"a question and an answer cannot be written: {error}") from error
        chat.vocabulary.warnings = loaded.warnings
        return chat

    def encode_messages(self, messages: Messages, *, add_generation_prompt: bool = True) -> Int32:
        """Return the ids of a whole conversation, by default with the template's beginning of an answer behind it.

        Words that look like control tokens stay words; with tools, calls or results, so do those that look like the
        tokens around calls and results. Raises TurnRefusedError.
        """
        has_tools = bool(messages.tools) or any(
            m.get("tool_calls") or m["role"] in TOOL_ROLES for m in messages.messages
        )
        shielded, mark = self._shielded([messages.messages, messages.tools], has_tools=has_tools)
        text = self.template.render(*shielded, add_generation_prompt=add_generation_prompt)
        return self._ids(text, mark)

    def encode_turn(self, messages: Messages, text: bytes, *, ends: bool = False) -> TurnTokens:
        """Return the tokens of an assistant's turn that says `text` behind the messages.

        The words are tokenised apart from the text before them, so that a row boundary lies between the two. With
        `ends` the token that ends the turn is behind them.

        Raises TurnRefusedError where the template does not write the words as they are.
        """
        content = text.decode()
        (shielded, tools, guarded), mark = self._shielded([messages.messages, messages.tools, content])
        turn = self.template.write_turn(shielded, guarded, tools)
        said = guarded[turn.start : turn.end]
        ids, continues = self._before(turn.before, said, mark)
        # White space has no marks in it, so that it can be counted where they are.
        skipped, left = len(guarded[: turn.start].encode()), len(guarded[turn.end :].encode())
        kept = text[skipped : len(text) - left]
        [words] = self.vocabulary.encode_batch([kept], continues=continues)
        if not words.num_tokens:
            raise TurnRefusedError("the tokenizer keeps nothing of the assistant's words")
        if skipped or left:
            words = _widened(words, skipped, left)
        if ends and self.vocabulary.eos_id is not None:
            words = words.with_end(self.vocabulary.eos_id)
            if not self.ends_at_once:
                words.lossless_T[-1] = False
        if ids.size and np.isin(ids[0], self._control_ids):
            return TurnTokens(int(ids[0]), ids[1:], words)
        return TurnTokens(None, ids, words)

    def _end_of_turn(self, control: dict[int, str]) -> tuple[str | None, bool]:
        """Return the name of the control token that ends an answer in the template, and whether it follows at once.

        The name is None, for the model's own EOS, where the template writes no control token behind an answer.
        """
        after = self.template.write_turn([{"role": "user", "content": "question"}], "answer").after
        ids = self._backend.encode(after, add_special_tokens=False).ids
        for place, token_id in enumerate(ids):
            if token_id in control:
                return control[token_id], place == 0
        return None, True

    def _puts_prefix_in_runs(self) -> bool:
        """Return whether the tokenizer puts a space in front of words that follow a control token."""
        if not self.vocabulary.has_dummy_prefix or not self.vocabulary.special_tokens:
            return False
        name = next(iter(self.vocabulary.special_tokens))
        ids = self._backend.encode(f"{name}word", add_special_tokens=False).ids[1:]
        return bool(ids == self.vocabulary.encode(b"word").token_ids_T.tolist())

    def _shielded(self, values: list[Any], *, has_tools: bool = False) -> tuple[list[Any], str]:
        """Return the values with a mark inside every word that looks like a control token, and the mark.

        Such a word is then no longer a control token's name; those of the template are. No text has the mark. With
        tools a second mark is inside the words that look like tokens around calls and results.
        """
        text = json.dumps(values, ensure_ascii=False)
        is_needed = self._names.search(text) is not None
        if has_tools and self._tool_names.search(text) is not None:
            first, second = _unused(text, 2)

            def shield(string: str) -> str:
                return self._tool_names.sub(rf"\1{second}", self._names.sub(rf"\1{first}", string))

            return _map_strings(values, shield), first + second
        if not is_needed:
            return values, ""
        [mark] = _unused(text, 1)
        return _map_strings(values, lambda string: self._names.sub(rf"\1{mark}", string)), mark

    def _ids(self, text: str, mark: str) -> Int32:
        """Return the ids of a written conversation; a run of text with a mark is split as text without it.

        Of two marks the second stands in words that the tokenizer would read as one token; they are split there.
        """
        encoding = self._backend.encode(text, add_special_tokens=False)
        ids = np.array(encoding.ids, dtype=np.int32)
        if not any(character in text for character in mark):
            return ids
        written = self._written_ids if len(mark) > 1 else self._control_ids
        offsets = encoding.offsets
        pieces, start, first = [], 0, 0
        for place in [*np.flatnonzero(np.isin(ids, written)).tolist(), len(ids)]:
            stop = offsets[place][0] if place < len(ids) else len(text)
            run = text[start:stop]
            has_mark = any(character in run for character in mark)
            pieces.append(self._words(run, mark, first) if has_mark else ids[first:place])
            pieces.append(ids[place : place + 1])
            start, first = (offsets[place][1], place + 1) if place < len(ids) else (stop, place)
        return np.concatenate(pieces)

    def _before(self, before: str, words: str, mark: str) -> tuple[Int32, bool]:
        """Return the ids of the text before the words, and whether the words continue it without a dummy prefix.

        The text is split as with the words behind it: many tokenizers split white space before a word otherwise than
        white space at the end of a text, and some have the template's last space in the words' first token.
        """
        ids = self._ids(before, mark)
        some = words[:_LOOK_AHEAD] if not mark else words[:_LOOK_AHEAD].split(mark, maxsplit=1)[0]
        control = np.flatnonzero(np.isin(ids, self._control_ids))
        run = int(control[-1]) + 1 if control.size else 0
        has_prefix, num_bytes = self.vocabulary.has_dummy_prefix, int(self._lengths_V[ids[run:]].sum())
        if not num_bytes:
            return ids, not (has_prefix and (self._prefixed_runs or run == 0))
        joint = self._ids(before + some, mark)
        ends = [0, *np.cumsum(self._lengths_V[joint[run:]]).tolist()]
        if num_bytes in ends:
            return joint[: run + ends.index(num_bytes)], True
        if has_prefix and before.endswith(" ") and num_bytes - 1 in ends:
            return joint[: run + ends.index(num_bytes - 1)], False
        return ids, True

    def _words(self, run: str, mark: str, first: int) -> Int32:
        begins, *others = run.replace(mark[0], "").split(mark[1]) if len(mark) > 1 else [run.replace(mark, "")]
        continues = first > 0 and not self._prefixed_runs
        encodings = self.vocabulary.encode_batch([begins.encode()], continues=continues)
        encodings += self.vocabulary.encode_batch([piece.encode() for piece in others], continues=True)
        return np.concatenate([encoding.token_ids_T for encoding in encodings])


def open_chat(folder: str | Path, chosen: str | None, eos_token: str | None = None) -> ChatTokenizer | None:
    """Return the tokenizer of a model folder for a source's `chat_template`; None for none.

    Raises ValueError naming the setting.
    """
    if chosen is None:
        return None
    try:
        return ChatTokenizer.from_pretrained(folder, chosen, eos_token=eos_token)
    except ValueError as error:
        raise ValueError(f"chat_template: {error}") from error


def _first_characters(names: Iterable[str]) -> re.Pattern[str]:
    """Return the pattern of the first character of every name."""
    longest_first = sorted(map(re.escape, names), key=len, reverse=True)
    return re.compile(f"(?s)(?=(?:{'|'.join(longest_first)}))(.)") if longest_first else re.compile("(?!)")


def _unused(text: str, count: int) -> list[str]:
    """Return characters for private use that a text does not have."""
    return list(
        islice((chr(number) for number in range(_FIRST_MARK, sys.maxunicode) if chr(number) not in text), count)
    )


def _widened(words: Encoding, skipped: int, left: int) -> Encoding:
    """Return the tokens of a text with more bytes in front and behind, which belong to its outer tokens."""
    ends_T, lossless_T = words.byte_ends_T + np.int32(skipped), words.lossless_T.copy()
    ends_T[-1] += left
    lossless_T[0] &= not skipped
    lossless_T[-1] &= not left
    return Encoding(words.token_ids_T, ends_T, lossless_T)


def _map_strings(value: Any, change: Callable[[str], str]) -> Any:
    """Return the value with every string in it changed, except the roles."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, list):
        return [_map_strings(item, change) for item in value]
    if isinstance(value, dict):
        return {change(k): v if k == "role" else _map_strings(v, change) for k, v in value.items()}
    return value
