"""`fusion headroom`: whether fusing can help, before anything is trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from services.cli.options import RecipeArgument, SetOption, err, out, print_line, read_recipe, user_errors


def headroom(
    recipe: RecipeArgument,
    set_: SetOption = None,
    split: Annotated[str, typer.Option(help="Split of the recipe's corpus.")] = "held_out",
    windows: Annotated[int, typer.Option(min=1, help="Most windows to look at, spread evenly over the split.")] = 256,
    json_: Annotated[Path | None, typer.Option("--json", help="Write all figures to this file too.")] = None,
) -> None:
    """Tell before training whether fusing can help: each source, their best mixture, the fused rows, by domain."""
    from services.deploy.local_ray import enable_ray_authentication

    with user_errors():
        enable_ray_authentication()
        from services.base.atomic import write_whole
        from services.base.progress_bars import window_progress
        from services.cli.analysis.tables import show_headroom
        from services.commands.analysis.headroom import headroom as measure

        checked = read_recipe(recipe, set_)
        with window_progress(err) as progress:
            found = measure(checked, split, windows, progress)
        if json_ is not None:
            write_whole(json_, json.dumps(found, indent=2) + "\n")
        show_headroom(found, out)
        print_line(found["verdict"]["sentence"])
