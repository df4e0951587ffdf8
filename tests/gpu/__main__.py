"""The parts that a GPU decides, checked in a few minutes: losses, step, workers, checkpoint, experts, projection.

    make gpu-check
    python -m tests.gpu [--device cuda] [--json FILE] [--quick]

It needs torch, transformers, numba and pyarrow, with pydantic, psutil and rich; no Ray and no vLLM. A part whose
packages are not there is left out, and the table says so. Without CUDA everything runs on the CPU, which shows that the
program works, and nothing about a GPU.
"""

from __future__ import annotations

import importlib
import platform
import time

import torch

from tests.bench.parts.report import Report, arguments

PARTS = ("losses", "step", "training", "checkpoint", "experts", "projection")


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="as torch names it")
    options = parser.parse_args()
    device = torch.device(options.device)
    torch.backends.cuda.matmul.allow_tf32 = False
    report = Report("gpu")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU"
    report.row(table="device", device=name, torch=torch.__version__)
    for part in PARTS:
        started = time.perf_counter()
        try:
            importlib.import_module(f"tests.gpu.{part}").check(report, device, quick=options.quick)
        except ImportError as error:
            report.row(table="parts", part=part, seconds=None, left_out=str(error))
        else:
            report.row(table="parts", part=part, seconds=time.perf_counter() - started, left_out=None)
    report.finish(options.json)


if __name__ == "__main__":
    main()
