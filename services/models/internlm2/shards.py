"""The files with a model's weights: read tensor by tensor, written shard by shard."""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from services.models.internlm2.config import read_json
from services.models.internlm2.layout import Part, Shape
from services.models.weights import write_errors_named

_FORMS = (("model", "safetensors"), ("pytorch_model", "bin"))
"""First words and endings of the files' names, the preferred form first."""


class WeightFiles:
    """The tensors in the weight files of a folder, safetensors or pickled ones; each is read when it is asked for.

    Attributes:
        shapes: of all tensors by name, in the order of the files.
        file_of: the file that a tensor is in.
    """

    def __init__(self, folder: Path) -> None:
        """Read names and shapes; raises ValueError where there are no such files, or one cannot be read."""
        self.shapes: dict[str, Shape] = {}
        self.file_of: dict[str, Path] = {}
        self._opened: dict[Path, _Safetensors | _Pickled] = {}
        for path in weight_files(folder):
            self._opened[path] = _Safetensors(path) if path.suffix == ".safetensors" else _Pickled(path)
            for name, shape in self._opened[path].shapes().items():
                if name in self.file_of:
                    raise ValueError(f"{path}: tensor {name} is in {self.file_of[name].name} as well")
                self.shapes[name], self.file_of[name] = shape, path

    def tensor(self, name: str) -> Tensor:
        """Return one tensor in the type that it is stored in."""
        return self._opened[self.file_of[name]].tensor(name).contiguous()


class _Safetensors:
    def __init__(self, path: Path) -> None:
        try:
            self._file: Any = safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path}: cannot be read: {error}") from error

    def shapes(self) -> dict[str, Shape]:
        return {name: tuple(self._file.get_slice(name).get_shape()) for name in self._file.keys()}  # noqa: SIM118

    def tensor(self, name: str) -> Tensor:
        tensor: Tensor = self._file.get_tensor(name)
        return tensor


class _Pickled:
    """A file of torch.save's; nothing of it is run, and it is mapped into memory where its form allows that."""

    def __init__(self, path: Path) -> None:
        try:
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        except pickle.UnpicklingError as error:
            raise ValueError(f"{path}: holds more than tensors, which is never run here") from error
        except (OSError, RuntimeError, EOFError) as error:
            raise ValueError(f"{path}: cannot be read: {error}") from error
        if not isinstance(loaded, Mapping) or not all(isinstance(value, Tensor) for value in loaded.values()):
            raise ValueError(f"{path}: holds no mapping of names to tensors")
        self._tensors: Mapping[str, Tensor] = loaded

    def shapes(self) -> dict[str, Shape]:
        return {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}

    def tensor(self, name: str) -> Tensor:
        return self._tensors[name]


def weight_files(folder: Path) -> list[Path]:
    """Return the files that the index names, or all of the form; raises ValueError when one or all are missing."""
    for stem, ending in _FORMS:
        index = folder / f"{stem}.{ending}.index.json"
        if index.is_file():
            named = read_json(index).get("weight_map")
            if not isinstance(named, dict) or not all(Path(str(name)).name == name for name in named.values()):
                raise ValueError(f"{index}: weight_map does not map tensors to files of the folder")
            files = [folder / name for name in sorted(set(named.values()))]
        else:
            files = sorted(folder.glob(f"{stem}*.{ending}"))
        if missing := [path for path in files if not path.is_file()]:
            raise ValueError(f"{missing[0]} is missing, which {index.name} names")
        if files:
            return files
    raise ValueError(f"{folder}: holds no weights (model*.safetensors or pytorch_model*.bin)")


def check_tensors(where: Path, found: Mapping[str, Shape], expected: Mapping[str, Shape]) -> None:
    """Raise ValueError naming the first tensor that is missing, has another shape, or is one too many."""
    for name, shape in expected.items():
        if name not in found:
            raise ValueError(f"{where}: tensor {name} is missing")
        if found[name] != shape:
            raise ValueError(f"{where}: tensor {name} is {list(found[name])}, by config.json it is {list(shape)}")
    if surplus := [name for name in found if name not in expected]:
        raise ValueError(f"{where}: tensor {surplus[0]} belongs to no such model")


def write_shards(
    folder: Path,
    shards: Sequence[Sequence[Part]],
    make: Callable[[Part], dict[str, Tensor]],
    report: Callable[[str, float], None],
) -> int:
    """Write a file of safetensors for every list of parts, and the index where there are several.

    The tensors of one file are in memory at a time. Returns the number of values in all files.
    """
    num_values, num_bytes, weight_map = 0, 0, dict[str, str]()
    for number, shard in enumerate(shards):
        name = f"model-{number + 1:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else "model.safetensors"
        report(f"shard {number + 1} of {len(shards)}", number / len(shards))
        tensors = {key: tensor for part in shard for key, tensor in make(part).items()}
        with write_errors_named(folder):
            save_file(tensors, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
        num_values += sum(tensor.numel() for tensor in tensors.values())
        num_bytes += sum(tensor.nbytes for tensor in tensors.values())
        del tensors
    if len(shards) > 1:
        index = {"metadata": {"total_size": num_bytes}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return num_values
