"""Corpora of conversations: what is read, which turns become windows, and what each is read behind."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from services.base.settings import explain
from services.corpus.config import CorpusConfig
from services.corpus.document import Conversation
from services.corpus.ledger import HELD_OUT, TRAIN, Corpus, Window
from services.corpus.prepare import WindowTokenizer, plan_corpus, read_text
from services.corpus.turns import TurnPlanner
from services.corpus.windows import Reader
from services.models.chat_template import ChatTemplate
from services.models.chat_tokenizer import ChatTokenizer
from services.wire.messages import Message, Messages, read_messages
from tests.corpus.documents import story
from tests.fakes.chat import chat_tokenizer

LIMIT = 240
CALL = {"type": "function", "function": {"name": "look_up", "arguments": '{"word": "cat"}'}}


def chat(number: int) -> list[Message]:
    """A conversation with three turns of the assistant, one of them between a tool's call and answer."""
    return [
        {"role": "system", "content": f"You are number {number}."},
        {"role": "user", "content": f"Question {number}?"},
        {"role": "assistant", "content": story(number, 8)},
        {"role": "user", "content": "Look it up."},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": f"found {number}"},
        {"role": "assistant", "content": f"It is ünder {number}.", "tool_calls": [CALL]},
        {"role": "tool", "content": "nothing"},
        {"role": "assistant", "content": f"Nothing about {number}."},
    ]


def prepare(folder: Path, tokenizers: list[WindowTokenizer] | None = None, **config: Any) -> Corpus:
    settings = {"format": "conversations", "shared_run_bytes": None, "held_out_share": 0.3} | config
    return plan_corpus(read_text(CorpusConfig.model_validate(settings), folder), tokenizers or [])


def windows(corpus: Corpus) -> list[Window]:
    return [corpus.window(split, n) for split in corpus.splits for n in range(corpus.num_windows(split))]


def test_every_turn_with_words_is_a_window_behind_the_messages_before_it(tmp_path: Path) -> None:
    chats = {chat(n)[0]["content"]: chat(n) for n in range(8)}
    (tmp_path / "chats.jsonl").write_text("\n".join(json.dumps({"messages": each}) for each in chats.values()))
    corpus = prepare(tmp_path / "out", files=["chats.jsonl"])
    found = windows(corpus)
    assert len(found) == 3 * 8
    for window in found:
        before = read_messages(window.messages).messages
        whole = chats[before[0]["content"]]
        assert before == whole[: window.turn]
        assert window.text.decode() == whole[window.turn]["content"]
        assert window.ends_document == ("tool_calls" not in whole[window.turn])
        assert window.passage.messages == window.messages and not window.passage.context
    for one, other in itertools.pairwise(found):
        if one.document == other.document:
            assert one.turn < other.turn and one.start_byte + len(one.text) < other.start_byte
    documents = [[corpus.window(s, n).document for n in range(corpus.num_windows(s))] for s in (TRAIN, HELD_OUT)]
    assert not set(documents[0]) & set(documents[1])
    left_out = [corpus.record["splits"][split]["turns"]["left_out"] for split in (TRAIN, HELD_OUT)]
    assert sum(each["tool_calls"] for each in left_out) == 8
    assert Corpus.open(tmp_path / "out").fingerprint(TRAIN) == corpus.fingerprint(TRAIN)


def test_files_of_all_forms_give_the_same_windows(tmp_path: Path) -> None:
    pairs = [(f"Question {n}?", story(n, 8)) for n in range(8)]
    messages = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in pairs]
    forms = {
        "strings.jsonl": [{"prompt": q, "completion": a} for q, a in pairs],
        "lists.jsonl": [{"prompt": each[:1], "completion": each[1:]} for each in messages],
        "messages.jsonl": [{"messages": each, "tools": None} for each in messages],
    }
    for name, rows in forms.items():
        (tmp_path / name).write_text("\n".join(json.dumps(row) for row in rows))
    pq.write_table(pa.Table.from_pylist(forms["messages.jsonl"]), tmp_path / "messages.parquet")
    pq.write_table(pa.Table.from_pylist(forms["strings.jsonl"]), tmp_path / "strings.parquet")
    found = {
        name: prepare(tmp_path / f"out-{name}", files=[name])
        for name in (*forms, "messages.parquet", "strings.parquet")
    }
    assert len({corpus.fingerprint(TRAIN) + corpus.fingerprint(HELD_OUT) for corpus in found.values()}) == 1
    assert len(windows(found["messages.parquet"])) == 8


def test_tool_calls_in_parquet_are_those_of_json(tmp_path: Path) -> None:
    rows = [{"messages": chat(n), "tools": [{"type": "function", "function": {"name": "look_up"}}]} for n in range(6)]
    (tmp_path / "chats.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "chats.parquet")
    ours, theirs = (windows(prepare(tmp_path / name, files=[f"chats.{name}"])) for name in ("jsonl", "parquet"))
    for one, other in zip(ours, theirs, strict=True):
        assert read_messages(one.messages) == read_messages(other.messages)
        assert read_messages(one.messages).tools == rows[0]["tools"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "a"}, "expected the key messages, or prompt and completion; its keys: text"),
        ({"prompt": "a"}, "expected the key messages, or prompt and completion"),
        (["a"], "expected an object with messages"),
        ({"messages": "a"}, "messages: expected a list, got a string"),
        ({"messages": [{"role": "human", "content": "a"}]}, "messages[0].role: 'human' is none of system, user"),
        ({"messages": [{"role": "user"}]}, "messages[0].content: expected a string"),
        ({"messages": [{"from": "user", "value": "a"}]}, "messages[0].role: None is none of"),
        ({"prompt": [{"role": "user", "content": 1}], "completion": "a"}, "prompt: messages[0].content: expected"),
        ({"prompt": "a", "completion": 3}, "completion: messages: expected a list, got a number"),
        ({"messages": [], "tools": "look_up"}, "tools: expected a list of objects"),
    ],
)
def test_a_bad_row_is_named_by_file_line_and_key(row: Any, message: str, tmp_path: Path) -> None:
    (tmp_path / "chats.jsonl").write_text(json.dumps({"messages": chat(1)}) + "\n\n" + json.dumps(row))
    with pytest.raises(ValueError) as raised:
        prepare(tmp_path / "out", files=["chats.jsonl"])
    assert f"chats.jsonl, line 3: {message}" in str(raised.value)


def test_bad_files_and_settings_name_the_key(tmp_path: Path) -> None:
    (tmp_path / "chats.txt").write_text("hello")
    (tmp_path / "bad.jsonl").write_text('{"messages": \n')
    with pytest.raises(ValueError, match=r"files: chats\.txt is none of \.jsonl, \.parquet"):
        prepare(tmp_path / "out", files=["chats.txt"])
    with pytest.raises(ValueError, match=r"bad\.jsonl, line 1: not JSON"):
        prepare(tmp_path / "out", files=["bad.jsonl"])
    for key, value in (("context_bytes", 64), ("separator", "x"), ("text_field", "body")):
        with pytest.raises(ValidationError) as raised:
            CorpusConfig.model_validate({"files": ["a"], "format": "conversations", key: value})
        assert f"{key}: not read with format: conversations" in explain(raised.value)
    with pytest.raises(ValidationError, match="max_history_bytes: only for conversations"):
        CorpusConfig(files=("a",), max_history_bytes=100)
    assert CorpusConfig(files=("a",), format="conversations").window_bytes == 8192


def long_chat(rng: random.Random) -> list[Message]:
    messages: list[Message] = [{"role": "system", "content": "Be brief."}] if rng.random() < 0.5 else []
    for _ in range(rng.randint(2, 9)):
        messages += [{"role": "user", "content": "x" * rng.randint(1, 60)} for _ in range(rng.randint(1, 2))]
        messages += [{"role": "assistant", "content": "y" * rng.randint(1, 60)}]
    return messages


@pytest.mark.parametrize("seed", range(20))
def test_long_conversations_lose_their_oldest_exchanges_first(seed: int) -> None:
    rng = random.Random(seed)
    messages, limit = long_chat(rng), rng.randint(120, 600)
    planner = TurnPlanner(8192, limit, [])
    planned = {turn.turn: turn for turn in planner.plan(Conversation.of("c", Messages(messages)))}
    system = messages[:1] if messages[0]["role"] == "system" else []

    def begins(n: int) -> bool:
        return messages[n]["role"] == "user" and (n == 0 or messages[n - 1]["role"] != "user")

    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        # The oracle: all histories that begin with an exchange, the longest that fits.
        fitting = [
            history
            for start in range(len(system), number)
            if begins(start) and len((history := Messages([*system, *messages[start:number]])).to_bytes()) <= limit
        ]
        if not fitting:
            assert number not in planned
            continue
        assert planned[number].messages == fitting[0].to_bytes()
        assert planned[number].shortened == (len(fitting[0].messages) < number)
    assert planner.left_out["too_long"] == sum(m["role"] == "assistant" for m in messages) - len(planned)


def test_windows_fit_the_models_that_read_them_and_refusals_are_counted(tmp_path: Path) -> None:
    def load(template: str) -> ChatTokenizer:
        tokenizer = chat_tokenizer("llama3", template)
        return ChatTokenizer(tokenizer, ChatTemplate.of(tokenizer))

    strict = "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}" + (
        "{{ bos_token + m.content + eos_token }}{% endfor %}"
    )
    tokenizer = chat_tokenizer("llama3", "chatml")
    refusing = ChatTokenizer(tokenizer, ChatTemplate.of(tokenizer, strict))
    chats = [chat(n) for n in range(8)]
    (tmp_path / "chats.jsonl").write_text("\n".join(json.dumps({"messages": each}) for each in chats))
    readers = {"a": load("chatml"), "b": refusing}
    tokenizers = [
        WindowTokenizer(name, name, lambda: tokenizer.vocabulary, LIMIT, template="t", load_chat=lambda c=chat_: c)
        for name, chat_ in readers.items()
    ]
    corpus = prepare(tmp_path / "out", tokenizers, files=["chats.jsonl"])
    found = windows(corpus)
    counts = [corpus.record["splits"][split]["turns"] for split in corpus.splits]
    assert (
        sum(each["refused_by"].get("b", 0) for each in counts)
        == sum(any(m["role"] == "tool" for m in read_messages(window.messages).messages) for window in found)
        > 0
    )
    assert sum(each["left_out"].get("too_long", 0) for each in counts) > 0
    for window in found:
        turn = readers["a"].encode_turn(read_messages(window.messages), window.text, ends=True)
        assert turn.context_ids.size + turn.words.num_tokens <= LIMIT
    target = Reader("target", refusing.vocabulary, None, True, refusing, is_target=True)
    planner = TurnPlanner(8192, 8192, [Reader("a", readers["a"].vocabulary, None, True, readers["a"]), target])
    planned = list(planner.plan(Conversation.of("c", Messages(chats[0]))))
    assert [turn.turn for turn in planned] == [2] and planner.left_out["refused"] == 2
