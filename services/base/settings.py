"""Base class of every configuration model: unknown keys refused, values frozen after validation."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, ValidationError

from services.base.credentials import without_credentials

MEMORY_PATTERN = r"^[1-9][0-9]*(Mi|Gi|Ti)$"
"""Pattern of an amount of memory as Kubernetes writes it."""


class Settings(BaseModel):
    """A section of a recipe. Errors name the key and what is allowed; see `explain`."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, populate_by_name=True, protected_namespaces=(), allow_inf_nan=False
    )


def explain(error: ValidationError) -> str:
    """Return one line per mistake: dotted key, problem, and the value that was given."""
    lines = []
    for item in error.errors(include_url=False):
        key = ".".join(str(part) for part in item["loc"]) or "(recipe)"
        message = "unknown key" if item["type"] == "extra_forbidden" else item["msg"].removeprefix("Value error, ")
        given = "" if item["type"] in {"missing", "extra_forbidden"} else f" (given: {item['input']!r:.120})"
        lines.append(without_credentials(f"{key}: {message}{given}"))
    return "\n".join(lines)
