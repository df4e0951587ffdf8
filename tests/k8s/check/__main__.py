"""`make k8s-check`: what can be known about the manifests without a cluster. Exit code 1 when a check fails."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from tests.k8s.check.manifests import Document, MissingToolError, overlay
from tests.k8s.check.run import PARTS, RECIPES, problems, stale_files


def main(
    schemas: Annotated[str | None, typer.Option(help="Folder of KubeRay's CRD schemas.")] = None,
) -> None:
    if schemas:
        os.environ["KUBERAY_SCHEMAS"] = schemas
    failed = False
    try:
        for name in PARTS:
            documents: list[Document] = overlay(name)
            found = list(problems(documents, PARTS[name]))
            if name in RECIPES:
                found += stale_files(name)
            failed = failed or bool(found)
            print(f"{name}: {len(documents)} documents, {len(found)} problems")
            for problem in found:
                print(f"  {problem}")
    except MissingToolError as error:
        print(f"not checked: {error}", file=sys.stderr)
        raise typer.Exit(1) from error
    raise typer.Exit(int(failed))


if __name__ == "__main__":
    typer.run(main)
