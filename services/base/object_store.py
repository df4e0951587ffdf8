"""Object stores as pyarrow file systems without folders, for which rights on a prefix are enough.

pyarrow asks for the bucket (HeadBucket) before it makes a folder, which a policy for one prefix refuses, though there
is no folder to make: the name of an object may have any slashes.
"""

from __future__ import annotations

from typing import Any
from urllib.request import getproxies, proxy_bypass

from pyarrow import fs

PROTOCOLS = {"s3", "s3a", "gs", "gcs", "az", "adl", "abfs", "abfss", "oci", "oss", "r2"}
"""Protocols of stores where a file appears when its upload is complete, and folders are only parts of names."""


def without_folders(files: Any) -> Any:
    """Return the file system of an object store so that `create_dir` does nothing."""
    return fs.PyFileSystem(_WithoutFolders(_tuned(files) if isinstance(files, fs.S3FileSystem) else files))


def _tuned(files: Any) -> Any:
    """Return an S3 file system that writes without threads of its own, through the proxy of the environment.

    Threads that copy files wait for parts that its own threads upload, and both come from one pool: enough large files
    at once would wait for ever (https://github.com/apache/arrow/issues/32372). A small file becomes one PutObject.
    """
    _, (options,) = files.__reduce__()
    options |= {"background_writes": False, "allow_delayed_open": True}
    host = options["endpoint_override"] or f"s3.{options['region']}.amazonaws.com"
    proxy = getproxies().get(options["scheme"])
    if proxy and not proxy_bypass(host) and not options["proxy_options"]["host"]:
        options["proxy_options"] = proxy
    return fs.S3FileSystem(**options)


class _WithoutFolders(fs.FileSystemHandler):  # type: ignore[misc]
    """A file system that passes everything on to another but the making of folders."""

    def __init__(self, files: Any) -> None:
        self.files = files

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _WithoutFolders) and bool(self.files == other.files)

    def __hash__(self) -> int:
        return hash(_WithoutFolders)

    def get_type_name(self) -> str:
        return str(self.files.type_name)

    def normalize_path(self, path: str) -> str:
        return str(self.files.normalize_path(path))

    def get_file_info(self, paths: list[str]) -> Any:
        return self.files.get_file_info(paths)

    def get_file_info_selector(self, selector: Any) -> Any:
        return self.files.get_file_info(selector)

    def create_dir(self, path: str, recursive: bool) -> None:
        return

    def delete_dir(self, path: str) -> None:
        self.files.delete_dir(path)

    def delete_dir_contents(self, path: str, missing_dir_ok: bool = False) -> None:
        self.files.delete_dir_contents(path, missing_dir_ok=missing_dir_ok)

    def delete_root_dir_contents(self) -> None:
        self.files.delete_dir_contents("/", accept_root_dir=True)

    def delete_file(self, path: str) -> None:
        self.files.delete_file(path)

    def move(self, src: str, dest: str) -> None:
        self.files.move(src, dest)

    def copy_file(self, src: str, dest: str) -> None:
        self.files.copy_file(src, dest)

    def open_input_stream(self, path: str) -> Any:
        return self.files.open_input_stream(path)

    def open_input_file(self, path: str) -> Any:
        return self.files.open_input_file(path)

    def open_output_stream(self, path: str, metadata: Any) -> Any:
        return self.files.open_output_stream(path, metadata=metadata)

    def open_append_stream(self, path: str, metadata: Any) -> Any:
        return self.files.open_append_stream(path, metadata=metadata)
