"""`fusion sample` and `fusion chat` on a real source: killed and resumed, nothing is asked for twice."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from services.cli.app import app
from services.source.config import SourceConfig
from tests.commands.sample_process import begin
from tests.fakes.answering import make_chat_model
from tests.fakes.services.plain_source import PlainSource, plain_source

NUM_PROMPTS = 24


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_chat_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def source(model: Path) -> Iterator[PlainSource]:
    engine = {"kind": "synthetic", "delay_seconds": 0.01}
    config = SourceConfig.model_validate(
        {"name": "tiny", "model": str(model), "engine": engine, "top_k": 16, "max_tokens": 1000}
    )
    with plain_source(config) as running:
        yield running


@pytest.fixture
def written(source: PlainSource, model: Path, tmp_path: Path) -> Callable[..., str]:
    """Writes a recipe of that source and returns its path; `sample` is added to its section."""
    lines: list[dict[str, Any]] = [
        {"messages": [{"role": "user", "content": f"Number {number}?"}]} for number in range(NUM_PROMPTS - 4)
    ]
    lines += [{"prompt": f"Number {number} is"} for number in range(4)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "a.txt").write_text("text")

    def write(name: str = "a", **sample: Any) -> str:
        recipe = {
            "name": name,
            "output_dir": str(tmp_path / "runs"),
            "corpus": {"files": [f"{tmp_path}/*.txt"]},
            "sources": [{"name": "tiny", "model": str(model), "top_k": 16, "address": source.address}],
            "target": {"model": str(model)},
            "sample": {
                "prompts": [f"{tmp_path}/prompts.jsonl"],
                "sampling": {"num_answers": 2, "max_new_tokens": 8, "seed": 1},
                **sample,
            },
        }
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(recipe))
        return str(path)

    return write


def fusion(*arguments: str, input_: str | None = None) -> Any:
    return CliRunner().invoke(app, list(arguments), input=input_, terminal_width=400)


def test_killed_and_resumed_it_asks_for_no_answer_twice_that_was_stored(
    written: Callable[..., str], source: PlainSource, tmp_path: Path
) -> None:
    whole = fusion("sample", written("whole"), "--to", str(tmp_path / "whole.jsonl"))
    assert whole.exit_code == 0, whole.output
    assert "tiny: 48 answers sampled, 0 there before" in whole.output
    recipe = written("killed", answers_per_shard=4, in_flight=2)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.commands.sample_process"])
    stored = 0
    for kill_after in (9, 9):
        source.hold_answers_after = source.answered + kill_after
        client = context.Process(target=begin, args=(recipe,))
        client.start()
        source.wait_until(holding=True)
        client.kill()
        client.join()
        source.wait_until(holding=False)
        files = list((tmp_path / "runs/killed/store").rglob("*.parquet"))
        assert len(files) * 4 > stored
        stored = len(files) * 4
    source.hold_answers_after = None
    answered = source.answered
    resumed = fusion("sample", recipe, "--to", str(tmp_path / "resumed.jsonl"))
    assert resumed.exit_code == 0, resumed.output
    assert f"tiny: {48 - stored} answers sampled, {stored} there before" in resumed.output
    assert source.answered - answered == 48 - stored
    assert (tmp_path / "resumed.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    again = fusion("sample", recipe)
    assert "tiny: 0 answers sampled, 48 there before" in again.output
    more = fusion("sample", recipe, "--set", "sample.sampling.num_answers=3")
    assert f"tiny: {NUM_PROMPTS} answers sampled, 48 there before" in more.output


def test_validate_reads_the_prompts(written: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "odd.jsonl").write_text('{"prompt": "good"}\n{"text": "bad"}\n')
    done = fusion("validate", written("v", prompts=[f"{tmp_path}/odd.jsonl"]))
    assert (done.exit_code, "odd.jsonl, row 2: needs one of the keys" in done.output) == (2, True), done.output
    assert "sample.prompts: " in done.output


def test_the_file_has_conversations_for_training(written: Callable[..., str], tmp_path: Path) -> None:
    done = fusion("sample", written("b"), "--to", str(tmp_path / "out.jsonl"))
    assert done.exit_code == 0, done.output
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert len(rows) == 48
    assert rows[0]["messages"][0] == {"role": "user", "content": "Number 0?"}
    assert (rows[0]["messages"][1]["role"], rows[0]["answer"], rows[1]["answer"]) == ("assistant", 0, 1)
    assert rows[-1]["prompt"] == "Number 3 is"
    assert {row["finish_reason"] for row in rows} <= {"length", "stop_token"}
    assert len({row["seed"] for row in rows}) == 48


def test_prompts_that_the_source_refuses_are_counted_and_named(written: Callable[..., str], tmp_path: Path) -> None:
    lines = [{"prompt": "good"}, {"prompt": "9" * 2000}, {"prompt": "8" * 2000}]  # more tokens than it takes
    (tmp_path / "odd.jsonl").write_text("\n".join(map(json.dumps, lines)))
    done = fusion("sample", written("c", prompts=[f"{tmp_path}/odd.jsonl"]))
    assert done.exit_code == 0, done.output
    assert "tiny: 2 answers sampled, 0 there before, 2 prompts refused: " in done.output
    assert "tokens and max_new_tokens = 8 are more than the 1001" in done.output


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("sample=null",), "sample: the recipe has no such section"),
        (("sample.prompts=[]",), "sample.prompts: "),
        (("sample.prompts=[nothing/*.jsonl]",), "sample.prompts: no file matches"),
        (("sample.sources=[who]",), "sample.sources: no source is called who; there are tiny"),
        (("sample.sampling.temperature=3",), "sample.sampling.temperature: "),
        (("service.store=null",), "sample.store: set it, or service.store"),
        (("sample.store=s3://key:secret@bucket/x",), "sample.store: "),
    ],
)
def test_settings_that_cannot_be_honoured_are_named(
    written: Callable[..., str], settings: tuple[str, ...], message: str
) -> None:
    options = [part for setting in settings for part in ("--set", setting)]
    done = fusion("sample", written("d"), *options)
    assert done.exit_code == 2
    assert message in done.output


def test_chat_answers_once_and_in_turns(written: Callable[..., str], tmp_path: Path) -> None:
    recipe = written("e")
    options = ("--max-new-tokens", "12", "--seed", "3", "--temperature", "2")
    once = fusion("chat", recipe, "--once", "Hello", *options)
    assert once.exit_code == 0, once.output
    twice = fusion("chat", recipe, *options, input_="Hello\nHello\n\n")
    assert twice.exit_code == 0, twice.output
    assert "tiny: " in twice.stderr
    first, second = (part.removesuffix("\n") for part in twice.stdout.removesuffix("> ").split("> ")[1:])
    assert first == once.stdout.removesuffix("\n")
    assert second != first  # what was said before belongs to the question
    other = fusion("chat", recipe, "--once", "Hello", "--system", "Be brief.", *options)
    assert other.stdout != once.stdout
    for wrong, message in (
        (("--source", "who"), "--source who: there is no such source, only tiny"),
        (("--temperature", "3"), "--temperature: Input should be less than or equal to 2"),
    ):
        refused = fusion("chat", recipe, "--once", "a", *wrong)
        assert (refused.exit_code, message in refused.output) == (2, True), refused.output
