"""The store of answers: what is there is found, by all that decides an answer; damage costs its own file only."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from services.base.files import Files
from services.sample.answers import AnswerIdentity, AnswerStore, conversation
from services.wire.answer import Answer, AnswerPrompt, Sampling, messages_prompt, text_prompt

IDENTITY = AnswerIdentity(
    model="m", revision="r", vocabulary="v", bos_token="<s>", eos_token="</s>", engine="vllm", dtype="float32",
    chat_template="t",
)  # fmt: skip
SAMPLING = Sampling(num_answers=3, seed=5, stop=("\n",))
PROMPTS = [text_prompt("Once"), messages_prompt([{"role": "user", "content": "ça va?"}])]


def opened(folder: Path, identity: AnswerIdentity = IDENTITY, answers_per_shard: int = 100) -> AnswerStore:
    return AnswerStore(Files(str(folder)), identity, answers_per_shard=answers_per_shard)


def answers(numbers: range, text: bytes = b"Yes \xf0\x9f") -> list[Answer]:
    ids, logprobs = np.int32([3, 4]), np.float32([-0.5, -1.25])
    return [Answer(0, n, text, ids, logprobs, "length", seed=2**62 + n, num_prompt_tokens=4) for n in numbers]


def test_what_was_put_is_there_for_the_next_process(tmp_path: Path) -> None:
    store = opened(tmp_path)
    assert store.missing(PROMPTS[0], SAMPLING) == range(3)
    store.put(PROMPTS[0], SAMPLING, answers(range(2)))
    assert store.missing(PROMPTS[0], SAMPLING) == range(2, 3)
    assert opened(tmp_path).missing(PROMPTS[0], SAMPLING) == range(3)  # not written yet
    store.put(PROMPTS[1], SAMPLING, answers(range(3), b"So"))
    store.flush()
    later = opened(tmp_path)
    assert later.missing(PROMPTS[0], SAMPLING) == range(2, 3)
    assert not later.missing(PROMPTS[1], SAMPLING)
    row = later.find(PROMPTS[0], SAMPLING, 1)
    assert row is not None
    assert (row["text"], row["token_ids"], row["logprobs"]) == (b"Yes \xf0\x9f", [3, 4], [-0.5, -1.25])
    assert (row["seed"], row["finish_reason"], row["num_prompt_tokens"]) == (2**62 + 1, "length", 4)
    expected = {"prompt": "Once", "completion": "Yes \ufffd", "source": "s", "answer": 1, "finish_reason": "length"}
    assert conversation(row, "s") == expected | {"seed": 2**62 + 1, "num_tokens": 2, "logprob": -1.75}
    turns = conversation(later.find(PROMPTS[1], SAMPLING, 0) or {}, "s")["messages"]
    assert turns == [{"role": "user", "content": "ça va?"}, {"role": "assistant", "content": "So"}]


@pytest.mark.parametrize(
    "other",
    [{"seed": 6}, {"temperature": 0.5}, {"top_p": 0.5}, {"max_new_tokens": 3}, {"stop": ()}, {"stop": ("a", "\n")}],
)
def test_an_answer_belongs_to_all_that_decides_it(tmp_path: Path, other: dict[str, Any]) -> None:
    store = opened(tmp_path)
    store.put(PROMPTS[0], SAMPLING, answers(range(3)))
    store.flush()
    assert store.missing(PROMPTS[0], SAMPLING.model_copy(update=other)) == range(3)
    more = SAMPLING.model_copy(update={"num_answers": 5, "logprobs": True})
    assert store.missing(PROMPTS[0], more) == range(3, 5)
    assert store.missing(AnswerPrompt(PROMPTS[0].content, is_messages=True), SAMPLING) == range(3)
    for key in ("revision", "vocabulary", "engine", "dtype", "chat_template", "bos_token", "eos_token"):
        assert opened(tmp_path, IDENTITY.model_copy(update={key: "other"})).missing(PROMPTS[0], SAMPLING) == range(3)
    assert not opened(tmp_path, IDENTITY.model_copy(update={"model": "moved"})).missing(PROMPTS[0], SAMPLING)


def test_a_full_file_is_written_at_once_and_equal_answers_make_equal_files(tmp_path: Path) -> None:
    names = []
    for folder in (tmp_path / "a", tmp_path / "b"):
        store = opened(folder, answers_per_shard=3)
        for prompt in PROMPTS if folder.name == "a" else PROMPTS[::-1]:
            store.put(prompt, SAMPLING, answers(range(3)))
        files = sorted(path.name for path in folder.rglob("*.parquet"))
        assert len(files) == 2
        names.append(files)
    assert names[0] == names[1]


def test_a_damaged_file_is_left_alone_and_its_answers_count_as_missing(tmp_path: Path) -> None:
    store = opened(tmp_path, answers_per_shard=3)
    for prompt in PROMPTS:
        store.put(prompt, SAMPLING, answers(range(3)))
    first = next(
        path for path in tmp_path.rglob("*.parquet") if pq.read_table(path).column("prompt")[0].as_py() == b"Once"
    )
    first.write_bytes(first.read_bytes()[:-20])
    damaged = opened(tmp_path)
    assert damaged.missing(PROMPTS[0], SAMPLING) == range(3)
    assert not damaged.missing(PROMPTS[1], SAMPLING)
    damaged.put(PROMPTS[0], SAMPLING, answers(range(3)))
    damaged.flush()
    assert opened(tmp_path).find(PROMPTS[0], SAMPLING, 2) is not None


def test_tools_of_a_conversation_stay_beside_its_messages(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "What is 2 + 2?"}]
    tools = [{"type": "function", "function": {"name": "sum", "parameters": {"type": "object"}}}]
    prompt = AnswerPrompt(json.dumps({"messages": messages, "tools": tools}).encode(), is_messages=True)
    store = opened(tmp_path)
    store.put(prompt, SAMPLING, answers(range(1), b"4"))
    store.flush()
    row = conversation(opened(tmp_path).find(prompt, SAMPLING, 0) or {}, "s")
    assert (row["messages"], row["tools"]) == ([*messages, {"role": "assistant", "content": "4"}], tools)
