"""Manifests against schemas: built-in kinds against Kubernetes' own, Ray's kinds against the CRDs of KubeRay."""

from __future__ import annotations

import copy
import functools
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import kubernetes_validate
from jsonschema import Draft202012Validator

from tests.k8s.check.manifests import REPOSITORY, Document, MissingToolError, title

KUBERNETES_VERSION = "1.33"
_RAY_KINDS = {"RayService": "rayservice-v1.json", "RayJob": "rayjob-v1.json", "RayCluster": "raycluster-v1.json"}
_WITHOUT_SCHEMA = {("monitoring.coreos.com/v1", "PodMonitor"), ("monitoring.coreos.com/v1", "PrometheusRule")}
"""Kinds of the Prometheus operator: tests/k8s/check/monitoring.py looks into them instead."""


def schema_folder() -> Path:
    """Where the CRDs' schemas lie: KUBERAY_SCHEMAS, or shared/schemas beside the repository."""
    if given := os.environ.get("KUBERAY_SCHEMAS"):
        return Path(given)
    beside = [parent / "shared" / "schemas" for parent in list(REPOSITORY.parents)[:2]]
    return next((folder for folder in beside if folder.is_dir()), beside[0])


def problems(documents: Sequence[Document]) -> Iterator[str]:
    for document in documents:
        kind = document["kind"]
        if document["apiVersion"] == "ray.io/v1" and kind in _RAY_KINDS:
            yield from _ray_problems(json.dumps(document))
        elif (document["apiVersion"], kind) not in _WITHOUT_SCHEMA:
            yield from _builtin_problems(json.dumps(document))


@functools.cache  # overlays share most of their documents, and reading Kubernetes' definitions takes its time
def _builtin_problems(text: str) -> tuple[str, ...]:
    document = json.loads(text)
    try:
        kubernetes_validate.validate(document, KUBERNETES_VERSION, strict=True)
    except kubernetes_validate.ValidationError as error:
        return (f"{title(document)}: {'.'.join(map(str, error.path))}: {error.message:.300}",)
    except kubernetes_validate.SchemaNotFoundError as error:
        return (f"{title(document)}: {error.message}",)
    return ()


@functools.cache
def _ray_problems(text: str) -> tuple[str, ...]:
    """Defaults are applied first, as the API server does; fields that the CRD does not know are refused."""
    document = json.loads(text)
    schema = _ray_schema(document["kind"])
    apply_defaults(schema, document)
    return tuple(
        f"{title(document)}: {'.'.join(map(str, error.absolute_path))}: {error.message:.300}"
        for error in Draft202012Validator(schema).iter_errors(document)
    )


def _ray_schema(kind: str) -> dict[str, Any]:
    file = schema_folder() / _RAY_KINDS[kind]
    if not file.is_file():
        raise MissingToolError(f"{file} is not there: give the folder of KubeRay's CRD schemas with --schemas")
    schema: dict[str, Any] = json.loads(file.read_text())
    return schema


def apply_defaults(schema: dict[str, Any], value: Any) -> None:
    """Fills what is missing with the schema's defaults, in place."""
    if isinstance(value, dict):
        for key, part in schema.get("properties", {}).items():
            if key not in value and "default" in part:
                value[key] = copy.deepcopy(part["default"])
            if key in value:
                apply_defaults(part, value[key])
    elif isinstance(value, list):
        for item in value:
            apply_defaults(schema.get("items", {}), item)
