"""Words, domains and personal data. Rules find what has a form; they do not know names or addresses of people."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from ipaddress import ip_address
from urllib.parse import urlsplit

from services.corpus.cleaning.config import SafetyConfig
from services.corpus.cleaning.filtering import Judge
from services.corpus.cleaning.inputs import input_files
from services.corpus.cleaning.shards import Drop, RawDocument
from services.corpus.cleaning.tally import Tally

_OCTET = r"(?:25[0-5]|2[0-4]\d|1?\d?\d)"
_KEYS = (
    r"AKIA[0-9A-Z]{16}",
    r"gh[pousr]_[A-Za-z0-9]{36,}",
    r"github_pat_\w{22,}",
    r"glpat-[\w-]{20,}",
    r"xox[abprs]-[A-Za-z0-9-]{10,}",
    r"AIza[\w-]{35}",
    r"sk-(?:proj-|ant-)?[\w-]{20,}",
    r"hf_[A-Za-z0-9]{30,}",
    r"eyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]{10,}",
)


@dataclass(frozen=True, slots=True)
class _Kind:
    """A kind of personal data: its form, its stand-in, and a check that the form alone does not do."""

    pattern: re.Pattern[str]
    stand_in: str
    is_one: Callable[[str], bool] = lambda found: True

    def replaced(self, text: str) -> str:
        return self.pattern.sub(lambda match: self.stand_in if self.is_one(match[0]) else match[0], text)


def _is_public(found: str) -> bool:
    try:
        return ip_address(found).is_global
    except ValueError:
        return False


def _is_phone(found: str) -> bool:
    digits = [character for character in found if character.isdigit()]
    return 8 <= len(digits) <= 15 and set(digits) != {"0"}


KINDS = {
    "key": _Kind(
        re.compile(
            r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?-----END [A-Z ]*PRIVATE KEY-----"
            rf"|(?<![\w-])(?:{'|'.join(_KEYS)})(?![\w-])",
            re.DOTALL,
        ),
        "KEY",
    ),
    "email": _Kind(
        re.compile(r"(?<![\w.+%-])[\w.+%-]{1,64}@(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,62})\.)+[A-Za-z]{2,24}(?![\w-])"),
        "name@example.com",
        lambda found: not found.lower().rpartition("@")[2].startswith("example."),
    ),
    "ip": _Kind(
        re.compile(
            rf"(?<![\w.])(?:{_OCTET}\.){{3}}{_OCTET}(?![\w]|\.\d)"
            r"|(?<![\w:.])(?:[0-9A-Fa-f]{1,4}:){2,7}:?(?:[0-9A-Fa-f]{1,4}:){0,5}[0-9A-Fa-f]{1,4}(?![\w:])"
        ),
        "192.0.2.1",
        _is_public,
    ),
    "phone": _Kind(
        re.compile(r"(?<![\w.+-])(?:\+\d{1,3}[ .-]?(?:\(\d{1,4}\)[ .-]?)?\d(?:[ .-]?\d){6,12}"
                   r"|\(\d{3}\) ?\d{3}[ .-]\d{4}|\d{3}[.-]\d{3}[.-]\d{4})(?![\w-]|\.\d)"),
        "+00 000 000000",
        _is_phone,
    ),
}  # fmt: skip
"""Kinds of personal data by the key of the setting; keys come first: a part of one may look like another kind."""


@dataclass(frozen=True, slots=True)
class Safety:
    """Drops documents by words and domains, and replaces personal data."""

    config: SafetyConfig

    def open(self, task: int) -> Judge:
        config = self.config
        severe, mild = _expression(config.severe_words, "severe_words"), _expression(config.mild_words, "mild_words")
        blocked = set(_lines(config.blocked_domains or (), "blocked_domains"))

        def judge(documents: list[RawDocument], tally: Tally) -> list[Drop | None]:
            return [
                _blocked(document, blocked)
                or _worded(document, severe, mild, config.mild_per_thousand_words)
                or _without_personal_data(document, config, tally)
                for document in documents
            ]

        return judge


def _lines(patterns: Sequence[str], setting: str) -> list[str]:
    """Return the lines of files, in lower case, without empty ones and comments."""
    found: list[str] = []
    for file in input_files(patterns, setting) if patterns else ():
        with file.open() as stream:
            try:
                lines = stream.read().decode("utf-8").lower().splitlines()
            except UnicodeDecodeError as error:
                raise ValueError(f"{file.location}: invalid UTF-8 at byte {error.start}") from error
        found += [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    return found


@cache
def _expression(patterns: tuple[str, ...] | None, setting: str) -> re.Pattern[str] | None:
    """Return what finds the words of the lists, longest first, as whole words where they begin and end with letters."""
    words = sorted(set(_lines(patterns or (), setting)), key=lambda word: (-len(word), word))
    if not words:
        return None
    bounded = (
        (r"(?<!\w)" if word[0].isascii() else "") + re.escape(word) + (r"(?!\w)" if word[-1].isascii() else "")
        for word in words
    )
    return re.compile("|".join(bounded))


def _blocked(document: RawDocument, blocked: set[str]) -> Drop | None:
    host = (urlsplit(document.url).hostname or "") if blocked and "://" in document.url else ""
    while host:
        if host in blocked:
            return Drop("blocked_domain", host)
        host = host.partition(".")[2]
    return None


def _worded(
    document: RawDocument, severe: re.Pattern[str] | None, mild: re.Pattern[str] | None, per_thousand: float
) -> Drop | None:
    if severe is None and mild is None:
        return None
    text = document.text.lower()
    if severe is not None and (found := severe.search(text)):
        return Drop("severe_word", found[0])
    if mild is not None and (number := sum(1 for _ in mild.finditer(text))):
        rate = 1000 * number / max(1, len(text.split()))
        if rate > per_thousand:
            return Drop("mild_words", f"{number}, {rate:.1f} per thousand")
    return None


def _without_personal_data(document: RawDocument, config: SafetyConfig, tally: Tally) -> Drop | None:
    text, replaced = document.text, {}
    for name, kind in KINDS.items():
        wish = getattr(config, name)
        found = 0 if wish == "keep" else sum(kind.is_one(match[0]) for match in kind.pattern.finditer(text))
        if found and wish == "drop":
            return Drop(f"has_{name}", f"{found} found")
        if found:
            text = kind.replaced(text)
            replaced[f"replaced_{name}"] = found
    document.text = text
    tally.notes.update(replaced)
    return None
