"""Cut conversations into turns: a window is what an assistant says in one message, read behind the messages before it.

A long conversation is cut at turns. A window keeps the system messages and as many of the last exchanges, each
beginning with a user's message, as fit `max_history_bytes` and every model's `max_tokens`.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

from services.corpus.document import Conversation
from services.corpus.windows import PlannedWindow, Reader
from services.models.chat_template import TurnRefusedError
from services.wire.messages import Message, Messages

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PlannedTurn(PlannedWindow):
    """A window of a conversation.

    Attributes:
        messages: the messages before the turn, as `Messages.to_bytes` writes them.
        turn: the number of the message in its conversation.
        ends: whether the message ends with the words; a tool call follows them otherwise.
    """

    messages: bytes
    turn: int
    ends: bool


class TurnPlanner:
    """Plans the windows of conversations for some models.

    Attributes:
        left_out: number of an assistant's messages that are no windows, by reason: `tool_calls` (calls tools and says
            nothing), `empty`, `too_long` (with the exchange it belongs to), `refused` (by the target's chat template or
            those of all sources).
        refused_by: number of windows that a model's chat template does not write, by the name of the reader.
    """

    def __init__(self, max_turn_bytes: int, max_history_bytes: int, readers: Sequence[Reader]) -> None:
        self._max_turn_bytes, self._max_history_bytes = max_turn_bytes, max_history_bytes
        self._readers = readers
        self.left_out: Counter[str] = Counter()
        self.refused_by: Counter[str] = Counter()
        self._told: set[str] = set()

    def plan(self, conversation: Conversation) -> Iterator[PlannedTurn]:
        """Yield the windows of a conversation in their order."""
        start = 0
        for turn, message in enumerate(conversation.conversation.messages):
            content = message.get("content") or ""
            end = start + len(content.encode())
            if message["role"] == "assistant":
                planned = self._turn(conversation, turn, start, end)
                if isinstance(planned, str):
                    self._count(planned, conversation.name, turn)
                else:
                    yield planned
            start = end + 1

    def counts(self) -> dict[str, dict[str, int]]:
        """Return `left_out` and `refused_by` as the ledger records them."""
        return {"left_out": dict(self.left_out), "refused_by": dict(self.refused_by)}

    def _turn(self, conversation: Conversation, turn: int, start: int, end: int) -> PlannedTurn | str:
        """Return the window, or the reason why there is none."""
        messages, text = conversation.conversation.messages, conversation.text[start:end]
        calls = bool(messages[turn].get("tool_calls"))
        if not text.strip():
            return "tool_calls" if calls else "empty"
        if len(text) > self._max_turn_bytes:
            return "too_long"
        for history in _histories(messages[:turn], self._max_history_bytes):
            before = Messages(history, conversation.conversation.tools)
            data = before.to_bytes()
            if len(data) > self._max_history_bytes:  # the tools count too
                continue
            fits = [self._fits(reader, before, text) for reader in self._readers]
            if False in fits:
                continue
            refusing = [reader for reader, fit in zip(self._readers, fits, strict=True) if fit is None]
            self.refused_by.update(reader.name for reader in refusing)
            if any(reader.is_target for reader in refusing) or _all_sources(self._readers, refusing):
                return "refused"
            shortened = len(history) < turn
            return PlannedTurn(start, end, start, True, shortened, False, messages=data, turn=turn, ends=not calls)
        return "too_long"

    def _fits(self, reader: Reader, before: Messages, text: bytes) -> bool | None:
        """Return whether a model can read the turn; None where its chat template refuses it."""
        if reader.chat is None:
            num_tokens = reader.vocabulary.encode(text).num_tokens + 1
        else:
            try:
                tokens = reader.chat.encode_turn(before, text, ends=True)
            except TurnRefusedError as error:
                if reader.name not in self._told:
                    self._told.add(reader.name)
                    _log.warning("%s: a turn is refused: %s", reader.name, error)
                return None
            num_tokens = int(tokens.context_ids.size) + tokens.words.num_tokens
        return reader.max_tokens is None or num_tokens <= reader.max_tokens

    def _count(self, reason: str, name: str, turn: int) -> None:
        if reason == "too_long" and not self.left_out[reason]:
            _log.warning("conversation %s: message %d is too long and is left out, as others may be", name, turn)
        self.left_out[reason] += 1


def _all_sources(readers: Sequence[Reader], refusing: Sequence[Reader]) -> bool:
    sources = [reader for reader in readers if not reader.is_target]
    return bool(sources) and all(reader in refusing for reader in sources)


def _histories(messages: Sequence[Message], max_bytes: int) -> Iterator[list[Message]]:
    """Yield the messages, then without their oldest exchange, and so on; those that are too long are left out."""
    head = next((n for n, message in enumerate(messages) if message["role"] != "system"), len(messages))
    sizes = [len(Messages([message]).to_bytes()) for message in messages]
    left = list(accumulate(reversed(sizes), initial=0))[::-1]  # bytes from a message to the end
    system_bytes = sum(sizes[:head])
    starts = [n for n in range(head + 1, len(messages)) if messages[n]["role"] == "user" != messages[n - 1]["role"]]
    for start in [head, *starts]:
        num_kept = head + len(messages) - start
        # Each size has two brackets of its own; a list has two in all, and a comma between messages.
        if system_bytes + left[start] - num_kept + 1 <= max_bytes:
            yield [*messages[:head], *messages[start:]]
