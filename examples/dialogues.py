"""Write the English dialogues of PyPI's chatterbot-corpus (BSD) as conversations, one on a line, for a recipe to read.

    python examples/dialogues.py dialogues.jsonl

Utterances are the user's and the assistant's in turn. A dialogue that ends with the user's loses that one.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import yaml

from services.corpus.package_text import PackageOrigin, package_files

PACKAGE = PackageOrigin(
    registry="pypi",
    name="chatterbot-corpus",
    version="1.3.3",
    glob="chatterbot_corpus/data/english/*.yml",
    sha256="8d43897a47cdb00447970b994008429aec2f89e092aa4aa62a6b9320bf069a3b",
)


def conversations(path: Path) -> Iterator[dict[str, list[dict[str, str]]]]:
    for dialogue in yaml.safe_load(path.read_text(encoding="utf-8"))["conversations"]:
        texts = [str(text).strip() for text in dialogue]
        pairs = [pair for pair in zip(texts[::2], texts[1::2], strict=False) if all(pair)]
        messages = [
            {"role": role, "content": text}
            for pair in pairs
            for role, text in zip(("user", "assistant"), pair, strict=True)
        ]
        if messages:
            yield {"messages": messages}


def main(output: Path) -> None:
    lines = [json.dumps(row, ensure_ascii=False) for path in package_files(PACKAGE) for row in conversations(path)]
    unique = list(dict.fromkeys(lines))
    output.write_text("\n".join(unique) + "\n", encoding="utf-8")
    print(f"{output}: {len(unique)} conversations, {len(lines) - len(unique)} repeated ones left out")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python examples/dialogues.py OUTPUT.jsonl")
    main(Path(sys.argv[1]))
