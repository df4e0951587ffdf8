"""Parts of a kustomization: patches, paths into the base, and YAML that people can read."""

from __future__ import annotations

import os
from typing import Any

import yaml

from services.recipes.strict_yaml import StrictDumper

HEADER = "# Made by `fusion k8s render`: change the recipe, or patch it from an overlay of your own.\n"


def replace(path: str, value: Any) -> dict[str, Any]:
    return {"op": "replace", "path": path, "value": value}


def add(path: str, value: Any) -> dict[str, Any]:
    return {"op": "add", "path": path, "value": value}


def patch(kind: str, name: str, operations: list[dict[str, Any]]) -> dict[str, Any]:
    return {"target": {"kind": kind, "name": name}, "patch": to_yaml(operations)}


def rename(kind: str, name: str, new_name: str) -> dict[str, Any]:
    """Return a patch that gives a resource of the base another name."""
    return {
        "target": {"kind": kind, "name": name},
        "patch": to_yaml([replace("/metadata/name", new_name)]),
        "options": {"allowNameChange": True},
    }


def part(base: str, name: str) -> str:
    """Return the path of a folder of the base, which may be a URL with a query at its end."""
    path, mark, query = base.partition("?")
    return f"{path}/{name}{mark}{query}"


def up(base: str, levels: int) -> str:
    """Return the base as seen from a folder `levels` below the overlay's; a URL is the same from everywhere."""
    return base if "://" in base else os.path.normpath("../" * levels + base)


class _Dumper(StrictDumper):
    """Block scalars for text of several lines, so that a Serve config inside a manifest can be read."""


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    style = "|" if "\n" in value else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)


_Dumper.add_representer(str, _text)


def to_yaml(document: Any) -> str:
    text: str = yaml.dump(document, Dumper=_Dumper, sort_keys=False, width=110, allow_unicode=True)
    return text


def dump(document: dict[str, Any]) -> str:
    return HEADER + to_yaml({key: value for key, value in document.items() if value or key == "spec"})
