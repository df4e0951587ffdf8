"""`fusion capture` on a real source: killed, damaged, out of room or twice at once, it ends with the same shards."""

from __future__ import annotations

import asyncio
import multiprocessing
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from services.cli.app import app
from services.commands.capture_scope import open_scope
from services.commands.prepare import prepare
from services.fusion.fuser import Fuser
from services.fusion.sources.remote import RemoteSource
from services.fusion.sources.through_store import ThroughStore
from services.recipes.load import load_recipe
from services.source.config import SourceConfig
from services.store.capture_plan import Place
from services.store.store import BlockStore
from tests.commands.capture_process import begin
from tests.fakes.files.small_disk import small_disk
from tests.fakes.services.plain_source import PlainSource, plain_source
from tests.fakes.tiny_model import make_tiny_model, sentences

PER_SHARD = 4
NOBODY = "127.0.0.1:9"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny", vocabulary_size=500, seed=1)


@pytest.fixture(scope="module")
def source(model: Path) -> Iterator[PlainSource]:
    config = SourceConfig(name="tiny", model=str(model), engine="transformers", top_k=16, torch_threads=1)
    with plain_source(config) as running:
        yield running


@pytest.fixture
def written(source: PlainSource, model: Path, tmp_path: Path) -> Callable[..., str]:
    """Writes a recipe of that source and returns its path; `name` has a run folder and a store of its own."""
    documents = tmp_path / "documents"
    documents.mkdir()
    for number in range(16):
        (documents / f"{number}.txt").write_text(sentences(600, seed=number), encoding="utf-8")

    def write(name: str = "a", address: str | None = None, **service: Any) -> str:
        small = {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "intermediate_size": 64}
        recipe = {
            "name": name,
            "output_dir": str(tmp_path / "runs"),
            "corpus": {"files": [f"{documents}/*.txt"], "window_bytes": 128, "shared_run_bytes": None},
            "sources": [{"name": "tiny", "model": str(model), "top_k": 16, "address": address or source.address}],
            "target": {"config": small, "tokenizer": {"train": {"vocabulary_size": 300}}},
            "service": service,
        }
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(recipe))
        return str(path)

    return write


def capture(recipe: str, *options: str) -> Any:
    arguments = ["capture", recipe, *options]
    return CliRunner().invoke(app, arguments, terminal_width=400)


def contents(recipe: str) -> dict[str, bytes]:
    root = Path(load_recipe(recipe).store or "")
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def shards(recipe: str) -> list[Path]:
    return sorted(Path(load_recipe(recipe).store or "").rglob("captures/*/*.parquet"))


@pytest.fixture
def undisturbed(written: Callable[..., str]) -> str:
    recipe = written("undisturbed")
    done = capture(recipe, "--windows-per-shard", str(PER_SHARD))
    assert done.exit_code == 0, done.output
    assert len(shards(recipe)) > 8
    return recipe


@pytest.fixture(scope="module")
def processes() -> Any:
    """Processes that start in a moment: a server that has imported everything forks them."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.commands.capture_process"])
    return context


def test_a_capture_killed_ten_times_ends_with_the_same_shards(
    undisturbed: str, written: Callable[..., str], source: PlainSource, processes: Any
) -> None:
    recipe, rng = written("killed"), random.Random(0)
    try:
        for _ in range(10):
            source.hold_after = source.scored + rng.randint(1, 2 * PER_SHARD)  # so that ten kills are no whole capture
            client = processes.Process(target=begin, args=(recipe, PER_SHARD))
            client.start()
            source.wait_until(holding=True)
            client.join(rng.uniform(0, 0.2))  # while it writes, perhaps
            assert client.is_alive()
            client.kill()
            client.join()
            source.wait_until(holding=False)
    finally:
        source.hold_after = None
    complete = {path.name for path in shards(recipe) if path.with_suffix(".json").is_file()}
    assert 0 < len(complete) < len(shards(undisturbed))
    scored = source.scored
    assert capture(recipe).exit_code == 0
    assert contents(recipe) == contents(undisturbed)
    assert source.scored - scored <= (len(shards(recipe)) - len(complete)) * PER_SHARD
    scored = source.scored
    again = capture(recipe)
    assert (again.exit_code, "tiny: complete" in again.stderr, source.scored) == (0, True, scored)


def test_verify_names_what_is_damaged_and_capture_repairs_just_that(undisturbed: str, source: PlainSource) -> None:
    assert capture(undisturbed, "--verify").exit_code == 0
    before = contents(undisturbed)
    flipped, short, gone, unrecorded = random.Random(1).sample(shards(undisturbed), 4)
    data = bytearray(flipped.read_bytes())
    data[len(data) // 2] ^= 1
    flipped.write_bytes(bytes(data))
    short.write_bytes(short.read_bytes()[:-100])
    gone.unlink()
    unrecorded.with_suffix(".json").unlink()
    scored = source.scored
    done = capture(undisturbed, "--verify")
    assert done.exit_code == 1
    for path, problem in (
        (flipped, "corrupt: its hash"),
        (short, "truncated: "),
        (gone, "missing"),
        (unrecorded, "its record is missing"),
    ):
        assert f"{path}: {problem}" in done.stdout
    assert done.stdout.count(".parquet: ") == 4
    assert source.scored == scored
    assert capture(undisturbed).exit_code == 0
    assert contents(undisturbed) == before
    assert source.scored - scored <= 4 * PER_SHARD
    assert capture(undisturbed, "--verify").exit_code == 0


def test_two_captures_at_once_end_with_the_same_shards(
    undisturbed: str, written: Callable[..., str], processes: Any
) -> None:
    recipe = written("twice")
    clients = [processes.Process(target=begin, args=(recipe, PER_SHARD)) for _ in range(2)]
    for client in clients:
        client.start()
    for client in clients:
        client.join(120)
    assert [client.exitcode for client in clients] == [0, 0]
    assert contents(recipe) == contents(undisturbed)


def test_a_full_disk_is_named_and_what_is_complete_stays(
    written: Callable[..., str], undisturbed: str, tmp_path: Path
) -> None:
    with small_disk(tmp_path / "disk") as disk:
        recipe = written("full", store=str(disk / "store"))
        done = capture(recipe, "--windows-per-shard", str(PER_SHARD))
        assert done.exit_code == 1
        assert "No space left on device" in done.stderr
        assert "Traceback" not in done.output
        good = contents(undisturbed)
        complete = {path.with_suffix("").name for path in shards(recipe) if path.with_suffix(".json").is_file()}
        assert complete
        kept = contents(recipe)
        assert all(kept[name] == good[name] for name in kept if name.endswith(".json") and name in good)
        assert not [name for name in kept if "partial" in name]


def test_what_cannot_be_honoured_is_named(undisturbed: str, written: Callable[..., str]) -> None:
    for options, message in (
        (("--source", "nobody"), "--source nobody: there is no such source, only tiny"),
        (("--split", "test"), "--split test: the corpus has train, held_out"),
        (("--windows-per-shard", "5"), "begun with 4; leave it out"),
        (("--set", "service.store=null"), "service.store: null keeps nothing"),
        (("--set", "service.store=nope://x"), "service.store: cannot open nope://x"),
    ):
        done = capture(undisturbed, *options)
        assert (done.exit_code, message in done.stderr) == (2, True), done.output
    done = capture(written("away", NOBODY))
    assert (done.exit_code, "source tiny does not answer at its address" in done.stderr) == (2, True)
    done = capture(written("new", NOBODY), "--verify")
    assert (done.exit_code, "nothing of it is in the store" in done.stdout) == (1, True)


def test_a_captured_corpus_is_fused_with_no_source_running(
    undisturbed: str, written: Callable[..., str], source: PlainSource
) -> None:
    """The same recipe with the source gone: fused windows, and a service that says it can."""
    online, offline = load_recipe(undisturbed), load_recipe(written("offline", NOBODY))
    for recipe in (online, offline):
        prepare(recipe)
    shutil.copytree(online.store or "", offline.store or "")
    captured = open_scope(offline)
    splits = {f"corpus/{split}": captured.corpus.fingerprint(split) for split in captured.corpus.splits}
    scored = source.scored

    async def fuse() -> None:
        fuser, live = Fuser(offline.fusion_service(), splits), Fuser(online.fusion_service(), splits)
        assert await fuser.problem() is None
        [status] = await fuser.statuses()
        assert (status.serving, sorted(status.captured)) == (False, sorted(splits))
        for split, fingerprint in zip(captured.corpus.splits, splits.values(), strict=True):
            for index in range(captured.corpus.num_windows(split)):
                passage = captured.corpus.window(split, index).passage
                encoding, place = fuser.encode(passage), Place(fingerprint, index)
                by_place, _ = await fuser.fuse(passage, encoding, names=["tiny"], k=8, place=place)
                by_key, _ = await live.fuse(passage, encoding, names=["tiny"], k=8)
                assert by_place.text_bytes == passage.text
                assert by_place.gold_T.tobytes() == by_key.gold_T.tobytes()
        empty = Fuser(load_recipe(written("empty", NOBODY)).fusion_service(), splits)
        assert await empty.problem() is not None
        for each in (fuser, live, empty):
            await each.close()

    prepare(load_recipe(written("empty", NOBODY)))
    asyncio.run(fuse())
    assert source.scored == scored


def test_a_miss_is_scored_once_and_captured_without_another_pass(
    written: Callable[..., str], undisturbed: str, source: PlainSource
) -> None:
    """What streams have left in the store costs a capture nothing."""
    recipe = load_recipe(written("streamed"))
    corpus = open_scope(recipe).corpus
    windows = [corpus.window(split, index) for split in corpus.splits for index in range(corpus.num_windows(split))]

    async def stream() -> None:
        store = BlockStore(recipe.store or "")
        reader = ThroughStore(RemoteSource(recipe.endpoint(recipe.sources[0]), recipe.service), store)
        for _ in range(2):
            for window in windows:
                assert (await reader.score(window.passage)).text_bytes == window.text
        await reader.close()
        store.flush()

    scored = source.scored
    asyncio.run(stream())
    assert source.scored - scored == len(windows)
    assert capture(written("streamed"), "--windows-per-shard", str(PER_SHARD)).exit_code == 0
    assert source.scored - scored == len(windows)
    without_kept = {name: data for name, data in contents(written("streamed")).items() if "/kept/" not in name}
    assert without_kept.keys() == contents(undisturbed).keys()
    assert capture(written("streamed"), "--verify").exit_code == 0


def test_a_pool_under_another_name_has_been_captured(written: Callable[..., str]) -> None:
    recipe = written("pooled")

    def name_pool(name: str) -> None:
        values = yaml.safe_load(Path(recipe).read_text())
        values["corpus"]["pools"] = {name: {"window_bytes": 256}}
        Path(recipe).write_text(yaml.safe_dump(values))

    name_pool("long")
    assert capture(recipe).exit_code == 0
    before = contents(recipe)
    name_pool("wide")
    for options in ((), ("--verify",)):
        done = capture(recipe, *options)
        assert done.exit_code == 0, done.output
    assert contents(recipe) == before
