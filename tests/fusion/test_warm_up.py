"""Nothing is compiled after a service says that it serves: neither for texts that are sent, nor for stored windows."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numba.core.dispatcher
import pytest

from services.fusion.client import StreamRequest
from tests.fakes.services.plain_fusion import plain_fusion


def compiled_for() -> dict[str, int]:
    """For how many types of arguments each compiled loop has machine code in this process."""
    return {
        f"{module}.{name}": len(value.signatures)
        for module, content in list(sys.modules.items())
        if module.startswith("fusion_core")
        for name, value in vars(content).items()
        if isinstance(value, numba.core.dispatcher.Dispatcher)
    }


def serve_and_ask(folder: Path, alignment: str) -> None:
    with plain_fusion(folder, alignment=alignment, native=alignment == "transport", store="store") as fusion:
        before = compiled_for()
        assert sum(before.values()) > 3
        client = fusion.client()
        client.fuse([b"the man said that it was time", "Zwölf Boxkämpfer — 日本語 👍\r\n\t".encode()])
        for _ in range(2):  # the second time from the store
            stream = client.stream(StreamRequest(dataset="words", split="train", seed=0, num_epochs=1))
            assert len(list(stream)) == fusion.num_windows
        late = {name: count - before.get(name, 0) for name, count in compiled_for().items()}
        assert {name: count for name, count in late.items() if count} == {}


@pytest.mark.drill
@pytest.mark.parametrize("alignment", ["byte", "min_edit", "transport"])
def test_callers_never_wait_for_a_compiler(tmp_path: Path, alignment: str) -> None:
    """In a process of its own: other tests have compiled for theirs."""
    command = [sys.executable, "-m", "tests.fusion.test_warm_up", str(tmp_path), alignment]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]


if __name__ == "__main__":
    serve_and_ask(Path(sys.argv[1]), sys.argv[2])
