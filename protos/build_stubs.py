"""Generates the gRPC stubs: as a hatch build hook (wheels and editable installs) and as `make proto`."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

from grpc_tools import protoc
from hatchling.builders.hooks.plugin.interface import BuildHookInterface

STUBS = Path("build") / "stubs"


def build(root: Path) -> Path:
    """Writes the package `fusion.v1` below `build/stubs` and returns that folder; raises RuntimeError on bad protos."""
    protos, out = root / "protos", root / STUBS
    out.mkdir(parents=True, exist_ok=True)
    files = sorted(str(path.relative_to(protos)) for path in protos.rglob("*.proto"))
    includes = [f"-I{protos}", f"-I{resources.files('grpc_tools') / '_proto'}"]
    outputs = [f"--python_out={out}", f"--pyi_out={out}", f"--grpc_python_out={out}"]
    if protoc.main(["protoc", *includes, *outputs, *files]) != 0:
        raise RuntimeError(f"protoc failed on {', '.join(files)}")
    for folder in {(out / file).parent for file in files}:
        (folder / "__init__.py").write_text('"""Generated from protos/ by the build; do not edit."""\n')
    return out


class StubsHook(BuildHookInterface[Any]):
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        build(Path(self.root))


if __name__ == "__main__":
    print(build(Path(__file__).resolve().parent.parent))
