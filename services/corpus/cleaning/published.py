"""The documents that cleaning leaves: a folder that the corpus reads, beside the steps or copied from there."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa

from services.base.atomic import whole_folder
from services.base.credentials import without_credentials
from services.base.errors import SettingError
from services.base.files import Files, join_location, open_location
from services.corpus.cleaning.config import CurateConfig
from services.corpus.cleaning.shards import StepFiles
from services.corpus.cleaning.tasks import Step

DOCUMENTS, LEDGER = "documents", "ledger.json"
_MADE_FROM = ".made_from"
"""File beside the documents with the identity of the last step: they are whole where it is there."""
_NOT_DECIDING = frozenset({"workers", "seconds_per_megabyte", "folder"})


def publish(out: Files, last: Step, identity: str) -> None:
    """Put the last step's files into one folder; on a disk it appears whole, elsewhere its mark comes last."""
    mark = f"{DOCUMENTS}/{_MADE_FROM}"
    if (out.read(mark) or b"").decode() == identity:
        return
    step = StepFiles(out, last.name)
    files = [
        f"{step.folder(task)}/{name}"
        for task in range(last.num_tasks)
        for name in sorted(out.sizes(step.folder(task)))
        if name.endswith(".parquet")
    ]
    if (root := out.local_folder) is None:
        out.delete(mark)
        out.delete_all(DOCUMENTS)
        for file in files:
            out.copy(file, f"{DOCUMENTS}/{Path(file).name}")
        out.write(mark, identity.encode())
        return
    with whole_folder(root / DOCUMENTS, replace=True) as folder:
        for file in files:
            try:
                os.link(root / file, folder / Path(file).name)
            except OSError:
                shutil.copyfile(root / file, folder / Path(file).name)
        (folder / _MADE_FROM).write_text(identity)


def check_curated(config: CurateConfig, location: Path | str) -> dict[str, Any]:
    """Return the ledger in a folder or URL; SettingError when it holds no documents that these settings made.

    Raises ValueError naming `folder` for a URL that cannot be opened.
    """
    place = without_credentials(join_location(location, LEDGER))
    files, root = open_location(location, "folder")
    try:
        with files.open_input_stream(f"{root}/{LEDGER}") as stream:
            ledger: dict[str, Any] = json.loads(stream.read())
        made_with = ledger["settings"]
    except FileNotFoundError as error:
        raise SettingError("files", "they are not cleaned yet; run `fusion corpus` with this recipe") from error
    except (OSError, pa.ArrowException) as error:
        raise SettingError("folder", f"{place} cannot be read: {without_credentials(str(error))}") from error
    except (ValueError, KeyError) as error:
        raise SettingError("files", f"{place} is damaged; run `fusion corpus` again") from error
    asked = config.model_dump(mode="json")
    if changed := sorted(key for key in asked if key not in _NOT_DECIDING and asked[key] != made_with.get(key)):
        raise SettingError(changed[0], "changed since the files were cleaned; run `fusion corpus` again")
    return ledger


def copy_documents(location: str, identity: str, folder: Path) -> None:
    """Copy the documents from a URL into `folder`, which appears whole; nothing is done where it has them.

    The files' times are made from the identity, so that a corpus is the same with copies made at another time.
    SettingError when `location` holds other documents. Rights to read are enough.
    """
    if (folder / _MADE_FROM).is_file() and (folder / _MADE_FROM).read_text() == identity:
        return
    out = Files(location, "folder", read_only=True)
    if (out.read(f"{DOCUMENTS}/{_MADE_FROM}") or b"").decode() != identity:
        raise SettingError("files", "their documents are not whole; run `fusion corpus` again")
    changed = int(hashlib.sha256(identity.encode()).hexdigest()[:12], 16)
    with whole_folder(folder, replace=True) as partial:
        for name in out.sizes(DOCUMENTS):
            with out.open(f"{DOCUMENTS}/{name}") as stream, (partial / name).open("wb") as file:
                shutil.copyfileobj(stream, file, 1 << 23)
            os.utime(partial / name, ns=(changed, changed))
