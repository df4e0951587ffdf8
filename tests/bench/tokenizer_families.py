"""Real tokenizers on a text full of stumbling blocks, and on Python: which share of the rows has to be masked.

The families are those that the tests hold against the library that they are made for (tests/fakes/real_tokenizers.py).
*Lossy* is the share of a tokenizer's own tokens whose bytes are not those of the text; *masked* is the share of the
target's rows that a source's rows cannot be aligned with, by `byte`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from fusion_core.alignment.byte.projection import ByteProjection
from tests.bench.parts.report import Report, arguments
from tests.fakes.real_tokenizers import FAMILIES, NASTY, flat_block, real_vocabulary

TARGET = "gpt2"
_PYTHON_BYTES = 20_000


def main() -> None:
    options = arguments(__doc__ or "").parse_args()
    report, target = Report("tokenizer_families"), real_vocabulary(TARGET)
    python = Path(argparse.__file__).read_bytes()[:_PYTHON_BYTES]
    for name in FAMILIES:
        source = real_vocabulary(name)
        cells = {"family": name, "ids": source.size}
        for text_name, text in (("nasty", NASTY.encode()), ("Python", python)):
            encoding = source.encode(text)
            rows = ByteProjection(source, target).project(flat_block(source, text), target.encode(text))
            cells[f"lossy, {text_name}"] = float(1 - encoding.lossless_T.mean())
            cells[f"masked onto {TARGET}, {text_name}"] = rows.masked_share
            if (name, text_name) == ("gemma3", "Python"):
                report.check(f"masked rows of Python, gemma3 onto {TARGET}", rows.masked_share, "share", at_most=0.01)
        report.row(**cells)
    report.finish(options.json)


if __name__ == "__main__":
    main()
