"""The text of the experiment: documents of two domains from the Python that runs, prose and code."""

from __future__ import annotations

import json
import os
from pathlib import Path
from pydoc_data.topics import topics

_DOCUMENT_BYTES = 1000
"""Most bytes of a document, so that there are many."""


def write_documents(path: Path, bytes_per_domain: int) -> Path:
    """Write a .jsonl file with keys `text` and `domain`: Python's documentation, and modules of its library."""
    library = Path(os.__file__).parent
    origins = {
        "prose": (topics[name] for name in sorted(topics)),
        "code": (file.read_text(encoding="utf-8", errors="ignore") for file in sorted(library.glob("*.py"))),
    }
    lines = []
    for domain, texts in origins.items():
        left = bytes_per_domain
        for text in texts:
            document = text.strip().encode()[:_DOCUMENT_BYTES].decode(errors="ignore")
            if len(document) > _DOCUMENT_BYTES // 4 and left > 0:
                left -= len(document)
                lines.append(json.dumps({"text": document, "domain": domain}))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")
    return path


def domain_of(path: Path) -> dict[bytes, str]:
    """Return the domain of every document of the file, by its text."""
    records = map(json.loads, path.read_text().splitlines())
    return {record["text"].encode(): record["domain"] for record in records}
