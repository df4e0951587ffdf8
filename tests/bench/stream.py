"""The fused stream at its limits: against its slowest source, its ceiling, and with a consumer that stalls.

Sources are of engine `synthetic` with the tokenizers of SmolLM2 and Gemma 3, top_k 64; the target has 4,096 tokens of
its own, k 64. Texts are Python's own documentation in windows of 8,192 bytes. Everything (sources, proxy, fusion
replica and client) runs on this machine, over real gRPC through Ray Serve. Rates are of bytes of text, which mean the
same in every vocabulary, and shown in tokens as well.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from tests.bench.parts.report import Report, arguments


def main() -> None:
    from services.deploy.local_ray import enable_ray_authentication

    enable_ray_authentication()
    from services.models.fetch import fetch
    from tests.bench.parts.stream_measurements import MEASUREMENTS
    from tests.bench.parts.stream_services import MODELS, Bench

    parser = arguments(__doc__ or "")
    parts = [measure.__name__.removeprefix("measure_") for measure in MEASUREMENTS]
    parser.add_argument("--only", choices=parts, nargs="+", default=parts, help="measure only these")
    options = parser.parse_args()
    models = {name: fetch(name) for name in MODELS}
    report = Report("stream")

    def wanted(measure: Callable[..., None]) -> bool:
        return measure.__name__.removeprefix("measure_") in options.only

    with tempfile.TemporaryDirectory(prefix="bench-stream-") as folder:
        os.environ["FUSION_HOME"] = str(Path(folder) / "home")
        bench = Bench(Path(folder), models, options.quick)
        for measure in filter(wanted, MEASUREMENTS):
            measure(report, bench)
    report.finish(options.json)


if __name__ == "__main__":
    main()
