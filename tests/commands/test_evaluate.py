from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from fusion_core.blocks import Block
from services.commands.evaluate import evaluate, evaluate_sources
from services.commands.prepare import corpus_and_target
from services.corpus.config import CorpusConfig
from services.corpus.prepare import plan_corpus, read_text
from services.recipes.recipe import Recipe, RecipeError
from tests.fakes.answering import make_chat_model
from tests.fakes.fusion_stream import FakeFusion, corpus, tiny_target


class BlindAtTimes(FakeFusion):
    """The source `right` has a row in the first window only."""

    def block(self, text: bytes, *, tokens_only: bool, k: int) -> Block:
        block = super().block(text, tokens_only=tokens_only, k=k)
        left, right = block.shares
        losses = (1.0, 3.0) if text == self.splits["held_out"][0] else (2.0, math.nan)
        shares = (replace(left, nats_per_byte=losses[0]), replace(right, nats_per_byte=losses[1]))
        return replace(block, shares=shares)


def test_a_window_without_a_source_does_not_spoil_its_figure(tmp_path: Path) -> None:
    texts = corpus(2)
    files = [tmp_path / f"{number}.txt" for number in range(2)]
    for file, text in zip(files, texts, strict=True):
        file.write_bytes(text)
    config = CorpusConfig.model_validate({"name": "toy", "files": [str(file) for file in files]})
    prepared = plan_corpus(read_text(config, tmp_path / "corpus"))
    nats, _ = evaluate_sources(BlindAtTimes(tiny_target(tmp_path), [], held_out=texts), prepared, "held_out")
    sizes = [len(text) for text in texts]
    assert nats["left"] == pytest.approx((sizes[0] + 2 * sizes[1]) / sum(sizes))
    assert nats["right"] == pytest.approx(3.0)


def test_a_turn_that_one_template_refuses_is_scored_by_no_model(tmp_path: Path) -> None:
    model = make_chat_model(tmp_path / "model")
    plain = "{% for m in messages %}{{ m.role + ': ' + m.content + '<|eos|>' }}{% endfor %}"
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('no system message') }}{% endif %}" + plain
    conversations = [
        [*([{"role": "system", "content": "Be brief."}] if number % 3 == 0 else []), *_exchange(number)]
        for number in range(30)
    ]
    lines = (json.dumps({"messages": messages}) for messages in conversations)
    (tmp_path / "chats.jsonl").write_text("\n".join(lines))
    source = {"model": str(model), "top_k": 8, "engine": "transformers"}
    recipe = Recipe.model_validate(
        {
            "name": "chats",
            "output_dir": str(tmp_path / "runs"),
            "corpus": {"files": [f"{tmp_path}/chats.jsonl"], "format": "conversations", "held_out_share": 0.5},
            "sources": [
                {"name": "all", "chat_template": plain, **source},
                {"name": "some", "chat_template": refusing, **source},
            ],
            "target": {"model": str(model)},
        }
    )
    lines_printed: list[str] = []
    evaluation = evaluate(recipe, [model], "held_out", sources=True, print_line=lines_printed.append)
    told = [line for line in lines_printed if "source some: its chat template refuses" in line]
    assert len(told) == 1
    refused = int(told[0].split("refuses ")[1].split()[0])
    corpus = corpus_and_target(recipe)
    windows = [corpus.window("held_out", index) for index in range(corpus.num_windows("held_out"))]
    kept = [window for window in windows if b"Be brief." not in window.messages]
    assert refused == len(windows) - len(kept) > 0
    assert evaluation["domains"]["all"]["bytes"] == sum(len(window.text) for window in kept)


def test_tasks_are_looked_at_before_anything_else(tmp_path: Path) -> None:
    values = {
        "name": "none",
        "output_dir": str(tmp_path / "runs"),
        "corpus": {"files": [f"{tmp_path}/missing.txt"]},
        "sources": [{"name": "one", "model": str(tmp_path / "missing"), "address": "127.0.0.1:1"}],
        "target": {"model": str(tmp_path / "missing")},
    }
    with pytest.raises(RecipeError, match=r"--tasks: no \*\.yaml in"):
        evaluate(Recipe.model_validate(values), [], "held_out", tasks=tmp_path)


def _exchange(number: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"Number {number}?"}, {"role": "assistant", "content": f"It is {number}."}]
