"""The steps of a `curate` section in their order, each a folder of shards, and their ledger.

    FOLDER/STEP/step.json                    identity of the step: its settings, and all that came before
    FOLDER/STEP/TASK/kept.parquet            documents that stay; dropped.parquet those that do not; record.json
    FOLDER/documents/DOMAIN.TASK.parquet     what the corpus is made of
    FOLDER/ledger.json                       counts of every step

FOLDER may be a URL. A step whose identity has changed is done again, and with it all that follow.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from services.base.errors import RunFailedError, SettingError
from services.base.files import Files
from services.base.home import exclusive, lock_place
from services.corpus.cleaning.config import CurateConfig
from services.corpus.cleaning.filtering import Filter, filter_shard
from services.corpus.cleaning.inputs import InputFile, deal, input_files
from services.corpus.cleaning.published import LEDGER, publish
from services.corpus.cleaning.reading import format_of, read_shard_of_files
from services.corpus.cleaning.shards import ShardWriter, StepFiles
from services.corpus.cleaning.steps.contamination import Decontaminate, check_suites
from services.corpus.cleaning.steps.duplicates import RemoveCopies, find_copies, write_hashes
from services.corpus.cleaning.steps.language import ChooseLanguages
from services.corpus.cleaning.steps.near_duplicates import find_near_copies, write_signatures
from services.corpus.cleaning.steps.quality import Quality, train_quality
from services.corpus.cleaning.steps.repositories import join_repositories
from services.corpus.cleaning.steps.rules import Rules
from services.corpus.cleaning.steps.safety import Safety
from services.corpus.cleaning.tally import Tally
from services.corpus.cleaning.tasks import RunAll, Step, read_record, run_step

VERSION = 1
"""Changes when the same settings and files give other documents."""
_STEP = "step.json"
_MOST_DOMAINS, OTHERS = 64, "others"
"""Domains of a shard that have a file each, all of which are open at once, and the name of the file of all others."""
_DECIDING = ("datatrove", "py3langid", "scikit-learn", "trafilatura", "pyarrow", "numpy")

Report = Callable[[str, int, int], None]
"""Called with a step, the number of its tasks that are done, and that of all."""


def clean(
    config: CurateConfig, folder: Path | str, run_all: RunAll, report: Report = lambda *_: None
) -> dict[str, Any]:
    """Clean the files of a `curate` section into a folder or URL; return the ledger. Done steps are not done again.

    Raises:
        SettingError: a setting cannot be honoured.
        ValueError: a file cannot be read, or the folder cannot be written; the message names it.
        RunFailedError: a worker died, a task's files went while cleaning went on, or no document is left.
    """
    require_extra()
    files = check_inputs(config)
    with exclusive(lock_place(str(folder))):
        out = Files(str(folder), "curate.folder")
        steps = list(_steps(config, files, out))
        before = ""
        for step in steps:
            before = _identity(before, step)
            _begin(out, step.name, before)
            run_step(step, out, run_all, partial(_report, report, step))
        ledger = _ledger(config, steps, out, before)
        publish(out, steps[-1], before)
        out.write(LEDGER, (json.dumps(ledger, indent=2, ensure_ascii=False) + "\n").encode())
        for left in set(out.folders("")) - {step.name for step in steps}:
            if out.read(f"{left}/{_STEP}") is not None:
                _delete_step(out, left)  # it is left out now
    if not ledger["kept"]:
        raise RunFailedError(f"curate: none of {ledger['documents_in']} documents is left; see {out.location(LEDGER)}")
    return ledger


def require_extra() -> None:
    """Raise SettingError when the packages that cleaning takes are not installed."""
    names = ("datatrove", "py3langid", "regex", "sklearn", "trafilatura", "xxhash")
    if missing := [name for name in names if find_spec(name) is None]:
        raise SettingError("files", f"{missing[0]} is not installed; the extra `curate` has it (llm-fusion[curate])")


def check_inputs(config: CurateConfig) -> list[InputFile]:
    """Return the files to clean; SettingError for a setting that names files which are not there or of no use."""
    files = input_files(config.files)
    for file in files:
        format_of(file, config)
    lists = [("safety", config.safety, ("severe_words", "mild_words", "blocked_domains"))]
    for section, settings, names in [*lists, ("quality", config.quality, ("good", "bad"))]:
        for name in names if settings is not None else ():
            _identities(getattr(settings, name), f"{section}.{name}")
    check_suites(config)
    return files


def _report(report: Report, step: Step, done: int) -> None:
    report(step.name, done, step.num_tasks)


def _identity(before: str, step: Step) -> str:
    content = json.dumps([before, step.name, step.num_tasks, step.identity], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def _begin(out: Files, step: str, identity: str) -> None:
    """Delete a step that was made from something else."""
    try:
        same = json.loads(out.read(f"{step}/{_STEP}") or b"")["identity"] == identity
    except (OSError, ValueError, KeyError):
        same = False
    if not same:
        _delete_step(out, step)
        out.write(f"{step}/{_STEP}", (json.dumps({"identity": identity}) + "\n").encode())


def _delete_step(out: Files, step: str) -> None:
    out.delete(f"{step}/{_STEP}")  # first: without it, what is left of a step that a kill spares counts for nothing
    out.delete_all(step)


def _steps(config: CurateConfig, files: list[InputFile], out: Files) -> Iterator[Step]:
    """Yield the steps in their order; each reads the one before it that has documents."""
    shards, dealt = config.shards, deal(files, config.shards)
    versions = {name: version(name) for name in _DECIDING}
    reading = [config.format, config.text_field, config.separator]
    identity = [VERSION, versions, reading, [file.identity() for file in files]]
    yield Step("read", identity, partial(read_shard_of_files, dealt, config), shards)
    source = StepFiles(out, "read")

    def filtering(name: str, settings: Any, chosen: Filter) -> Step:
        nonlocal source
        before, source = source, StepFiles(out, name)
        return Step(name, settings, partial(filter_shard, before, chosen), shards)

    if config.exact_duplicates:
        yield Step("exact_hashes", None, partial(write_hashes, source), shards)
        yield Step("exact_search", None, partial(find_copies, StepFiles(out, "exact_hashes"), shards), 1)
        yield filtering("exact_duplicates", None, RemoveCopies(StepFiles(out, "exact_search"), "exact_copy"))
    if config.language is not None:
        yield filtering("language", config.language.model_dump(), ChooseLanguages(config.language))
    if config.rules is not None:
        yield filtering("rules", config.rules.model_dump(), Rules(config.rules))
    if (near := config.near_duplicates) is not None:
        yield Step("near_signatures", near.model_dump(), partial(write_signatures, source, near), shards)
        search = partial(find_near_copies, StepFiles(out, "near_signatures"), shards, near.threshold)
        yield Step("near_search", None, search, 1)
        yield filtering("near_duplicates", None, RemoveCopies(StepFiles(out, "near_search"), "near_copy"))
    if (safety := config.safety) is not None:
        lists = {
            name: _identities(getattr(safety, name), f"safety.{name}")
            for name in ("severe_words", "mild_words", "blocked_domains")
        }
        yield filtering("safety", [safety.model_dump(), lists], Safety(safety))
    if (quality := config.quality) is not None:
        examples = [_identities(quality.good, "quality.good"), _identities(quality.bad, "quality.bad")]
        train = partial(train_quality, quality, config)
        yield Step("quality_model", [reading, examples], train, 1)
        yield filtering("quality", quality.threshold, Quality(StepFiles(out, "quality_model"), quality.threshold))
    if (suites := config.decontaminate) is not None:
        known = [suites.model_dump(), _identities(suites.suites, "decontaminate.suites")]
        yield filtering("decontaminate", known, Decontaminate(suites, json.dumps(known)))
    if (joining := config.repositories) is not None:
        join = partial(join_repositories, source, shards, joining.max_bytes)
        yield Step("repositories", joining.max_bytes, join, shards)
        source = StepFiles(out, "repositories")
    yield Step("by_domain", None, partial(_write_domains, source), shards)


def _identities(patterns: tuple[str, ...] | None, setting: str) -> list[Any]:
    return [file.identity() for file in input_files(patterns, setting)] if patterns else []


def _write_domains(source: StepFiles, task: int, folder: Path) -> None:
    """Write a shard as one file for each of its first domains, `DOMAIN.TASK.parquet`, and one for all others."""
    writers: dict[str, ShardWriter] = {}
    try:
        for batch in source.documents(task):
            for document in batch:
                name = re.sub(r"[^\w-]+", "_", document.domain)[:64] or "documents"
                if name not in writers and len(writers) >= _MOST_DOMAINS:
                    name = OTHERS
                if name not in writers:
                    writers[name] = ShardWriter(folder / f"{name}.{task:05d}.parquet")
                writers[name].write(document)
    finally:
        for writer in writers.values():
            writer.__exit__(None, None, None)


def _record(out: Files, step: str, task: int) -> dict[str, Any]:
    if (record := read_record(out, step, task)) is None:
        place = out.location(StepFiles(out, step).folder(task))
        raise RunFailedError(f"curate: {place} has changed while this run went on; does another one write there?")
    return record


def _ledger(config: CurateConfig, steps: list[Step], out: Files, identity: str) -> dict[str, Any]:
    """Return the counts of all steps with documents, and of the whole; RunFailedError when a record has gone."""
    entries, hashes = [], []
    for step in steps:
        records = [_record(out, step.name, task) for task in range(step.num_tasks)]
        tallies = [record["tally"] for record in records if record["tally"] is not None]
        hashes = [record["files"] for record in records]
        if tallies:
            entry = Tally.total(tallies).as_json()
            if entry["documents_in"] != entry["kept"] + entry["joined"] + sum(entry["dropped"].values()):
                raise AssertionError(f"{step.name}: the counts do not add up: {entry}")
            entries.append({"step": step.name, **entry})
    saved = entries[0]["bytes_in"] - entries[-1]["bytes_kept"]
    return {
        "version": VERSION,
        "identity": identity,
        "settings": config.model_dump(mode="json"),
        "documents_in": entries[0]["documents_in"],
        "dropped": sum(sum(entry["dropped"].values()) for entry in entries),
        "joined": sum(entry["joined"] for entry in entries),
        "kept": entries[-1]["kept"],
        "bytes_in": entries[0]["bytes_in"],
        "bytes_kept": entries[-1]["bytes_kept"],
        "seconds_saved": {name: saved * rate / 1e6 for name, rate in sorted(config.seconds_per_megabyte.items())},
        "steps": entries,
        "files": dict(sorted((name, sha) for files in hashes for name, (_, sha) in files.items())),
    }
