"""Code of a repository in the order of its imports, joined to documents of a length."""

from __future__ import annotations

from pathlib import Path

import pytest

from services.corpus.cleaning.config import CurateConfig
from services.corpus.cleaning.shards import RawDocument
from services.corpus.cleaning.steps.repositories import in_order
from tests.corpus.cleaning.conftest import rows_of, run_clean


def order(language: str, files: dict[str, str]) -> list[str]:
    documents = [RawDocument(path, text, kind="code", language=language, path=path) for path, text in files.items()]
    return [document.path for document in in_order(documents)]


@pytest.mark.parametrize(
    ("language", "files", "before"),
    [
        ("python", {"a.py": "from pkg.low import x", "pkg/low.py": "import os"}, [("pkg/low.py", "a.py")]),
        ("python", {"p/a.py": "from . import z\nfrom .y import (q)", "p/z.py": "", "p/y.py": "from .z import r"},
         [("p/z.py", "p/y.py"), ("p/y.py", "p/a.py")]),
        ("python", {"a.py": "import lib.m, os", "src/lib/m.py": "", "src/lib/__init__.py": ""},
         [("src/lib/m.py", "a.py")]),
        ("c", {"main.c": '#include "util/u.h"\n#include <stdio.h>', "util/u.h": ""}, [("util/u.h", "main.c")]),
        ("typescript", {"app/a.ts": "import {b} from '../lib/b'", "lib/b.ts": ""}, [("lib/b.ts", "app/a.ts")]),
        ("java", {"a/A.java": "import a.Z;", "a/Z.java": ""}, [("a/Z.java", "a/A.java")]),
    ],
)  # fmt: skip
def test_a_file_stands_behind_those_that_it_imports(
    language: str, files: dict[str, str], before: list[tuple[str, str]]
) -> None:
    found = order(language, files)
    assert sorted(found) == sorted(files)
    for first, second in before:
        assert found.index(first) < found.index(second)


def test_cycles_and_long_chains_end(tmp_path: Path) -> None:
    assert sorted(order("python", {"a.py": "import b", "b.py": "import a", "c.py": "import c"})) == [
        "a.py",
        "b.py",
        "c.py",
    ]
    chain = {f"m{n}.py": f"import m{n + 1}" for n in range(3000)}
    assert order("python", chain) == [f"m{n}.py" for n in reversed(range(3000))]


def test_joined_documents_hold_all_files_up_to_the_length(tmp_path: Path) -> None:
    for repository in ("one", "two", "three"):
        folder = tmp_path / "raw" / repository
        folder.mkdir(parents=True)
        for n in range(9):
            (folder / f"m{n}.py").write_text(f"import m{n + 1}\n# {repository} {n}\n" + f"value_{n} = {n}\n" * 20)
    (tmp_path / "raw" / "one" / "readme.md").write_text("A text that is no code.")
    config = CurateConfig.model_validate(
        {"files": [f"{tmp_path}/raw/**/*.*"], "shards": 2, "rules": None, "near_duplicates": None,
         "repositories": {"max_bytes": 1024}}
    )  # fmt: skip
    ledger = run_clean(config, tmp_path / "out")
    rows = rows_of(tmp_path / "out", "documents/*.parquet")
    code = [row for row in rows if row["kind"] == "code"]
    assert len(rows) == len(code) + 1
    assert ledger["documents_in"] == 28 == ledger["kept"] + ledger["dropped"] + ledger["joined"]
    assert ledger["kept"] == len(rows)
    assert all(len(row["text"].encode()) <= 1024 for row in code)
    for repository in ("one", "two", "three"):
        parts = sorted((row for row in code if row["repository"] == repository), key=lambda row: row["id"])
        assert len(parts) > 1
        whole = "\n".join(row["text"] for row in parts)
        places = [whole.index(f"# {repository} {n}\n") for n in range(9)]
        assert places == sorted(places, reverse=True)
