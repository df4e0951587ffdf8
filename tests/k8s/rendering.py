"""Recipes for a cluster, and `fusion k8s render` on a copy of the manifests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from typer.testing import CliRunner

from services.cli.app import app

runner = CliRunner()


def recipe_of(num_sources: int, **changes: Any) -> dict[str, Any]:
    sources = [
        {"name": f"model-{n}", "model": f"/data/models/model-{n}", "dtype": "bfloat16", "num_gpus": 1}
        for n in range(num_sources)
    ]
    return {
        "name": "many",
        "corpus": {"files": ["/data/runs/text/*.jsonl"]},
        "sources": sources,
        "target": {"model": "/data/models/target"},
        **changes,
    }


def render(k8s: Path, recipe: dict[str, Any], *options: str) -> Any:
    file = k8s.parent / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe))
    output = k8s / "overlays" / "many"
    return runner.invoke(app, ["k8s", "render", str(file), "--base", str(k8s), "--output", str(output), *options])
