"""README, docs/ and CONTRIBUTING.md as the tests read them: code spans, code blocks, tables, links, headings."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
PAGES = tuple(
    str(path.relative_to(REPOSITORY))
    for path in (REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *sorted((REPOSITORY / "docs").glob("*.md")))
)
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def text_of(page: str) -> str:
    return (REPOSITORY / page).read_text(encoding="utf-8")


def code_blocks(page: str, language: str) -> list[str]:
    return [body for found, body in _FENCE.findall(text_of(page)) if found == language]


def prose_of(page: str) -> str:
    """The page without its code blocks."""
    return _FENCE.sub("", text_of(page))


def code_spans(text: str) -> list[str]:
    return re.findall(r"`([^`\n]+)`", text)


def commands(page: str) -> Iterator[str]:
    """Every shell command, a line each: those of the blocks, without comments, and code spans."""
    for block in code_blocks(page, "sh"):
        for line in block.replace("\\\n", " ").splitlines():
            yield from (part.strip() for part in re.split(r"&&|;", line.partition(" #")[0]) if part.strip())
    yield from code_spans(prose_of(page))


def tables(page: str) -> Iterator[tuple[str, list[list[str]]]]:
    """Every table with the heading above it: its rows, the head included, as lists of cells."""
    heading, rows = "", list[list[str]]()
    for line in [*prose_of(page).splitlines(), ""]:
        if line.startswith("|"):
            rows.append([cell.strip() for cell in line.strip().strip("|").split("|")])
            continue
        if rows:
            yield heading, [rows[0], *rows[2:]]
            rows = []
        if line.startswith("#"):
            heading = line.lstrip("# ")


def links(page: str) -> list[str]:
    """Targets of the page's links, those to the web apart."""
    found = re.findall(r"\]\(([^)\s]+)\)", prose_of(page))
    return [target for target in found if "://" not in target]


def anchors(page: str) -> set[str]:
    """The names that GitHub gives the page's headings."""
    headings = re.findall(r"^#+ (.+)$", prose_of(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.replace("`", "").lower()).replace(" ", "-") for heading in headings}
