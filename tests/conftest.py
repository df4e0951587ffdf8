"""Settings that have to be made before anything else is imported."""

import os

# Ray reads the mode once, when it is imported; clusters of the tests use Ray's token like those of `fusion up`.
os.environ.setdefault("RAY_AUTH_MODE", "token")
