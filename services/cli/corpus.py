"""`fusion corpus`: files cleaned for a corpus."""

from __future__ import annotations

from typing import Annotated

import typer

from services.base.credentials import without_credentials
from services.base.files import join_location
from services.cli.options import RecipeArgument, SetOption, err, out, print_line, read_recipe, user_errors


def corpus(
    recipe: RecipeArgument,
    set_: SetOption = None,
    ray_address: Annotated[
        str | None,
        typer.Option(
            help="Run as a job on this Ray cluster (dashboard, http://host:8265), whose nodes share the run's folder."
        ),
    ] = None,
) -> None:
    """Clean the files of section `curate`. Running it again goes on where it ended, and redoes what has changed."""
    from services.commands.clean import clean_here, lines_of, submit_cleaning

    with user_errors():
        checked = read_recipe(recipe, set_)
        if ray_address is not None:
            from services.deploy.local_ray import enable_ray_authentication

            enable_ray_authentication()
            raise typer.Exit(submit_cleaning(checked, ray_address, out))
        ledger = clean_here(checked, err)
        for line in lines_of(ledger):
            print_line(line)
        print_line(without_credentials(join_location(checked.curated_location, "corpus.html")))
