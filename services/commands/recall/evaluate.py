"""`fusion recall eval`: the held-out questions of a recipe, by the judge and by ways that need none."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from fusion_core.recall.memory import MemoryConfig
from services.base.atomic import write_whole
from services.commands.recall.train import run_folder, training_sections
from services.recall.evaluate import (
    Find,
    at_random,
    both_found,
    by_bm25,
    by_bm25_twice,
    by_memory,
    dense,
    head,
    interval,
    sliding_window,
)
from services.recall.examples import gold_blocks, read_examples
from services.recall.judge import Judge
from services.recall.selector import longest_block
from services.recipes.recipe import Recipe, RecipeError


@dataclass(frozen=True, slots=True)
class Share:
    """The share of questions of which a way found all relevant blocks, with its 95 % interval."""

    way: str
    questions: int
    share: float
    low: float
    high: float


def evaluate_judge(recipe: Recipe, run_name: str, count: int) -> tuple[list[Share], Path]:
    """Return the shares of the judge of a run and of the baselines, `count` blocks each, and the file written.

    Raises RecipeError where there is no judge or nothing held out, SettingError for files that cannot be used.
    """
    section, config = training_sections(recipe)
    folder = run_folder(recipe, run_name)
    if not (folder / "model").is_dir():
        raise RecipeError(f"--run-name: there is no judge in {folder} yet; `fusion recall train` makes it")
    if not config.held_out:
        raise RecipeError("recall.train.held_out: names no file to evaluate on")
    held_out = read_examples([Path(file) for file in config.held_out], "recall.train.held_out")
    examples = [example for example in held_out if example.spans]
    if not examples:
        raise RecipeError("recall.train.held_out: no example has spans")
    judge, encoder = Judge.load(folder / "model"), Judge.load(config.encoder, fresh=True)
    memory = MemoryConfig(window_tokens=judge.window_tokens, hops=section.hops, rehearsal=section.rehearsal)
    ways: dict[str, Find] = {
        "judge": by_memory(judge, memory),
        "judge, a single hop": by_memory(judge, memory.model_copy(update={"hops": section.hops[-1:]})),
        "BM25": by_bm25,
        "BM25 twice": by_bm25_twice,
        "dense retrieval": dense(encoder),
        "sliding window": sliding_window,
        "head": head,
        "random": at_random,
    }
    documents = [judge.read(example.text, longest_block(judge)) for example in examples]
    gold = [gold_blocks(example, document.spans) for example, document in zip(examples, documents, strict=True)]
    shares = []
    for name, find in ways.items():
        found = [find(example.question, document, count) for example, document in zip(examples, documents, strict=True)]
        right = [float(both_found(wanted, blocks)) for wanted, blocks in zip(gold, found, strict=True)]
        shares.append(Share(name, len(right), *interval(right)))
    file = folder / "evaluation.json"
    write_whole(file, json.dumps([asdict(share) for share in shares], indent=2) + "\n")
    return shares, file
