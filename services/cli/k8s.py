"""`fusion k8s`: the overlay of a recipe, and the commands that the manifests' pods run beside the services."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from services.cli.options import RecipeArgument, SetOption, err, print_line, print_note, read_recipe, user_errors

_RECALL_SECONDS = 3600
"""The longest time that the preparing of a corpus waits for the recall service."""

app = typer.Typer(help="Kubernetes manifests, and what their pods run.", no_args_is_help=True)


@app.command()
def render(
    recipe: RecipeArgument,
    set_: SetOption = None,
    output: Annotated[Path | None, typer.Option(help="Folder of the overlay; default k8s/overlays/NAME.")] = None,
    base: Annotated[str, typer.Option(help="The repository's k8s folder, or a URL that kustomize reads.")] = "k8s",
    run_name: Annotated[str, typer.Option(help="Folder of the training run below the recipe's.")] = "fused",
    gpus_per_node: Annotated[int, typer.Option(min=1, help="GPUs of a node: larger replicas take several pods.")] = 8,
    gpu_resource: Annotated[str, typer.Option(help="Name of the GPUs' resource.")] = "nvidia.com/gpu",
    queue: Annotated[str | None, typer.Option(help="Kueue queue that admits the training job.")] = None,
    check: Annotated[bool, typer.Option(help="Write nothing; end with 1 when the files are not current.")] = False,
) -> None:
    """Write the kustomize overlay of a recipe: sources, fusion service and training job."""
    from services.deploy.k8s.overlay import differences, overlay_files, write_overlay
    from services.deploy.k8s.pods import GpuNodes

    with user_errors():
        checked = read_recipe(recipe, set_)
        folder = output or Path("k8s/overlays") / checked.name
        if "://" not in base:
            if not (Path(base) / "base" / "kustomization.yaml").is_file():
                raise ValueError(
                    f"--base: there is no {base}/base/kustomization.yaml; give the repository's k8s folder"
                )
            base = os.path.relpath(base, folder)
        nodes = GpuNodes(per_node=gpus_per_node, resource=gpu_resource)
        files = overlay_files(checked, base=base, run_name=run_name, nodes=nodes, queue=queue)
        if not check:
            write_overlay(files, folder)
            print_line(f"{folder}: {len(files)} files; kubectl apply -k {folder}")
            return
        found = differences(files, folder)
    for line in found:
        print_note(line)
    if found:
        raise typer.Exit(1)
    print_line(f"{folder}: current")


@app.command()
def prepare(recipe: RecipeArgument, set_: SetOption = None) -> None:
    """Fetch the models, cut the corpus into windows and make the target's folder, as the preparing job does."""
    from services.base.progress_bars import model_progress
    from services.commands.prepare import prepare as make
    from services.deploy.k8s.wait import wait_for
    from services.models.fetch import fetch
    from services.recipes.resolve import models_to_fetch

    with user_errors():
        checked = read_recipe(recipe, set_)
        for name in models_to_fetch(checked):
            with model_progress(err, name) as progress:
                fetch(name, progress)
        if checked.corpus.recall is not None and checked.recall is not None and checked.recall.address is not None:
            # Its judge is fetched here, so it comes up behind this job.
            wait_for([], [checked.recall.address], timeout_seconds=_RECALL_SECONDS, print_line=print_note)
        print_line(str(make(checked, print_note)))


@app.command()
def wait(
    path: Annotated[list[Path] | None, typer.Option(help="A file that has to be there; may be repeated.")] = None,
    health: Annotated[list[str] | None, typer.Option(help="host:port that has to answer SERVING.")] = None,
    timeout_seconds: Annotated[float, typer.Option(min=0, help="How long to wait.")] = 3600,
) -> None:
    """Wait for files and services, as init containers do."""
    from services.deploy.k8s.wait import wait_for

    with user_errors():
        if not path and not health:
            raise ValueError("--path or --health: nothing to wait for")
        wait_for(path or [], health or [], timeout_seconds=timeout_seconds, print_line=print_note)
