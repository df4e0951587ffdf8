"""Base class of every configuration model: unknown keys refused, values frozen after validation."""

from __future__ import annotations

import re
from collections.abc import Mapping

from pydantic import BaseModel, ConfigDict, ValidationError

from services.base.credentials import without_credentials

MEMORY_PATTERN = r"^[1-9][0-9]*(Mi|Gi|Ti)$"
"""Pattern of an amount of memory as Kubernetes writes it."""


class Settings(BaseModel):
    """A section of a recipe. Errors name the key and what is allowed; see `explain`."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, populate_by_name=True, protected_namespaces=(), allow_inf_nan=False
    )


_MESSAGES = {
    "extra_forbidden": "unknown key",
    "model_type": "must be a section of keys and values",
    "dict_type": "must be a section of keys and values",
}
"""Messages by pydantic's type of a mistake; its own stand for the others."""
_KEY = re.compile(r"[a-z]\w*(\.\w+|\[\d+\])*: ")
"""Pattern of the key that a section's own message begins with, as seen from the section."""


def explain(error: ValidationError) -> str:
    """Return one line per mistake: dotted key, problem, and the value that was given where it is not a section."""
    lines, items = [], error.errors(include_url=False)
    wrong = [item["loc"] for item in items]
    for item in items:
        loc = item["loc"]
        if item["type"] == "too_short" and any(other[: len(loc)] == loc != other for other in wrong):
            continue  # the wrong entries were not counted
        message = _MESSAGES.get(item["type"], item["msg"].removeprefix("Value error, "))
        separator = "." if item["type"] == "value_error" and _KEY.match(message) else ": "
        key = ".".join(str(part) for part in loc)
        shown = not (item["type"] in {"missing", "extra_forbidden"} or isinstance(item["input"], Mapping))
        given = f" (given: {item['input']!r:.120})" if shown else ""
        lines.append(without_credentials(f"{key}{separator if key else ''}{message}{given}"))
    return "\n".join(lines)
