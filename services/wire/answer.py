"""Prompts, how their answers are sampled, and the answers: what both sides of a `Generate` call agree on.

Shape legend: T sampled tokens of one answer.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
from pydantic import Field, ValidationError, field_validator

from fusion.v1 import answer_pb2
from fusion_core.arrays import Float32, Int32
from services.base.errors import InvalidArgumentError
from services.base.settings import Settings, explain
from services.wire.messages import Message, Messages
from services.wire.tool_calls import ToolCall

LEAST_TEMPERATURE, MOST_TEMPERATURE = 0.01, 2.0
"""Bounds of a temperature that is not 0: vLLM's, which the other engines share."""
MOST_STOPS, MOST_STOP_BYTES = 16, 256
MOST_SEED = 2**63 - 1
"""Largest seed that every engine takes, and every file format keeps."""

FinishReason: TypeAlias = Literal["stop_token", "stop_string", "length"]
_FINISH: dict[FinishReason, answer_pb2.FinishReason] = {
    "stop_token": answer_pb2.FINISH_REASON_STOP_TOKEN,
    "stop_string": answer_pb2.FINISH_REASON_STOP_STRING,
    "length": answer_pb2.FINISH_REASON_LENGTH,
}
_REASONS = {number: reason for reason, number in _FINISH.items()}


class Sampling(Settings):
    """Settings by which the answers to a prompt are sampled."""

    num_answers: int = Field(1, ge=1, description="Answers to each prompt, by seeds of their own.")
    temperature: float = Field(1.0, ge=0, le=MOST_TEMPERATURE, description="Divides the logits; 0 is greedy.")
    top_p: float = Field(
        1.0, gt=0, le=1, description="Samples among the likeliest tokens with this much probability together."
    )
    max_new_tokens: int = Field(256, ge=1, description="Most tokens of an answer.")
    stop: tuple[str, ...] = Field((), max_length=MOST_STOPS, description="An answer ends where it contains one.")
    seed: int = Field(0, ge=0, le=MOST_SEED, description="Every answer's own seed is a hash of it; see answer_seed.")
    logprobs: bool = Field(False, description="Whether to get the log-probabilities of the sampled tokens.")
    first_answer: int = Field(0, ge=0, lt=2**31, description="Number of the first answer; others may be there already.")

    @property
    def numbers(self) -> range:
        """The numbers of the answers."""
        return range(self.first_answer, self.first_answer + self.num_answers)

    @field_validator("temperature")
    @classmethod
    def _not_almost_greedy(cls, temperature: float) -> float:
        if 0 < temperature < LEAST_TEMPERATURE:
            raise ValueError(f"0 (greedy) or {LEAST_TEMPERATURE} to {MOST_TEMPERATURE:g} is allowed")
        return temperature

    @field_validator("stop")
    @classmethod
    def _stops_fit(cls, stop: tuple[str, ...]) -> tuple[str, ...]:
        if any(not 1 <= len(string.encode()) <= MOST_STOP_BYTES for string in stop):
            raise ValueError(f"each must have 1 to {MOST_STOP_BYTES} bytes")
        return stop


@dataclass(frozen=True, slots=True)
class AnswerPrompt:
    """A prompt for answers; made by `text_prompt` or `messages_prompt`.

    Attributes:
        content: UTF-8: the text to be continued, or the messages as JSON.
        is_messages: whether the content is messages.
    """

    content: bytes
    is_messages: bool = False

    @property
    def identity(self) -> bytes:
        """Return the hash of the prompt, 32 bytes."""
        return hashlib.sha256((b"messages:" if self.is_messages else b"text:") + self.content).digest()


def text_prompt(text: str | bytes) -> AnswerPrompt:
    """Return the prompt that asks for a text to be continued."""
    return AnswerPrompt(text.encode() if isinstance(text, str) else text)


def messages_prompt(messages: Sequence[Message], tools: Sequence[Any] | None = None) -> AnswerPrompt:
    """Return the prompt that asks for the next message of a conversation, and names the tools that may be called."""
    given = Messages(list(messages), None if tools is None else list(tools))
    return AnswerPrompt(given.to_bytes(), is_messages=True)


def answer_seed(seed: int, prompt: AnswerPrompt, number: int) -> int:
    """Return the seed of one answer, 63 bits.

    It is made of what is asked for alone, so that neither the order of prompts nor those asked beside it change an
    answer: the first 8 bytes, little-endian and without the lowest bit, of the SHA-256 of `llm-fusion answer`, the seed
    and the number as 8 bytes each, little-endian, and `AnswerPrompt.identity`.
    """
    numbers = seed.to_bytes(8, "little") + number.to_bytes(8, "little")
    digest = hashlib.sha256(b"llm-fusion answer" + numbers + prompt.identity).digest()
    return int.from_bytes(digest[:8], "little") >> 1


@dataclass(frozen=True, slots=True, eq=False)
class Answer:
    """One answer to one prompt.

    Attributes:
        prompt: number of the prompt, in the order in which prompts were asked.
        number: number of the answer to this prompt.
        text: bytes of the tokens, up to the stop string; control tokens have none.
        token_ids_T: int32, all sampled tokens, the one that ended the answer included.
        logprobs_T: float32, the model's own log-probabilities of these tokens; None unless asked for.
        finish_reason: why it ended.
        seed: the seed that it was sampled with.
        num_prompt_tokens: tokens of the prompt, BOS and what the chat template adds included.
        tool_calls, content, tool_problem: where the prompt names tools, the calls, the words beside them, UTF-8, and
            why something that begins like a call was left among the words.
    """

    prompt: int
    number: int
    text: bytes
    token_ids_T: Int32
    logprobs_T: Float32 | None
    finish_reason: FinishReason
    seed: int
    num_prompt_tokens: int
    tool_calls: tuple[ToolCall, ...] = ()
    content: bytes = b""
    tool_problem: str = ""


def encode_prompt(prompt: AnswerPrompt) -> answer_pb2.AnswerPrompt:
    """Return the message for a prompt."""
    if prompt.is_messages:
        return answer_pb2.AnswerPrompt(messages=prompt.content)
    return answer_pb2.AnswerPrompt(text=prompt.content)


def prompts_of(
    messages: Sequence[answer_pb2.AnswerPrompt], *, max_prompt_bytes: int, first: int = 0
) -> list[AnswerPrompt]:
    """Return the prompts of a request; InvalidArgumentError names the one that is empty, too long or not UTF-8.

    `first` is the number of the first of them.
    """
    prompts = []
    for index, message in enumerate(messages, first):
        field = message.WhichOneof("content")
        if field is None:
            raise InvalidArgumentError(f"prompts[{index}]: text or messages must be set")
        content = message.messages if field == "messages" else message.text
        if len(content) > max_prompt_bytes:
            raise InvalidArgumentError(
                f"prompts[{index}].{field}: {len(content)} bytes; at most {max_prompt_bytes} are accepted"
            )
        try:
            content.decode("utf-8")
        except UnicodeDecodeError as error:
            raise InvalidArgumentError(f"prompts[{index}].{field}: not UTF-8 at byte {error.start}") from error
        prompts.append(AnswerPrompt(content, is_messages=field == "messages"))
    return prompts


def encode_sampling(sampling: Sampling) -> answer_pb2.Sampling:
    """Return the message for the settings."""
    return answer_pb2.Sampling(**sampling.model_dump())


def sampling_of(message: answer_pb2.Sampling) -> Sampling:
    """Return the settings of a request; InvalidArgumentError names each field that is outside its bounds."""
    given: dict[str, Any] = {
        field.name: tuple(value) if field.name == "stop" else value for field, value in message.ListFields()
    }
    try:
        return Sampling(**given)
    except ValidationError as error:
        lines = (f"sampling.{line}" for line in explain(error).splitlines())
        raise InvalidArgumentError("; ".join(lines)) from error


def encode_answer(answer: Answer) -> answer_pb2.Answer:
    """Return the message for an answer."""
    return answer_pb2.Answer(
        prompt=answer.prompt,
        number=answer.number,
        text=answer.text,
        token_ids=answer.token_ids_T.astype("<i4").tobytes(),
        logprobs=b"" if answer.logprobs_T is None else answer.logprobs_T.astype("<f4").tobytes(),
        finish_reason=_FINISH[answer.finish_reason],
        seed=answer.seed,
        num_prompt_tokens=answer.num_prompt_tokens,
        tool_calls=[
            answer_pb2.ToolCall(id=call.id, name=call.name, arguments=_written(call.arguments))
            for call in answer.tool_calls
        ],
        content=answer.content,
        tool_problem=answer.tool_problem,
    )


def decode_answer(message: answer_pb2.Answer) -> Answer:
    """Return the answer of a message; raises InvalidArgumentError naming the field that cannot be right."""
    if len(message.token_ids) % 4 or not message.token_ids:
        raise InvalidArgumentError(f"token_ids: {len(message.token_ids)} bytes are no int32 column")
    token_ids_T = np.frombuffer(message.token_ids, dtype="<i4").astype(np.int32)
    if token_ids_T.min() < 0:
        raise InvalidArgumentError("token_ids: an id is negative")
    logprobs_T = None
    if message.logprobs:
        if len(message.logprobs) != len(message.token_ids):
            raise InvalidArgumentError(f"logprobs: {len(message.logprobs)} bytes for {len(token_ids_T)} tokens")
        logprobs_T = np.frombuffer(message.logprobs, dtype="<f4").astype(np.float32)
        if not np.isfinite(logprobs_T).all() or logprobs_T.max() > 1e-3:
            raise InvalidArgumentError("logprobs: one is no log-probability")
    if message.finish_reason not in _REASONS:
        raise InvalidArgumentError(f"finish_reason: {message.finish_reason} is unknown")
    return Answer(
        prompt=message.prompt,
        number=message.number,
        text=message.text,
        token_ids_T=token_ids_T,
        logprobs_T=logprobs_T,
        finish_reason=_REASONS[message.finish_reason],
        seed=message.seed,
        num_prompt_tokens=message.num_prompt_tokens,
        tool_calls=tuple(map(_decode_call, message.tool_calls)),
        content=message.content,
        tool_problem=message.tool_problem,
    )


def _written(arguments: dict[str, Any]) -> bytes:
    return json.dumps(arguments, ensure_ascii=False, separators=(",", ":")).encode()


def _decode_call(message: answer_pb2.ToolCall) -> ToolCall:
    try:
        arguments = json.loads(message.arguments)
    except (ValueError, RecursionError) as error:
        raise InvalidArgumentError(f"tool_calls: arguments are not JSON: {error}") from error
    if not isinstance(arguments, dict):
        raise InvalidArgumentError("tool_calls: arguments are no object")
    return ToolCall(message.name, arguments, message.id)
