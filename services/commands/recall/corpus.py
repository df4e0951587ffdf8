"""The stage of a corpus that makes short conversations of long records: key blocks with a question, then the answer.

    recalled/IDENTITY/00000.jsonl   conversations of some records; a file is there whole or not at all
    recalled/IDENTITY/done.json     counts, written last

The identity is a hash of the files, of the settings and of the judge's weights, as far as they are here.
"""

from __future__ import annotations

import asyncio
import glob
import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, aclosing, nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from fusion.v1 import recall_pb2
from services.base.atomic import write_whole
from services.base.errors import InvalidArgumentError, NotFoundError, SettingError, UnavailableError
from services.base.home import exclusive
from services.base.progress_bars import plain_console, window_progress
from services.commands.recall.select import endpoint_of
from services.corpus.config import CorpusConfig, RecalledConfig
from services.corpus.conversations import records
from services.corpus.readers import local_files
from services.models.catalogue import resolve_model
from services.models.revision import weights_revision
from services.recall.client import KeyBlockStream, LongText, RecallClient
from services.recall.excerpt import excerpt_of, prompt_of
from services.recipes.recipe import Recipe, RecipeError

DONE = "done.json"
_TEXTS_PER_FILE = 128
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Asked:
    """A question about a long text, the answer, and the domain of its record; None where records have no domain."""

    text: LongText
    answer: str
    domain: str | float | None


def recalled_corpus(recipe: Recipe, print_line: Callable[[str], None]) -> CorpusConfig:
    """Return the corpus of the conversations, which are made where they are missing; all others are kept.

    A recall service that does not run is deployed for as long as it takes.

    Raises SettingError naming the key of the corpus, ServiceError when the service fails: what it has answered stays.
    """
    stage, corpus = recipe.corpus.recall, recipe.corpus
    assert stage is not None, "only for a corpus of key blocks"
    files = local_files(corpus.files or ())
    folder = recipe.recalled_folder / _identity(recipe, files)
    with exclusive(folder):
        if not (folder / DONE).is_file():
            _make(recipe, stage, files, folder)
    done = json.loads((folder / DONE).read_text())
    left_out = f", {done['left_out']} left out: {done['reason']}" if done["left_out"] else ""
    print_line(f"key blocks: {done['rows']} conversations{left_out}")
    if not done["rows"]:
        raise SettingError("recall", f"no key blocks were found: {done['reason']}")
    pattern = f"{glob.escape(str(folder.absolute()))}/*.jsonl"
    short = {"files": (pattern,), "recall": None, "format": "conversations", "text_field": "text"}
    return corpus.model_copy(update=short)


def asked(corpus: CorpusConfig, stage: RecalledConfig, files: Sequence[Path]) -> Iterator[Asked]:
    """Yield the questions of all records; SettingError names the key that a record lacks."""
    named = (corpus.text_field, stage.question, stage.answer, corpus.domain_field)
    columns = list(dict.fromkeys(key for key in named if key is not None))
    for path in files:
        for _, place, row in records(path, path.name, columns):
            where = f"{path}, {place}"
            if not isinstance(row, dict):
                raise ValueError(f"{where}: expected an object")
            [text] = _texts(row, corpus.text_field, "text_field", where)
            domain = row.get(corpus.domain_field) if corpus.domain_field is not None else None
            for question, answer in _pairs(row, stage, where):
                yield Asked(LongText(text.encode(errors="replace"), question), answer, domain)


def _pairs(row: dict[str, Any], stage: RecalledConfig, where: str) -> Iterator[tuple[str, str]]:
    answers = _texts(row, stage.answer, "recall.answer", where, lists=True)
    if stage.labels is not None:
        if unknown := sorted(set(answers) - set(stage.labels)):
            raise SettingError(
                "recall.labels", f"{where} has the label {unknown[0]!r}; there are {', '.join(stage.labels)}"
            )
        yield from ((question, "yes" if label in answers else "no") for label, question in stage.labels.items())
        return
    questions = _texts(row, stage.question or "", "recall.question", where, lists=True)
    if len(questions) != len(answers):
        raise SettingError("recall.answer", f"{where} has {len(answers)} answers to {len(questions)} questions")
    yield from zip(questions, answers, strict=True)


def _texts(row: dict[str, Any], key: str, setting: str, where: str, *, lists: bool = False) -> list[str]:
    """Return the text under a key, or the texts of a list where lists are allowed."""
    value = row.get(key)
    given: list[Any] = value if lists and isinstance(value, list) else [value]
    texts = [text for text in given if isinstance(text, str)]
    if len(texts) != len(given):
        raise SettingError(setting, f"{where} has no text under {key!r}")
    return texts


def _identity(recipe: Recipe, files: Sequence[Path]) -> str:
    recall, corpus = recipe.recall, recipe.corpus
    assert recall is not None, "a corpus of key blocks needs the section"
    here = recall.judge is not None and recall.address is None
    stats = [(str(path), path.stat()) for path in files]
    deciding = {
        "stage": corpus.recall.model_dump(mode="json") if corpus.recall is not None else None,
        "fields": [corpus.text_field, corpus.domain_field],
        "inputs": [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats],
        "selection": [list(recall.hops), recall.rehearsal, recall.max_text_bytes, recall.max_question_bytes],
        "precision": recall.precision,
        "judge": weights_revision(resolve_model(recall.judge or "")) if here else recall.judge,
    }
    return hashlib.sha256(json.dumps(deciding, sort_keys=True).encode()).hexdigest()[:16]


def _make(recipe: Recipe, stage: RecalledConfig, files: Sequence[Path], folder: Path) -> None:
    """Write the files that are missing, then the record."""
    num_asked = sum(1 for _ in asked(recipe.corpus, stage, files))  # and every record is checked before the judge works
    folder.mkdir(parents=True, exist_ok=True)
    console = plain_console(stderr=True)
    with _served(recipe), window_progress(console, "texts") as progress:
        reason = asyncio.run(_ask(recipe, stage, files, folder, lambda done: progress("recall", done, num_asked)))
    rows = sum(path.read_bytes().count(b"\n") for path in folder.glob("*.jsonl"))
    done = {"rows": rows, "left_out": num_asked - rows, "reason": reason or "see the log of the first attempt"}
    write_whole(folder / DONE, json.dumps(done) + "\n")


def _served(recipe: Recipe) -> AbstractContextManager[Any]:
    """Return a context in which the recall service runs: as it is, or deployed for as long as the block takes."""
    recall = recipe.recall
    assert recall is not None, "a corpus of key blocks needs the section"
    try:
        revision = asyncio.run(_info(recipe)).revision
    except (UnavailableError, NotFoundError):
        if recall.address is not None:
            raise
    else:
        if recall.address is None and revision != weights_revision(resolve_model(recall.judge or "")):
            raise RecipeError(
                "recall.judge: the service that is up has other weights; `fusion down` and `fusion up` with these"
            )
        return nullcontext()
    from services.deploy.local_ray import enable_ray_authentication

    enable_ray_authentication()
    from services.deploy.up import temporarily_up

    console = plain_console(stderr=True)
    return temporarily_up(recipe, recipe.run_folder / "recipe.yaml", console, only=[recall.application])


async def _info(recipe: Recipe) -> recall_pb2.GetRecallInfoResponse:
    client = RecallClient(*endpoint_of(recipe))
    try:
        return await client.info()
    finally:
        await client.close()


async def _ask(
    recipe: Recipe, stage: RecalledConfig, files: Sequence[Path], folder: Path, report: Callable[[int], None]
) -> str:
    """Write the conversations of each part of the records that has no file yet; return why the first was left out."""
    recall = recipe.recall
    assert recall is not None, "a corpus of key blocks needs the section"
    settings = recall_pb2.RecallSettings(budget_bytes=stage.budget_bytes, hops=recall.hops, rehearsal=recall.rehearsal)
    stream = KeyBlockStream(*endpoint_of(recipe), settings=settings)
    questions, reason, number, done = asked(recipe.corpus, stage, files), "", 0, 0
    try:
        while part := list(islice(questions, _TEXTS_PER_FILE)):
            file = folder / f"{number:06}.jsonl"
            if not file.is_file():
                rows = list[str]()
                async with aclosing(stream.in_order(one.text for one in part)) as found:
                    places = iter(part)
                    async for each in found:
                        one = next(places)
                        done += 1
                        report(done)
                        if isinstance(each, InvalidArgumentError):
                            reason = reason or str(each)
                            _log.warning("a text is left out: %s", each)
                        else:
                            rows.append(_row(one, each, recipe.corpus.domain_field))
                await asyncio.to_thread(write_whole, file, "".join(rows))
            else:
                done += len(part)
            number += 1
    finally:
        await stream.close()
    report(done)
    return reason


def _row(one: Asked, found: recall_pb2.KeyBlocks, domain_field: str | None) -> str:
    """Return the line of a conversation, which a corpus of conversations reads."""
    content = prompt_of(excerpt_of(one.text.text, found.blocks), one.text.question)
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": one.answer}]
    row: dict[str, Any] = {"messages": messages}
    if domain_field is not None:
        row[domain_field] = one.domain
    return json.dumps(row, ensure_ascii=False) + "\n"
