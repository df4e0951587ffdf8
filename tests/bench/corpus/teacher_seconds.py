"""Seconds that real sources spend on a heap with and without `curate`, see `teachers.py`.

    python -m tests.bench.corpus.teacher_seconds [--json FILE] [--quick]

vLLM's workers import this file again, and do not start where Numba has been imported: nothing is, up here.
"""


def main() -> None:
    from tests.bench.corpus import teachers

    teachers.main()


if __name__ == "__main__":
    main()
