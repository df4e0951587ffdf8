"""Processor time of preparing a corpus over three sizes of text: it must grow as the text does.

The text is made up: documents of about a kilobyte, of words from a vocabulary of 20,000, some of which repeat a passage
of another, as text from the web does. Reading, splitting and the search for shared passages are timed apart from
planning windows for a tokenizer and writing the ledger.
"""

from __future__ import annotations

import json
import random
import tempfile
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

from services.corpus.config import CorpusConfig
from services.corpus.prepare import WindowTokenizer, plan_corpus, read_text
from tests.bench.parts.report import Report, arguments
from tests.fakes.tokenizers import vocabulary

_WORDS, _DOCUMENT_WORDS, _PASSAGE_WORDS = 20_000, 170, 30


def documents(num_bytes: int) -> Iterator[str]:
    """Yield made-up documents, about `num_bytes` together; the same for the same size."""
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 9))) for _ in range(_WORDS)]
    passage, total = "", 0
    while total < num_bytes:
        text = " ".join(rng.choices(words, k=_DOCUMENT_WORDS))
        if rng.random() < 0.05:
            text = f"{passage} {text}"
        passage = " ".join(text.split(" ")[:_PASSAGE_WORDS])
        total += len(text)
        yield text


def measure(num_bytes: int) -> tuple[float, float]:
    """Return the processor seconds that reading and splitting take, and those that planning and writing take."""
    tokenizer = WindowTokenizer("byte_level", "byte_level", lambda: vocabulary("byte_level"))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "text.jsonl"
        with file.open("w") as lines:
            lines.writelines(json.dumps({"text": text}) + "\n" for text in documents(num_bytes))
        config = CorpusConfig(files=(str(file),), context_bytes=256)
        started = time.process_time()
        text = read_text(config, Path(folder) / "out")
        read = time.process_time()
        plan_corpus(text, [tokenizer])
        return read - started, time.process_time() - read


def main() -> None:
    options = arguments(__doc__ or "").parse_args()
    report = Report("corpus_prepare")
    sizes = [1, 4, 16] if options.quick else [4, 16, 64]
    measure(2**18)  # imports, and kernels that are compiled at their first use
    seconds = {size: measure(size * 10**6) for size in sizes}
    for size, (read, plan) in seconds.items():
        report.row(
            text_megabytes=size,
            read_and_split_seconds=read,
            plan_and_write_seconds=plan,
            megabytes_per_second=size / (read + plan),
        )
    for small, large in pairwise(sizes):
        growth = sum(seconds[large]) / sum(seconds[small]) / (large / small)
        report.check(f"{small} to {large} MB: growth of the time over that of the text", growth, "", at_most=1.2)
    report.finish(options.json)


if __name__ == "__main__":
    main()
