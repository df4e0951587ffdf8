"""A source at its limits: the engine's front end, the way over gRPC, the service's ceiling, its memory, its formats.

The model is SmolLM2-135M-Instruct, K = 64; texts are Python's own documentation, cut into windows of an exact number
of tokens. Figures of the front end are CPU seconds of one core, the others wall time of the whole machine, with the
client on it.
"""

from __future__ import annotations

from collections.abc import Callable
from pydoc_data.topics import topics

from tests.bench.parts.report import Report, arguments


def main() -> None:
    # Not at the head of the file: vLLM's processes import it as their main module, and numba beside them breaks vLLM.
    from fusion_core.vocabulary import Vocabulary
    from services.deploy.local_ray import enable_ray_authentication
    from services.models.catalogue import resolve_model
    from services.models.fetch import fetch
    from tests.bench.parts.source_measurements import MEASUREMENTS, WITH_BARE_ENGINE
    from tests.bench.parts.source_services import MODEL, BareEngine, Case

    parser = arguments(__doc__ or "")
    parts = [measure.__name__.removeprefix("measure_") for measure in (*WITH_BARE_ENGINE, *MEASUREMENTS)]
    parser.add_argument("--only", choices=parts, nargs="+", default=parts, help="measure only these")
    options = parser.parse_args()
    enable_ray_authentication()
    fetch(MODEL)
    text = "\n".join(topics[name] for name in sorted(topics)).encode()
    case = Case(Vocabulary.from_pretrained(resolve_model(MODEL)), text, options.quick)
    report = Report("source")

    def wanted(measure: Callable[..., None]) -> bool:
        return measure.__name__.removeprefix("measure_") in options.only

    for measure in filter(wanted, MEASUREMENTS):
        measure(report, case)
    if any(map(wanted, WITH_BARE_ENGINE)):
        bare = BareEngine()
        try:
            for measure_both in filter(wanted, WITH_BARE_ENGINE):
                measure_both(report, case, bare)
        finally:
            bare.close()
    report.finish(options.json)


if __name__ == "__main__":
    main()
