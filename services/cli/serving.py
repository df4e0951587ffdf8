"""`fusion up`, `down`, `status` and `fetch`: services on this machine, and their answers."""

from __future__ import annotations

from typing import Annotated

import typer

from services.cli.options import (
    RecipeArgument,
    SetOption,
    err,
    out,
    print_line,
    print_note,
    read_recipe,
    user_errors,
)
from services.recipes.recipe import RecipeError


def up(
    recipe: RecipeArgument,
    set_: SetOption = None,
    no_sources: Annotated[
        bool, typer.Option("--no-sources", help="Only the fusion service: windows come from the store.")
    ] = False,
) -> None:
    """Start the sources and the fusion service on this machine and leave them running."""
    from services.base.progress_bars import deployment_progress
    from services.commands.prepare import prepare
    from services.deploy.local_ray import enable_ray_authentication
    from services.rpc.auth import read_token

    with user_errors():
        enable_ray_authentication()
        checked, is_open = read_recipe(recipe, set_), read_token() is None
        from services.deploy.up import check_free
        from services.deploy.up import up as start  # imports Ray, which reads its mode then

        check_free(checked)
        recipe_file = prepare(checked, print_note, save=False)
        with deployment_progress(err) as progress:
            only = [checked.service.application] if no_sources else None
            deployment = start(checked, recipe_file, progress, only=only)
        print_line(f"fusion service: {deployment.grpc_address} (application {deployment.application})")
        for section, served in checked.beside.items() if not no_sources else ():
            print_line(f"{section + ':':15} {deployment.grpc_address} (application {served.application})")
        print_line(f"Ray dashboard:  {deployment.dashboard}")
        if is_open:
            print_note("warning: no FUSION_TOKEN is set, and Serve's gRPC port listens on all interfaces")
        print_line(f"recipe:         {deployment.recipe}")


def down(
    name: Annotated[str | None, typer.Argument(help="Name of the recipe; all that run by default.")] = None,
) -> None:
    """End services that `up` started, with all of their processes."""
    from services.deploy.local_ray import deployments

    with user_errors():
        running = [deployment for deployment in deployments() if name in {None, deployment.name}]
        if not running and name is not None:
            raise RecipeError(f"{name}: nothing of this name is up")
        for deployment in running:
            deployment.stop()
            print_line(f"{deployment.name}: down")
        if not running:
            print_line("nothing is up")


def status() -> None:
    """Show health, model and vocabulary of every running service."""
    from services.cli.status import show_status
    from services.deploy.local_ray import deployments

    with user_errors():
        running = deployments()
        if not running:
            print_line("nothing is up; `fusion up RECIPE` starts services")
        healthy = [show_status(deployment, out) for deployment in running]
        if not all(healthy):
            raise typer.Exit(1)


def fetch(
    text: Annotated[str, typer.Option(help="Text to fuse.")],
    address: Annotated[str | None, typer.Option(help="host:port; default what `fusion up` started.")] = None,
    application: Annotated[
        str | None, typer.Option(help="Serve application of the fusion service; default what was started, or fusion.")
    ] = None,
    top: Annotated[int, typer.Option(min=1, max=32, help="Candidates shown per token.")] = 5,
    source: Annotated[list[str] | None, typer.Option(help="Ask only this source; may be repeated.")] = None,
) -> None:
    """Fetch fused distributions over gRPC and print the likeliest tokens."""
    from services.cli.tables import show_fused

    with user_errors():
        if not text:
            raise RecipeError("--text: must not be empty")
        found_address, found_application = _service(address)
        show_fused(text, found_address, application or found_application, top, source or [], out)


def _service(address: str | None) -> tuple[str, str]:
    """Return address and application of the service at `address`, or of the only one that is up."""
    from services.deploy.local_ray import deployments

    if address is not None:
        return address, "fusion"
    running = deployments()
    if len(running) != 1:
        names = ", ".join(deployment.name for deployment in running) or "none"
        raise RecipeError(f"--address: needed unless exactly one recipe is up (up now: {names})")
    return running[0].grpc_address, running[0].application
