"""`fusion capture --verify`: read every captured file back and name each that is bad."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from rich.console import Console

from services.base.progress_bars import window_progress
from services.commands.capture_scope import CaptureScope
from services.store.capture_plan import capture_folder, read_plan
from services.store.captured_split import CapturedSplit, renamed
from services.store.identity import SourceIdentity
from services.store.shard import check_shard


def capture_problems(scope: CaptureScope, console: Console) -> Iterator[tuple[str, str]]:
    """Read back everything that the sources have in the store; yield place and problem of each file that is bad."""
    with window_progress(console) as progress:
        for source in scope.sources:
            identities = scope.stored(source)
            if not identities:
                yield f"source {source.name}", "nothing of it is in the store"
            for identity in identities:
                yield from _problems_of(scope, source.name, identity, progress)


def _problems_of(
    scope: CaptureScope, name: str, identity: SourceIdentity, progress: Callable[[str, int, int], None]
) -> Iterator[tuple[str, str]]:
    store = scope.store.source(identity)
    for split in scope.splits:
        folder = capture_folder(store.folder, scope.corpus.fingerprint(split))
        plan = read_plan(store.files, folder)
        if plan is None:
            yield store.files.location(f"{folder}/capture.json"), f"{split} was not captured, or its plan is damaged"
            continue
        captured = CapturedSplit(store, scope.corpus, renamed(plan, scope.corpus, split))
        for number, (place, problem) in enumerate(captured.problems()):
            progress(f"{name}/{split}", min((number + 1) * plan.windows_per_shard, plan.num_windows), plan.num_windows)
            if problem:
                yield place, problem
    for path in store.uncaptured_shards():
        try:
            check_shard(store.files, path, vocabulary=identity.vocabulary)
        except ValueError as error:
            yield store.files.location(f"{path}.parquet"), str(error)
