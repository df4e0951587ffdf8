"""Settings that have to be made before anything else is imported."""

import os

from hypothesis import settings

# Ray reads the mode once, when it is imported; clusters of the tests use Ray's token like those of `fusion up`.
os.environ.setdefault("RAY_AUTH_MODE", "token")

# Examples are random on a developer's machine and the same every time in CI; how long one takes is no verdict.
settings.register_profile("developer", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "developer")
