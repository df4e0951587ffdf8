"""Benchmark of mixtures of experts: `python -m tests.bench.moe`."""
