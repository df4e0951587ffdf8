"""Malformed input at scale: `python -m tests.fuzz --cases 20000`. The tests run a part of it."""
