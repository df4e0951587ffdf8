"""Files of code repositories joined to long documents, each file behind those that it imports (Guo et al. 2024)."""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath

from services.corpus.cleaning.shards import DROPPED, KEPT, RawDocument, ShardWriter, StepFiles
from services.corpus.cleaning.tally import Tally

_IMPORTS = {
    "python": re.compile(r"^[ \t]*(?:from[ \t]+(\.*[\w.]*)[ \t]+import[ \t]+(.*)|import[ \t]+([\w., \t]+))", re.M),
    "c": re.compile(r'^[ \t]*#[ \t]*include[ \t]*["<]([^">]+)[">]', re.M),
    "javascript": re.compile(r"""(?:from|require\(|import)[ \t]*\(?["'](\.[^"']+)["']"""),
    "java": re.compile(r"^[ \t]*import[ \t]+(?:static[ \t]+)?([\w.]+)", re.M),
}
_LIKE = {"cpp": "c", "cuda": "c", "typescript": "javascript", "kotlin": "java", "scala": "java"}


def join_repositories(source: StepFiles, num_shards: int, max_bytes: int, task: int, folder: Path) -> Tally:
    """Write a shard: its documents that are in no repository, and the repositories that fall to this task."""
    tally, files = Tally(), dict[str, list[RawDocument]]()
    with ShardWriter(folder / KEPT) as kept, ShardWriter(folder / DROPPED, with_reasons=True):
        for shard in range(num_shards):
            for batch in source.documents(shard):
                for document in batch:
                    if document.kind == "code" and document.repository:
                        if zlib.crc32(document.repository.encode()) % num_shards == task:
                            tally.take(document.num_bytes)
                            files.setdefault(document.repository, []).append(document)
                    elif shard == task:
                        tally.take(document.num_bytes)
                        kept.write(document)
                        tally.keep(document.num_bytes)
        for name in sorted(files):
            joined = list(_joined(name, in_order(files[name]), max_bytes))
            tally.joined += len(files[name]) - len(joined)
            for document in joined:
                kept.write(document)
                tally.keep(document.num_bytes)
    return tally


def in_order(files: Iterable[RawDocument]) -> list[RawDocument]:
    """Return the files of a repository, each behind those that it imports; cycles are broken by the paths' order."""
    by_path = {file.path or file.id: file for file in sorted(files, key=lambda file: (file.path, file.id))}
    needs = {path: sorted(set(_needed(path, file, by_path)) - {path}) for path, file in by_path.items()}
    order, seen = [], set[str]()
    for root in by_path:
        stack = [(root, iter(needs[root]))] if root not in seen else []
        seen.add(root)
        while stack:
            path, rest = stack[-1]
            following = next((need for need in rest if need not in seen), None)
            if following is None:
                order.append(by_path[path])
                stack.pop()
            else:
                seen.add(following)
                stack.append((following, iter(needs[following])))
    return order


def _needed(path: str, file: RawDocument, by_path: Mapping[str, RawDocument]) -> Iterator[str]:
    """Yield the paths of the files of the repository that a file imports."""
    language = _LIKE.get(file.language, file.language)
    if (pattern := _IMPORTS.get(language)) is None:
        return
    for match in pattern.finditer(file.text):
        if language == "python":
            candidates = list(_python_files(path, match))
        elif language == "java":
            candidates = [match[1].replace(".", "/") + ending for ending in (".java", ".kt", ".scala")]
        elif language == "javascript":
            base = _resolved(PurePosixPath(path).parent / match[1])
            candidates = [base, *(base + ending for ending in (".js", ".ts", ".jsx", ".tsx", "/index.js", "/index.ts"))]
        else:
            candidates = [_resolved(PurePosixPath(path).parent / match[1]), match[1]]
        for candidate in candidates:
            yield from _found(candidate, by_path)


def _found(candidate: str, by_path: Mapping[str, RawDocument]) -> Iterator[str]:
    """Yield the file at a path, below any top folder of sources such as `src`."""
    for folder in ("", "src/", "lib/", "include/", "src/main/java/"):
        if folder + candidate in by_path:
            yield folder + candidate


def _python_files(path: str, match: re.Match[str]) -> Iterator[str]:
    modules: Sequence[str]
    if match[3] is not None:
        modules = [part.split()[0] for part in match[3].split(",") if part.strip()]
        base = ""
    else:
        dots = len(match[1]) - len(match[1].lstrip("."))
        parents = PurePosixPath(path).parts[: len(PurePosixPath(path).parts) - dots] if dots else ()
        base = "/".join(parents)
        package = match[1].lstrip(".")
        names = [part.split()[0] for part in match[2].strip("() \\").split(",") if part.strip()]
        modules = [package, *(f"{package}.{name}" if package else name for name in names)]
    for module in modules:
        place = "/".join(part for part in (base, module.replace(".", "/")) if part)
        yield from (f"{place}.py", f"{place}/__init__.py")


def _resolved(path: PurePosixPath) -> str:
    """Return a path without `.` and `..`."""
    parts: list[str] = []
    for part in path.parts:
        if part == "..":
            parts = parts[:-1]
        elif part != ".":
            parts.append(part)
    return "/".join(parts)


def _joined(name: str, files: Sequence[RawDocument], max_bytes: int) -> Iterator[RawDocument]:
    """Yield documents of at most `max_bytes`, or of one file, with a line end between two files."""
    group: list[RawDocument] = []
    size = 0
    number = 0
    for file in files:
        if group and size + 1 + file.num_bytes > max_bytes:
            yield _document(f"{name}#{number}", group)
            group, size, number = [], 0, number + 1
        size += file.num_bytes + bool(group)
        group.append(file)
    if group:
        yield _document(f"{name}#{number}", group)


def _document(document_id: str, group: Sequence[RawDocument]) -> RawDocument:
    first = group[0]
    text = "\n".join(file.text for file in group)
    return RawDocument(document_id, text, first.url, first.domain, first.language, "code", first.repository, first.path)
