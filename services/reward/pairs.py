"""Preference pairs: rows with a prompt, a better and a worse answer, and the domain whose wish decided."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from services.base.errors import SettingError
from services.corpus.readers import local_files
from services.wire.messages import Message, check_messages

_KEY = "data"


@dataclass(frozen=True, slots=True)
class Pair:
    """Two answers to the same messages, the better one first, by the wish of a domain."""

    messages: list[Message]
    chosen: str
    rejected: str
    domain: str


def read_pairs(patterns: Sequence[str], domains: Iterable[str]) -> list[Pair]:
    """Return the pairs of all files, in order; raises SettingError naming file, line and key of one that is none."""
    try:
        files = local_files(patterns)
    except SettingError as error:
        raise SettingError(_KEY, error.problem) from error
    known, pairs = list(domains), []
    for path in files:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    pairs.append(_pair(line, f"{path}, line {number}", known))
    return pairs


def write_pairs(path: Path, pairs: Iterable[Pair]) -> None:
    """Write pairs as rows that `read_pairs` reads."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = (json.dumps(asdict(pair), ensure_ascii=False) + "\n" for pair in pairs)
    path.write_text("".join(rows), encoding="utf-8")


def split_pairs(pairs: Sequence[Pair], held_out_share: float) -> tuple[list[Pair], list[Pair]]:
    """Return the pairs to train on, and those held out; all pairs of a prompt are on the same side.

    The side is a function of the prompt alone, so that more data moves no prompt to the other side.
    """
    sides: tuple[list[Pair], list[Pair]] = ([], [])
    for pair in pairs:
        digest = hashlib.blake2b(json.dumps(pair.messages, sort_keys=True).encode(), digest_size=8).digest()
        sides[int.from_bytes(digest, "little") < held_out_share * 2**64].append(pair)
    return sides


def fingerprint(pairs: Iterable[Pair]) -> str:
    """Return a hash of the pairs in their order."""
    digest = hashlib.sha256()
    for pair in pairs:
        digest.update(json.dumps(asdict(pair), sort_keys=True).encode() + b"\n")
    return digest.hexdigest()[:32]


def messages_of(row: Mapping[str, Any]) -> list[Message]:
    """Return the conversation that a row's answers reply to; raises ValueError naming the key that is wrong."""
    given = [key for key in ("prompt", "messages") if key in row]
    if len(given) != 1:
        raise ValueError("needs one of the keys prompt and messages")
    value = row[given[0]]
    if given == ["prompt"] and isinstance(value, str):
        return [{"role": "user", "content": value}]
    try:
        check_messages(value)
    except ValueError as error:
        raise ValueError(str(error).replace("messages", given[0], 1)) from error
    if not value or value[-1]["role"] == "assistant":
        raise ValueError(f"{given[0]}: must hold the messages before the answer, at least one")
    return list(value)


def _pair(line: bytes, where: str, domains: Sequence[str]) -> Pair:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise SettingError(_KEY, f"{where}: not JSON: {error}") from error
    if not isinstance(row, dict):
        raise SettingError(_KEY, f"{where}: expected an object")
    try:
        messages = messages_of(row)
        chosen, rejected = (_answer(row, key) for key in ("chosen", "rejected"))
    except ValueError as error:
        raise SettingError(_KEY, f"{where}: {error}") from error
    domain = row.get("domain", domains[0] if len(domains) == 1 else None)
    if not isinstance(domain, str) or domain not in domains:
        raise SettingError(_KEY, f"{where}: domain: {domain!r} is none of reward.domains: {', '.join(domains)}")
    if chosen == rejected:
        raise SettingError(_KEY, f"{where}: chosen and rejected are the same answer")
    return Pair(messages, chosen, rejected, domain)


def _answer(row: Mapping[str, Any], key: str) -> str:
    """Return an answer: a string, or as TRL's data sets have it, a list with the assistant's message alone."""
    value = row.get(key)
    if (
        isinstance(value, list)
        and len(value) == 1
        and isinstance(value[0], dict)
        and value[0].get("role") == "assistant"
    ):
        value = value[0].get("content")
    if not isinstance(value, str):
        raise ValueError(f"{key}: must be a string, or a list with the assistant's message alone")
    return value
