"""Files of models on a hub or in an object store, downloaded so that an interrupted download goes on where it stopped.

Only the data of a model is downloaded: configuration, tokenizer, weights as safetensors. Pickled weights and code are
not.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
from pyarrow import fs

from services.base.files import open_location
from services.base.home import FetchError
from services.models.packages import file_sha256
from services.models.reference import ModelReference

Report = Callable[[str, float], None]
"""A function of the current step's name, and of the share of the whole that is done, from 0 to 1."""

_WANTED = ("*.json", "*.jinja", "*.safetensors", "*.model", "*.tiktoken", "merges.txt", "vocab.txt", "LICENSE*")
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle")
_CHUNK_BYTES = 8 * 2**20
_HUB_CONNECTIONS = 4
_DOWNLOADED = 0.9
"""Share of a fetch that is the download; checksums are the rest."""


def choose_files(reference: ModelReference, sizes: Mapping[str, int]) -> dict[str, int]:
    """Return names and sizes of the files to download, among those directly in the model's folder.

    Raises ValueError when there is no model among them, or one with pickled weights only.
    """
    wanted = {name: size for name, size in sizes.items() if any(fnmatchcase(name, pattern) for pattern in _WANTED)}
    if {"model.safetensors", "model.safetensors.index.json"} & wanted.keys():  # the same weights in their first form
        wanted = {name: size for name, size in wanted.items() if not fnmatchcase(name, "consolidated*.safetensors")}
    if not {"config.json", "tokenizer.json"} & wanted.keys():
        raise ValueError(f"{reference.url} has no config.json and no tokenizer.json, so it is no model folder")
    pickled = sorted(name for name in sizes if any(fnmatchcase(name, pattern) for pattern in _PICKLED))
    if pickled and not any(name.endswith(".safetensors") for name in wanted):
        raise ValueError(
            f"{reference.url} has pickled weights only ({pickled[0]}), which run code when they are read; "
            "safetensors are needed"
        )
    return wanted


def check_shards(reference: ModelReference, folder: Path) -> None:
    """Raise FetchError unless every file of weights that the index names is there."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        named = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        if missing := sorted(name for name in named if not (folder / name).is_file()):
            raise FetchError(f"{reference.url}: {missing[0]} is missing, which {index.name} names")


def download_from_hub(reference: ModelReference, folder: Path, report: Report) -> dict[str, Any]:
    """Download a model of the hub into a folder; return its origin for the record, the commit included.

    Address, token and proxy come from the environment: HF_ENDPOINT, HF_TOKEN, HTTPS_PROXY. Raises FetchError.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    where = f"{reference.url} (at {constants.ENDPOINT})"
    if constants.HF_HUB_OFFLINE:
        raise FetchError(f"{reference.url}: HF_HUB_OFFLINE is set, and the model was not fetched before")
    try:
        api = HfApi(endpoint=constants.ENDPOINT)
        info = api.model_info(reference.repository, revision=reference.revision, files_metadata=True)
        there = {file.rfilename: file for file in info.siblings or () if "/" not in file.rfilename}
        chosen = choose_files(reference, {name: file.size or 0 for name, file in there.items()})
        total, done = sum(chosen.values()), 0
        check_room(reference, total, folder)
        with ThreadPoolExecutor(_HUB_CONNECTIONS) as pool:
            running = {pool.submit(_get, reference, info.sha, there[name], folder / name): name for name in chosen}
            try:
                for finished in as_completed(running):
                    finished.result()
                    done += chosen[running[finished]]
                    report(f"downloading {reference.repository}", _DOWNLOADED * done / max(total, 1))
            finally:
                pool.shutdown(cancel_futures=True)
    except GatedRepoError as error:
        raise FetchError(f"{where} is gated: accept its terms there, and set HF_TOKEN to a token of yours") from error
    except RevisionNotFoundError as error:
        raise FetchError(f"{where}: there is no revision {reference.revision}") from error
    except RepositoryNotFoundError as error:
        raise FetchError(f"{where}: no such model, or HF_TOKEN is not set to a token that may read it") from error
    except hub_errors() as error:
        if isinstance(error, OSError) and error.errno in {errno.ENOSPC, errno.EDQUOT}:
            raise
        raise FetchError(f"{where}: {type(error).__name__}: {str(error).splitlines()[0]}") from error
    _keep_only(chosen, folder)
    return {"hub": reference.repository, "revision": info.sha, "requested": reference.revision}


def _get(reference: ModelReference, commit: str | None, file: Any, path: Path) -> None:
    """Download one file of the hub, from where an earlier attempt stopped; check it against the hash that is known."""
    from huggingface_hub import constants, get_token, hf_hub_download, hf_hub_url
    from huggingface_hub.file_download import http_get

    if file.size is not None and file.size > constants.MAX_HTTP_DOWNLOAD_SIZE:  # only through the hub's own protocol
        hf_hub_download(
            reference.repository, file.rfilename, revision=commit, local_dir=path.parent, endpoint=constants.ENDPOINT
        )
        return
    url = hf_hub_url(reference.repository, file.rfilename, revision=commit, endpoint=constants.ENDPOINT)
    headers = {"Authorization": f"Bearer {token}"} if (token := get_token()) else {}
    sha256 = file.lfs.sha256 if file.lfs is not None else None
    with _resumed(path, sha256 or file.blob_id or str(commit), restart=file.size is None) as local:
        http_get(url, local, resume_size=local.tell(), headers=headers, expected_size=file.size)
    if sha256 is not None and file_sha256(path) != sha256:
        path.unlink()
        raise FetchError(f"{reference.url}: {file.rfilename} has another SHA-256 than the hub announces")


def hub_errors() -> tuple[type[Exception], ...]:
    """Return the errors of a download from a hub that fails.

    OSError covers full disks too. RuntimeError: when one thread of the client loses its connection, it closes those of
    the others, whose next request then raises one.
    """
    from huggingface_hub.errors import HfHubHTTPError

    client_error = next(base for base in HfHubHTTPError.__bases__ if base is not OSError)
    return client_error, OSError, RuntimeError


def download_from_store(reference: ModelReference, folder: Path, report: Report) -> dict[str, Any]:
    """Download a model from an object store into a folder; return its origin for the record. Raises FetchError."""
    try:
        files, root = open_location(reference.url, "model")
        infos = {info.base_name: info for info in files.get_file_info(fs.FileSelector(root, allow_not_found=True))}
        sizes = {name: info.size for name, info in infos.items() if info.type == fs.FileType.File}
        chosen = choose_files(reference, sizes)
        total, done = sum(chosen.values()), 0
        check_room(reference, total, folder)
        for name, size in chosen.items():
            for there in _download(files, infos[name], folder / name):
                report(f"downloading {name}", _DOWNLOADED * (done + there) / max(total, 1))
            done += size
    except (OSError, pa.ArrowException) as error:
        raise FetchError(f"{reference.url}: {str(error).splitlines()[0]}") from error
    _keep_only(chosen, folder)
    return {"url": reference.url}


def _keep_only(names: Iterable[str], folder: Path) -> None:
    """Delete the notes of downloads beside the files, and other files that an earlier attempt downloaded."""
    shutil.rmtree(folder / ".cache", ignore_errors=True)
    for path in set(folder.iterdir()) - {folder / name for name in names}:
        path.unlink()


def check_room(reference: ModelReference, num_bytes: int, folder: Path) -> None:
    """Raise FetchError when the disk of a folder has no room for this many bytes beside those that are there."""
    there = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    free = shutil.disk_usage(folder).free
    if free < num_bytes - there:
        need, have = (num_bytes - there) / 1e9, free / 1e9
        raise FetchError(f"{reference.url} needs {need:.1f} GB, {have:.1f} GB are free on the disk of {folder.parent}")


def _download(files: Any, info: Any, path: Path) -> Iterator[int]:
    """Download one file of an object store, from where an earlier attempt stopped; yield how many bytes are there."""
    with files.open_input_file(info.path) as remote:
        version = (remote.metadata() or {}).get("ETag") or f"{info.size} {info.mtime_ns}"
        with _resumed(path, version if isinstance(version, str) else version.decode()) as local:
            remote.seek(local.tell())
            yield local.tell()
            while data := remote.read(_CHUNK_BYTES):
                local.write(data)
                yield local.tell()
    if (size := path.stat().st_size) != info.size:
        path.unlink()
        raise FetchError(f"{info.path}: {size} bytes came, {info.size} were announced")


@contextmanager
def _resumed(path: Path, version: str, *, restart: bool = False) -> Iterator[BinaryIO]:
    """Open a file at its end for the rest of a download; empty when it is of another version, noted beside it."""
    noted = path.with_name(f"{path.name}.version")
    if restart or not noted.is_file() or noted.read_text() != version:
        path.unlink(missing_ok=True)
        noted.write_text(version)
    with path.open("r+b" if path.exists() else "w+b") as file:
        file.seek(0, os.SEEK_END)
        yield file
