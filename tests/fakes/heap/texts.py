"""Real text for heaps: the descriptions and sources of the packages that are installed here."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib.metadata import distributions
from itertools import chain, islice
from pathlib import Path


def descriptions() -> Iterator[tuple[str, str]]:
    """Yield name and description (a README, mostly) of each installed package, sorted by name."""
    found = {}
    for distribution in distributions():
        text = distribution.read_text("METADATA") or ""
        _, _, body = text.partition("\n\n")
        if body.strip():
            found[(distribution.name or "").lower()] = body
    yield from sorted(found.items())


def sections(min_words: int = 120, max_words: int = 320) -> list[tuple[str, str]]:
    """Return parts of the descriptions, cut between paragraphs, each with a name."""
    cut = []
    for name, text in descriptions():
        part: list[str] = []
        number = 0
        for paragraph in re.split(r"\n\s*\n", text):
            part.append(paragraph)
            words = sum(len(piece.split()) for piece in part)
            if words >= min_words:
                if words <= max_words:
                    cut.append((f"{name}-{number}", "\n\n".join(part)))
                    number += 1
                part = []
    return cut


def docstrings(package: str, min_words: int = 120) -> Iterator[tuple[str, str]]:
    """Yield the prose of the docstrings of an installed package, as texts of at least `min_words` words each."""
    root = Path(__import__(package).__file__ or "").parent
    seen = set()
    for path in sorted(root.rglob("*.py")):
        found = re.findall(r'"{3}(.*?)"{3}', path.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
        part: list[str] = []
        number = 0
        for paragraph in (piece for text in found for piece in re.split(r"\n\s*\n", text)):
            if len(paragraph.split()) >= 15 and paragraph not in seen and _is_prose(paragraph):
                seen.add(paragraph)
                part.append("\n".join(line.strip() for line in paragraph.strip().splitlines()))
            if sum(len(piece.split()) for piece in part) >= min_words:
                yield f"{path.relative_to(root.parent)}-{number}", "\n\n".join(part)
                part, number = [], number + 1


def _is_prose(text: str) -> bool:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    long_lines = sum(len(line) > 50 for line in lines) / max(1, len(lines))
    letters = sum(c.isalpha() or c.isspace() or c in ",." for c in text) / max(1, len(text))
    return long_lines > 0.5 and letters > 0.92 and not re.search(r"https?:|@|[|{}<>]|:[a-z]+:", text)


def _is_varied(text: str) -> bool:
    """Return whether hardly a run of five words comes twice."""
    words = text.split()
    return len({tuple(words[i : i + 5]) for i in range(len(words) - 4)}) > 0.97 * (len(words) - 4)


def prose(packages: tuple[str, ...] = ("sklearn",), most: int | None = None) -> list[tuple[str, str]]:
    """Return texts that read as prose: docstrings of packages, and parts of descriptions."""
    from_docstrings = (found for package in packages for found in docstrings(package))
    every = chain(from_docstrings, (pair for pair in sections() if _is_prose(pair[1])))
    return list(islice((pair for pair in every if _is_varied(pair[1])), most))


def python_files(package: str, limit: int) -> list[tuple[str, str]]:
    """Return path and text of the first Python files of an installed package."""
    root = Path(__import__(package).__file__ or "").parent
    files = [path for path in sorted(root.rglob("*.py")) if path.stat().st_size > 200][:limit]
    return [(str(path.relative_to(root.parent)), path.read_text(encoding="utf-8")) for path in files]
