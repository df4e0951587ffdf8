"""A ledger of ten million windows beside a small one, and preparing over growing sizes of text.

The large ledger is written straight as shards: made-up windows of 1,024 bytes, all with context and a tenth with a
domain; every 16th shard repeats the windows of an earlier one, in a file of its own. Measured are opening it in a
process of its own, with the memory that opening and then reading adds; reads at random places, from both ledgers;
and the rate of a fused stream from both, in turn, of one process: a service and two synthetic sources,
with the default numbers of candidates.

Preparing is measured in a process of its own too, with runs, buckets and shards of 4 MB instead of 32, so that the
memory for one of each is small beside the text: processor time and peak memory.
"""

from __future__ import annotations

import json
import multiprocessing
import random
import resource
import shutil
import tempfile
import time
from collections.abc import Callable
from itertools import islice, pairwise
from pathlib import Path
from statistics import median
from typing import Any

import psutil

from services.base.files import Files
from services.corpus.config import CorpusConfig
from services.corpus.drawn import Sizes
from services.corpus.ledger import TRAIN, Corpus
from services.corpus.prepare import WindowTokenizer, plan_corpus, read_text
from services.corpus.shards import SCHEMA, Shard, encode_shard, group_rows, split_fingerprint
from services.fusion.client import StreamRequest
from tests.bench.corpus_prepare import documents
from tests.bench.parts.report import Report, arguments
from tests.fakes.services.plain_fusion import plain_fusion
from tests.fakes.tokenizers import vocabulary

WINDOW_BYTES, SHARD_WINDOWS, DISTINCT_SHARDS = 1024, 1 << 15, 16
SIZES = Sizes(run=1 << 22, bucket=1 << 22, shard=1 << 22)
MEBIBYTE = 2**20


def write_ledger(folder: Path, name: str, num_windows: int) -> None:
    """Write a ledger of made-up windows, four to a document."""
    files, shards = Files(str(folder)), list[Shard]()
    text = " ".join(documents(8 * MEBIBYTE)).encode()
    written: list[tuple[bytes, Shard]] = []
    for number, first in enumerate(range(0, num_windows, SHARD_WINDOWS)):
        size = min(SHARD_WINDOWS, num_windows - first)
        place = number % DISTINCT_SHARDS
        if size < SHARD_WINDOWS or place == len(written):
            encoded = encode_shard("", rows(text, number, size), SCHEMA, group_rows(WINDOW_BYTES))
            written += [encoded] if size == SHARD_WINDOWS else []
        else:
            encoded = written[place]
        data, shard = encoded
        path = f"{TRAIN}/{number:05}.parquet"
        files.write(f"windows/{path}", data)
        shards.append(Shard(**shard.to_json() | {"file": path}))
    info = {
        "num_windows": num_windows,
        "num_bytes": sum(shard.num_bytes for shard in shards),
        "fingerprint": split_fingerprint(shards),
        "windows_per_group": group_rows(WINDOW_BYTES),
        "shards": [shard.to_json() for shard in shards],
    }
    files.write("corpus.json", json.dumps({"version": 3, "name": name, "splits": {TRAIN: info}}).encode())


def rows(text: bytes, seed: int, number: int) -> list[tuple[Any, ...]]:
    """Return the rows of a shard: four windows of one document behind each other."""
    rng, found = random.Random(seed), list[tuple[Any, ...]]()
    for document in range(number // 4 + 1):
        at = rng.randrange(len(text) - 4 * WINDOW_BYTES)
        name, domain = f"part-{seed}.jsonl#{document}", "news" if document % 10 == 0 else ""
        for start in range(0, 4 * WINDOW_BYTES, WINDOW_BYTES):
            window = text[at + start : at + start + WINDOW_BYTES]
            context_start = max(0, start - WINDOW_BYTES // 2)
            last = start == 3 * WINDOW_BYTES
            found.append((window, name, start, context_start, last, domain, 4 * WINDOW_BYTES))
    return found[:number]


def in_process(function: Callable[..., Any], *values: Any) -> Any:
    """Return what a function returns in a fresh process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, values)


def opened(folder: str, num_reads: int) -> tuple[float, float, float]:
    """Return seconds to open a ledger, and the MiB that opening, and then random reads as well, have added."""
    memory = psutil.Process().memory_info
    Files(folder).read("corpus.json")  # imports
    before = memory().rss
    started = time.perf_counter()
    corpus = Corpus.open(folder)
    seconds, after = time.perf_counter() - started, memory().rss
    rng = random.Random(1)
    for _ in range(num_reads):
        corpus.window(TRAIN, rng.randrange(corpus.num_windows(TRAIN)))
    return seconds, (after - before) / MEBIBYTE, (memory().rss - before) / MEBIBYTE


def read_milliseconds(corpus: Corpus, num_reads: int, *, in_order: bool) -> float:
    """Return the processor time of reading a window with its context."""
    size, rng = corpus.num_windows(TRAIN), random.Random(2)
    indices = range(num_reads) if in_order else [rng.randrange(size) for _ in range(num_reads)]
    started = time.process_time()
    for index in indices:
        corpus.window(TRAIN, index % size)
    return (time.process_time() - started) / num_reads * 1000


def stream_rates(folders: dict[str, Path], num_windows: int, repetitions: int) -> dict[str, float]:
    """Return windows per processor second of a fused stream from each data set, measured in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in folders}
    with tempfile.TemporaryDirectory() as folder:
        corpora = [str(path) for path in folders.values()]
        windows = {"window_bytes": WINDOW_BYTES}
        with plain_fusion(Path(folder), windows=windows, corpora=corpora, k_out=32, top_k=64) as fusion:
            client = fusion.client()
            for repetition in range(repetitions + 1):
                for name in folders:
                    request = StreamRequest(dataset=name, split=TRAIN, seed=repetition)
                    started = time.process_time()
                    stream = client.stream(request)
                    assert len(list(islice(stream, num_windows))) == num_windows
                    stream.close()
                    seconds[name].append(time.process_time() - started)
    return {name: num_windows / median(found[1:]) for name, found in seconds.items()}  # the first one compiles


def prepared(folder: str, num_bytes: int) -> tuple[float, float]:
    """Return processor seconds of preparing a text, and the peak MiB of this process above its start."""
    file, out = Path(folder) / f"{num_bytes}.jsonl", Path(folder) / "out"
    tokenizer = WindowTokenizer("byte_level", "byte_level", lambda: vocabulary("byte_level"))
    config = CorpusConfig(files=(str(file),), context_bytes=256, workers=1)
    small = CorpusConfig(files=(str(Path(folder) / "first.jsonl"),), context_bytes=256, workers=1)
    plan_corpus(read_text(small, Path(folder) / "first"), [tokenizer])  # imports, and kernels that are compiled
    before = psutil.Process().memory_info().rss
    started = time.process_time()
    plan_corpus(read_text(config, out, sizes=SIZES), [tokenizer])
    seconds = time.process_time() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    shutil.rmtree(out)
    return seconds, (peak - before) / MEBIBYTE


def measure_ledger(report: Report, folder: Path, num_windows: int, *, quick: bool) -> None:
    """Add rows and checks of the large ledger beside the small one."""
    folders = {"small": folder / "small", "large": folder / "large"}
    numbers = {"small": 10_000, "large": num_windows}
    for name, path in folders.items():
        write_ledger(path, name, numbers[name])
    for name, path in folders.items():
        seconds, opening, reading = in_process(opened, str(path), 3000)
        corpus = Corpus.open(path)
        read_milliseconds(corpus, 100, in_order=False)
        report.row(
            table="ledger",
            windows=numbers[name],
            shards=len(corpus.record["splits"][TRAIN]["shards"]),
            open_milliseconds=seconds * 1000,
            opening_mib=opening,
            opening_and_reading_mib=reading,
            read_in_order_milliseconds=read_milliseconds(corpus, 5000, in_order=True),
            read_at_random_milliseconds=read_milliseconds(corpus, 3000, in_order=False),
        )
        if name == "large":
            report.check(f"opening {num_windows:,} windows", seconds, "s", at_most=1)
            report.check("memory that opening and 3,000 random reads add", reading, "MiB", at_most=200)
    rates = stream_rates(folders, 100 if quick else 300, 2 if quick else 5)
    for name, rate in rates.items():
        report.row(table="fused stream", windows=numbers[name], windows_per_processor_second=rate)
    report.check("rate of a stream, large ledger over small", rates["large"] / rates["small"], "", at_least=0.95)


def measure_preparing(report: Report, folder: Path, sizes: list[int]) -> None:
    """Add rows and checks of preparing."""
    for name, num_bytes in [("first", MEBIBYTE), *((str(size * 10**6), size * 10**6) for size in sizes)]:
        with (folder / f"{name}.jsonl").open("w") as lines:
            lines.writelines(json.dumps({"text": text}) + "\n" for text in documents(num_bytes))
    found = {size: in_process(prepared, str(folder), size * 10**6) for size in sizes}
    for size, (seconds, peak) in found.items():
        report.row(
            table="preparing",
            text_megabytes=size,
            processor_seconds=seconds,
            megabytes_per_processor_second=size / seconds,
            peak_mib=peak,
        )
    for small, large in pairwise(sizes):
        growth = found[large][0] / found[small][0] / (large / small)
        report.check(f"{small} to {large} MB: growth of the time over that of the text", growth, "", at_most=1.1)
    growth = found[sizes[-1]][1] / found[sizes[-2]][1]
    report.check(f"{sizes[-2]} to {sizes[-1]} MB: growth of the memory", growth, "", at_most=1.1)


def main() -> None:
    options = arguments(__doc__ or "").parse_args()
    report = Report("corpus_size")
    with tempfile.TemporaryDirectory() as folder:
        measure_preparing(report, Path(folder), [2, 8, 32] if options.quick else [8, 32, 128])
    with tempfile.TemporaryDirectory() as folder:
        measure_ledger(report, Path(folder), 10**6 if options.quick else 10**7, quick=options.quick)
    report.finish(options.json)


if __name__ == "__main__":
    main()
